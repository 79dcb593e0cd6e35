"""Programs: what trains an objective of any kind, and arrays that an update deletes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.models import lora as adapters
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import sharding
from dpo_jax.training import loop, metrics, objectives
from dpo_jax.training.data_feed import DataFeed
from dpo_jax.training.ppo import RolloutFeed
from dpo_jax.training.step import Frozen, copy_params, make_programs
from tests.helpers.tiny import tiny_config

MESH = sharding.make_mesh(devices=jax.devices()[:1])
HYPER = dict(lr=0.5, warmup_steps=0.0, steps=10.0, max_grad_norm=0.0, pull=2.0, lora_scale=1.0)
BATCH = dict(goal=np.array([[1.0, 3.0]], np.float32))  # one microbatch


def squared_distance(params, reference, hyper, microbatch):
    """An objective of one's own: pull one weight to goals, and away from the reference's."""
    weight = params["norm_final"]["scale"][0]
    loss = hyper["pull"] * (weight - microbatch["goal"]) ** 2
    if reference is not None:
        loss += reference["norm_final"]["scale"][0]
    total, count = loss.sum(), jnp.float32(len(microbatch["goal"]))
    return (total, count), {"loss": (total, count)}


@pytest.fixture
def programs():
    return make_programs(squared_distance, tiny_config(), MESH, optimizer="sgd")


@pytest.fixture
def params(tiny):
    _, params = tiny
    return copy_params(params)


def test_custom_objective_is_trained(programs, params):
    start = float(params["norm_final"]["scale"][0])
    frozen = Frozen(HYPER)
    before = metrics.named(programs.measure(params, frozen, BATCH), "eval")["loss/eval"]
    assert before == pytest.approx(np.mean(2 * (start - np.array([1, 3])) ** 2), rel=1e-6)
    state, measured = programs.update(programs.init_state(params), frozen, BATCH)
    assert metrics.named(measured, "train")["loss/train"] == pytest.approx(before)
    gradient = 2 * 2 * (start - 2)
    after = float(state.params["norm_final"]["scale"][0])
    assert after == pytest.approx(start - 0.5 * gradient, rel=1e-5) and int(state.step) == 1


def test_mixtures_of_the_same_losses_share_programs():
    """Their weights are traced, in the order of the names."""

    def programs_of(loss):
        block = configs.default(("dpo",)).dpo
        block.loss = loss
        return loop.stage_programs("dpo", block, tiny_config(), MESH), block

    found, block = programs_of("sigmoid=1,nll=0.2")
    same, _ = programs_of("sigmoid,nll=0")
    assert same is found
    for other in ("nll=0.2,sigmoid=1", "sigmoid=1", "sigmoid"):
        assert programs_of(other)[0] is not found
    np.testing.assert_array_equal(
        objectives.numbers(block, steps=1)["loss_weights"], np.float32([1, 0.2])
    )
    assert "loss_weights" not in objectives.numbers(programs_of("sigmoid")[1], steps=1)


def test_update_refuses_donated_state(programs, params):
    state = programs.init_state(params)
    kept = copy_params(params)
    programs.update(state, Frozen(HYPER), BATCH)
    with pytest.raises(RuntimeError, match="the state went into an update.*copy_params"):
        programs.update(state, Frozen(HYPER), BATCH)
    with pytest.raises(RuntimeError, match="what is measured went into an update"):
        programs.measure(params, Frozen(HYPER), BATCH)
    programs.measure(kept, Frozen(HYPER), BATCH)


def test_update_refuses_shared_reference(programs, params):
    state = programs.init_state(params)
    with pytest.raises(ValueError, match="the reference shares arrays with the policy"):
        programs.update(state, Frozen(HYPER, reference=params), BATCH)
    reference = copy_params(params)
    state, _ = programs.update(state, Frozen(HYPER, reference), BATCH)
    programs.update(state, Frozen(HYPER, reference), BATCH)


def test_update_of_adapters_leaves_base(params):
    config = tiny_config()
    lora = Lora(2, targets=())
    programs = make_programs(squared_distance, config, MESH, optimizer="sgd", lora=lora)
    trained = jax.device_put(adapters.init(config, lora, 0))
    frozen = Frozen(HYPER, reference=None, base=params)
    whole = float(np.mean(2 * (float(params["norm_final"]["scale"][0]) - np.array([1, 3])) ** 2))
    measured = programs.measure(trained, frozen, BATCH)
    assert metrics.named(measured, "eval")["loss/eval"] == pytest.approx(whole)
    state, _ = programs.update(programs.init_state(trained), frozen, BATCH)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)


@pytest.mark.parametrize("feed", [DataFeed, RolloutFeed])
def test_feeds_follow_protocol(feed):
    methods = [name for name, member in vars(loop.Feed).items() if inspect.isfunction(member)]
    methods = [name for name in methods if not name.startswith("_")]
    assert {"start", "check", "run", "evaluate", "close"} <= set(methods)
    for name in methods:
        wanted = inspect.signature(getattr(loop.Feed, name)).parameters
        assert list(inspect.signature(getattr(feed, name)).parameters) == list(wanted), name

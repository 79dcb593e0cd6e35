"""The load-balancing loss of experts is of the whole batch, however it is laid out."""

import dataclasses

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Example
from dpo_jax.models import transformer
from dpo_jax.parallel import sharding
from dpo_jax.training import objectives
from dpo_jax.training.loop import stage_programs
from dpo_jax.training.losses import PLAIN
from dpo_jax.training.step import Frozen, copy_params, make_programs
from tests.helpers.tiny import HYPER, random_pairs, tiny_config

CONFIG = tiny_config(experts=4, experts_per_token=2, mlp_width=8, unroll=1)
LR = 0.1


def examples(name) -> list[Example]:
    """Sixteen examples of eight prompts, which share responses too."""
    first, second = random_pairs(8, seed=0), random_pairs(8, seed=1)
    found = list(first)
    for pair, other in zip(first, second, strict=True):
        found.append(Example(pair.prompt, (pair.responses[0], other.responses[1])))
    if name == "sft":
        return [Example(example.prompt, example.responses[:1]) for example in found]
    return found


def updated(name, loss, *, mesh=None, **layout):
    """Return the change of the weights by a step of plain SGD, over its rate, and the metrics."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    programs = make_programs(
        objectives.make(name, CONFIG, loss, PLAIN),
        CONFIG,
        mesh,
        routing_pass=objectives.make_routing_pass(name, CONFIG, loss),
        optimizer="sgd",
    )
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(0, 0.3, leaf.shape).astype(np.float32),
        transformer.abstract(CONFIG),
    )
    # Matched pairs are together in a prompt's cell.
    order = np.arange(16).reshape(2, 8).T.reshape(1, 16)
    batches = Batches(examples(name), order, shards=sharding.batch_shards(mesh), **layout)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    reference = copy_params(placed)
    hyper = HYPER | dict(lr=np.float32(LR), max_grad_norm=np.float32(0))
    hyper["router_aux_loss_coef"] = np.float32(0.5)
    with jax.set_mesh(mesh):
        batch = sharding.shard_batch(mesh, batches[0], axis=1)
        frozen = Frozen(hyper, reference if name == "dpo" else None)
        state, metrics = programs.update(programs.init_state(placed), frozen, batch)
    return jax.tree.map(lambda old, new: (old - new) / LR, params, jax.device_get(state.params)), {
        key: float(total / count) for key, (total, count) in metrics.items()
    }


@pytest.mark.parametrize(
    "name, loss, axes",
    [
        ("dpo", "sigmoid", dict(expert=2, fsdp=2, tensor=2)),
        pytest.param("sft", "token_mean", dict(expert=4, fsdp=2), marks=pytest.mark.slow),
    ],
    ids=["dpo", "sft"],
)
def test_update_with_the_router_loss_is_equal_in_every_layout(name, loss, axes):
    """Separate rows on one device, all at once; shared prompts on a mesh, in microbatches."""
    expected, metrics = updated(name, loss, share=False)
    mesh = sharding.make_mesh(data=1, **axes)
    found, found_metrics = updated(name, loss, microbatches=2, mesh=mesh)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest)
    for key in ("loss", "router/imbalance"):
        np.testing.assert_allclose(found_metrics[key], metrics[key], rtol=2e-5, err_msg=key)


def test_no_routing_is_measured_without_experts_or_of_other_stages():
    dense = dataclasses.replace(CONFIG, experts=0)
    assert objectives.make_routing_pass("dpo", dense) is None
    assert objectives.make_routing_pass("rm", CONFIG) is None


def test_router_loss_is_refused_without_experts():
    dense = dataclasses.replace(CONFIG, experts=0)
    block = configs.default(("kto",)).kto
    objectives.check_balance("kto", block, dense)
    block.router_aux_loss_coef = 0.1
    objectives.check_balance("kto", block, CONFIG)
    with pytest.raises(
        ValueError, match=r"kto\.router_aux_loss_coef = 0\.1: this model has no exp"
    ):
        stage_programs("kto", block, dense, sharding.make_mesh())

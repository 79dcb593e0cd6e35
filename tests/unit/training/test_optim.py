"""Optimisers and schedules against their formulas, and where moments live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config import OPTIMIZERS, SCHEDULES
from dpo_jax.models import transformer
from dpo_jax.parallel import sharding
from dpo_jax.training import optim
from tests.helpers.tiny import tiny_config


def test_lion_moves_by_sign():
    lion = optim.make("lion", 0.0)
    params = {"w": jnp.array([1.0, 1.0])}
    state = lion.init(params)
    first, state = lion.update({"w": jnp.array([2.0, -3.0])}, state, params)
    np.testing.assert_array_equal(first["w"], [1, -1])
    # 0.9 x 0.01 x old still outweighs it.
    second, _ = lion.update({"w": jnp.array([-0.01, 0.01])}, state, params)
    np.testing.assert_array_equal(second["w"], [1, -1])


def factored_update(grads):
    """Return Adafactor's update after these gradients, as Shazeer and Stern (2018) write it."""
    rows, columns = 0.0, 0.0
    for step, grad in enumerate(grads, 1):
        decay = 1 - step**-0.8
        rows = decay * rows + (1 - decay) * (grad**2).mean(1, keepdims=True)
        columns = decay * columns + (1 - decay) * (grad**2).mean(0, keepdims=True)
        update = grad / np.sqrt(rows * columns / rows.mean())
    return update / max(1.0, np.sqrt((update**2).mean()))


def test_adafactor_equals_its_formula():
    adafactor = optim.make("adafactor", 0.0)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(3, 256, 130)) * np.array([1.0, 0.1, 100.0])[:, None, None]
    params = {"w": jnp.zeros((256, 130))}
    state = adafactor.init(params)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 256, "a row and a column are kept"
    for grad in grads:
        update, state = adafactor.update({"w": jnp.asarray(grad, jnp.float32)}, state, params)
    np.testing.assert_allclose(update["w"], factored_update(grads), rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules(schedule):
    def rate(step):
        return float(
            optim.learning_rate(schedule, jnp.int32(step), lr=2.0, warmup_steps=10.0, steps=110.0)
        )

    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [2 / 11, 10 / 11, 20 / 11], rtol=1e-6)
    halfway = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    np.testing.assert_allclose([rate(10), rate(60)], [2.0, halfway], rtol=1e-6)
    assert rate(109) > 0
    np.testing.assert_allclose(rate(110), 2.0 if schedule == "constant" else 0.0, atol=1e-6)


MOMENTS = dict(rmsprop=1, adamw=2, adafactor=1, lion=1, sgd=0)  # of the shape of a weight


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings_follow_weights(name):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = transformer.abstract(tiny_config())
    weights = flatten(params)
    weight_shardings = flatten(sharding.param_shardings(mesh, params))
    optimizer = optim.make(name, 0.0)
    state = flatten(jax.eval_shape(optimizer.init, params))
    found = flatten(
        optim.state_shardings(mesh, optimizer, params, sharding.param_shardings(mesh, params))
    )
    assert found.keys() == state.keys()
    moments = 0
    for path, placed in found.items():
        weight = next((name for name in weights if path.endswith(name)), None)
        if weight and state[path].shape == weights[weight].shape:
            assert placed == weight_shardings[weight], path
            moments += 1
        else:
            assert placed == sharding.replicated(mesh), path
    assert moments == MOMENTS[name] * len(weights)


def flatten(tree) -> dict:
    """Return the leaves of a tree by the names of their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}

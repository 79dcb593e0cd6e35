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


def test_lion_moves_by_the_sign_of_the_blended_gradient():
    lion = optim.make("lion", 0.0)
    params = {"w": jnp.array([1.0, 1.0])}
    state = lion.init(params)
    first, state = lion.update({"w": jnp.array([2.0, -3.0])}, state, params)
    np.testing.assert_array_equal(first["w"], [1, -1])
    second, _ = lion.update(
        {"w": jnp.array([-0.01, 0.01])}, state, params
    )  # 0.9 x 0.01 x old still outweighs it
    np.testing.assert_array_equal(second["w"], [1, -1])


def test_adafactor_keeps_a_row_and_a_column_and_bounds_the_update():
    adafactor = optim.make("adafactor", 0.0)
    params = {"w": jnp.zeros((256, 130))}
    state = adafactor.init(params)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 256
    direction, _ = adafactor.update(
        {"w": jax.random.normal(jax.random.key(0), (256, 130)) * 100}, state, params
    )
    assert float(jnp.sqrt(jnp.mean(direction["w"] ** 2))) <= 1.0 + 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    def rate(step):
        return float(
            optim.learning_rate(schedule, jnp.int32(step), lr=2.0, warmup_steps=10.0, steps=110.0)
        )

    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [2 / 11, 10 / 11, 20 / 11], rtol=1e-6)
    halfway = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    np.testing.assert_allclose([rate(10), rate(60)], [2.0, halfway], rtol=1e-6)
    assert rate(109) > 0
    np.testing.assert_allclose(rate(110), 2.0 if schedule == "constant" else 0.0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_live_where_their_weights_do(name):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = transformer.abstract(tiny_config())
    placed = sharding.param_shardings(mesh, params)
    optimizer = optim.make(name, 0.0)
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = optim.state_shardings(mesh, optimizer, params, placed)
    by_path = {
        sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    }
    moments = 0
    placements = jax.tree_util.tree_leaves_with_path(shardings)
    for (path, leaf), shape in zip(placements, jax.tree.leaves(shapes), strict=True):
        name_in_params = next((n for n in by_path if sharding.path_name(path).endswith(n)), None)
        if name_in_params and shape.shape == params_shape(params, name_in_params):
            assert leaf == by_path[name_in_params], path
            moments += 1
    assert moments == {"rmsprop": 1, "adamw": 2, "lion": 1, "sgd": 0}.get(
        name, moments / len(by_path)
    ) * len(by_path)


def params_shape(params, name):
    for key in name.split("/"):
        params = params[key]
    return params.shape

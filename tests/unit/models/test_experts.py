"""Layers of experts against a plain sum over all of them, and on meshes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.models import experts, transformer
from dpo_jax.parallel import sharding
from tests.helpers.tiny import tiny_config

CONFIG = tiny_config(experts=8, experts_per_token=3, mlp_width=24)
LAYER = experts.Experts(CONFIG, nn.silu, 1.0)
RNG = np.random.default_rng(0)
SHARDS, TOKENS = 8, 20
X_SND = RNG.normal(0, 1, (SHARDS, TOKENS, CONFIG.width)).astype(np.float32)
COUNTS_SN = RNG.integers(0, 3, (SHARDS, TOKENS)).astype(np.float32)
WANTED_SND = RNG.normal(0, 1, X_SND.shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(LAYER.init, jax.random.key(0), X_SND)["params"]
    return jax.tree.map(lambda leaf: RNG.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)


def plain(params, x_SND):
    """Every expert on every token, and the weights that it would have; 0 if it was not chosen."""
    probs_SNE = jax.nn.softmax(x_SND @ params["router"]["kernel"])
    least_SN1 = jnp.sort(probs_SNE)[..., -CONFIG.experts_per_token, None]
    weights_SNE = jnp.where(probs_SNE >= least_SN1, probs_SNE, 0)
    weights_SNE /= weights_SNE.sum(-1, keepdims=True)
    gate, up, down = [params["experts"][name]["kernel"] for name in ("gate", "up", "down")]
    inner_SNEF = nn.silu(jnp.einsum("SND,EDF->SNEF", x_SND, gate))
    inner_SNEF *= jnp.einsum("SND,EDF->SNEF", x_SND, up)
    return jnp.einsum("SNEF,EFD,SNE->SND", inner_SNEF, down, weights_SNE)


def ours(params, x_SND):
    return LAYER.apply({"params": params}, x_SND)[0]


def gradients(layer, params, x_SND):
    def total(params, x_SND):
        y_SND = layer(params, x_SND)
        return (y_SND * WANTED_SND).sum(), y_SND

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x_SND)


def assert_close(found, expected, rtol=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def test_experts_equal_a_sum_over_all(params):
    assert_close(gradients(ours, params, X_SND), gradients(plain, params, X_SND))


def test_all_tokens_may_choose_the_same_experts(params):
    """Groups of all tokens beside empty ones: nothing is dropped."""
    kernel_DE = np.zeros((CONFIG.width, CONFIG.experts), np.float32)
    kernel_DE[0] = np.arange(CONFIG.experts)
    params = params | {"router": {"kernel": kernel_DE}}
    x_SND = X_SND.copy()
    x_SND[..., 0] = 5
    assert_close(gradients(ours, params, x_SND), gradients(plain, params, x_SND))


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(dict(expert=2, data=4), marks=pytest.mark.slow),
        dict(expert=4, fsdp=2, data=1),
        dict(expert=2, fsdp=2, tensor=2, data=1),
        dict(expert=2, context=2, tensor=2, data=1),
    ],
    ids=str,
)
def test_experts_are_equal_on_meshes(params, axes):
    """Also where the batch's axes do not divide its shards, and each device has all of them."""
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))

    def loss(params, x_SND):
        y_SND, routing = LAYER.apply({"params": params}, x_SND, COUNTS_SN[: len(x_SND)])
        weighted = (y_SND * WANTED_SND[: len(x_SND)]).sum()
        return weighted + routing.imbalance(routing.shares_E), (y_SND, routing)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    for x_SND in (X_SND, X_SND[:1]):
        expected = gradient(params, x_SND)
        with jax.set_mesh(mesh):
            assert_close(gradient(placed, x_SND), expected)


def test_nothing_comes_from_copies_of_other_devices(params, monkeypatch):
    """A product may leave anything, such as NaN, in rows past its last group."""
    rows_by_kernels = experts._rows_by_kernels

    def with_tail(x_AD, kernel_EDF, sizes_E, *, contracted):
        y_AF = rows_by_kernels(x_AD, kernel_EDF, sizes_E, contracted=contracted)
        is_of_group_A1 = (jnp.arange(len(y_AF)) < sizes_E.sum())[:, None]
        return jnp.where(is_of_group_A1, y_AF, jnp.nan)

    kernels = {
        name: jnp.asarray(params["experts"][name]["kernel"][2:5]) for name in ("gate", "up", "down")
    }
    chosen_SNk = RNG.integers(-2, 6, (SHARDS, TOKENS, 3))
    weights_SNk = RNG.uniform(0, 1, chosen_SNk.shape).astype(np.float32)

    def total(x_SND, weights_SNk, kernels):
        y_SND = experts.mlps_of_tokens(
            nn.silu, x_SND, chosen_SNk, weights_SNk, kernels, are_some=True
        )
        return (y_SND * WANTED_SND).sum()

    gradient = jax.value_and_grad(total, (0, 1, 2))
    expected = gradient(X_SND, weights_SNk, kernels)
    monkeypatch.setattr(experts, "_rows_by_kernels", with_tail)
    found = gradient(X_SND, weights_SNk, kernels)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_close(found, expected)


def test_gathered_kernels_are_not_kept():
    """Without remat too, the backward pass gathers each layer's experts again."""
    layers = 8
    mesh = sharding.make_mesh(data=1, fsdp=8)
    tokens_SN = jax.ShapeDtypeStruct(
        (8, 16), jnp.int32, sharding=NamedSharding(mesh, P(sharding.BATCH))
    )

    def temporaries(remat):
        config = tiny_config(
            layers=layers, width=64, mlp_width=128, experts=8, experts_per_token=2, unroll=1
        )
        config = dataclasses.replace(config, remat=remat)
        shapes = transformer.abstract(config)
        placed = sharding.param_shardings(mesh, shapes)
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            placed,
        )

        def loss(params, tokens_SN):
            positions_SN = jnp.broadcast_to(jnp.arange(16), (8, 16))
            return (transformer.hidden(config, params, tokens_SN, positions_SN) ** 2).sum()

        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss), out_shardings=placed)
            return step.lower(params, tokens_SN).compile().memory_analysis().temp_size_in_bytes

    of_a_layer = 3 * 8 * 64 * 128 * 4
    assert temporaries("none") - temporaries("full") < (layers / 4) * of_a_layer


def test_routing_counts_tokens(params):
    _, routing = jax.jit(LAYER.apply)({"params": params}, X_SND, COUNTS_SN)
    logits_SNE = X_SND.astype(np.float64) @ params["router"]["kernel"]
    probs_SNE = np.exp(logits_SNE) / np.exp(logits_SNE).sum(-1, keepdims=True)
    chosen_E, probs_E = np.zeros((2, CONFIG.experts))
    for count, probs in zip(COUNTS_SN.ravel(), probs_SNE.reshape(-1, CONFIG.experts), strict=True):
        chosen_E[np.argsort(probs)[-CONFIG.experts_per_token :]] += count
        probs_E += count * probs
    np.testing.assert_array_equal(routing.chosen_E, chosen_E)
    np.testing.assert_allclose(routing.probs_E, probs_E, rtol=1e-5)
    assert routing.tokens == COUNTS_SN.sum()
    # An even spread has the least loss, k, as its shares are k / E and its probabilities 1 / E.
    even_E = np.full(CONFIG.experts, 1 / CONFIG.experts, np.float32)
    even = experts.Routing(3 * even_E, even_E, np.float32(1))
    np.testing.assert_allclose(even.imbalance(even.shares_E), CONFIG.experts_per_token, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(100, 0, 150, 20), (0, 0, 0, 300), (1, 298, 1, 0)], ids=str)
def test_gradient_of_kernels_on_a_tpu_equals_that_by_blocks(sizes):
    """The Pallas kernel, interpreted; 300 rows are no multiple of its tiles."""
    x_AD, grad_AF = [RNG.normal(0, 1, (300, width)).astype(np.float32) for width in (16, 24)]
    sizes_E = jnp.array(sizes)
    by_blocks = experts._rows_by_rows(x_AD, grad_AF, sizes_E)
    by_kernel = experts._rows_by_rows_on_tpu(x_AD, grad_AF, sizes_E, interpret=True)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        expected = x_AD[rows].astype(np.float64).T @ grad_AF[rows]
        np.testing.assert_allclose(by_blocks[group], expected, atol=1e-4)
        np.testing.assert_allclose(by_kernel[group], expected, atol=1e-4)
        start += size


def test_check_mesh_refuses_experts_that_are_not_split():
    mesh = sharding.make_mesh(expert=8)
    experts.check_mesh(CONFIG, mesh)
    with pytest.raises(ValueError, match="mesh.expert = 8: this model has 12 experts a layer; "):
        experts.check_mesh(tiny_config(experts=12), mesh)
    with pytest.raises(ValueError, match="this model has no experts; expected 1"):
        experts.check_mesh(tiny_config(), mesh)

"""Linear layers: gradients in the CPU's order and in the plain one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import linear

EQUATIONS = ["SND,DHC->SNHC", "SNHC,HCD->SND", "SND,DF->SNF", "SNF,FD->SND"]


@pytest.fixture
def on_gpu(monkeypatch):
    """Trace as for a GPU; what is traced still runs here."""
    monkeypatch.setattr(linear, "device", lambda: types.SimpleNamespace(platform="gpu"))


def operands(equation):
    rng, sizes = np.random.default_rng(0), dict(S=2, N=7, D=8, H=2, C=3, F=16)
    for term in equation.split("->")[0].split(","):
        yield jnp.asarray(rng.normal(size=[sizes[axis] for axis in term]), jnp.float32)


def gradients(multiply, x, kernel):
    return jax.grad(lambda x, kernel: jnp.sin(multiply(x, kernel)).sum(), (0, 1))(x, kernel)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_product_gradients_equal_einsum(equation):
    """Whichever operand of the kernel's gradient is narrower."""
    x, kernel = operands(equation)
    found = gradients(lambda x, kernel: linear.product(equation, x, kernel), x, kernel)
    expected = gradients(lambda x, kernel: jnp.einsum(equation, x, kernel), x, kernel)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_product_keeps_a_narrow_kernel_as_it_is(platform, monkeypatch):
    """A frozen kernel of 16 bits is widened in both passes, and no wide copy is kept between."""
    monkeypatch.setattr(linear, "device", lambda: types.SimpleNamespace(platform=platform))
    x, kernel = operands("SND,DF->SNF")
    narrow = kernel.astype(jnp.bfloat16)
    y, backward = jax.vjp(lambda x: linear.product("SND,DF->SNF", x, narrow), x)
    wide = jnp.einsum("SND,DF->SNF", x, narrow.astype(jnp.float32))
    np.testing.assert_array_equal(y, wide)
    expected = jnp.einsum("SNF,DF->SND", jnp.ones_like(y), narrow.astype(jnp.float32))
    np.testing.assert_allclose(backward(jnp.ones_like(y))[0], expected, rtol=1e-6)
    kept = [leaf.dtype for leaf in jax.tree.leaves(backward) if leaf.shape == kernel.shape]
    assert kept == [jnp.bfloat16]


def traced():
    """Forward and backward pass of a product and a bias, as text."""

    def loss(x, kernel, bias):
        y = linear.product("SND,DF->SNF", x, kernel)
        return (y + linear.over_tokens(bias, y.shape, y.dtype)).sum()

    x, kernel = operands("SND,DF->SNF")
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, kernel, jnp.zeros(16)))


def test_product_cpu_order_on_cpus():
    found = traced()
    # One sum is the loss's own.
    assert "optimization_barrier" in found and found.count("reduce_sum") == 1


def test_product_elsewhere_is_einsum(on_gpu):
    found = traced()
    assert "optimization_barrier" not in found and found.count("reduce_sum") == 2


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_bias_gradient_adds_in_float32(platform, monkeypatch):
    """A bfloat16 sum of ones would stop at 256."""
    monkeypatch.setattr(linear, "device", lambda: types.SimpleNamespace(platform=platform))

    def loss(bias):
        return linear.over_tokens(bias, (1, 3000, 2), jnp.bfloat16).sum()

    trace = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros(2)))
    assert "bf16[2] = reduce_sum" not in trace
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2)), 3000, rtol=0.004)


def test_linear_axes_by_name():
    """The table, the kernel's shape and the bias's, for a layer that gives heads."""
    layer = linear.Linear((8, 2, 3), True, "float32", name="q")
    x_SND, _ = operands("SND,DF->SNF")
    params = layer.init(jax.random.key(0), x_SND)["params"]
    assert params["kernel"].shape == (8, 2, 3) and params["bias"].shape == (2, 3)
    expected = jnp.einsum("SND,DHC->SNHC", x_SND, params["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x_SND), expected, atol=1e-6)


HEADS = {"...D,VD->...V": (40, 16), "...D,DV->...V": (16, 40)}  # tied and untied heads


@pytest.mark.parametrize("equation", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_product(equation, dtype):
    """The sums keep their bits, and no product of 16 bits gets an operand of 32, slow on a GPU."""
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    given = (
        jax.random.normal(x_key, (2, 7, 16), dtype),
        jax.random.normal(kernel_key, HEADS[equation], dtype),
    )
    in_float32 = [x.astype(jnp.float32) for x in given]

    def loss(x, kernel):
        return jnp.sin(linear.wide_product(equation, x, kernel)).sum()

    found = linear.wide_product(equation, *given)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jnp.einsum(equation, *in_float32), rtol=1e-6, atol=1e-5)

    gradient = jax.grad(loss, argnums=(0, 1))
    operands = []
    for step in jax.make_jaxpr(gradient)(*given).eqns:
        if step.primitive.name == "dot_general":
            operands += [str(operand.aval.dtype) for operand in step.invars]
    assert operands == [dtype] * 2 * 3  # forward, and each operand's gradient
    tolerance = 1e-6 if dtype == "float32" else 0.01  # bfloat16 has 8 bits
    for ours, expected in zip(gradient(*given), gradient(*in_float32), strict=True):
        assert ours.dtype == dtype
        gap = np.abs(np.asarray(ours, np.float32) - expected).max()
        assert gap <= tolerance * np.abs(expected).max()

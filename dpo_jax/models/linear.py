"""Linear layers, and the order and precision of their backward pass.

Letters as in `transformer.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.parallel.sharding import device

# Layer -> the axes of its input and of its output, after the tokens' axes S and N. Its kernel has
# the input's axes first: q's is [D, H, C], out's [H, C, D].
AXES = {
    "q": ("D", "HC"),
    "k": ("D", "KC"),
    "v": ("D", "KC"),
    "out": ("HC", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}


class Linear(nn.Module):
    """A linear layer, with the adapter that `lora.join` may have laid beside its kernel.

    Its name, a key of AXES, says which axes it takes and gives.
    """

    shape: tuple[int, ...]  # of the kernel
    bias: bool
    dtype: str  # of the products
    scale: float = 1.0  # of the initial weights

    @nn.compact
    def __call__(self, x):
        inputs, outputs = AXES[self.name]
        kernel = self.param("kernel", nn.initializers.normal(0.02 * self.scale), self.shape)
        if not _is_narrower(kernel, x):
            kernel = kernel.astype(self.dtype)
        y = product(f"SN{inputs},{inputs}{outputs}->SN{outputs}", x, kernel)
        if self.has_variable("params", "lora_a"):
            # Through the rank: neither W + A B nor its gradient is ever made.
            a = self.get_variable("params", "lora_a").astype(self.dtype)
            b = self.get_variable("params", "lora_b").astype(self.dtype)
            low_rank_SNr = product(f"SN{inputs},{inputs}r->SNr", x, a)
            y += product(f"SNr,r{outputs}->SN{outputs}", low_rank_SNr, b)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape[len(inputs) :])
            y += over_tokens(bias, y.shape, y.dtype)
        return y


def product(equation: str, x, kernel) -> jax.Array:
    """Return jnp.einsum(equation, x, kernel), x and the result with the tokens' axes S, N first.

    On a CPU the backward pass takes another order, which XLA's CPU compiler runs faster. So it does
    for a frozen kernel that is held in fewer bits than x: it is widened here, once more in the
    backward pass, so that no wide copy of all layers is kept for it.
    """
    if device().platform == "cpu" or _is_narrower(kernel, x):
        return _product(equation, x, kernel)
    return jnp.einsum(equation, x, kernel)


def _is_narrower(kernel, x) -> bool:
    return kernel.dtype.itemsize < x.dtype.itemsize


def wide_product(equation: str, x, kernel) -> jax.Array:
    """Return jnp.einsum(equation, x, kernel) in float32: the sums are not rounded to 16 bits.

    Their gradient is rounded, so that the products of the backward pass have two operands of 16
    bits, as the forward pass has. XLA would widen the narrow one instead, and a GPU multiplies
    float32 ten times more slowly.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(equation, x, kernel)
    return _wide_product(equation, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_product(equation: str, x, kernel) -> jax.Array:
    return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)


def _wide_product_forward(equation, x, kernel):
    # Not a call of `_wide_product`, in which remat policies would see no product to save.
    y = jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
    return y, (x, kernel)


def _wide_product_backward(equation, operands, grad):
    x, kernel = operands
    grad = grad.astype(x.dtype)
    # Transposes of linear functions, not `jax.vjp`, which would make the product once more.
    of_x = jax.linear_transpose(lambda x: jnp.einsum(equation, x, kernel), x)
    of_kernel = jax.linear_transpose(lambda kernel: jnp.einsum(equation, x, kernel), kernel)
    return *of_x(grad), *of_kernel(grad)


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def softcapped(x, cap: float | None) -> jax.Array:
    """Return values bent into (-cap, cap): cap tanh(x / cap); without a cap, as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def over_tokens(weight, shape: tuple[int, ...], dtype) -> jax.Array:
    """Return a bias or scale, repeated over the tokens of `shape`, in a dtype.

    Its gradient is a sum over tokens, in float32.
    """
    if device().platform == "cpu":
        return _over_tokens_on_cpu(weight.astype(dtype), shape)
    # Repeated first and rounded then, so that the backward pass widens before it sums.
    return jnp.broadcast_to(weight, shape).astype(dtype)


# The kernel's gradient is a product over the tokens, for which a CPU needs one operand transposed.
# XLA transposes the one that is written first, whatever its size. Here it is always the narrower
# one. XLA also fuses what computes the operand (an activation, a norm) into the transposing loop,
# which then evaluates it a stride apart; `optimization_barrier` has it computed once, in its own
# order, before it is read.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x, kernel) -> jax.Array:
    return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _product_forward(equation, x, kernel):
    # Not a call of `_product`, in which remat policies would see no product to save.
    y = jnp.einsum(equation, x.value, kernel.value.astype(x.value.dtype))
    # A frozen kernel (LoRA's base) has no gradient, and its input is not kept for one.
    saved_x = x.value if kernel.perturbed else None
    return y, (saved_x, kernel.value)


def _product_backward(equation, saved, grad):
    x, kernel = saved
    kernel = kernel.astype(grad.dtype)
    inputs, out = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    if x is None:
        return jnp.einsum(f"{out},{of_kernel}->{of_x}", grad, kernel), None
    x, grad = jax.lax.optimization_barrier((x, grad))
    grad_x = jnp.einsum(f"{out},{of_kernel}->{of_x}", grad, kernel)
    tokens_axes = (((0, 1), (0, 1)), ((), ()))  # S and N, the first axes of both
    if x.size <= grad.size:
        return grad_x, jax.lax.dot_general(x, grad, tokens_axes)
    # The gradient is the narrower one: the product comes out with the kernel's outputs first.
    outputs_first = jax.lax.optimization_barrier(jax.lax.dot_general(grad, x, tokens_axes))
    outputs = grad.ndim - 2
    return grad_x, jnp.moveaxis(outputs_first, range(outputs), range(-outputs, 0))


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


# A sum over the leading axes is a slow loop in XLA's CPU backend. The same sum as a product with a
# row of ones runs many times faster.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _over_tokens_on_cpu(weight, shape) -> jax.Array:
    return jnp.broadcast_to(weight, shape)


def _over_tokens_forward(weight, shape):
    return _over_tokens_on_cpu(weight, shape), weight


def _over_tokens_backward(shape, weight, grad):
    tokens = grad.reshape(-1, weight.size)
    ones = jnp.ones(len(tokens), grad.dtype)
    total = jnp.dot(ones, tokens, preferred_element_type=jnp.float32)
    return (total.reshape(weight.shape).astype(weight.dtype),)


_over_tokens_on_cpu.defvjp(_over_tokens_forward, _over_tokens_backward)

"""A layer of experts in the MLP's place: a router sends each token to k of E small MLPs.

No token is dropped, whatever the experts' loads. A token is copied for each of its experts, the
copies are sorted by expert, and a grouped product multiplies each run of copies by its expert's
kernel. The mesh axis `expert` splits both the batch and the experts: a device gathers the tokens of
its neighbours along it, runs its own experts on them, and what they give is added up.

Letters as in `transformer.py`, and

    E  experts                       k  experts of a token
    A  copies of a device's tokens   B  copies of a block, all of one expert
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.parallel.sharding import BATCH, device, fitting, spec_of

# Where grouped products go block by block: about so many blocks for each expert. Its last one is
# only partly filled, and every block reads the expert's kernel.
BLOCKS_PER_EXPERT = 4
LEAST_BLOCK, MOST_BLOCK = 8, 512  # copies of a block
# Tiles of the kernels' gradient on a TPU: rows, and bytes of a row. Three such tiles and two of
# outputs, held twice, are in on-chip memory together.
TPU_ROWS, TPU_TILE_BYTES = 256, 2048


def check_mesh(config, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError where mesh.expert does not split the experts of a model."""
    devices = mesh.shape["expert"]
    if devices == 1 or (config.experts and config.experts % devices == 0):
        return
    has = f"{config.experts} experts a layer" if config.experts else "no experts"
    expected = "a number that divides them" if config.experts else "1"
    raise ValueError(f"config.mesh.expert = {devices}: this model has {has}; expected {expected}.")


class Routing(NamedTuple):
    """How routers spread tokens: sums over tokens and layers."""

    chosen_E: jax.Array  # how often each expert was chosen; no gradient goes through it
    probs_E: jax.Array  # of the routers
    tokens: jax.Array

    @property
    def shares_E(self) -> jax.Array:
        """How many choices of a token are each expert; together they are k."""
        return self.chosen_E / jnp.maximum(self.tokens, 1)

    def imbalance(self, shares_E: jax.Array) -> jax.Array:
        """Return the load-balancing loss (Fedus et al. 2022, eq. 4), summed over the tokens.

        shares_E: of all tokens that are to be balanced together, which may be more than these.
        """
        return len(shares_E) * jnp.dot(shares_E, self.probs_E)


class Experts(nn.Module):
    """A router and its experts. It also returns the `Routing` of tokens, if it gets `counts_SN`.

    counts_SN: how often each token counts in that.
    """

    config: object  # TransformerConfig
    activation: Callable
    scale: float  # of the initial weights that write to the residual stream

    @nn.compact
    def __call__(self, x_SND, counts_SN=None):
        config = self.config
        probs_SNE = Router(config.experts, name="router")(x_SND)
        weights_SNk, chosen_SNk = jax.lax.top_k(probs_SNE, config.experts_per_token)
        if config.norm_topk_prob:
            weights_SNk /= weights_SNk.sum(-1, keepdims=True)
        mlps = GroupedMlps(config, self.activation, self.scale, name="experts")
        x_SND = mlps(x_SND, chosen_SNk, weights_SNk)
        if counts_SN is None:
            return x_SND, None
        is_chosen_SNE = (chosen_SNk[..., None] == jnp.arange(config.experts)).any(-2)
        chosen_E = jnp.einsum("SN,SNE->E", counts_SN, is_chosen_SNE.astype(jnp.float32))
        probs_E = jnp.einsum("SN,SNE->E", counts_SN, probs_SNE)
        return x_SND, Routing(chosen_E, probs_E, counts_SN.sum())


class Router(nn.Module):
    """The probability of each expert for each token, float32."""

    experts: int

    @nn.compact
    def __call__(self, x_SND):
        normal = nn.initializers.normal(0.02)
        kernel_DE = self.param("kernel", normal, (x_SND.shape[-1], self.experts))
        # In float32 whatever the compute dtype: of two experts that are nearly equal, rounding
        # would choose another one.
        logits_SNE = jnp.einsum(
            "SND,DE->SNE", x_SND.astype(jnp.float32), kernel_DE, precision="highest"
        )
        return jax.nn.softmax(logits_SNE)


class GroupedMlps(nn.Module):
    """All experts, each on the tokens that chose it; their sum by the router's weights."""

    config: object  # TransformerConfig
    activation: Callable
    scale: float  # of the initial weights that write to the residual stream

    @nn.compact
    def __call__(self, x_SND, chosen_SNk, weights_SNk):
        config = self.config
        E, D, F = config.experts, config.width, config.mlp_width
        kernels = {
            "gate": Kernel((E, D, F), name="gate")(),
            "up": Kernel((E, D, F), name="up")(),
            "down": Kernel((E, F, D), self.scale, name="down")(),
        }
        kernels = jax.tree.map(lambda kernel: kernel.astype(config.dtype), kernels)
        # As in the MLP, recomputed in the backward pass.
        activation = jax.checkpoint(self.activation)
        is_recomputed = config.remat != "none"
        return on_each_device(activation, x_SND, chosen_SNk, weights_SNk, kernels, is_recomputed)


class Kernel(nn.Module):
    """The kernels of all experts, as one array."""

    shape: tuple[int, ...]
    scale: float = 1.0

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.normal(0.02 * self.scale), self.shape)


def on_each_device(
    activation: Callable, x_SND, chosen_SNk, weights_SNk, kernels: dict, is_recomputed: bool
):
    """Return what the experts give for all tokens, [S, N, D].

    The compiler would gather sorted copies from all devices: each device sorts its own.
    is_recomputed: whether the backward pass computes the whole layer again anyway.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mlps_of_tokens(activation, x_SND, chosen_SNk, weights_SNk, kernels)
    tokens_spec = fitting(mesh, P(BATCH, "context"), x_SND.shape[:2])
    kernel_specs = {
        name: spec_of(f"experts/{name}/kernel", kernel.shape, mesh)
        for name, kernel in kernels.items()
    }
    # The batch's axes split all of its shards or none.
    splits_batch = tokens_spec[0] is not None
    splits_experts = kernel_specs["up"][0] is not None

    def local(x_SND, chosen_SNk, weights_SNk, kernels):
        def gathered(x, axis: str, dimension: int):
            return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)

        whole = {}
        for name, kernel in kernels.items():
            spec = kernel_specs[name]
            # Back it goes summed, each device's part to it.
            whole[name] = gathered(kernel, "fsdp", spec.index("fsdp")) if "fsdp" in spec else kernel
        first_expert = 0
        if splits_experts:
            first_expert = jax.lax.axis_index("expert") * len(whole["up"])
            if splits_batch:
                x_SND, chosen_SNk, weights_SNk = [
                    gathered(x, "expert", 0) for x in (x_SND, chosen_SNk, weights_SNk)
                ]
        out_SND = mlps_of_tokens(
            activation, x_SND, chosen_SNk - first_expert, weights_SNk, whole, splits_experts
        )
        if splits_experts and splits_batch:
            out_SND = jax.lax.psum_scatter(out_SND, "expert", scatter_dimension=0, tiled=True)
        elif splits_experts:
            out_SND = jax.lax.psum(out_SND, "expert")
        if "tensor" in kernel_specs["up"]:
            out_SND = jax.lax.psum(out_SND, "tensor")
        return out_SND

    if not is_recomputed:
        # To keep the gathered kernels of every layer for the backward pass would undo what `fsdp`
        # saves.
        local = jax.checkpoint(local, policy=_all_but_gathered)
    split = jax.shard_map(
        local,
        in_specs=(tokens_spec, tokens_spec, tokens_spec, kernel_specs),
        out_specs=tokens_spec,
        check_vma=False,
    )
    return split(x_SND, chosen_SNk, weights_SNk, kernels)


def _all_but_gathered(primitive, *_, **__) -> bool:
    """Return whether `jax.checkpoint` keeps what an operation gives."""
    return primitive.name != "all_gather"


def mlps_of_tokens(
    activation: Callable, x_SND, chosen_SNk, weights_SNk, kernels: dict, are_some: bool = False
):
    """Return the sum of what each token's experts give, by their weights, [S, N, D].

    are_some: whether a token may have chosen experts that are not among the kernels, whose numbers
    are below 0 or too large. They add nothing.
    """
    experts = len(kernels["up"])
    chosen_A = chosen_SNk.reshape(-1)
    if are_some:
        is_here_A = (chosen_A >= 0) & (chosen_A < experts)
        chosen_A = jnp.where(is_here_A, chosen_A, experts)  # sorted to the end
    order_A = jnp.argsort(chosen_A)
    inverse_A = jnp.argsort(order_A)
    sizes_E = (chosen_A[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    is_here_A1 = (jnp.arange(len(order_A)) < sizes_E.sum())[:, None]

    def only_here(x):
        # Of the copies past the last group a product may make anything, and so may its gradient.
        return jnp.where(is_here_A1, x, 0) if are_some else x

    x_ND = x_SND.reshape(-1, x_SND.shape[-1])
    x_AD = only_here(copies(x_ND, order_A, inverse_A, len(x_ND)))
    gate_AF = grouped_product(x_AD, kernels["gate"], sizes_E)
    up_AF = grouped_product(x_AD, kernels["up"], sizes_E)
    # Weighted before the last product, whose result is then needed by no backward pass.
    weights_A1 = only_here(weights_SNk.reshape(-1)[order_A][:, None].astype(x_AD.dtype))
    x_AF = activation(gate_AF) * up_AF * weights_A1
    y_AD = only_here(grouped_product(x_AF, kernels["down"], sizes_E))
    return sums_of_copies(y_AD, order_A, inverse_A, len(x_ND)).reshape(x_SND.shape)


# `copies` and `sums_of_copies` are each other's transposes. Written so, both are gathers: what jax
# would make of the first, additions to places in any order, is slow on accelerators.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def copies(x_ND, order_A, inverse_A, tokens: int):
    """Return a copy of each token for each of its experts, in the order of the experts."""
    return x_ND[order_A // (len(order_A) // tokens)]


def _copies_forward(x_ND, order_A, inverse_A, tokens):
    return copies(x_ND, order_A, inverse_A, tokens), (order_A, inverse_A)


def _copies_backward(tokens, saved, grad_AD):
    return sums_of_copies(grad_AD, *saved, tokens), None, None


copies.defvjp(_copies_forward, _copies_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sums_of_copies(y_AD, order_A, inverse_A, tokens: int):
    """Return the sum of each token's copies, [N, D]."""
    return y_AD[inverse_A].reshape(tokens, -1, y_AD.shape[-1]).sum(1)


def _sums_forward(y_AD, order_A, inverse_A, tokens):
    return sums_of_copies(y_AD, order_A, inverse_A, tokens), (order_A, inverse_A)


def _sums_backward(tokens, saved, grad_ND):
    return copies(grad_ND, *saved, tokens), None, None


sums_of_copies.defvjp(_sums_forward, _sums_backward)


@jax.custom_vjp
def grouped_product(x_AD, kernel_EDF, sizes_E):
    """Return each group of rows times its own kernel, [A, F].

    sizes_E: rows of each group, one group after the other. Rows past the last are not defined, nor
    are their gradients.
    """
    return _rows_by_kernels(x_AD, kernel_EDF, sizes_E, contracted=1)


def _product_forward(x_AD, kernel_EDF, sizes_E):
    kernel, sizes = kernel_EDF.value, sizes_E.value
    # As in `linear.py`: without a gradient of the kernel its input is not kept for one.
    saved_AD = x_AD.value if kernel_EDF.perturbed else None
    return grouped_product(x_AD.value, kernel, sizes), (saved_AD, kernel, sizes)


def _product_backward(saved, grad_AF):
    x_AD, kernel_EDF, sizes_E = saved
    grad_x_AD = _rows_by_kernels(grad_AF, kernel_EDF, sizes_E, contracted=2)
    if x_AD is None:
        return grad_x_AD, None, None
    # XLA has no kernel for this one, on any platform.
    of_kernel = _rows_by_rows_on_tpu if device().platform == "tpu" else _rows_by_rows
    return grad_x_AD, of_kernel(x_AD, grad_AF, sizes_E).astype(kernel_EDF.dtype), None


grouped_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _rows_by_kernels(x_AD, kernel_EDF, sizes_E, *, contracted: int):
    """Return each group of rows times its kernel, over this axis of the kernels."""
    # Elsewhere than on TPUs, XLA would multiply all rows by all kernels, and mask.
    if device().platform == "tpu":
        axes = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([1], [contracted]), ([], [])),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        return jax.lax.ragged_dot_general(
            x_AD, kernel_EDF, sizes_E, axes, precision=_precision(x_AD)
        )

    blocks, size = blocks_of(sizes_E, len(x_AD))
    # A group's last block goes past its end. The next group writes over what it makes there.
    padded_AD = jnp.pad(x_AD, ((0, size), (0, 0)))
    outputs = kernel_EDF.shape[3 - contracted]

    def add(y_AF, block):
        x_BD = jax.lax.dynamic_slice_in_dim(padded_AD, block.start, size)
        axes = (([1], [contracted - 1]), ([], []))
        y_BF = jax.lax.dot_general(x_BD, kernel_EDF[block.group], axes)
        return jax.lax.dynamic_update_slice_in_dim(y_AF, y_BF, block.start, 0), None

    y_AF, _ = jax.lax.scan(add, jnp.zeros((len(padded_AD), outputs), x_AD.dtype), blocks)
    return y_AF[: len(x_AD)]


def _rows_by_rows(x_AD, grad_AF, sizes_E):
    """Return x^T grad of each group, float32 [E, D, F]."""
    blocks, size = blocks_of(sizes_E, len(x_AD))
    padded_AD, padded_AF = [jnp.pad(x, ((0, size), (0, 0))) for x in (x_AD, grad_AF)]

    def add(total_EDF, block):
        x_BD = jax.lax.dynamic_slice_in_dim(padded_AD, block.start, size)
        grad_BF = jax.lax.dynamic_slice_in_dim(padded_AF, block.start, size)
        is_of_group_B1 = jnp.arange(size)[:, None] < block.rows
        x_BD = jnp.where(is_of_group_B1, x_BD, 0)
        grad_BF = jnp.where(is_of_group_B1, grad_BF, 0)
        of_block_DF = jnp.einsum("BD,BF->DF", x_BD, grad_BF, preferred_element_type=jnp.float32)
        return total_EDF.at[block.group].add(of_block_DF), None

    zeros = jnp.zeros((len(sizes_E), x_AD.shape[1], grad_AF.shape[1]), jnp.float32)
    total_EDF, _ = jax.lax.scan(add, zeros, blocks)
    return total_EDF


def _rows_by_rows_on_tpu(x_AD, grad_AF, sizes_E, interpret: bool = False):
    """As `_rows_by_rows`, in the dtype of the rows, by JAX's Pallas kernel."""
    # Imported here: it is experimental, and nothing else must depend on it.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    missing = ((0, -len(x_AD) % TPU_ROWS), (0, 0))
    widest = TPU_TILE_BYTES // x_AD.dtype.itemsize
    with jax.default_matmul_precision(_precision(x_AD)):
        return tgmm(
            jnp.pad(x_AD, missing).T,
            jnp.pad(grad_AF, missing),
            sizes_E,
            x_AD.dtype,
            (TPU_ROWS, min(widest, x_AD.shape[1]), min(widest, grad_AF.shape[1])),
            interpret=interpret,
        )


def _precision(x_AD) -> str:
    """Return the precision of a TPU's kernels, which refuse that of float32 for bfloat16."""
    return "float32" if x_AD.dtype == jnp.float32 else "default"


class RowBlock(NamedTuple):
    """Rows of one group."""

    group: jax.Array
    start: jax.Array
    rows: jax.Array  # how many of the block's are the group's; below 1 in blocks to spare


def blocks_of(sizes_E, rows: int) -> tuple[RowBlock, int]:
    """Return as many blocks as any groups of so many rows may need, in order, and their size."""
    groups = len(sizes_E)
    size = rows // (BLOCKS_PER_EXPERT * groups)
    size = min(max(size, LEAST_BLOCK), MOST_BLOCK)
    number = jnp.arange(rows // size + groups)
    blocks_E = -(-sizes_E // size)
    ends_E = jnp.cumsum(blocks_E)
    # Those to spare go on after the last group.
    group = jnp.searchsorted(ends_E, number, side="right").clip(max=groups - 1)
    start = (jnp.cumsum(sizes_E) - sizes_E)[group] + size * (number - (ends_E - blocks_E)[group])
    left = jnp.cumsum(sizes_E)[group] - start
    return RowBlock(group, start.clip(max=rows), left), size

"""Causal attention over rows gathered from a flat run of tokens.

A batch is one flat run of tokens per shard, where a prompt is laid down once and both its responses
follow. Attention alone sees whole sequences: it gathers them into right-padded rows, runs plain
causal attention there, and takes each token's output back. For a prompt P, the chosen response C
and the rejected response R:

    run of tokens     P0 P1 P2 C0 C1 R0
    attention's rows  P0 P1 P2 C0 C1        each token sees itself and what stands to its left
                      P0 P1 P2 R0 .         so R0 never sees C0 and C1
    slots             0  1  2  3  4         places in the rows, counted from the first row to the
                      5  6  7  8  9         last; P0 stands in slots 0 and 5

`data/packing.py` makes the indices; `transformer.py` lists the letters in array names, and here
also:

    Z  slots of a shard, all rows end to end         B  S and R as one axis
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.parallel.hardware import chip_of
from dpo_jax.parallel.sharding import BATCH, device, fitting

# kernel -> the platforms that it runs on
KERNELS = {
    "xla": ("cpu", "gpu", "tpu"),
    "splash": ("cpu", "tpu"),
    "cudnn": ("gpu",),
}
QUERY_BLOCK = 128  # queries per block; keys after a block are never touched
SPLASH_LANES = 128  # splash's blocks are multiples of this
# Bytes of a number -> the longest of splash's blocks that fits into on-chip memory.
SPLASH_BLOCK = {2: 1024, 4: 512}


class Layout(NamedTuple):
    """The place of each shard's tokens in attention's rows; see `data/packing.py`."""

    rows: tuple[jax.Array, ...]  # rows_SRT of each length bucket: indices into N
    # gather_index_SN: the slot, counted through all rows, that a token's output is taken from
    gather_index: jax.Array
    # token_slots_SNK: all slots of a token, -1 where there are fewer than K
    token_slots: jax.Array


def attend(
    q_SNHC,
    k_SNKC,
    v_SNKC,
    layout: Layout | None = None,
    *,
    window: int | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Return attention of each token over its own sequence so far, [S, N, H, C].

    Without a layout each shard's N tokens are themselves one row. `window` and `kernel` as of
    `causal_attention`.
    """
    causal = functools.partial(causal_attention, window=window, kernel=kernel)
    if layout is None:
        out_SRNHC = causal(q_SNHC[:, None], k_SNKC[:, None], v_SNKC[:, None])
        return out_SRNHC[:, 0]

    index_SZ = _end_to_end(layout.rows)
    q_SZHC = _spread(q_SNHC, index_SZ, layout.token_slots)
    k_SZKC = _spread(k_SNKC, index_SZ, layout.token_slots)
    v_SZKC = _spread(v_SNKC, index_SZ, layout.token_slots)

    # All buckets are gathered at once, but each has rows of its own length, so each is a call.
    outputs = []
    start = 0
    for rows_SRT in layout.rows:
        end = start + rows_SRT[0].size
        q_SRTHC = q_SZHC[:, start:end].reshape(*rows_SRT.shape, *q_SZHC.shape[2:])
        k_SRTKC = k_SZKC[:, start:end].reshape(*rows_SRT.shape, *k_SZKC.shape[2:])
        v_SRTKC = v_SZKC[:, start:end].reshape(*rows_SRT.shape, *v_SZKC.shape[2:])
        out_SRTHC = causal(q_SRTHC, k_SRTKC, v_SRTKC)
        outputs.append(out_SRTHC.reshape(q_SZHC[:, start:end].shape))
        start = end
    out_SZHC = jnp.concatenate(outputs, axis=1)
    return _collect(out_SZHC, layout.gather_index, index_SZ)


def _end_to_end(rows: tuple[jax.Array, ...]) -> jax.Array:
    """Return the token in each slot, [S, Z]: the rows of all buckets, one after the other."""
    flat = [rows_SRT.reshape(rows_SRT.shape[0], -1) for rows_SRT in rows]
    return jnp.concatenate(flat, axis=1)


def attend_cached(
    q_SNHC, k_SNKC, v_SNKC, cache: dict, positions_SN, *, window: int | None = None
) -> jax.Array:
    """Return attention of one new token in each row (N = 1) over the cache and itself.

    The result is [S, 1, H, C]. A token sees the cache's slots before its position. cache: one
    layer's k, v [S, K, U, C]; it is only read, so it need not be copied: the token's own key and
    value are separate arguments. A slot that is not seen has a weight of exactly 0. Softmax in
    float32.
    """
    shards, _, heads, width = q_SNHC.shape
    kv_heads, slots = cache["k"].shape[1:3]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Query heads in groups that share a key head: the cache is not repeated for each of them.
    q_SKGC = (q_SNHC * width**-0.5).reshape(shards, kv_heads, heads // kv_heads, width)
    # A token's slot is its position. Its own slot is not written yet, so distance 0 is not seen.
    distance_SU = positions_SN - jnp.arange(slots)
    seen_SU = distance_SU > 0
    if window is not None:
        seen_SU &= distance_SU < window
    scores_SKGU = dot("SKGC,SKUC->SKGU", q_SKGC, cache["k"])
    scores_SKGU = jnp.where(seen_SU[:, None, None], scores_SKGU, jnp.finfo(jnp.float32).min)
    own_SKGN = dot("SKGC,SNKC->SKGN", q_SKGC, k_SNKC)
    # One softmax over the cache and the token itself, which comes last.
    weights = jax.nn.softmax(jnp.concatenate([scores_SKGU, own_SKGN], axis=-1))
    weights = weights.astype(v_SNKC.dtype)
    weights_SKGU = weights[..., :slots]
    weights_SKGN = weights[..., slots:]
    out_SKGC = dot("SKGU,SKUC->SKGC", weights_SKGU, cache["v"])
    out_SKGC += dot("SKGN,SNKC->SKGC", weights_SKGN, v_SNKC)
    return out_SKGC.astype(v_SNKC.dtype).reshape(q_SNHC.shape)


def causal_attention(
    q_SRTHC, k_SRUKC, v_SRUKC, *, window: int | None = None, kernel: str = "auto"
) -> jax.Array:
    """Return plain causal attention within rows, [S, R, T, H, C]; softmax in float32.

    window: how many of the latest keys are seen, the query's own included. kernel: see `choose`.
    """
    kernel = choose(kernel, q_SRTHC.dtype, q_SRTHC.shape[-1])
    if kernel == "xla":
        return _in_blocks(q_SRTHC, k_SRUKC, v_SRUKC, window)
    function = _splash if kernel == "splash" else _cudnn
    return _on_each_device(function, q_SRTHC, k_SRUKC, v_SRUKC, window)


def choose(kernel: str, dtype, width: int) -> str:
    """Return a key of KERNELS: the one named, or what `auto` stands for on the step's device.

    auto is splash on a TPU; cudnn on a GPU that `hardware.CHIPS` lists (others may not have it),
    for 16-bit numbers and heads of a width that all of these take; elsewhere xla, the blocks
    written here. Raises ValueError where the named kernel cannot run.
    """
    where = device().platform
    dtype = jnp.dtype(dtype)
    if kernel == "auto":
        # Heads up to 256 wide run on an H100 and an H200 only, so auto stays with 128.
        cudnn_takes_it = dtype.itemsize == 2 and width % 8 == 0 and width <= 128
        if where == "tpu":
            return "splash"
        if where == "gpu" and cudnn_takes_it and chip_of(device()):
            return "cudnn"
        return "xla"
    check(kernel, where)
    if kernel == "cudnn" and (dtype.itemsize != 2 or width % 8 or width > 256):
        raise ValueError(
            "config.model.attention = 'cudnn' takes model.dtype=bfloat16 and heads of a multiple "
            f"of 8, up to 128 wide (256 on an H100 or H200), not {dtype} and {width}: take auto."
        )
    return kernel


def check(kernel: str, where: str) -> None:
    """Raise ValueError where a named kernel does not run on a platform."""
    if kernel != "auto" and where not in KERNELS[kernel]:
        raise ValueError(
            f"config.model.attention = {kernel!r} runs on {' and '.join(KERNELS[kernel])}, not on "
            f"{where}: take auto."
        )


def _on_each_device(kernel, q_SRTHC, k_SRUKC, v_SRUKC, window):
    """Run a kernel over each device's own rows and heads: the compiler cannot split a kernel.

    kernel: (q_BTHC, k_BUKC, v_BUKC, window) -> out_BTHC.
    """

    def local(q_SRTHC, k_SRUKC, v_SRUKC):
        q_BTHC = q_SRTHC.reshape(-1, *q_SRTHC.shape[2:])
        k_BUKC = k_SRUKC.reshape(-1, *k_SRUKC.shape[2:])
        v_BUKC = v_SRUKC.reshape(-1, *v_SRUKC.shape[2:])
        return kernel(q_BTHC, k_BUKC, v_BUKC, window).reshape(q_SRTHC.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_SRTHC, k_SRUKC, v_SRUKC)

    heads = q_SRTHC.shape[3]
    kv_heads = k_SRUKC.shape[3]
    if heads % mesh.shape["tensor"] == 0:
        # Key heads are repeated until each device has its own.
        times = math.lcm(kv_heads, mesh.shape["tensor"]) // kv_heads
        k_SRUKC = jnp.repeat(k_SRUKC, times, axis=3)
        v_SRUKC = jnp.repeat(v_SRUKC, times, axis=3)

    # An axis that a device count does not divide stays whole on every device (`fitting`).
    wanted = PartitionSpec(BATCH, None, None, "tensor")
    specs = tuple(fitting(mesh, wanted, x.shape) for x in (q_SRTHC, k_SRUKC, v_SRUKC))
    # Varying axes are not checked: kernels do not say how their outputs vary over the mesh.
    split = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(q_SRTHC, k_SRUKC, v_SRUKC)


def _splash(q_BTHC, k_BUKC, v_BUKC, window):
    """Run JAX's Pallas kernel for TPUs, over padded rows; on a CPU it is interpreted, slowly."""
    # Imported here: it is experimental, and the other kernels must not depend on it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q_BTHC.shape[1:]
    # As few blocks as fit on the chip, all equally long, so that the last is not mostly padding.
    count = -(-length // SPLASH_BLOCK[q_BTHC.dtype.itemsize])
    block = -(-length // (count * SPLASH_LANES)) * SPLASH_LANES
    padded = count * block
    square = (padded, padded)
    # Padding comes after all tokens, so a causal mask hides it from them.
    if window is None:
        mask = splash.CausalMask(square)
    else:
        mask = splash.LocalMask(square, (window - 1, 0), 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def attend_rows(q_BHTC, k_BKUC, v_BKUC):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            interpret=device().platform == "cpu",
        )
        return jax.vmap(kernel)(q_BHTC, k_BKUC, v_BKUC)

    def padded_heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    # The kernel refuses the precision float32 for bfloat16.
    precision = "default" if q_BTHC.dtype == jnp.bfloat16 else "float32"
    # The kernel does not scale the queries.
    out_BHTC = _at_precision(precision, attend_rows)(
        padded_heads_first(q_BTHC * width**-0.5),
        padded_heads_first(k_BUKC),
        padded_heads_first(v_BUKC),
    )
    return out_BHTC.swapaxes(1, 2)[:, :length]


def _at_precision(precision: str, function):
    """Return the function with all its products at a precision.

    The backward pass is traced on its own, so it needs the precision set again.
    """

    @jax.custom_vjp
    def at_precision(*arrays):
        with jax.default_matmul_precision(precision):
            return function(*arrays)

    def forward(*arrays):
        with jax.default_matmul_precision(precision):
            return jax.vjp(function, *arrays)

    def backward(pull_back, grad):
        with jax.default_matmul_precision(precision):
            return pull_back(grad)

    at_precision.defvjp(forward, backward)
    return at_precision


def _cudnn(q_BTHC, k_BUKC, v_BUKC, window, implementation="cudnn"):
    """Run NVIDIA's fused kernel; its backward pass may add in another order from run to run."""
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BUKC,
        v_BUKC,
        is_causal=True,
        implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )


def _in_blocks(q_SRTHC, k_SRUKC, v_SRUKC, window):
    """Return attention in plain XLA.

    Blocks of queries see only the keys up to their end, so about half of the square is never
    computed, and each block is recomputed in the backward pass, so no [T, T] array is kept.
    """
    shards, rows, length, heads, width = q_SRTHC.shape
    kv_heads = k_SRUKC.shape[3]
    # Heads first, keys transposed: each block is then two batched matrix products with nothing to
    # shuffle, which the CPU runs about twice as fast as the same products over [T, H, C].
    q_SRTKGC = (q_SRTHC * width**-0.5).reshape(
        shards, rows, length, kv_heads, heads // kv_heads, width
    )
    q_SRKGTC = q_SRTKGC.transpose(0, 1, 3, 4, 2, 5)
    k_SRKCU = k_SRUKC.transpose(0, 1, 3, 4, 2)
    v_SRKUC = v_SRUKC.transpose(0, 1, 3, 2, 4)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        # The first key that the block's first query sees.
        first = 0 if window is None else max(0, start - window + 1)
        block = functools.partial(_attend_block, offset=start - first, window=window)
        if length > QUERY_BLOCK:
            # A single block is not recomputed: its scores are small.
            block = jax.checkpoint(block)
        q_block = q_SRKGTC[..., start:end, :]
        k_block = k_SRKCU[..., first:end]
        v_block = v_SRKUC[..., first:end, :]
        blocks.append(block(q_block, k_block, v_block))
    out_SRKGTC = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=4)
    return out_SRKGTC.transpose(0, 1, 4, 2, 3, 5).reshape(q_SRTHC.shape)


def _attend_block(q_SRKGTC, k_SRKCU, v_SRKUC, *, offset: int, window: int | None):
    """Return attention of a block of queries, the first of which sits at key `offset`."""
    shards, rows, kv_heads, groups, length, width = q_SRKGTC.shape
    # I: G and T as one. The queries of all heads that share a key head are one matrix.
    q_SRKIC = q_SRKGTC.reshape(shards, rows, kv_heads, groups * length, width)
    scores_SRKIU = jnp.einsum(
        "SRKIC,SRKCU->SRKIU", q_SRKIC, k_SRKCU, preferred_element_type=jnp.float32
    )
    query_T1 = offset + jnp.arange(length)[:, None]
    key_1U = jnp.arange(k_SRKCU.shape[-1])[None, :]
    distance_TU = query_T1 - key_1U
    seen_TU = distance_TU >= 0
    if window is not None:
        seen_TU &= distance_TU < window
    seen_IU = jnp.tile(seen_TU, (groups, 1))
    scores_SRKIU = jnp.where(seen_IU, scores_SRKIU, jnp.finfo(jnp.float32).min)
    # The highest score is taken off against overflow. It cancels, so it needs no gradient.
    highest_SRKI1 = jax.lax.stop_gradient(scores_SRKIU.max(-1, keepdims=True))
    weights_SRKIU = jnp.exp(scores_SRKIU - highest_SRKI1)
    out_SRKIC = jnp.einsum(
        "SRKIU,SRKUC->SRKIC",
        weights_SRKIU.astype(v_SRKUC.dtype),
        v_SRKUC,
        preferred_element_type=jnp.float32,
    )
    # Divided after the product: that is C numbers for each query, not U.
    out_SRKIC /= weights_SRKIU.sum(-1, keepdims=True)
    return out_SRKIC.astype(v_SRKUC.dtype).reshape(q_SRKGTC.shape)


# Tokens to rows and back are gathers whose transposes are gathers too: scatters would be slow on a
# CPU, and on a GPU would add in an order that changes from run to run. So each backward pass is
# written out below. Indices have no gradient: None.


@jax.custom_vjp
def _spread(x_SN, index_SZ, token_slots_SNK):
    """Return x[s, index[s]]: the token of each slot."""
    return _take(x_SN, index_SZ)


def _spread_forward(x_SN, index_SZ, token_slots_SNK):
    return _take(x_SN, index_SZ), token_slots_SNK


def _spread_backward(token_slots_SNK, grad_SZ):
    # A token of the prompt is in a slot of each response's row: the gradients of all its slots add
    # up. A token in fewer slots than K has -1 for the others, which give nothing.
    grad_SN = 0
    for k in range(token_slots_SNK.shape[-1]):
        slot_SN = token_slots_SNK[..., k]
        grad_SN += _masked(_take(grad_SZ, slot_SN), slot_SN >= 0)
    return grad_SN, None, None


@jax.custom_vjp
def _collect(x_SZ, gather_index_SN, index_SZ):
    """Return x[s, gather_index[s]]: each token's output, from one of its slots."""
    return _take(x_SZ, gather_index_SN)


def _collect_forward(x_SZ, gather_index_SN, index_SZ):
    return _take(x_SZ, gather_index_SN), (gather_index_SN, index_SZ)


def _collect_backward(indices, grad_SN):
    gather_index_SN, index_SZ = indices
    # A token's output is taken from one of its slots, so that slot alone has a gradient: the slot
    # to which its own token goes back.
    read_slot_SZ = _take(gather_index_SN, index_SZ)
    is_read_SZ = read_slot_SZ == jnp.arange(index_SZ.shape[1])
    return _masked(_take(grad_SN, index_SZ), is_read_SZ), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)


def _masked(x, mask):
    """Return x, and 0 where the mask of its leading axes is False."""
    trailing = (1,) * (x.ndim - mask.ndim)
    return jnp.where(mask.reshape(mask.shape + trailing), x, 0)


def _take(x, index):
    """Return x[s, index[s]] for every shard s: indices of any rank into the second axis."""

    def take_from_shard(shard, shard_index):
        # -1 stands for no slot. It is clipped to 0, and masked by whoever takes it.
        return jnp.take(shard, shard_index, axis=0, mode="clip")

    return jax.vmap(take_from_shard)(x, index)

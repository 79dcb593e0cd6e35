"""Causal attention over rows gathered from a flat run of tokens.

A batch is one flat run of tokens per shard, where a prompt is laid down once and both its responses
follow. Attention alone sees whole sequences: it gathers them into right-padded rows, runs plain
causal attention there, and takes each token's output back. `data/packing.py` makes the indices;
`transformer.py` lists the letters in array names.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

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
        return causal(q_SNHC[:, None], k_SNKC[:, None], v_SNKC[:, None])[:, 0]
    index_SP = jnp.concatenate(
        [rows_SRT.reshape(rows_SRT.shape[0], -1) for rows_SRT in layout.rows], axis=1
    )
    spread = [_spread(x, index_SP, layout.token_slots) for x in (q_SNHC, k_SNKC, v_SNKC)]
    outputs, start = [], 0
    for shards, rows, length in (rows_SRT.shape for rows_SRT in layout.rows):
        end = start + rows * length
        bucket = [
            x_SP[:, start:end].reshape(shards, rows, length, *x_SP.shape[2:]) for x_SP in spread
        ]
        outputs.append(causal(*bucket).reshape(shards, rows * length, *q_SNHC.shape[2:]))
        start = end
    return _collect(jnp.concatenate(outputs, axis=1), layout.gather_index, index_SP)


def attend_cached(
    q_SNHC, k_SNKC, v_SNKC, cache: dict, positions_SN, *, window: int | None = None
) -> jax.Array:
    """Return attention of one new token in each row (N = 1) over the cache and itself.

    The result is [S, 1, H, C]. A token sees the cache's slots before its position. cache: one
    layer's k, v [S, K, U, C]; it is only read, so it need not be copied: the token's own key and
    value are given besides. A slot that is not seen has a weight of exactly 0. Softmax in float32.
    """
    shards, _, heads, width = q_SNHC.shape
    kv_heads, slots = cache["k"].shape[1:3]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q_SKGC = (q_SNHC * width**-0.5).reshape(shards, kv_heads, heads // kv_heads, width)
    distance_SU = positions_SN - jnp.arange(slots)
    seen_SU = distance_SU > 0
    if window is not None:
        seen_SU &= distance_SU < window
    scores_SKGU = dot("SKGC,SKUC->SKGU", q_SKGC, cache["k"])
    scores_SKGU = jnp.where(seen_SU[:, None, None], scores_SKGU, jnp.finfo(jnp.float32).min)
    own_SKGN = dot("SKGC,SNKC->SKGN", q_SKGC, k_SNKC)
    weights_SKGU = jax.nn.softmax(jnp.concatenate([scores_SKGU, own_SKGN], axis=-1)).astype(
        v_SNKC.dtype
    )
    out_SKGC = dot("SKGU,SKUC->SKGC", weights_SKGU[..., :slots], cache["v"])
    out_SKGC += dot("SKGN,SNKC->SKGC", weights_SKGU[..., slots:], v_SNKC)
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
    where, dtype = device().platform, jnp.dtype(dtype)
    if kernel == "auto":
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

    kernel: (q_BTHC, k_BUKC, v_BUKC, window) -> out_BTHC; B: S and R as one.
    """

    def local(q_SRTHC, k_SRUKC, v_SRUKC):
        rows = [x.reshape(-1, *x.shape[2:]) for x in (q_SRTHC, k_SRUKC, v_SRUKC)]
        return kernel(*rows, window).reshape(q_SRTHC.shape)

    mesh, heads, kv_heads = jax.sharding.get_abstract_mesh(), q_SRTHC.shape[3], k_SRUKC.shape[3]
    if mesh.empty:
        return local(q_SRTHC, k_SRUKC, v_SRUKC)
    if heads % mesh.shape["tensor"] == 0:
        # Key heads are repeated until each device has its own.
        times = math.lcm(kv_heads, mesh.shape["tensor"]) // kv_heads
        k_SRUKC, v_SRUKC = (jnp.repeat(x, times, axis=3) for x in (k_SRUKC, v_SRUKC))
    specs = [
        fitting(mesh, P(BATCH, None, None, "tensor"), x.shape) for x in (q_SRTHC, k_SRUKC, v_SRUKC)
    ]
    return jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(
        q_SRTHC, k_SRUKC, v_SRUKC
    )


def _splash(q_BTHC, k_BUKC, v_BUKC, window):
    """Run JAX's Pallas kernel for TPUs, over padded rows; on a CPU it is interpreted, slowly."""
    # Imported here: it is experimental, and the other kernels must not depend on it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q_BTHC.shape[1:]
    count = -(-length // SPLASH_BLOCK[q_BTHC.dtype.itemsize])
    block = -(-length // (count * SPLASH_LANES)) * SPLASH_LANES
    padded = count * block
    square = (padded, padded)
    mask = (
        splash.CausalMask(square)
        if window is None
        else splash.LocalMask(square, (window - 1, 0), 0)
    )
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def attend_rows(q_BHTC, k_BKUC, v_BKUC):
        return jax.vmap(
            splash.make_splash_mha_single_device(
                splash.MultiHeadMask([mask] * heads),
                block_sizes=blocks,
                interpret=device().platform == "cpu",
            )
        )(q_BHTC, k_BKUC, v_BKUC)

    # The kernel refuses the precision float32 for bfloat16.
    precision = "default" if q_BTHC.dtype == jnp.bfloat16 else "float32"
    heads_first = [
        jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q_BTHC * width**-0.5, k_BUKC, v_BUKC)
    ]
    return _at_precision(precision, attend_rows)(*heads_first).swapaxes(1, 2)[:, :length]


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
        first = 0 if window is None else max(0, start - window + 1)
        block = functools.partial(_attend_block, offset=start - first, window=window)
        block = jax.checkpoint(block) if length > QUERY_BLOCK else block
        blocks.append(
            block(q_SRKGTC[..., start:end, :], k_SRKCU[..., first:end], v_SRKUC[..., first:end, :])
        )
    out_SRKGTC = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=4)
    return out_SRKGTC.transpose(0, 1, 4, 2, 3, 5).reshape(q_SRTHC.shape)


def _attend_block(q_SRKGTC, k_SRKCU, v_SRKUC, *, offset: int, window: int | None):
    """Return attention of a block of queries, the first of which sits at key `offset`."""
    shards, rows, kv_heads, groups, length, width = q_SRKGTC.shape
    q_SRKIC = q_SRKGTC.reshape(shards, rows, kv_heads, groups * length, width)  # I: G and T as one
    scores_SRKIU = jnp.einsum(
        "SRKIC,SRKCU->SRKIU", q_SRKIC, k_SRKCU, preferred_element_type=jnp.float32
    )
    distance_TU = offset + jnp.arange(length)[:, None] - jnp.arange(k_SRKCU.shape[-1])[None, :]
    seen_TU = distance_TU >= 0
    if window is not None:
        seen_TU &= distance_TU < window
    scores_SRKIU = jnp.where(
        jnp.tile(seen_TU, (groups, 1)), scores_SRKIU, jnp.finfo(jnp.float32).min
    )
    weights_SRKIU = jnp.exp(
        scores_SRKIU - jax.lax.stop_gradient(scores_SRKIU.max(-1, keepdims=True))
    )
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
# CPU, and on a GPU would add in an order that changes from run to run. P: places in the flattened
# rows.


@jax.custom_vjp
def _spread(x_SN, index_SP, token_slots_SNK):
    """Return x[s, index[s]]: tokens at their places."""
    return _take(x_SN, index_SP)


def _spread_forward(x_SN, index_SP, token_slots_SNK):
    return _take(x_SN, index_SP), token_slots_SNK


def _spread_backward(token_slots_SNK, grad_SP):
    grad_SN = sum(
        _masked(_take(grad_SP, token_slots_SNK[..., k]), token_slots_SNK[..., k] >= 0)
        for k in range(token_slots_SNK.shape[-1])
    )
    return grad_SN, None, None


@jax.custom_vjp
def _collect(x_SP, back_SN, index_SP):
    """Return x[s, back[s]]: each token's output, from one of its places."""
    return _take(x_SP, back_SN)


def _collect_forward(x_SP, back_SN, index_SP):
    return _take(x_SP, back_SN), (back_SN, index_SP)


def _collect_backward(indices, grad_SN):
    back_SN, index_SP = indices
    taken_SP = _take(back_SN, index_SP) == jnp.arange(
        index_SP.shape[1]
    )  # a token is taken from one place only
    return _masked(_take(grad_SN, index_SP), taken_SP), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)


def _masked(x, mask):
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


def _take(x, index):
    """Return x[s, index[s]] for every shard s: indices of any rank into the second axis."""
    return jax.vmap(lambda shard, i: jnp.take(shard, i, axis=0, mode="clip"))(x, index)

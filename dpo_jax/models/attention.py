"""Causal attention over rows gathered from a flat run of tokens.

A batch is one flat run of tokens per shard, where a prompt is laid down once and its responses
follow. Attention alone sees sequences. It gathers tokens into rows, each with a prompt and
responses to it, padded on the right, and works in two parts: the prompt attends to itself, and each
response to the prompt and to itself, so that no query is computed twice. For a prompt P and the
responses C and R:

    run of tokens   P0 P1 P2 C0 C1 R0
    prompts         P0 P1 P2              each token sees itself and what stands to its left
    responses       C0 C1                 sees P0 P1 P2 as well
                    R0 .                  so does R0, which never sees C0 and C1
    slots           0  1  2               places in the rows, counted from the first to the last
                    3  4
                    5  6

With several devices along the mesh's axis `context`, each has the queries of every so many places
of a row, and gathers the keys and values of all: a stripe. Only then are queries fewer than keys.

Where prompts are short, rows are whole sequences: responses without a prompt, each of which starts
with its own copy of P0 P1 P2. `data/packing.py` chooses, and makes the indices; `transformer.py`
lists the letters in array names, and here also:

    Z  slots of a shard, all rows end to end         U  tokens of a row's prompt
    A  responses of a row                            T  tokens of each response
    B  S and R as one axis
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.data.packing import BUCKETS, MOST_SLOTS, QUERY_BLOCK, RowLimits, Rows
from dpo_jax.models.linear import softcapped, wide_product
from dpo_jax.parallel.hardware import chip_of
from dpo_jax.parallel.sharding import BATCH, constrain, context_size, device, fitting

# kernel -> the platforms that it runs on
KERNELS = {
    "xla": ("cpu", "gpu", "tpu"),
    "splash": ("cpu", "tpu"),
    "cudnn": ("gpu",),
}
SPLASH_LANES = 128  # splash's blocks are multiples of this
# On a GPU the kernels of more buckets, and what cuts their rows out and puts them together, cost
# more than padding: GPT-2 on an H200, at TL;DR's lengths, took 42.7 ms a step in three buckets,
# 34.9 in two and 31.7 in one.
GPU_BUCKETS = 1
# Of rows longer than so many blocks of queries, some blocks are computed in a loop, so that neither
# the program nor the memory grows with the square of the length. A CPU would hold the scores of all
# blocks that it is free to compute at once.
MOST_GROUPS = 8
# Bytes of a number -> the longest of splash's blocks that fits into on-chip memory.
SPLASH_BLOCK = {2: 1024, 4: 512}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of each shard's tokens in attention's rows; see `data/packing.py`."""

    rows: tuple[Rows, ...]  # of each bucket, indices into N with a leading axis of shards
    token_slots: jax.Array  # token_slots_SNJ: all slots of a token, -1 where there are fewer than J
    # token_counts_SN, float32: how often each token counts where routers are measured; None: they
    # are not.
    token_counts: jax.Array | None = None
    stripes: int = dataclasses.field(default=1, metadata=dict(static=True))  # see `Batch`


class Stripe(NamedTuple):
    """A device's part of the places of a row: first, first + stripes, first + 2 stripes ..."""

    first: jax.Array | int = 0
    stripes: int = 1


WHOLE = Stripe()


class Prompts(NamedTuple):
    """The keys and values of rows' prompts, which all responses of a row see."""

    k: jax.Array  # k_SRUKC
    v: jax.Array  # v_SRUKC
    lengths: jax.Array  # lengths_SR: how many of U are there


def row_limits(window: int | None, platform: str, context: int = 1) -> RowLimits:
    """Return what a model with this window asks of its rows on a platform, such as gpu.

    context: the size of the mesh's axis.
    """
    return RowLimits(window, GPU_BUCKETS if platform == "gpu" else BUCKETS, context)


def attend(
    q_SNHC,
    k_SNKC,
    v_SNKC,
    layout: Layout | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Return attention of each token over its own sequence so far, [S, N, H, C].

    Without a layout each shard's N tokens are themselves one row. `window`, `scale`, `softcap` and
    `kernel` as of `attend_rows`.
    """
    over_rows = functools.partial(
        attend_rows, window=window, scale=scale, softcap=softcap, kernel=kernel
    )
    context = context_size()
    if context > 1 and layout is not None and layout.stripes == context:
        return _on_stripes(over_rows, q_SNHC, k_SNKC, v_SNKC, layout)
    if context > 1:
        # These tokens are not in stripes, so each device along `context` computes all outputs.
        q_SNHC, k_SNKC, v_SNKC = [
            constrain(x_SNHC, BATCH, None, "tensor") for x_SNHC in (q_SNHC, k_SNKC, v_SNKC)
        ]
    if layout is None:
        # One row with one response.
        rows = [x[:, None, None] for x in (q_SNHC, k_SNKC, v_SNKC)]
        return over_rows(*rows)[:, 0, 0]
    return _attend_run(over_rows, q_SNHC, k_SNKC, v_SNKC, layout)


def _on_stripes(over_rows, q_SNHC, k_SNKC, v_SNKC, layout: Layout):
    """Return attention of a run in stripes, each device's queries over the keys of all."""

    def local(q_SNHC, k_SNKC, v_SNKC, layout):
        # Gathered here, so that the backward pass sums the gradients as it scatters them.
        k_SNKC, v_SNKC = [
            jax.lax.all_gather(x_SNKC, "context", axis=1, tiled=True) for x_SNKC in (k_SNKC, v_SNKC)
        ]
        stripe = Stripe(jax.lax.axis_index("context"), layout.stripes)
        return _attend_run(over_rows, q_SNHC, k_SNKC, v_SNKC, layout, stripe)

    layout = dataclasses.replace(layout, token_counts=None)  # of routers, not of attention
    return _on_each_device(local, q_SNHC, k_SNKC, v_SNKC, layout, tokens="context")


def _attend_run(over_rows, q_SNHC, k_SNKC, v_SNKC, layout: Layout, stripe: Stripe = WHOLE):
    """Return attention of a run's queries, or of a stripe of them, over its keys.

    over_rows: `attend_rows` with its options.
    """
    shards, tokens, heads, width = q_SNHC.shape
    stripes = stripe.stripes
    over_rows = functools.partial(over_rows, stripe=stripe)

    index_SZ = _end_to_end(layout.rows)
    k_SZKC = _spread(k_SNKC, index_SZ, layout.token_slots)
    v_SZKC = _spread(v_SNKC, index_SZ, layout.token_slots)
    # A query's output is taken from its first slot, so that slot alone has a gradient.
    first_slot_SNJ = layout.token_slots[..., :1]
    if stripes > 1:
        # Rows are multiples of the stripes, so slots go round the stripes as places in a row do.
        index_SZs = index_SZ.reshape(shards, -1, stripes)
        index_SZ = jax.lax.dynamic_index_in_dim(index_SZs, stripe.first, 2, keepdims=False) % tokens
        start = stripe.first * tokens
        first_slot_SNJ = jax.lax.dynamic_slice_in_dim(first_slot_SNJ, start, tokens, 1) // stripes
    q_SZHC = _spread(q_SNHC, index_SZ, first_slot_SNJ)

    def parts(start, shape):
        """Return the queries, keys and values of a part of the slots."""
        of_queries = (*shape[:-1], shape[-1] // stripes)
        q_part = _slots(q_SZHC, start // stripes, of_queries)
        return q_part, _slots(k_SZKC, start, shape), _slots(v_SZKC, start, shape)

    # All buckets are gathered at once, but each has rows of its own sizes, so each is a call.
    outputs = []
    start = 0
    for rows in layout.rows:
        prompts = None
        if rows.prompts.size:
            q_SRUHC, k_SRUKC, v_SRUKC = parts(start, rows.prompts.shape)
            # A prompt attends as the only response to no prompt.
            out_SRAUHC = over_rows(q_SRUHC[:, :, None], k_SRUKC[:, :, None], v_SRUKC[:, :, None])
            outputs.append(out_SRAUHC.reshape(shards, -1, heads, width))
            prompts = Prompts(k_SRUKC, v_SRUKC, rows.prompt_lengths)
            start += rows.prompts[0].size
        q_SRATHC, k_SRATKC, v_SRATKC = parts(start, rows.responses.shape)
        out_SRATHC = over_rows(q_SRATHC, k_SRATKC, v_SRATKC, prompts)
        outputs.append(out_SRATHC.reshape(shards, -1, heads, width))
        start += rows.responses[0].size
    out_SZHC = jnp.concatenate(outputs, axis=1)
    return _collect(out_SZHC, first_slot_SNJ[..., 0], index_SZ)


def _slots(x_SZ, start: int, shape: tuple[int, ...]):
    """Return a part of the slots as an array of this shape, and of the trailing axes of x."""
    end = start + math.prod(shape[1:])
    return x_SZ[:, start:end].reshape(*shape, *x_SZ.shape[2:])


def _end_to_end(rows: tuple[Rows, ...]) -> jax.Array:
    """Return the token in each slot, [S, Z]: of each bucket the prompts, then the responses."""
    flat = []
    for bucket in rows:
        for tokens in (bucket.prompts, bucket.responses):
            flat.append(tokens.reshape(tokens.shape[0], -1))
    return jnp.concatenate(flat, axis=1)


def attend_cached(
    q_SNHC,
    k_SNKC,
    v_SNKC,
    cache: dict,
    positions_SN,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Return attention of one new token in each row (N = 1) over the cache and itself.

    The result is [S, 1, H, C]. A token sees the cache's slots before its position. cache: one
    layer's k, v [S, K, U, C]; it is only read, so it need not be copied: the token's own key and
    value are separate arguments. A slot that is not seen has a weight of exactly 0. Softmax in
    float32. `window`, `scale` and `softcap` as of `attend_rows`.
    """
    shards, _, heads, width = q_SNHC.shape
    kv_heads, slots = cache["k"].shape[1:3]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Query heads in groups that share a key head: the cache is not repeated for each of them.
    scale = width**-0.5 if scale is None else scale
    q_SKGC = (q_SNHC * scale).reshape(shards, kv_heads, heads // kv_heads, width)
    # A token's slot is its position. Its own slot is not written yet, so distance 0 is not seen.
    distance_SU = positions_SN - jnp.arange(slots)
    seen_SU = distance_SU > 0
    if window is not None:
        seen_SU &= distance_SU < window
    scores_SKGU = softcapped(dot("SKGC,SKUC->SKGU", q_SKGC, cache["k"]), softcap)
    scores_SKGU = jnp.where(seen_SU[:, None, None], scores_SKGU, jnp.finfo(jnp.float32).min)
    own_SKGN = softcapped(dot("SKGC,SNKC->SKGN", q_SKGC, k_SNKC), softcap)
    # One softmax over the cache and the token itself, which comes last.
    weights = jax.nn.softmax(jnp.concatenate([scores_SKGU, own_SKGN], axis=-1))
    weights = weights.astype(v_SNKC.dtype)
    weights_SKGU = weights[..., :slots]
    weights_SKGN = weights[..., slots:]
    out_SKGC = dot("SKGU,SKUC->SKGC", weights_SKGU, cache["v"])
    out_SKGC += dot("SKGN,SNKC->SKGC", weights_SKGN, v_SNKC)
    return out_SKGC.astype(v_SNKC.dtype).reshape(q_SNHC.shape)


def attend_rows(
    q_SRATHC,
    k_SRATKC,
    v_SRATKC,
    prompts: Prompts | None = None,
    *,
    stripe: Stripe = WHOLE,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Return attention of each response over its row's prompt, and over itself, causally.

    The result is [S, R, A, T, H, C]; softmax in float32. prompts: None where there are none.
    stripe: which places of a response the queries are of; it has keys of all. window: how many of
    the latest keys are seen, the query's own included. scale: what scores are multiplied by; None:
    1 / root of C. softcap: what scores are bent to stay within. kernel: see `choose`.

    Raises ValueError where a response could be further from its prompt than the window reaches.
    """
    width = q_SRATHC.shape[-1]
    kernel = choose(kernel, q_SRATHC.dtype, width, softcap, stripe.stripes)
    scale = width**-0.5 if scale is None else scale
    if prompts is not None and window is not None:
        longest = prompts.k.shape[2] + k_SRATKC.shape[3]
        if longest > window:
            raise ValueError(
                f"rows of {longest} tokens in two parts cannot have a window of {window}: give "
                "Batches the model's window."
            )
        window = None
    if kernel == "xla":
        return _in_blocks(q_SRATHC, k_SRATKC, v_SRATKC, prompts, stripe, window, scale, softcap)
    if kernel == "splash":
        function = functools.partial(_splash, stripe=stripe, scale=scale, softcap=softcap)
    else:
        function = functools.partial(_cudnn, scale=scale)
    over_responses = functools.partial(_over_responses, function, window)
    # A stripe is a device's own already.
    if stripe.stripes > 1:
        return over_responses(q_SRATHC, k_SRATKC, v_SRATKC, prompts)
    return _on_each_device(over_responses, q_SRATHC, k_SRATKC, v_SRATKC, prompts)


def choose(kernel: str, dtype, width: int, softcap: float | None = None, stripes: int = 1) -> str:
    """Return a key of KERNELS: the one named, or what `auto` stands for on the step's device.

    auto is splash on a TPU; cudnn on a GPU that `hardware.CHIPS` lists (others may not have it),
    for 16-bit numbers and heads of a width that all of these take, without a softcap, and for whole
    rows; elsewhere xla, the blocks written here. Raises ValueError where the named kernel cannot
    run.
    """
    where = device().platform
    dtype = jnp.dtype(dtype)
    if kernel == "auto":
        if where == "tpu":
            return "splash"
        if where == "gpu" and not why_not_cudnn(dtype, width, softcap, stripes):
            return "cudnn"
        return "xla"
    check(kernel, where)
    if kernel == "cudnn" and stripes > 1:
        raise ValueError(
            "config.model.attention = 'cudnn' does not run with config.mesh.context = "
            f"{stripes}: take auto, which is xla there."
        )
    if kernel == "cudnn" and (dtype.itemsize != 2 or width % 8 or width > 256):
        raise ValueError(
            "config.model.attention = 'cudnn' takes model.dtype=bfloat16 and heads of a multiple "
            f"of 8, up to 128 wide (256 on an H100 or H200), not {dtype} and {width}: take auto."
        )
    check_softcap(kernel, softcap)
    return kernel


def check_softcap(kernel: str, softcap: float | None) -> None:
    """Raise ValueError where a kernel that is named cannot bend scores as a model needs."""
    if kernel == "cudnn" and softcap is not None:
        raise ValueError(
            "config.model.attention = 'cudnn' has no softcap of scores, which this model needs: "
            "take auto."
        )


def why_not_cudnn(dtype, width: int, softcap: float | None, stripes: int = 1) -> str:
    """Return why `auto` does not take cuDNN's kernel on the step's GPU; "" where it does."""
    if stripes > 1:
        return "cuDNN has no mask for rows whose tokens several devices share (mesh.context)"
    if softcap is not None:
        return "cuDNN has no soft cap of scores"
    if jnp.dtype(dtype).itemsize != 2:
        return "cuDNN takes 16-bit numbers (--config.model.dtype=bfloat16)"
    # Wider heads, up to 256, run on an H100 and an H200 only, so auto stays with 128.
    if width % 8 or width > 128:
        return f"cuDNN takes heads of a multiple of 8 up to 128 wide, not {width}"
    return "" if chip_of(device()) else "this GPU may not have cuDNN's kernel"


def check(kernel: str, where: str) -> None:
    """Raise ValueError where a named kernel does not run on a platform."""
    if kernel != "auto" and where not in KERNELS[kernel]:
        raise ValueError(
            f"config.model.attention = {kernel!r} runs on {' and '.join(KERNELS[kernel])}, not on "
            f"{where}: take auto."
        )


def _on_each_device(local, q, k, v, extra: Prompts | Layout | None, tokens: str | None = None):
    """Run a function over each device's own shards and heads: the compiler cannot split a kernel.

    local: (q, k, v, extra) -> the outputs, in the place of q. q, k and v have shards first, then
    any axes, heads and a width. tokens: the mesh axis that splits their second axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, extra)

    heads = q.shape[-2]
    kv_heads = k.shape[-2]
    if heads % mesh.shape["tensor"] == 0:
        # Key heads are repeated until each device has its own.
        times = math.lcm(kv_heads, mesh.shape["tensor"]) // kv_heads
        k = jnp.repeat(k, times, axis=-2)
        v = jnp.repeat(v, times, axis=-2)
        if isinstance(extra, Prompts):
            k_SRUKC = jnp.repeat(extra.k, times, axis=3)
            v_SRUKC = jnp.repeat(extra.v, times, axis=3)
            extra = Prompts(k_SRUKC, v_SRUKC, extra.lengths)

    def spec(x):
        # An axis that a device count does not divide stays whole on every device (`fitting`).
        wanted = [BATCH, *[None] * (x.ndim - 1)]
        if jnp.issubdtype(x.dtype, jnp.floating):  # not lengths and indices
            wanted[1] = tokens
            wanted[-2] = "tensor"
        return fitting(mesh, PartitionSpec(*wanted), x.shape)

    arguments = (q, k, v, extra)
    specs = jax.tree.map(spec, arguments)
    # Varying axes are not checked: kernels do not say how their outputs vary over the mesh.
    split = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*arguments)


def _over_responses(kernel, window, q_SRATHC, k_SRATKC, v_SRATKC, prompts: Prompts | None):
    """Run a kernel over rows of one response each, with its own copy of the prompt's keys.

    kernel: (q_BTHC, k_BUKC, v_BUKC, seen_BU, window) -> out_BTHC, where the queries are those of
    the last T keys, or of a stripe of them, and seen_BU says which keys before those are there;
    None: there are none.
    """
    q_BTHC = q_SRATHC.reshape(-1, *q_SRATHC.shape[3:])
    k_BUKC, v_BUKC, seen_BU = _with_prompts(k_SRATKC, v_SRATKC, prompts)
    return kernel(q_BTHC, k_BUKC, v_BUKC, seen_BU, window).reshape(q_SRATHC.shape)


def _with_prompts(k_SRATKC, v_SRATKC, prompts: Prompts | None):
    """Return keys and values of each response with those of its prompt before, and which are there.

    k_BUKC, v_BUKC, and seen_BU of the prompt's part; None without prompts.
    """
    rows = k_SRATKC.shape[:3]

    def one_axis(x_SRA):
        return x_SRA.reshape(-1, *x_SRA.shape[3:])

    if prompts is None:
        return one_axis(k_SRATKC), one_axis(v_SRATKC), None

    def joined(prompt_SRUKC, own_SRATKC):
        copies_SRAUKC = jnp.broadcast_to(prompt_SRUKC[:, :, None], rows + prompt_SRUKC.shape[2:])
        return one_axis(jnp.concatenate([copies_SRAUKC, own_SRATKC], axis=3))

    places_U = jnp.arange(prompts.k.shape[2])
    seen_SRU = places_U < prompts.lengths[..., None]
    seen_BU = one_axis(jnp.broadcast_to(seen_SRU[:, :, None], (*rows, len(places_U))))
    return joined(prompts.k, k_SRATKC), joined(prompts.v, v_SRATKC), seen_BU


def _splash(q_BTHC, k_BUKC, v_BUKC, seen_BU, window, *, stripe: Stripe = WHOLE, scale, softcap):
    """Run JAX's Pallas kernel for TPUs, over padded rows; on a CPU it is interpreted, slowly."""
    # Imported here: it is experimental, and the other kernels must not depend on it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q_BTHC.shape[1:3]
    prompt_length = k_BUKC.shape[1] - length * stripe.stripes
    if stripe.stripes > 1:
        k_BUKC, v_BUKC, seen_BU = _before_stripe(k_BUKC, v_BUKC, seen_BU, stripe, prompt_length)
    longest_block = SPLASH_BLOCK[q_BTHC.dtype.itemsize]
    queries, query_block = _blocks(length, longest_block)
    # The prompt keeps its place before the padding of the response.
    padding = (queries - length) * stripe.stripes
    keys, key_block = _blocks(k_BUKC.shape[1] + padding, longest_block)
    # All padding of responses comes after their tokens, so a causal mask hides it from them.
    if window is None:
        mask = splash.CausalMask((queries, keys), offset=prompt_length)
    else:
        mask = splash.LocalMask((queries, keys), (window - 1, 0), prompt_length)
    if stripe.stripes > 1:
        mask.q_sequence = mask.q_sequence * stripe.stripes + stripe.stripes - 1
    blocks = splash.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
    )

    # Heads first. The kernel does not scale the queries.
    arrays = [_lengthened(q_BTHC * scale, queries).swapaxes(1, 2)]
    arrays += [_lengthened(x_BUKC, keys).swapaxes(1, 2) for x_BUKC in (k_BUKC, v_BUKC)]
    if seen_BU is not None:
        # A query sees keys of its own segment: 1, and 0 where a prompt is padded.
        after = keys - seen_BU.shape[1]
        is_there_BU = jnp.pad(seen_BU, ((0, 0), (0, after)), constant_values=True)
        segments = splash.SegmentIds(
            q=jnp.ones((len(seen_BU), queries), jnp.int32), kv=is_there_BU.astype(jnp.int32)
        )
        arrays.append(segments)

    def attend_rows(*arrays):
        # Made here: the backward pass is traced on its own, and may not read what another made.
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            interpret=device().platform == "cpu",
        )
        return jax.vmap(kernel)(*arrays)

    # The kernel refuses the precision float32 for bfloat16.
    precision = "default" if q_BTHC.dtype == jnp.bfloat16 else "float32"
    out_BHTC = _at_precision(precision, attend_rows)(*arrays)
    return out_BHTC.swapaxes(1, 2)[:, :length]


def _before_stripe(k_BUKC, v_BUKC, seen_BU, stripe: Stripe, prompt_length: int):
    """Move a response's keys so that the last stripe's mask is any stripe's; return which are seen.

    A kernel's mask is one for all devices, and that of the last stripe lets a query see the most:
    by `stripes - 1 - first` keys more than it should. So many are put before the response's own,
    and hidden as the padding of prompts is. Its last keys, which move past the end of the row, are
    kept: the arrays become longer by `stripes - 1`.
    """
    spare = stripe.stripes - 1

    def moved(x_BUKC):
        own_BTKC = jnp.pad(x_BUKC[:, prompt_length:], ((0, 0), (0, spare), (0, 0), (0, 0)))
        own_BTKC = jnp.roll(own_BTKC, spare - stripe.first, axis=1)
        return jnp.concatenate([x_BUKC[:, :prompt_length], own_BTKC], axis=1)

    if seen_BU is None:
        seen_BU = jnp.ones((len(k_BUKC), 0), bool)
    is_own_T = jnp.arange(spare) >= spare - stripe.first
    is_own_BT = jnp.broadcast_to(is_own_T, (len(k_BUKC), spare))
    return moved(k_BUKC), moved(v_BUKC), jnp.concatenate([seen_BU, is_own_BT], axis=1)


def _blocks(length: int, longest: int) -> tuple[int, int]:
    """Return a length that splash takes, and that of its blocks.

    As few blocks as fit on the chip, all equally long, so that the last is not mostly padding.
    """
    count = -(-length // longest)
    block = -(-length // (count * SPLASH_LANES)) * SPLASH_LANES
    return count * block, block


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


def _cudnn(q_BTHC, k_BUKC, v_BUKC, seen_BU, window, implementation="cudnn", *, scale=None):
    """Run NVIDIA's fused kernel; its backward pass may add in another order from run to run."""
    length = q_BTHC.shape[1]
    prompt_length = k_BUKC.shape[1] - length
    # Its backward pass takes even lengths only. What is added comes last, so that no query sees it.
    queries = length + length % 2
    keys = prompt_length + queries
    keys += keys % 2
    q_BTHC = _lengthened(q_BTHC, queries)
    k_BUKC = _lengthened(k_BUKC, keys)
    v_BUKC = _lengthened(v_BUKC, keys)
    mask_B1TU = None
    if seen_BU is not None:
        # Causal counts from the first key, which would be the prompt's.
        own_TU = jnp.arange(queries)[:, None] >= jnp.arange(keys - prompt_length)
        rows = len(seen_BU)
        seen_BTU = jnp.broadcast_to(seen_BU[:, None], (rows, queries, prompt_length))
        own_BTU = jnp.broadcast_to(own_TU, (rows, *own_TU.shape))
        mask_B1TU = jnp.concatenate([seen_BTU, own_BTU], axis=2)[:, None]
    out_BTHC = jax.nn.dot_product_attention(
        q_BTHC,
        k_BUKC,
        v_BUKC,
        mask=mask_B1TU,
        scale=scale,
        is_causal=seen_BU is None,
        implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )
    return out_BTHC[:, :length]


def _lengthened(x_BTHC, length: int):
    """Return rows padded with zeros to a length."""
    return jnp.pad(x_BTHC, ((0, 0), (0, length - x_BTHC.shape[1]), (0, 0), (0, 0)))


def _in_blocks(
    q_SRATHC, k_SRATKC, v_SRATKC, prompts: Prompts | None, stripe: Stripe, window, scale, softcap
):
    """Return attention in plain XLA.

    Blocks of queries see only the keys up to their end, or that of a group of them, so about half
    of the square is never computed, and each block is recomputed in the backward pass, so no [T, T]
    array is kept.
    """
    shards, rows, responses, length, heads, width = q_SRATHC.shape
    kv_heads = k_SRATKC.shape[4]
    # Heads first, keys transposed: each block is then two batched matrix products with nothing to
    # shuffle, which the CPU runs about twice as fast as the same products over [T, H, C].
    q_SRATKGC = (q_SRATHC * scale).reshape(
        shards, rows, responses, length, kv_heads, heads // kv_heads, width
    )
    q_SRKAGTC = q_SRATKGC.transpose(0, 1, 4, 2, 5, 3, 6)
    k_SRKACT = k_SRATKC.transpose(0, 1, 4, 2, 5, 3)
    v_SRKATC = v_SRATKC.transpose(0, 1, 4, 2, 3, 5)
    of_prompts = None
    keys = k_SRATKC.shape[3]
    if prompts is not None:
        k_SRKCU = prompts.k.transpose(0, 1, 3, 4, 2)
        v_SRKUC = prompts.v.transpose(0, 1, 3, 2, 4)
        keys += k_SRKCU.shape[-1]
        of_prompts = (k_SRKCU, v_SRKUC, prompts.lengths)

    def attend_block(q_block, k_keys, v_keys, first):
        """first: the first query's place among the keys, if it is the first stripe's."""
        of_block = Stripe(first + stripe.first, stripe.stripes)
        return _attend_block(
            q_block, k_keys, v_keys, of_prompts, stripe=of_block, window=window, softcap=softcap
        )

    # A single block is not recomputed: its scores are small.
    if keys > QUERY_BLOCK:
        attend_block = jax.checkpoint(attend_block)
    outputs = []
    for start, end in _groups_of_queries(length, stripe.stripes, window):
        # The keys from the first that the first query sees, to the last query's own.
        place = start * stripe.stripes
        first = 0 if window is None else max(0, place - window + 1)
        last = end * stripe.stripes
        q_group = q_SRKAGTC[..., start:end, :]
        k_keys = k_SRKACT[..., first:last]
        v_keys = v_SRKATC[..., first:last, :]
        if end - start <= QUERY_BLOCK:
            outputs.append(attend_block(q_group, k_keys, v_keys, place - first))
        else:
            outputs.append(
                _one_by_one(attend_block, q_group, k_keys, v_keys, place - first, stripe)
            )
    out_SRKAGTC = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=5)
    return out_SRKAGTC.transpose(0, 1, 3, 5, 2, 4, 6).reshape(q_SRATHC.shape)


def _groups_of_queries(length: int, stripes: int, window: int | None) -> list[tuple[int, int]]:
    """Return the first query and the end of each group of blocks whose keys are the same.

    A short row has a group for each block. In a long one several share a program and the keys of
    the last, of which a window leaves few that the others do not see.
    """
    blocks = -(-length // QUERY_BLOCK)
    # By the keys: a block of a stripe sees the places of as many blocks as there are stripes.
    of_group = min(blocks, -(-blocks * stripes // MOST_GROUPS))
    if window is not None:
        of_group = min(of_group, max(1, window // (QUERY_BLOCK * stripes)))
    starts = range(0, length, of_group * QUERY_BLOCK)
    return [(start, min(start + of_group * QUERY_BLOCK, length)) for start in starts]


def _one_by_one(attend_block, q_SRKAGTC, k_keys, v_keys, first: int, stripe: Stripe):
    """Return attention of several blocks in a loop, so that one's scores are there at a time."""
    length = q_SRKAGTC.shape[5]
    blocks = -(-length // QUERY_BLOCK)
    missing = blocks * QUERY_BLOCK - length
    q_SRKAGTC = jnp.pad(q_SRKAGTC, [(0, 0)] * 5 + [(0, missing), (0, 0)])
    split = (*q_SRKAGTC.shape[:5], blocks, QUERY_BLOCK, q_SRKAGTC.shape[6])
    q_blocks = jnp.moveaxis(q_SRKAGTC.reshape(split), 5, 0)
    firsts = first + jnp.arange(blocks) * QUERY_BLOCK * stripe.stripes
    out_blocks = jax.lax.map(
        lambda args: attend_block(args[0], k_keys, v_keys, args[1]), (q_blocks, firsts)
    )
    out_SRKAGTC = jnp.moveaxis(out_blocks, 0, 5).reshape(q_SRKAGTC.shape)
    return out_SRKAGTC[..., :length, :]


def _attend_block(
    q_SRKAGTC,
    k_SRKACU,
    v_SRKAUC,
    prompts,
    *,
    stripe: Stripe,
    window: int | None,
    softcap: float | None,
):
    """Return attention of a block of queries. `stripe` says at which keys they are.

    U: here the response's keys up to the block's end. prompts: k_SRKCW, v_SRKWC and lengths_SR of
    the rows' prompts, W tokens each, which all queries see; or None.
    """
    shards, rows, kv_heads, responses, groups, length, width = q_SRKAGTC.shape
    # I: G and T as one. The queries of all heads that share a key head are one matrix.
    q_SRKAIC = q_SRKAGTC.reshape(shards, rows, kv_heads, responses, groups * length, width)
    unseen = jnp.finfo(jnp.float32).min
    scores_SRKAIU = wide_product("SRKAIC,SRKACU->SRKAIU", q_SRKAIC, k_SRKACU)
    scores_SRKAIU = softcapped(scores_SRKAIU, softcap)
    query_T1 = stripe.first + stripe.stripes * jnp.arange(length)[:, None]
    key_1U = jnp.arange(k_SRKACU.shape[-1])[None, :]
    distance_TU = query_T1 - key_1U
    seen_TU = distance_TU >= 0
    if window is not None:
        seen_TU &= distance_TU < window
    seen_IU = jnp.tile(seen_TU, (groups, 1))
    scores_SRKAIU = jnp.where(seen_IU, scores_SRKAIU, unseen)
    highest_SRKAI1 = scores_SRKAIU.max(-1, keepdims=True)
    if prompts is not None:
        k_SRKCW, v_SRKWC, lengths_SR = prompts
        # The queries of all responses are one matrix: they see the same keys, which stay in one
        # place, however many responses there are.
        q_SRKJC = q_SRKAIC.reshape(shards, rows, kv_heads, -1, width)
        scores_SRKJW = wide_product("SRKJC,SRKCW->SRKJW", q_SRKJC, k_SRKCW)
        scores_SRKJW = softcapped(scores_SRKJW, softcap)
        seen_SRW = jnp.arange(k_SRKCW.shape[-1]) < lengths_SR[..., None]
        scores_SRKJW = jnp.where(seen_SRW[:, :, None, None], scores_SRKJW, unseen)
        highest_SRKJ1 = scores_SRKJW.max(-1, keepdims=True)
        highest_SRKAI1 = jnp.maximum(highest_SRKAI1, highest_SRKJ1.reshape(highest_SRKAI1.shape))
    # The highest score is taken off against overflow. It cancels, so it needs no gradient.
    highest_SRKAI1 = jax.lax.stop_gradient(highest_SRKAI1)
    weights_SRKAIU = jnp.exp(scores_SRKAIU - highest_SRKAI1)
    out_SRKAIC = wide_product(
        "SRKAIU,SRKAUC->SRKAIC", weights_SRKAIU.astype(v_SRKAUC.dtype), v_SRKAUC
    )
    total_SRKAI1 = weights_SRKAIU.sum(-1, keepdims=True)
    if prompts is not None:
        highest_SRKJ1 = highest_SRKAI1.reshape(highest_SRKJ1.shape)
        weights_SRKJW = jnp.exp(scores_SRKJW - highest_SRKJ1)
        out_SRKJC = wide_product("SRKJW,SRKWC->SRKJC", weights_SRKJW.astype(v_SRKWC.dtype), v_SRKWC)
        out_SRKAIC += out_SRKJC.reshape(out_SRKAIC.shape)
        total_SRKAI1 += weights_SRKJW.sum(-1, keepdims=True).reshape(total_SRKAI1.shape)
    # Divided after the product: that is C numbers for each query, not one for each key.
    out_SRKAIC /= total_SRKAI1
    return out_SRKAIC.astype(v_SRKAUC.dtype).reshape(q_SRKAGTC.shape)


# Tokens to rows and back are gathers whose transposes are gathers too: scatters would be slow on a
# CPU, and on a GPU would add in an order that changes from run to run. So each backward pass is
# written out below. Indices have no gradient: None.


@jax.custom_vjp
def _spread(x_SN, index_SZ, token_slots_SNJ):
    """Return x[s, index[s]]: the token of each slot."""
    return _take(x_SN, index_SZ)


def _spread_forward(x_SN, index_SZ, token_slots_SNJ):
    return _take(x_SN, index_SZ), (index_SZ, token_slots_SNJ)


def _spread_backward(indices, grad_SZ):
    index_SZ, token_slots_SNJ = indices
    slots = token_slots_SNJ.shape[-1]
    if slots > MOST_SLOTS:
        # Each gather reads all tokens, so with many slots a scatter is faster after all. Slots of
        # padding, which stand for token 0, have no gradient: no output is taken from their rows.
        def add_up(grad_Z, index_Z):
            return jax.ops.segment_sum(grad_Z, index_Z, token_slots_SNJ.shape[1])

        return jax.vmap(add_up)(grad_SZ, index_SZ), None, None
    # A token of the prompt is in a slot of each row: the gradients of all its slots add up. A token
    # in fewer slots than J has -1 for the others, which give nothing.
    grad_SN = 0
    for j in range(slots):
        slot_SN = token_slots_SNJ[..., j]
        grad_SN += _masked(_take(grad_SZ, slot_SN), slot_SN >= 0)
    return grad_SN, None, None


@jax.custom_vjp
def _collect(x_SZ, first_slot_SN, index_SZ):
    """Return x[s, first_slot[s]]: each token's output, from the first of its slots."""
    return _take(x_SZ, first_slot_SN)


def _collect_forward(x_SZ, first_slot_SN, index_SZ):
    return _take(x_SZ, first_slot_SN), (first_slot_SN, index_SZ)


def _collect_backward(indices, grad_SN):
    first_slot_SN, index_SZ = indices
    # A token's output is taken from one of its slots, so that slot alone has a gradient: the slot
    # to which its own token goes back.
    read_slot_SZ = _take(first_slot_SN, index_SZ)
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

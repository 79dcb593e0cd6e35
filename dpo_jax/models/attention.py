"""Causal attention over rows gathered from a flat run of tokens.

A batch is one flat run of tokens per shard, where a prompt is laid down once and both its responses
follow. Attention alone sees whole sequences: it gathers them into right-padded rows, runs plain
causal attention there, and takes each token's output back. See `data/layout.py` for the indices and
`transformer.py` for the letters in array names.
"""

import functools

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # queries per block; keys after a block are never touched


def attend(q_SNHC, k_SNKC, v_SNKC, rows=None, back_SN=None, *, window: int | None = None) -> jax.Array:
    """Attention of each token over its own sequence so far.

    rows: tuple of rows_SRT, indices into N of each row's tokens, one array per length bucket;
        None when each shard's N tokens are themselves one row.
    back_SN: where in the concatenated, flattened rows each token's output is found.
    Returns [S, N, H, C].
    """
    if rows is None:
        return causal_attention(q_SNHC[:, None], k_SNKC[:, None], v_SNKC[:, None], window=window)[:, 0]
    outputs = []
    for rows_SRT in rows:
        out_SRTHC = causal_attention(*(_take(x, rows_SRT) for x in (q_SNHC, k_SNKC, v_SNKC)), window=window)
        shards, row_count, length, *rest = out_SRTHC.shape
        outputs.append(out_SRTHC.reshape(shards, row_count * length, *rest))
    return _take(jnp.concatenate(outputs, axis=1), back_SN)


def causal_attention(q_SRTHC, k_SRUKC, v_SRUKC, *, window: int | None = None) -> jax.Array:
    """Plain causal attention within rows; `window` keeps only that many latest keys, the query's own included.

    Blocks of queries see only the keys up to their end, so about half of the square is never computed, and
    each block is recomputed in the backward pass, so no [T, T] array is kept. Softmax in float32.
    """
    shards, rows, length, heads, width = q_SRTHC.shape
    kv_heads = k_SRUKC.shape[3]
    # Heads first, keys transposed: each block is then two batched matrix products with nothing to shuffle,
    # which the CPU runs about twice as fast as the same products over [T, H, C].
    q_SRTKGC = (q_SRTHC * width**-0.5).reshape(shards, rows, length, kv_heads, heads // kv_heads, width)
    q_SRKGTC = q_SRTKGC.transpose(0, 1, 3, 4, 2, 5)
    k_SRKCU = k_SRUKC.transpose(0, 1, 3, 4, 2)
    v_SRKUC = v_SRUKC.transpose(0, 1, 3, 2, 4)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        block = functools.partial(_attend_block, offset=start - first, window=window)
        block = jax.checkpoint(block) if length > QUERY_BLOCK else block
        blocks.append(block(q_SRKGTC[..., start:end, :], k_SRKCU[..., first:end], v_SRKUC[..., first:end, :]))
    out_SRKGTC = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=4)
    return out_SRKGTC.transpose(0, 1, 4, 2, 3, 5).reshape(q_SRTHC.shape)


def _attend_block(q_SRKGTC, k_SRKCU, v_SRKUC, *, offset: int, window: int | None):
    """Attention of a block of queries, the first of which sits at key `offset`."""
    shards, rows, kv_heads, groups, length, width = q_SRKGTC.shape
    q_SRKIC = q_SRKGTC.reshape(shards, rows, kv_heads, groups * length, width)  # I: G and T as one
    scores_SRKIU = jnp.einsum("SRKIC,SRKCU->SRKIU", q_SRKIC, k_SRKCU, preferred_element_type=jnp.float32)
    distance_TU = offset + jnp.arange(length)[:, None] - jnp.arange(k_SRKCU.shape[-1])[None, :]
    seen_TU = distance_TU >= 0
    if window is not None:
        seen_TU &= distance_TU < window
    scores_SRKIU = jnp.where(jnp.tile(seen_TU, (groups, 1)), scores_SRKIU, jnp.finfo(jnp.float32).min)
    weights_SRKIU = jnp.exp(scores_SRKIU - jax.lax.stop_gradient(scores_SRKIU.max(-1, keepdims=True)))
    out_SRKIC = jnp.einsum("SRKIU,SRKUC->SRKIC", weights_SRKIU.astype(v_SRKUC.dtype), v_SRKUC,
                           preferred_element_type=jnp.float32)
    out_SRKIC /= weights_SRKIU.sum(-1, keepdims=True)  # after the product: C numbers a query to divide, not U
    return out_SRKIC.astype(v_SRKUC.dtype).reshape(q_SRKGTC.shape)


def _take(x, index):
    """x[s, index[s]] for every shard s: indices of any rank into the second axis."""
    return jax.vmap(lambda shard, i: jnp.take(shard, i, axis=0, mode="clip"))(x, index)

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
    length = q_SRTHC.shape[2]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        block = functools.partial(_attend_block, offset=start - first, window=window)
        block = jax.checkpoint(block) if length > QUERY_BLOCK else block
        blocks.append(block(q_SRTHC[:, :, start:end], k_SRUKC[:, :, first:end], v_SRUKC[:, :, first:end]))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def _attend_block(q_SRTHC, k_SRUKC, v_SRUKC, *, offset: int, window: int | None):
    """Attention of a block of queries, the first of which sits at key `offset`."""
    shards, rows, length, heads, width = q_SRTHC.shape
    kv_heads = k_SRUKC.shape[3]
    q_SRTKGC = q_SRTHC.reshape(shards, rows, length, kv_heads, heads // kv_heads, width)
    scores_SRKGTU = jnp.einsum("SRTKGC,SRUKC->SRKGTU", q_SRTKGC * width**-0.5, k_SRUKC,
                               preferred_element_type=jnp.float32)
    distance_TU = offset + jnp.arange(length)[:, None] - jnp.arange(k_SRUKC.shape[2])[None, :]
    seen_TU = distance_TU >= 0
    if window is not None:
        seen_TU &= distance_TU < window
    scores_SRKGTU = jnp.where(seen_TU, scores_SRKGTU, jnp.finfo(jnp.float32).min)
    weights_SRKGTU = jax.nn.softmax(scores_SRKGTU, axis=-1).astype(v_SRUKC.dtype)
    out_SRTKGC = jnp.einsum("SRKGTU,SRUKC->SRTKGC", weights_SRKGTU, v_SRUKC)
    return out_SRTKGC.reshape(q_SRTHC.shape)


def _take(x, index):
    """x[s, index[s]] for every shard s: indices of any rank into the second axis."""
    return jax.vmap(lambda shard, i: jnp.take(shard, i, axis=0, mode="clip"))(x, index)

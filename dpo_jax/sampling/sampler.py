"""Sampling: prefill and a compiled decode loop over a cache of keys and values, many prompts at a
time.

A completion depends on its prompt, its index and the seed alone: each row has random keys of its
own, its tokens sit at its own positions, and padding behind a prompt has no weight. Whole batches
of rows are split over the mesh. Settings are traced and shapes are few, so that one program serves
many calls.

Letters: B rows (a prompt and which of its completions), T tokens of a padded prompt, M new tokens,
V vocabulary, in G groups of W tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models import transformer
from dpo_jax.models.loading import Model
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import BATCH, constrain

# prompts are padded to this many tokens or a power of 2 times it, so that few programs are compiled
SHORTEST = 8
GROUP = 128  # tokens among which a draw chooses at once
NO_EOS = -1
INFINITY = np.float32(np.inf).view(np.int32)  # its bits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn, and how many."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # draw among the k likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that make up this share
    n: int = 1  # completions of each prompt
    seed: int = 0
    batch_size: int = 64  # completions at a time, over all devices


@dataclasses.dataclass
class Completion:
    """What was sampled after a prompt."""

    tokens: np.ndarray  # int32, EOS included where it ended by it
    # float32 nats, of each token under the model itself: temperature 1 and nothing cut
    log_probs: np.ndarray
    ended: bool  # by EOS, rather than by length


def sample(
    model: Model, prompts: list[np.ndarray], sampling: Sampling, *, first: int = 0
) -> list[list[Completion]]:
    """Sample `sampling.n` completions of each prompt, token ids.

    first: the index of the first prompt among those that share the seed. Raises ValueError for
    settings or prompts that cannot be sampled.
    """
    check(model.config, prompts, sampling, first=first)
    n, mesh, eos_id = sampling.n, model.mesh, model.eos_id
    order = sorted(
        range(len(prompts)), key=lambda row: len(prompts[row])
    )  # like lengths share a batch: less padding
    rows = np.array([(row, number) for row in order for number in range(n)]).reshape(-1, 2)
    batch_size = min(sampling.batch_size, _power_of_2(len(rows)))
    batch_size = sharding.whole_shards(batch_size, mesh)
    found = [[None] * n for _ in prompts]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = part[
            np.arange(batch_size) % len(part)
        ]  # the last batch is filled up with rows that are thrown away
        batch = _batch(prompts, filled, first)
        with jax.set_mesh(mesh):
            drawn = _generate(
                model.config,
                sampling.max_new_tokens,
                model.params,
                sharding.shard_batch(mesh, batch, axis=0),
                np.uint32(sampling.seed % 2**32),
                np.int32(NO_EOS if eos_id is None else eos_id),
                np.float32(sampling.temperature),
                np.int32(sampling.top_k),
                np.float32(sampling.top_p),
            )
        for (row, number), *values in zip(part, *map(np.asarray, drawn), strict=False):
            found[row][number] = _completion(*values, eos_id)
    return found


def check(
    config: TransformerConfig, prompts: list[np.ndarray], sampling: Sampling, *, first: int = 0
) -> None:
    """Raise ValueError for settings or prompts that `sample` would refuse."""
    for name, value, least in (
        ("max_new_tokens", sampling.max_new_tokens, 1),
        ("temperature", sampling.temperature, 0),
        ("top_k", sampling.top_k, 0),
        ("n", sampling.n, 1),
        ("first", first, 0),
        ("batch_size", sampling.batch_size, 1),
    ):
        if not least <= value < np.inf:
            raise ValueError(f"{name}={value}: expected {least} or more.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"top_p={sampling.top_p}: expected more than 0, and at most 1, which keeps all tokens."
        )
    for row, prompt in enumerate(prompts, first):
        if not len(prompt):
            raise ValueError(
                f"prompt {row} is empty: it needs a token, such as BOS, to predict the first one from."
            )
        if not 0 <= np.min(prompt) <= np.max(prompt) < config.vocab:
            raise ValueError(
                f"prompt {row} has tokens from {np.min(prompt)} to {np.max(prompt)}, but the model's "
                f"vocabulary is 0 to {config.vocab - 1}: its tokenizer is another model's."
            )
        if (
            config.learned_positions
            and len(prompt) + sampling.max_new_tokens > config.max_positions
        ):
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, and with max_new_tokens="
                f"{sampling.max_new_tokens} it passes the model's {config.max_positions} positions: "
                "shorten the prompts or max_new_tokens."
            )


def _batch(prompts, rows, first: int) -> dict:
    """Prompts [B, T] padded on the right, their lengths, and the numbers that make up each row's
    key.
    """
    ids = [prompts[row] for row, _ in rows]
    width = SHORTEST * _power_of_2(-(-max(map(len, ids)) // SHORTEST))
    tokens_BT = np.zeros((len(ids), width), np.int32)
    for line, prompt in zip(tokens_BT, ids, strict=True):
        line[: len(prompt)] = prompt
    return dict(
        tokens=tokens_BT,
        lengths=np.array([len(prompt) for prompt in ids], np.int32),
        rows=(rows[:, 0] + first).astype(np.uint32),
        numbers=rows[:, 1].astype(np.uint32),
    )


def _power_of_2(size: int) -> int:
    """The least power of 2 that is not below a size."""
    return 1 << max(size - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(config, max_new_tokens, params, batch, seed, eos_id, temperature, top_k, top_p):
    """Tokens and their log-probs, [B, M] each; 0 behind a row's EOS."""
    tokens_BT, lengths_B = batch["tokens"], batch["lengths"]
    rows, width = tokens_BT.shape
    keys_B = jax.vmap(
        lambda row, number: jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), row), number
        )
    )(batch["rows"], batch["numbers"])
    positions_BT = jnp.broadcast_to(jnp.arange(width), tokens_BT.shape)
    cache = transformer.empty_cache(config, rows, width + max_new_tokens)
    x_BTD, cache = transformer.step(config, params, tokens_BT, positions_BT, cache)
    x_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]

    def going_on(state):
        return (state["m"] < max_new_tokens) & ~state["done_B"].all()

    def draw_next(state):
        m, done_B = state["m"], state["done_B"]
        logits_BV = constrain(transformer.unembed(config, params, state["x_BD"]), BATCH, "tensor")
        keys_m_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, m)
        token_B = _draw(logits_BV, keys_m_B, temperature, top_k, top_p)
        is_drawn_BV = jnp.arange(config.vocab) == token_B[:, None]
        log_prob_B = jnp.where(is_drawn_BV, logits_BV, 0).sum(-1) - jax.nn.logsumexp(
            logits_BV, axis=-1
        )
        token_B, log_prob_B = jnp.where(done_B, 0, token_B), jnp.where(done_B, 0, log_prob_B)
        x_B1D, cache = transformer.step(
            config, params, token_B[:, None], (lengths_B + m)[:, None], state["cache"]
        )
        return dict(
            m=m + 1,
            done_B=done_B | (token_B == eos_id),
            x_BD=x_B1D[:, 0],
            cache=cache,
            tokens_BM=state["tokens_BM"].at[:, m].set(token_B),
            log_probs_BM=state["log_probs_BM"].at[:, m].set(log_prob_B),
        )

    shape = (rows, max_new_tokens)
    state = jax.lax.while_loop(
        going_on,
        draw_next,
        dict(
            m=0,
            done_B=jnp.zeros(rows, bool),
            x_BD=x_BD,
            cache=cache,
            tokens_BM=jnp.zeros(shape, jnp.int32),
            log_probs_BM=jnp.zeros(shape, jnp.float32),
        ),
    )
    return constrain(state["tokens_BM"]), constrain(state["log_probs_BM"])


def _draw(logits_BV, keys_B, temperature, top_k, top_p) -> jax.Array:
    """A token for each row, int32 [B]."""

    def at_random():
        scores_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        scores_BV = jax.lax.cond(
            (top_k > 0) | (top_p < 1), lambda: _cut(scores_BV, top_k, top_p), lambda: scores_BV
        )
        return _draw_in_proportion(jnp.exp(scores_BV), keys_B)

    return jax.lax.cond(temperature > 0, at_random, lambda: logits_BV.argmax(-1)).astype(jnp.int32)


def _draw_in_proportion(weights_BV, keys_B) -> jax.Array:
    """An index for each row, each as likely as its weight: first a group of them, then one of the
    group, [B].

    Two uniforms a row, where noise for every token would cost as much as the model; and a rare
    token's chance is as exact as a common one's.
    """
    rows, width = weights_BV.shape
    weights_BGW = jnp.pad(weights_BV, ((0, 0), (0, -width % GROUP))).reshape(rows, -1, GROUP)
    uniforms_2B = jax.vmap(lambda key: jax.random.uniform(key, 2), out_axes=1)(keys_B)
    group_B = _invert_cdf(weights_BGW.sum(-1), uniforms_2B[0])
    within_BW = jnp.take_along_axis(weights_BGW, group_B[:, None, None], axis=1)[:, 0]
    return group_B * GROUP + _invert_cdf(within_BW, uniforms_2B[1])


def _invert_cdf(weights_BW, uniform_B) -> jax.Array:
    """The first index up to which more than the share uniform_B of the weights lies, [B]; never one
    without weight.
    """
    upto_BW = jnp.where(weights_BW > 0, jnp.cumsum(weights_BW, -1), 0)
    return (upto_BW > uniform_B[:, None] * upto_BW.max(-1, keepdims=True)).argmax(-1)


def _cut(scores_BV, top_k, top_p) -> jax.Array:
    """The scores with -inf in place of all but the top_k highest, then of all but the fewest that
    make up top_p.

    scores: at most 0. As in transformers; but tokens that tie with the last one kept are kept too.
    """
    depth_BV = jax.lax.bitcast_convert_type(jnp.abs(scores_BV), jnp.int32)
    kept_BV = _likeliest(depth_BV, jnp.ones_like(scores_BV), jnp.where(top_k > 0, top_k, jnp.inf))
    share_BV = jax.nn.softmax(jnp.where(kept_BV, scores_BV, -jnp.inf))
    kept_BV &= _likeliest(depth_BV, share_BV, jnp.where(top_p < 1, top_p, jnp.inf))
    return jnp.where(kept_BV, scores_BV, -jnp.inf)


def _likeliest(depth_BV, weights_BV, enough) -> jax.Array:
    """Which tokens are the fewest, likeliest first, whose weights add up to enough; all, where they
    never do.

    depth: how far below the likeliest, the bits of a float as an integer, which have its order.
    That of the last token kept is found by halving its range: a sort takes several times as long on
    a CPU, and wants the whole vocabulary in one place.
    """

    def halve(_, ends):
        low_B1, high_B1 = ends
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        reached_B1 = (
            jnp.where(depth_BV <= middle_B1, weights_BV, 0).sum(-1, keepdims=True) >= enough
        )
        return jnp.where(reached_B1, low_B1, middle_B1 + 1), jnp.where(
            reached_B1, middle_B1, high_B1
        )

    low_B1 = jnp.zeros_like(depth_BV[:, :1])
    _, high_B1 = jax.lax.fori_loop(0, 31, halve, (low_B1, low_B1 + INFINITY))
    return depth_BV <= high_B1


def _completion(tokens_M, log_probs_M, eos_id: int | None) -> Completion:
    ends = np.flatnonzero(tokens_M == (NO_EOS if eos_id is None else eos_id))
    count = ends[0] + 1 if len(ends) else len(tokens_M)
    return Completion(tokens_M[:count].copy(), log_probs_M[:count].copy(), bool(len(ends)))

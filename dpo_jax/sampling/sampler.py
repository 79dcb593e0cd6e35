"""Sampling: prefill and a compiled decode loop over a cache of keys and values.

Many prompts are sampled from at a time, and each is read once for its completions of a batch. A
completion depends on its prompt, its index and the seed alone: each row has random keys of its own,
its tokens sit at its own positions, and padding after a prompt has no weight. Batches of rows are
split over the mesh. Settings are traced and shapes are few, so that one program serves many calls.

Letters: P prompts, n completions of each, B = P n rows (a prompt and which of its completions), T
tokens of a padded prompt, M new tokens, D width, V vocabulary, in G groups of W tokens. The cache's
letters are those of transformer.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import stopping
from dpo_jax.data.packing import pad_right
from dpo_jax.models import transformer
from dpo_jax.models.loading import Model
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import BATCH, constrain

# Prompts are padded to a power of 2 times this many tokens, so that few programs are compiled.
SHORTEST = 8
GROUP = 128  # tokens of the vocabulary in a group; a draw chooses a group, then one of its tokens
NO_EOS = -1  # a token id that is never drawn
INFINITY = np.float32(np.inf).view(np.int32)  # its bits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling: how completions are drawn, and how many."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # draw among the k likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that make up this share
    n: int = 1  # completions of each prompt
    seed: int = 0
    batch_size: int = 64  # completions at a time, over all devices
    # Above 0: the likeliest completion that beam search with so many beams finds (beam.py), and
    # nothing is drawn.
    beams: int = 0


@dataclasses.dataclass
class Completion:
    """One sampled completion of a prompt."""

    tokens: np.ndarray  # int32, EOS included where it ended by it
    # float32 nats, of each token under the model itself: temperature 1 and nothing cut
    log_probs: np.ndarray
    ended: bool  # by EOS or another of the model's stop_ids, not by length


def sample(
    model: Model, prompts: list[np.ndarray], sampling: Sampling, *, first: int = 0
) -> list[list[Completion]]:
    """Sample `sampling.n` completions of each prompt, token ids.

    first: the index of the first prompt among those that share the seed. Raises ValueError for
    settings or prompts that cannot be sampled.
    """
    check(model.config, prompts, sampling, first=first)
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    count, n = _batch_sizes(len(prompts), sampling, sharding.batch_shards(model.mesh))
    # A prompt of more than n completions comes several times.
    starts = [(index, number) for index in order for number in range(0, sampling.n, n)]
    starts = np.array(starts).reshape(-1, 2)
    found = [[None] * sampling.n for _ in prompts]
    for start in range(0, len(starts), count):
        stopping.may_stop()
        part = starts[start : start + count]
        # The last batch is filled up with prompts whose completions are thrown away.
        filled = part[np.arange(count) % len(part)]
        batch = _batch(prompts, filled, n, first)
        with jax.set_mesh(model.mesh):
            tokens_BM, log_probs_BM = _generate(
                model.config,
                sampling.max_new_tokens,
                model.params,
                sharding.shard_batch(model.mesh, batch, axis=0),
                _settings(sampling, model.stop_ids),
            )
        tokens_BM = np.asarray(tokens_BM)
        log_probs_BM = np.asarray(log_probs_BM)
        for place, (index, first_number) in enumerate(part):
            # The last ones of a prompt may be more than were asked for.
            for number in range(first_number, min(first_number + n, sampling.n)):
                row = place * n + number - first_number
                found[index][number] = completion(tokens_BM[row], log_probs_BM[row], model.stop_ids)
    return found


def _batch_sizes(prompts: int, sampling: Sampling, shards: int) -> tuple[int, int]:
    """Return how many prompts a batch has, and how many completions of each.

    prompts: how many there are in all. shards: how many a batch is split into.
    """
    # A shard has room for all completions of a prompt, or the prompt comes several times. It also
    # does where there are few, so that no shard is without work.
    rows = min(sampling.batch_size, prompts * sampling.n)
    most = max(1, rows // shards)
    parts = -(-sampling.n // most)
    n = -(-sampling.n // parts)
    count = max(1, sampling.batch_size // (n * shards)) * shards
    # A few prompts need no large batch; powers of 2, so that few programs are compiled.
    needed = -(-_power_of_2(prompts * parts) // shards) * shards
    return min(count, needed), n


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
        ("beams", sampling.beams, 0),
    ):
        if not least <= value < np.inf:
            raise ValueError(f"{name}={value}: expected {least} or more.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"top_p={sampling.top_p}: expected more than 0, and at most 1, which keeps all tokens."
        )
    if sampling.beams:
        _check_beams(sampling)
    for index, prompt in enumerate(prompts, first):
        # A completion's first token is predicted from the prompt's last.
        if not len(prompt):
            raise ValueError(
                f"prompt {index} is empty: it needs a token, such as BOS, to predict the first one "
                "from."
            )
        # A lookup out of range would not fail: jax clips it to another token.
        if not 0 <= np.min(prompt) <= np.max(prompt) < config.vocab:
            raise ValueError(
                f"prompt {index} has tokens from {np.min(prompt)} to {np.max(prompt)}, but the "
                f"model's vocabulary is 0 to {config.vocab - 1}: its tokenizer is another model's."
            )
        length = len(prompt) + sampling.max_new_tokens
        # Learned positions are a table with an end. Most rotary ones have none.
        if config.limit and length > config.max_positions:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, and with max_new_tokens="
                f"{sampling.max_new_tokens} it passes the model's {config.limit}: shorten the "
                "prompts or max_new_tokens."
            )


def _check_beams(sampling: Sampling) -> None:
    """Raise ValueError for settings that beam search has no use for, or too many beams."""
    unused = Sampling(sampling.max_new_tokens)
    for name in ("temperature", "top_k", "top_p", "n", "seed"):
        value, default = getattr(sampling, name), getattr(unused, name)
        if value != default:
            raise ValueError(
                f"{name}={value} with beams={sampling.beams}: expected {default}, its default, as "
                "beam search draws nothing and returns one completion. Leave one of the two out."
            )
    if sampling.beams > sampling.batch_size:
        raise ValueError(
            f"beams={sampling.beams}: expected at most batch_size={sampling.batch_size}, as the "
            "beams of a prompt are extended together. Raise batch_size."
        )


def _batch(prompts, starts: np.ndarray, n: int, first: int) -> dict:
    """Return prompts [P, T] padded on the right, their lengths, and the numbers of each row's key.

    starts: [P, 2], the index of the prompt and the number of the first of its n completions.
    """
    return padded([prompts[index] for index, _ in starts]) | dict(
        rows=(starts[:, 0] + first).astype(np.uint32),
        numbers=(starts[:, 1:] + np.arange(n)).astype(np.uint32),
    )


def padded(ids: list[np.ndarray]) -> dict:
    """Return prompts [P, T] padded on the right, and their lengths."""
    # Widths double, so a hundred lengths of prompts need a handful of programs.
    longest = max(map(len, ids))
    width = SHORTEST * _power_of_2(-(-longest // SHORTEST))
    lengths_P = np.array([len(prompt) for prompt in ids], np.int32)
    return dict(tokens=pad_right(ids, width), lengths=lengths_P)


def _settings(sampling: Sampling, stop_ids: tuple[int, ...]) -> dict:
    """Return the settings that are traced, so that others need no other program."""
    return dict(
        seed=np.uint32(sampling.seed % 2**32),
        # No token is -1, so without an EOS no row is ever done early.
        stop_ids=np.array(stop_ids or [NO_EOS], np.int32),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
    )


def _power_of_2(size: int) -> int:
    """Return the least power of 2 that is not below a size."""
    return 1 << max(size - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(config, max_new_tokens, params, batch, settings):
    """Return tokens and their log-probs, [B, M] each; 0 after a row's EOS."""
    prompts, n = batch["numbers"].shape
    rows = prompts * n
    lengths_B = jnp.repeat(batch["lengths"], n)
    rows_B = jnp.repeat(batch["rows"], n)
    numbers_B = batch["numbers"].ravel()
    keys_B = jax.vmap(_row_key, (None, 0, 0))(settings["seed"], rows_B, numbers_B)

    x_PD, cache = prefill(config, params, batch)
    # All completions of a prompt begin with its keys and values.
    x_BD = jnp.repeat(x_PD, n, axis=0)
    cache = {name: with_room(x_LPKUC, n, max_new_tokens) for name, x_LPKUC in cache.items()}

    def is_unfinished(state):
        # Once all rows have ended there is nothing left to draw.
        return (state["m"] < max_new_tokens) & ~state["done_B"].all()

    def draw_next(state):
        m = state["m"]
        done_B = state["done_B"]
        logits_BV = constrain(transformer.unembed(config, params, state["x_BD"]), BATCH, "tensor")
        # From the row's key and the token's number alone: other rows of the batch make no
        # difference.
        keys_m_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, m)
        token_B = _draw(logits_BV, keys_m_B, settings)
        # By comparison, not by a gather: each device looks at its own part of the vocabulary.
        is_drawn_BV = jnp.arange(config.vocab) == token_B[:, None]
        logit_B = jnp.where(is_drawn_BV, logits_BV, 0).sum(-1)
        # Under the model itself, before temperature and cuts, since that is what training compares
        # with.
        log_prob_B = logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
        # Rows that have ended go on in the loop with token 0, which nobody reads.
        token_B = jnp.where(done_B, 0, token_B)
        log_prob_B = jnp.where(done_B, 0, log_prob_B)
        # Right after the prompt's own end: the padding's slots are written over.
        positions_B1 = (lengths_B + m)[:, None]
        x_B1D, cache = transformer.step(
            config, params, token_B[:, None], positions_B1, state["cache"]
        )
        return dict(
            m=m + 1,
            done_B=done_B | (token_B[:, None] == settings["stop_ids"]).any(-1),
            x_BD=x_B1D[:, 0],
            cache=cache,
            tokens_BM=state["tokens_BM"].at[:, m].set(token_B),
            log_probs_BM=state["log_probs_BM"].at[:, m].set(log_prob_B),
        )

    start = dict(
        m=0,
        done_B=jnp.zeros(rows, bool),
        x_BD=x_BD,
        cache=cache,
        tokens_BM=jnp.zeros((rows, max_new_tokens), jnp.int32),
        log_probs_BM=jnp.zeros((rows, max_new_tokens), jnp.float32),
    )
    end = jax.lax.while_loop(is_unfinished, draw_next, start)
    return constrain(end["tokens_BM"]), constrain(end["log_probs_BM"])


def prefill(config, params, batch) -> tuple[jax.Array, dict]:
    """Return the hidden state of each prompt's last token, [P, D], and the cache of all of them."""
    tokens_PT = batch["tokens"]
    prompts, width = tokens_PT.shape
    positions_PT = jnp.broadcast_to(jnp.arange(width), tokens_PT.shape)
    cache = transformer.empty_cache(config, prompts, width)
    x_PTD, cache = transformer.step(config, params, tokens_PT, positions_PT, cache)
    x_PD = jnp.take_along_axis(x_PTD, (batch["lengths"] - 1)[:, None, None], axis=1)[:, 0]
    return x_PD, cache


def with_room(cache_LPKUC, n: int, slots: int) -> jax.Array:
    """Return the cache of the prompts' n rows each, [L, B, K, U, C], with room for more slots."""
    # A compiled loop cannot grow it, so there is room for all that may come.
    cache_LBKUC = jnp.repeat(cache_LPKUC, n, axis=1)
    cache_LBKUC = jnp.pad(cache_LBKUC, ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0)))
    return constrain(cache_LBKUC, None, BATCH, "tensor")


def _row_key(seed, row, number):
    """Return the key of a completion: its prompt's place, and its number among the prompt's."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), number)


def _draw(logits_BV, keys_B, settings) -> jax.Array:
    """Draw a token for each row, int32 [B]."""
    temperature = settings["temperature"]
    top_k = settings["top_k"]
    top_p = settings["top_p"]

    def at_random():
        # The maximum is taken off so that exp below is at most 1. It changes no probability.
        scores_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        # Cutting searches the vocabulary, so it is skipped where it would cut nothing.
        is_cut = (top_k > 0) | (top_p < 1)
        scores_BV = jax.lax.cond(is_cut, lambda: _cut(scores_BV, top_k, top_p), lambda: scores_BV)
        return _draw_in_proportion(jnp.exp(scores_BV), keys_B)

    def likeliest():
        return logits_BV.argmax(-1)

    return jax.lax.cond(temperature > 0, at_random, likeliest).astype(jnp.int32)


def _draw_in_proportion(weights_BV, keys_B) -> jax.Array:
    """Draw an index for each row, each as likely as its weight, [B].

    First a group of tokens is drawn, then one of the group. That takes two uniforms a row: noise
    for every token (Gumbel's) would cost as much as the model. And the chance of a rare token is as
    exact as that of a common one.
    """
    rows, width = weights_BV.shape
    # Padding has no weight, so it is never drawn.
    weights_BGW = jnp.pad(weights_BV, ((0, 0), (0, -width % GROUP))).reshape(rows, -1, GROUP)
    uniforms_2B = jax.vmap(lambda key: jax.random.uniform(key, 2), out_axes=1)(keys_B)
    # P(token) = P(group) P(token | group). Within a group of 128, float32 sums lose little; a sum
    # over the whole vocabulary would swallow the smallest weights.
    group_B = _invert_cdf(weights_BGW.sum(-1), uniforms_2B[0])
    within_BW = jnp.take_along_axis(weights_BGW, group_B[:, None, None], axis=1)[:, 0]
    return group_B * GROUP + _invert_cdf(within_BW, uniforms_2B[1])


def _invert_cdf(weights_BW, uniform_B) -> jax.Array:
    """Return the first index up to which more than the share uniform_B of the weights lies, [B].

    It is never one without weight.
    """
    # 0 where there is no weight: the strict comparison below never picks such an index.
    upto_BW = jnp.where(weights_BW > 0, jnp.cumsum(weights_BW, -1), 0)
    return (upto_BW > uniform_B[:, None] * upto_BW.max(-1, keepdims=True)).argmax(-1)


def _cut(scores_BV, top_k, top_p) -> jax.Array:
    """Return the scores with -inf for tokens outside of top_k, then of top_p.

    scores: at most 0. As in transformers, but tokens that tie with the last one kept are kept too.
    """
    # How far a score is below 0. The bits of floats that are not negative sort as the floats do.
    depth_BV = jax.lax.bitcast_convert_type(jnp.abs(scores_BV), jnp.int32)
    # Infinity is never reached, so it keeps all tokens. Weights of 1 count tokens; for top_p the
    # weights are probabilities.
    kept_BV = _likeliest(depth_BV, jnp.ones_like(scores_BV), jnp.where(top_k > 0, top_k, jnp.inf))
    # Shares are among those that top_k has left, as in transformers.
    share_BV = jax.nn.softmax(jnp.where(kept_BV, scores_BV, -jnp.inf))
    kept_BV &= _likeliest(depth_BV, share_BV, jnp.where(top_p < 1, top_p, jnp.inf))
    return jnp.where(kept_BV, scores_BV, -jnp.inf)


def _likeliest(depth_BV, weights_BV, enough) -> jax.Array:
    """Return which tokens are the fewest, likeliest first, whose weights add up to enough.

    All are, where they never do. depth: how far a token is below the likeliest, as an integer. The
    depth of the last token kept is found by halving its range of 31 bits: a sort takes several
    times as long on a CPU, and needs the whole vocabulary on one device.
    """

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        weight_B1 = jnp.where(depth_BV <= middle_B1, weights_BV, 0).sum(-1, keepdims=True)
        is_enough_B1 = weight_B1 >= enough
        low_B1 = jnp.where(is_enough_B1, low_B1, middle_B1 + 1)
        high_B1 = jnp.where(is_enough_B1, middle_B1, high_B1)
        return low_B1, high_B1

    # Bits of floats from 0 to infinity: 31 halvings leave one of them.
    low_B1 = jnp.zeros_like(depth_BV[:, :1])
    _, high_B1 = jax.lax.fori_loop(0, 31, halve, (low_B1, low_B1 + INFINITY))
    return depth_BV <= high_B1


def completion(tokens_M, log_probs_M, stop_ids: tuple[int, ...]) -> Completion:
    """Return what was drawn up to a token that ends it, or all of it."""
    eos_places = np.flatnonzero(np.isin(tokens_M, stop_ids))
    has_ended = len(eos_places) > 0
    count = eos_places[0] + 1 if has_ended else len(tokens_M)
    # Copies, or each completion would keep the whole batch's arrays in memory.
    return Completion(tokens_M[:count].copy(), log_probs_M[:count].copy(), has_ended)

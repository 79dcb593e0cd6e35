"""Log-probabilities of responses: the one primitive under every loss, and under `score`.

The head runs only where a completion token is predicted, in chunks that are computed again in the
backward pass, so that logits of all tokens, [tokens, vocabulary], never exist. Products accumulate
in float32, and log-probs are float32.

A microbatch is a `packing.Batch` whose arrays have a leading axis of shards S. Letters are those of
transformer.py, and Q: responses of a shard.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.data.packing import Batch
from dpo_jax.models import transformer
from dpo_jax.models.attention import Layout
from dpo_jax.models.experts import Routing
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.parallel.hardware import Chip, chip_of
from dpo_jax.parallel.sharding import BATCH, TOKENS, constrain, device

# The version of the numbers that the forward pass makes of weights and tokens. Raise it with every
# change that moves a log-prob by more than rounding, in this file or in what it calls: reference
# log-probs that were kept are then computed again, and an unfinished stage is not resumed on other
# numbers. tests/unit/models/test_forward_version.py says when.
FORWARD_VERSION = 1

# How much of a chip's memory the logits of a chunk may take, which is one shard's at a time.
CHUNK_SHARE = 1 / 64
CHUNK_LOGITS = 2**26  # the logits of a chunk on a chip that is not known: 256 MB
# On a CPU 16 MB, which its caches hold, but not for fewer positions than CPU_CHUNK: every chunk
# reads all of the head, and adds to all of its gradient.
CPU_CHUNK_LOGITS = 2**22
CPU_CHUNK = 512
# Without a gradient there is nothing to add to, and reading the head costs less than writing more
# logits than the caches hold.
CPU_CHUNK_FORWARD = 128


def response_log_probs(
    config: TransformerConfig, params, batch: Batch, *, gradient: bool = True
) -> jax.Array:
    """Return the summed log-prob of each response given its prompt, nats, float32 [S, Q].

    gradient: False says that none will be taken, as of a reference, and only affects the speed.
    """
    # Logits are taken at all completion tokens of a shard, whichever response they belong to.
    log_probs_SM = token_log_probs(config, params, batch, gradient=gradient)
    return by_response(log_probs_SM, batch)


class ExampleSums(NamedTuple):
    """Sums over the tokens of each example's responses, nats, float32 [S, P, K] each."""

    log_probs: jax.Array
    # log sum_v p(v)^2 of each step, over the vocabulary. No gradient goes through it.
    log_sum_squares: jax.Array | None = None
    # Log-probs of as many first tokens as the shortest of the example's responses has.
    shared_log_probs: jax.Array | None = None
    # How the routers of experts spread all of the tokens, not by example.
    routing: Routing | None = None


def example_log_probs(
    config: TransformerConfig,
    params,
    batch: Batch,
    *,
    squares: bool = False,
    shared: bool = False,
    routing: bool = False,
    gradient: bool = True,
) -> ExampleSums:
    """Return the summed log-probs of each example's responses, of one pass.

    squares, shared, routing: whether to return `log_sum_squares`, `shared_log_probs` and `routing`,
    too. gradient: as in `response_log_probs`.
    """
    if routing:
        x_SND, found_routing = batch_hidden_and_routing(config, params, batch)
    else:
        x_SND, found_routing = batch_hidden(config, params, batch), None
    x_SMD = _at_completions(x_SND, batch)
    log_sum_squares = None
    if squares:
        log_probs_SM, squares_SM = _in_chunks(
            config,
            _target_log_probs_and_squares,
            [(params, x_SMD)],
            batch.targets,
            gradient=gradient,
        )
        log_sum_squares = by_example(by_response(squares_SM, batch), batch)
    else:
        log_probs_SM = target_log_probs(config, params, x_SMD, batch.targets, gradient=gradient)
    log_probs_SPK = by_example(by_response(log_probs_SM, batch), batch)
    shared_log_probs = None
    if shared:
        shared_log_probs = _sum_of_shared(log_probs_SM, log_probs_SPK, batch)
    return ExampleSums(log_probs_SPK, log_sum_squares, shared_log_probs, found_routing)


def by_response(values_SM: jax.Array, batch: Batch) -> jax.Array:
    """Return the sum of each response's values, [S, Q], from those of completion tokens."""
    responses = batch.response_lengths.shape[-1]

    def sum_by_response(values_M, segment_ids_M):
        # Padding has a segment of its own, the last, which is left out.
        return jax.ops.segment_sum(values_M, segment_ids_M, responses)

    return jax.vmap(sum_by_response)(values_SM, batch.segment_ids)


def _sum_of_shared(log_probs_SM: jax.Array, whole_SPK: jax.Array, batch: Batch) -> jax.Array:
    """Return the sum over the first tokens of responses, as many as an example's shortest has.

    whole_SPK: the sum over all tokens. A response of several examples is cut differently in each,
    so its sums up to every token are made, and read where it is cut.
    """

    def add(earlier, later):
        (total, has_start), (log_prob, is_start) = earlier, later
        # Sums begin anew with each response: differences of longer ones would lose their digits.
        return jnp.where(is_start, log_prob, total + log_prob), has_start | is_start

    def read(sums_M, lengths_Q, response_index_PK, shared_PK):
        # Responses follow one another. One without a token has nothing to read.
        starts_Q = jnp.cumsum(lengths_Q) - lengths_Q
        last_PK = starts_Q[response_index_PK] + shared_PK - 1
        return jnp.where(shared_PK > 0, sums_M[last_PK], 0)

    before_SM = jnp.pad(batch.segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_start_SM = batch.segment_ids != before_SM
    sums_SM, _ = jax.lax.associative_scan(add, (log_probs_SM, is_start_SM), axis=1)
    lengths_SPK = by_example(batch.response_lengths, batch)
    shared_SPK = jnp.broadcast_to(lengths_SPK.min(-1, keepdims=True), lengths_SPK.shape)
    cut_SPK = jax.vmap(read)(sums_SM, batch.response_lengths, batch.response_index, shared_SPK)
    # The same bits where nothing is cut off, though they were added up in another order.
    return jnp.where(shared_SPK == lengths_SPK, whole_SPK, cut_SPK)


def by_example(values_SQ: jax.Array, batch: Batch) -> jax.Array:
    """Return the values of each example's responses, [S, P, K], from those of distinct ones."""
    shards = len(values_SQ)
    index_SI = batch.response_index.reshape(shards, -1)
    values_SI = jnp.take_along_axis(values_SQ, index_SI, axis=1)
    return values_SI.reshape(batch.response_index.shape)


def token_log_probs(
    config: TransformerConfig, params, batch: Batch, *, gradient: bool = True
) -> jax.Array:
    """Return the log-prob of each completion token, nats, float32 [S, M].

    Padding has the log-prob of some token 0, which is to be masked. gradient: as in
    `response_log_probs`.
    """
    x_SMD = completion_hidden(config, params, batch)
    return target_log_probs(config, params, x_SMD, batch.targets, gradient=gradient)


def likeliest_tokens(
    config: TransformerConfig, params, batch: Batch, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return each completion token's log-prob, and the likeliest tokens in its place.

    Log-probs are in nats, float32 [S, M]; the `count` likeliest tokens come first to last, with
    ids [S, M, count] and log-probs [S, M, count]. No gradient is taken.
    """
    models = [(params, completion_hidden(config, params, batch))]
    function = functools.partial(_likeliest, count)
    return _in_chunks(config, function, models, batch.targets, gradient=False)


def batch_hidden(config: TransformerConfig, params, batch: Batch) -> jax.Array:
    """Return the trunk's last hidden state of every token of a microbatch, [S, N, D]."""
    layout = Layout(batch.rows, batch.token_slots, stripes=batch.stripes)
    return transformer.hidden(config, params, batch.tokens, batch.positions, layout)


def batch_hidden_and_routing(
    config: TransformerConfig, params, batch: Batch
) -> tuple[jax.Array, Routing]:
    """Return `batch_hidden`, and how the routers of experts spread the tokens.

    A token counts for each response of an example that reads it, as if each had a row of its own.
    """
    counts_SN = batch.token_counts.astype(jnp.float32)
    layout = Layout(batch.rows, batch.token_slots, counts_SN, batch.stripes)
    return transformer.hidden_and_routing(config, params, batch.tokens, batch.positions, layout)


def completion_hidden(config: TransformerConfig, params, batch: Batch) -> jax.Array:
    """Return the trunk's last hidden state where each completion token is predicted, [S, M, D]."""
    return _at_completions(batch_hidden(config, params, batch), batch)


def _at_completions(x_SND, batch: Batch) -> jax.Array:
    # Gathered along `context`: the tokens before completions may be on any of its devices.
    x_SND = constrain(x_SND, BATCH)
    x_SMD = jnp.take_along_axis(x_SND, batch.logit_positions[..., None], axis=1)
    return constrain(x_SMD, BATCH)


def target_log_probs(
    config: TransformerConfig, params, x_SMD, targets_SM, *, gradient: bool = True
) -> jax.Array:
    """Return the log-prob of each target token, nats, float32 [S, M].

    x_SMD: the hidden states that predict them. gradient: as in `response_log_probs`.
    """
    models = [(params, x_SMD)]
    return _in_chunks(config, _target_log_probs, models, targets_SM, gradient=gradient)


def token_kls(
    config: TransformerConfig, params, reference, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Return each completion token's log-ratio, and the KL of the step that chose it.

    The log-ratio is log policy - log reference. The KL(policy || reference) is over the whole
    vocabulary, exact for that step. Nats, float32 [S, M] each.
    """
    models = []
    for weights in (params, reference):
        models.append((weights, completion_hidden(config, weights, batch)))
    return _in_chunks(config, _target_kls, models, batch.targets)


def chunk_logits(chip: Chip | None) -> int:
    """Return how many float32 logits of a shard are in memory at once.

    The fewer, the more chunks, and each reads the head once more.
    """
    if chip is None:
        return CHUNK_LOGITS
    return int(chip.hbm_gib * 2**30 * CHUNK_SHARE) // 4


@jax.named_scope("head")
def _in_chunks(
    config: TransformerConfig, function: Callable, models: list, targets_SM, gradient: bool = True
):
    """Return function(targets_SM, logits_SMV of each model), over chunks whose logits fit.

    The function's values are arrays [S, M, ...]. models: pairs of weights and their hidden states
    [S, M, D]. The logits are computed again in the backward pass.
    """
    parts = sharding.context_size()
    if parts == 1:
        return _in_chunks_of_shards(config, function, models, targets_SM, gradient)
    # Devices along `context` take parts of a shard's positions, as if each were a shard.
    models = [(params, _in_parts(x_SMD, parts)) for params, x_SMD in models]
    targets = _in_parts(targets_SM, parts)
    values = _in_chunks_of_shards(config, function, models, targets, gradient)
    return jax.tree.map(lambda x: _of_parts(x, targets_SM.shape), values)


def _in_parts(x_SM, parts: int):
    """Return the positions of each shard as those of several shards, padded with zeros."""
    missing = ((0, 0), (0, -x_SM.shape[1] % parts), *[(0, 0)] * (x_SM.ndim - 2))
    x_SM = jnp.pad(x_SM, missing)
    return constrain(x_SM.reshape(len(x_SM) * parts, -1, *x_SM.shape[2:]), TOKENS)


def _of_parts(x, shape: tuple[int, int]):
    """Return what `_in_parts` split as an array of this shape, and of the trailing axes of x."""
    shards, positions = shape
    x_SM = x.reshape(shards, -1, *x.shape[2:])[:, :positions]
    return constrain(x_SM, BATCH)


def _in_chunks_of_shards(config, function, models, targets_SM, gradient):
    shards, positions = targets_SM.shape
    # In positions: each has a logit for every token of the vocabulary.
    limit = chunk_logits(chip_of(device())) // config.vocab
    if device().platform == "cpu":
        least = CPU_CHUNK if gradient else CPU_CHUNK_FORWARD
        limit = min(limit, max(least, CPU_CHUNK_LOGITS // config.vocab))
    # Never below 128, or the product with the head would be too thin to be fast.
    chunks = -(-positions // max(128, limit))
    chunk = -(-positions // chunks)  # so that the last is about as large as the others
    heads = [_head(config, params) for params, _ in models]
    hidden = [x_SMD for _, x_SMD in models]
    unembed = functools.partial(transformer.unembed, config)
    # One chunk: no loop, and the logits may be kept for the backward pass.
    if positions <= chunk:
        return _of_logits(function, unembed, heads, hidden, targets_SM)
    # Gathered once, before the loop, and not once in each of its rounds.
    heads = [sharding.per_shard(head, shards) for head in heads]

    def split(x_SM):
        """Return [chunks, S, positions of a chunk, ...], padded with zeros."""
        # `lax.map` wants chunks of one size, on the first axis.
        missing = ((0, 0), (0, -positions % chunk), *[(0, 0)] * (x_SM.ndim - 2))
        x_SM = jnp.pad(x_SM, missing)
        return jnp.moveaxis(x_SM.reshape(shards, -1, chunk, *x_SM.shape[2:]), 1, 0)

    def join(x):
        # What came of the padding is cut off.
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(shards, chunks * chunk, *x.shape[3:])[:, :positions]

    def of_chunk(chunk_of_hidden_and_targets):
        return _of_logits(function, jax.vmap(unembed), heads, *chunk_of_hidden_and_targets)

    # Without the checkpoint the loop would keep the logits of all its chunks.
    inputs = (jax.tree.map(split, hidden), split(targets_SM))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(of_chunk), inputs))


def _head(config: TransformerConfig, params) -> dict:
    """Return the part of the weights that `unembed` reads."""
    # Only these weights are laid out again for the chunks: the scalar head and the trunk are not.
    head = {name: x for name, x in params.get("head", {}).items() if name != "scalar"}
    if not config.tied:
        return {"head": head}
    return {"head": head, "embed": {"tokens": params["embed"]["tokens"]}}


def _of_logits(function, unembed, heads, hidden, targets_SM):
    """Return function(targets, logits of each model), the logits split by vocabulary."""
    logits = []
    for head, x_SMD in zip(heads, hidden, strict=True):
        # Split by vocabulary: each device makes its part of the logits, and none is gathered.
        logits.append(constrain(unembed(head, x_SMD), TOKENS, None, "tensor"))
    return function(targets_SM, *logits)


def _target_log_probs(targets_SM, logits_SMV):
    # Not log_softmax, which would make another array as large as the logits.
    return _at(targets_SM, logits_SMV) - jax.nn.logsumexp(logits_SMV, axis=-1)


def _likeliest(count: int, targets_SM, logits_SMV):
    total_SM = jax.nn.logsumexp(logits_SMV, axis=-1)
    top_logits_SMk, top_ids_SMk = jax.lax.top_k(logits_SMV, count)
    log_probs_SM = _at(targets_SM, logits_SMV) - total_SM
    return log_probs_SM, top_ids_SMk, top_logits_SMk - total_SM[..., None]


def _target_log_probs_and_squares(targets_SM, logits_SMV):
    """Return log p of each target, and log sum_v p(v)^2 of its step, without a gradient."""
    fixed_SMV = jax.lax.stop_gradient(logits_SMV)
    log_totals_SM = jax.nn.logsumexp(fixed_SMV, axis=-1)
    squares_SM = jax.nn.logsumexp(2 * fixed_SMV, axis=-1) - 2 * log_totals_SM
    return _target_log_probs(targets_SM, logits_SMV), squares_SM


def _target_kls(targets_SM, logits_SMV, reference_logits_SMV):
    log_probs_SMV = jax.nn.log_softmax(logits_SMV)
    log_ratios_SMV = log_probs_SMV - jax.nn.log_softmax(reference_logits_SMV)
    # The expectation is over the policy: sum of p (log p - log q).
    kl_SM = (jnp.exp(log_probs_SMV) * log_ratios_SMV).sum(-1)
    return _at(targets_SM, log_ratios_SMV), kl_SM


def _at(targets_SM, values_SMV):
    """Return the value of each target, [S, M]."""
    # A comparison, not a gather: it stays on the device that holds its part of the vocabulary.
    is_target_SMV = jnp.arange(values_SMV.shape[-1]) == targets_SM[..., None]
    return jnp.where(is_target_SMV, values_SMV, 0).sum(-1)

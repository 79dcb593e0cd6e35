"""Log-probabilities of responses: the one primitive under every loss, live or cached, training or
scoring.

The head runs only where a response token is predicted, in chunks that are recomputed in the
backward pass, so [tokens, vocabulary] never exists; products accumulate, and log-probs are, in
float32.
"""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.models import transformer
from dpo_jax.models.attention import Layout
from dpo_jax.parallel import sharding
from dpo_jax.parallel.hardware import Chip, chip_of
from dpo_jax.parallel.sharding import BATCH, constrain, device

# The version of the numbers that the forward pass makes of weights and tokens. Raise it with every
# change that moves a log-prob by more than rounding, in this file or in what it calls: reference
# log-probs that were kept are then computed again, and an unfinished stage is not resumed on other
# numbers. tests/unit/models/test_forward_version.py says when.
FORWARD_VERSION = 1

CHUNK_SHARE = (
    1 / 64
)  # of a chip's memory: what the logits of a shard that are there at once may take,
CHUNK_LOGITS = 2**26  # and how many they are on a chip not known: 256 MB
CPU_CHUNK_LOGITS = 2**22  # 16 MB, which its caches hold,
# but not for fewer positions: each chunk reads all of the head, and adds to all of its gradient
CPU_CHUNK = 512


def response_log_probs(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """Summed log-probability of each response given its prompt, nats, float32 [S, Q].

    batch: one microbatch of `data/batches.py`, arrays with leading axis S.
    """
    log_probs_SM = token_log_probs(config, params, batch)
    responses = batch.response_lengths.shape[-1]
    return jax.vmap(
        lambda log_probs_M, segment_ids_M: jax.ops.segment_sum(
            log_probs_M, segment_ids_M, responses
        )
    )(log_probs_SM, batch.segment_ids)


def token_log_probs(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """Log-probability of each scored token, nats, float32 [S, M]; padding holds the log-prob of a
    token 0.
    """
    return target_log_probs(config, params, completion_hidden(config, params, batch), batch.targets)


def batch_hidden(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """The trunk's last hidden state of every token of a microbatch, [S, N, D]."""
    return transformer.hidden(
        config,
        params,
        batch.tokens,
        batch.positions,
        Layout(batch.rows, batch.gather_index, batch.token_slots),
    )


def completion_hidden(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """The trunk's last hidden state where each scored token is predicted, [S, M, D]."""
    x_SND = batch_hidden(config, params, batch)
    return constrain(jnp.take_along_axis(x_SND, batch.logit_positions[..., None], axis=1), BATCH)


def target_log_probs(config: transformer.TransformerConfig, params, x_SMD, targets_SM) -> jax.Array:
    """Log-probability of each target token from the hidden state that predicts it, nats, float32
    [S, M].
    """
    return _in_chunks(config, _target_log_probs, [(params, x_SMD)], targets_SM)


def token_kls(
    config: transformer.TransformerConfig, params, reference, batch
) -> tuple[jax.Array, jax.Array]:
    """Of each scored token the log-ratio log policy - log reference, and where it was chosen
    KL(policy || reference).

    The KL is over the whole vocabulary, exact for that step. Nats, float32 [S, M] each.
    """
    models = [
        (weights, completion_hidden(config, weights, batch)) for weights in (params, reference)
    ]
    return _in_chunks(config, _target_kls, models, batch.targets)


def chunk_logits(chip: Chip | None) -> int:
    """How many float32 logits of a shard are in memory at once; each chunk more reads the head once
    more.
    """
    return CHUNK_LOGITS if chip is None else int(chip.hbm_gib * 2**30 * CHUNK_SHARE) // 4


def _in_chunks(config, function, models, targets_SM):
    """function(targets_SM, logits_SMV of each model), at so few positions at a time that their
    logits fit.

    models: pairs of weights and their hidden states [S, M, D]. The logits are computed again in the
    backward pass.
    """
    shards, scored = targets_SM.shape
    limit = chunk_logits(chip_of(device())) // config.vocab
    if device().platform == "cpu":
        limit = min(limit, max(CPU_CHUNK, CPU_CHUNK_LOGITS // config.vocab))
    chunk = -(-scored // -(-scored // max(128, limit)))  # the last is about as large as the others
    heads, hidden = [_head(config, params) for params, _ in models], [x_SMD for _, x_SMD in models]
    unembed = functools.partial(transformer.unembed, config)
    if scored <= chunk:
        return _of_logits(function, unembed, heads, hidden, targets_SM)
    heads = [sharding.per_shard(head, shards) for head in heads]

    def in_chunks(x_SM):
        x_SM = jnp.pad(x_SM, ((0, 0), (0, -scored % chunk), *[(0, 0)] * (x_SM.ndim - 2)))
        return jnp.moveaxis(x_SM.reshape(shards, -1, chunk, *x_SM.shape[2:]), 1, 0)

    found = jax.lax.map(
        jax.checkpoint(lambda chunk: _of_logits(function, jax.vmap(unembed), heads, *chunk)),
        (jax.tree.map(in_chunks, hidden), in_chunks(targets_SM)),
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(shards, -1)[:, :scored], found)


def _head(config, params) -> dict:
    """The part of the weights that `unembed` reads."""
    head = {name: x for name, x in params.get("head", {}).items() if name != "scalar"}
    return {"head": head} | (
        {"embed": {"tokens": params["embed"]["tokens"]}} if config.tied else {}
    )


def _of_logits(function, unembed, heads, hidden, targets_SM):
    return function(
        targets_SM,
        *(
            constrain(unembed(head, x_SMD), BATCH, None, "tensor")
            for head, x_SMD in zip(heads, hidden, strict=True)
        ),
    )


def _target_log_probs(targets_SM, logits_SMV):
    return _at(targets_SM, logits_SMV) - jax.nn.logsumexp(logits_SMV, axis=-1)


def _target_kls(targets_SM, logits_SMV, reference_logits_SMV):
    log_probs_SMV = jax.nn.log_softmax(logits_SMV)
    ratio_SMV = log_probs_SMV - jax.nn.log_softmax(reference_logits_SMV)
    return _at(targets_SM, ratio_SMV), (jnp.exp(log_probs_SMV) * ratio_SMV).sum(-1)


def _at(targets_SM, values_SMV):
    # A comparison, not a gather: it stays on the device that holds its part of the vocabulary.
    return jnp.where(jnp.arange(values_SMV.shape[-1]) == targets_SM[..., None], values_SMV, 0).sum(
        -1
    )

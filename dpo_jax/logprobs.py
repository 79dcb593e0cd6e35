"""Log-probabilities of responses: the one primitive under every loss, live or cached, training or scoring.

The head runs only where a response token is predicted, in chunks that are recomputed in the backward pass, so
[tokens, vocabulary] never exists; products accumulate, and log-probs are, in float32.
"""

import jax
import jax.numpy as jnp

from dpo_jax.models import transformer
from dpo_jax.sharding import BATCH, constrain

CHUNK_LOGITS = 2**26  # logits of a shard that are in memory at once: 256 MB


def response_logprobs(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """Summed log-probability of each response given its prompt, nats, float32 [S, Q].

    batch: one microbatch of `data/batches.py`, arrays with leading axis S.
    """
    logp_SM = token_logprobs(config, params, batch)
    responses = batch["counts"].shape[-1]
    return jax.vmap(lambda logp_M, owner_M: jax.ops.segment_sum(logp_M, owner_M, responses))(
        logp_SM, batch["owner"])


def token_logprobs(config: transformer.TransformerConfig, params, batch) -> jax.Array:
    """Log-probability of each scored token, nats, float32 [S, M]; padding holds the log-prob of a token 0."""
    x_SND = transformer.hidden(
        config, params, batch["tokens"], batch["positions"], batch["rows"], batch["back"])
    x_SMD = constrain(jnp.take_along_axis(x_SND, batch["predict"][..., None], axis=1), BATCH)
    chunk = max(128, CHUNK_LOGITS // config.vocab)
    scored = x_SMD.shape[1]
    if scored <= chunk:
        return _chunk_logprobs(config, params, x_SMD, batch["targets"])
    pad = -scored % chunk
    chunks = (jnp.pad(x_SMD, ((0, 0), (0, pad), (0, 0))), jnp.pad(batch["targets"], ((0, 0), (0, pad))))
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0), chunks)
    one = jax.checkpoint(lambda args: _chunk_logprobs(config, params, *args))
    logp_SM = jnp.moveaxis(jax.lax.map(one, chunks), 0, 1).reshape(x_SMD.shape[0], -1)
    return logp_SM[:, :scored]


def _chunk_logprobs(config, params, x_SMD, targets_SM):
    logits_SMV = constrain(transformer.unembed(config, params, x_SMD), BATCH, None, "tensor")
    # A comparison, not a gather: it stays on the device that holds its part of the vocabulary.
    is_target_SMV = jnp.arange(config.vocab) == targets_SM[..., None]
    target_SM = jnp.where(is_target_SMV, logits_SMV, 0).sum(-1)
    return target_SM - jax.nn.logsumexp(logits_SMV, axis=-1)

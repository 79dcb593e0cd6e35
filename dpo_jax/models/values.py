"""Outputs of a scalar head: a reward for each response, or a value for each completion token."""

import jax
import jax.numpy as jnp

from dpo_jax.data.packing import Batch
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import batch_hidden, completion_hidden, target_log_probs
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel.sharding import BATCH, constrain


def response_rewards(config: TransformerConfig, params, batch: Batch) -> jax.Array:
    """Return a reward model's reward of each response, read at its last token, float32 [S, Q]."""
    x_SND = batch_hidden(config, params, batch)
    x_SQD = jnp.take_along_axis(x_SND, batch.last_token[..., None], axis=1)
    return transformer.scalar(params, constrain(x_SQD, BATCH))


def token_values(config: TransformerConfig, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the log-prob of each completion token, and the value of the state before it.

    Float32 [S, M] each; one pass of the trunk gives both.
    """
    x_SMD = completion_hidden(config, params, batch)
    log_probs_SM = target_log_probs(config, params, x_SMD, batch.targets)
    return log_probs_SM, transformer.scalar(params, x_SMD)

"""What a scalar head says: a reward of each response, a value of each token."""

import jax
import jax.numpy as jnp

from dpo_jax.models import transformer
from dpo_jax.models.log_probs import batch_hidden, completion_hidden, target_log_probs


def response_rewards(model, params, batch) -> jax.Array:
    """A reward model's score of each response, read at its last token, float32 [S, Q]."""
    x_SND = batch_hidden(model, params, batch)
    return transformer.scalar(
        params, jnp.take_along_axis(x_SND, batch.last_token[..., None], axis=1)
    )


def token_values(model, params, batch) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each scored token, and the value of the state it is chosen in, float32 [S, M]."""
    x_SMD = completion_hidden(model, params, batch)
    return target_log_probs(model, params, x_SMD, batch.targets), transformer.scalar(params, x_SMD)

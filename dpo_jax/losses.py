"""Losses on log-probabilities: pure jnp, one value per example.

A response's log-probability is the sum over its tokens, in nats. A log-ratio is the policy's minus the
reference's; `beta` times it is the implicit reward (Rafailov et al. 2023, eq. 5).
"""

import jax
import jax.numpy as jnp


def sigmoid(margin, beta, label_smoothing=0.0) -> jax.Array:
    """DPO: -log sigmoid(beta margin), where margin is chosen minus rejected log-ratio (eq. 7).

    label_smoothing > 0 is conservative DPO: that share of the labels is taken as flipped.
    """
    return (-(1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
            - label_smoothing * jax.nn.log_sigmoid(-beta * margin))


def robust(margin, beta, label_smoothing=0.0) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024): an unbiased estimate of DPO's loss under flipped labels."""
    return (-(1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
            + label_smoothing * jax.nn.log_sigmoid(-beta * margin)) / (1 - 2 * label_smoothing)


def hinge(margin, beta, _label_smoothing=0.0) -> jax.Array:
    """Hinge on the scaled margin (SLiC, Zhao et al. 2023, with DPO's reward)."""
    return jax.nn.relu(1 - beta * margin)


def ipo(margin, beta, _label_smoothing=0.0) -> jax.Array:
    """IPO (Azar et al. 2023, eq. 17): pulls the margin to 1 / (2 beta)."""
    return jnp.square(margin - 1 / (2 * beta))


# config.dpo.loss -> (loss, whether log-ratios are means over a response's tokens rather than sums)
PREFERENCE = {
    "sigmoid": (sigmoid, False),
    "sigmoid_norm": (sigmoid, True),
    "ipo": (ipo, True),
    "ipo_sum": (ipo, False),
    "hinge": (hinge, False),
    "robust": (robust, False),
}


def preference(name, chosen_logratio, rejected_logratio, chosen_count, rejected_count,
               beta, label_smoothing=0.0) -> jax.Array:
    """The named loss of pairs from their summed log-ratios and scored-token counts, each [...]."""
    loss, per_token = PREFERENCE[name]
    if per_token:
        chosen_logratio, rejected_logratio = chosen_logratio / chosen_count, rejected_logratio / rejected_count
    return loss(chosen_logratio - rejected_logratio, beta, label_smoothing)

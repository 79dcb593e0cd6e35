"""Losses on log-probabilities: pure jnp, one value per example.

A response's log-probability is the sum over its tokens, in nats. A log-ratio is the policy's minus
the reference's; `beta` times it is the implicit reward (Rafailov et al. 2023, eq. 5).
"""

import jax
import jax.numpy as jnp


def sigmoid(margin, beta, label_smoothing=0.0) -> jax.Array:
    """DPO: -log sigmoid(beta margin), where margin is chosen minus rejected log-ratio (eq. 7).

    label_smoothing > 0 is conservative DPO: that share of the labels is taken as flipped.
    """
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        beta * margin
    ) - label_smoothing * jax.nn.log_sigmoid(-beta * margin)


def robust(margin, beta, label_smoothing=0.0) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024): an unbiased estimate of DPO's loss under flipped
    labels.
    """
    return (
        -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
        + label_smoothing * jax.nn.log_sigmoid(-beta * margin)
    ) / (1 - 2 * label_smoothing)


def hinge(margin, beta, _label_smoothing=0.0) -> jax.Array:
    """Hinge on the scaled margin (SLiC, Zhao et al. 2023, with DPO's reward)."""
    return jax.nn.relu(1 - beta * margin)


def ipo(margin, beta, _label_smoothing=0.0) -> jax.Array:
    """IPO (Azar et al. 2023, eq. 17): pulls the margin to 1 / (2 beta)."""
    return jnp.square(margin - 1 / (2 * beta))


def unlikelihood(chosen_log_prob, rejected_log_prob, alpha) -> jax.Array:
    """Likelihood of the chosen, and unlikelihood of the rejected response by a factor alpha.

    -log p(chosen) + alpha log p(rejected), unbounded below, as the paper describes its baseline
    (section 6.1, appendix C.3) without writing it down: the form is ours. Welleck et al. 2019 bound
    it: -log(1 - p(rejected)).
    """
    return -chosen_log_prob + alpha * rejected_log_prob


def bradley_terry(chosen_reward, rejected_reward) -> jax.Array:
    """A reward model's loss: minus the log-probability that the chosen response is preferred (eq.
    2).
    """
    return -jax.nn.log_sigmoid(chosen_reward - rejected_reward)


def ppo_policy(logratio, advantage, clip) -> jax.Array:
    """PPO's clipped objective, to be minimised, per token (Schulman et al. 2017, eq. 7).

    logratio: log-prob under the policy minus that under the policy that sampled.
    """
    ratio = jnp.exp(logratio)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))


def ppo_value(value, sampled_value, target, clip) -> jax.Array:
    """Half the squared error of the value, which may move by `clip` from what it was at sampling,
    per token.
    """
    clipped = sampled_value + jnp.clip(value - sampled_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))


def advantages(rewards_BT, values_BT, counts_B, lam) -> jax.Array:
    """Generalised advantage estimates without discount, [B, T] (Schulman et al. 2016, eq. 16).

    counts_B: how many tokens each row has; after the last one there is neither reward nor value.
    """
    steps_T = jnp.arange(rewards_BT.shape[1])
    real_BT = steps_T < counts_B[:, None]
    next_BT = jnp.pad(values_BT, ((0, 0), (0, 1)))[:, 1:] * (steps_T + 1 < counts_B[:, None])
    delta_BT = (rewards_BT + next_BT - values_BT) * real_BT

    def back(later_B, delta_B):
        later_B = delta_B + lam * later_B
        return later_B, later_B

    _, advantage_TB = jax.lax.scan(back, jnp.zeros_like(delta_BT[:, 0]), delta_BT.T, reverse=True)
    return advantage_TB.T * real_BT


# config.dpo.loss -> (loss, whether log-ratios are means over a response's tokens rather than sums)
PREFERENCE = {
    "sigmoid": (sigmoid, False),
    "sigmoid_norm": (sigmoid, True),
    "ipo": (ipo, True),
    "ipo_sum": (ipo, False),
    "hinge": (hinge, False),
    "robust": (robust, False),
}


def preference(
    name,
    chosen_logratio,
    rejected_logratio,
    chosen_count,
    rejected_count,
    beta,
    label_smoothing=0.0,
) -> jax.Array:
    """The named loss of pairs from their summed log-ratios and scored-token counts, each [...]."""
    loss, per_token = PREFERENCE[name]
    if per_token:
        chosen_logratio, rejected_logratio = (
            chosen_logratio / chosen_count,
            rejected_logratio / rejected_count,
        )
    return loss(chosen_logratio - rejected_logratio, beta, label_smoothing)

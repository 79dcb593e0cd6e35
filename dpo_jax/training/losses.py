"""Losses on log-probabilities, in plain jnp.

A preference loss is a function of pairs, beta and label_smoothing. To add one, write it here, and
add it to PREFERENCE and its name to config.PREFERENCE_LOSSES:

    def squared_hinge(pairs, beta, label_smoothing):
        return jnp.square(jax.nn.relu(1 - beta * pairs.margin))

`pairs` is a `Pairs`, whose arrays have the same shape. `beta` and `label_smoothing` are scalars.
The result is one value for each pair, in the shape of those arrays. All are traced, so that a sweep
compiles nothing: use jnp, and no Python branch on a value. Without a reference
(config.dpo.reference=none) the log-ratios are the policy's own log-probs.

From Python, a loss of log-ratios alone need not be added here:

    def squared_hinge(chosen_log_ratios, rejected_log_ratios, beta):
        return jnp.square(jax.nn.relu(1 - beta * (chosen_log_ratios - rejected_log_ratios)))

    trainer = dpo_jax.Trainer(model, squared_hinge, beta=0.1)

A response's log-probability is the sum over its tokens, in nats. A log-ratio is the policy's minus
the reference's; `beta` times it is the implicit reward (Rafailov et al. 2023, eq. 5).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The inputs of a preference loss; every array has one value per pair."""

    chosen_log_ratios: jax.Array
    rejected_log_ratios: jax.Array
    chosen_log_probs: jax.Array  # under the policy
    rejected_log_probs: jax.Array
    chosen_lengths: jax.Array  # in completion tokens
    rejected_lengths: jax.Array

    @property
    def margin(self) -> jax.Array:
        """The chosen minus the rejected log-ratio."""
        return self.chosen_log_ratios - self.rejected_log_ratios

    @property
    def margin_per_token(self) -> jax.Array:
        """The margin of log-ratios that are means over the tokens of a response, not sums."""
        chosen = self.chosen_log_ratios / self.chosen_lengths
        rejected = self.rejected_log_ratios / self.rejected_lengths
        return chosen - rejected


def sigmoid(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """DPO: -log sigmoid(beta margin), eq. 7.

    label_smoothing > 0 is conservative DPO: that share of the labels is taken as flipped.
    """
    return _smoothed_sigmoid(pairs.margin, beta, label_smoothing)


def sigmoid_norm(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """DPO on log-ratios that are means over tokens."""
    return _smoothed_sigmoid(pairs.margin_per_token, beta, label_smoothing)


def robust(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024), an unbiased estimate of DPO's loss.

    label_smoothing: the share of labels that are flipped, less than 0.5.
    """
    scaled = beta * pairs.margin
    # This weighting of both orders undoes, in expectation, what flipped labels do to the loss.
    right = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    flipped = label_smoothing * jax.nn.log_sigmoid(-scaled)
    return (right + flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """Hinge on the scaled margin (SLiC, Zhao et al. 2023, with DPO's reward)."""
    del label_smoothing
    return jax.nn.relu(1 - beta * pairs.margin)


def ipo(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """IPO (Azar et al. 2023, eq. 17): pulls the margin, of means over tokens, to 1 / (2 beta)."""
    del label_smoothing
    return jnp.square(pairs.margin_per_token - 1 / (2 * beta))


def ipo_sum(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """IPO on the margin of sums over tokens, as the paper has it."""
    del label_smoothing
    return jnp.square(pairs.margin - 1 / (2 * beta))


def name_of(function: Callable) -> str:
    """Return the name by which messages and a run's record know a function of the caller's."""
    return getattr(function, "__qualname__", type(function).__qualname__)


# config.dpo.loss -> the loss
PREFERENCE = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "hinge": hinge,
    "robust": robust,
}


def unlikelihood(chosen_log_probs, rejected_log_probs, alpha) -> jax.Array:
    """Likelihood of the chosen response, and unlikelihood of the rejected one by a factor alpha.

    -log p(chosen) + alpha log p(rejected), unbounded below, as the paper describes its baseline
    (section 6.1, appendix C.3) without writing it down: the form is ours. Welleck et al. 2019 bound
    it: -log(1 - p(rejected)).
    """
    return -chosen_log_probs + alpha * rejected_log_probs


def bradley_terry(chosen_rewards, rejected_rewards) -> jax.Array:
    """A reward model's loss: minus the log-probability that the chosen response wins (eq. 2)."""
    return -jax.nn.log_sigmoid(chosen_rewards - rejected_rewards)


def ppo_policy(log_ratio, advantage, clip) -> jax.Array:
    """PPO's clipped objective, to be minimised, per token (Schulman et al. 2017, eq. 7).

    log_ratio: log-prob under the policy minus that under the policy that sampled.
    """
    ratio = jnp.exp(log_ratio)
    # The larger loss of the two: clipping may take away an incentive, and never adds one.
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))


def ppo_value(value, sampled_value, target, clip) -> jax.Array:
    """Half the squared error of the value, per token.

    The value may move by `clip` from what it was at sampling; beyond that it has no gradient.
    """
    # As in the policy's loss, the larger of the two counts.
    clipped = sampled_value + jnp.clip(value - sampled_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))


def advantages(rewards_BT, values_BT, lengths_B, lam) -> jax.Array:
    """Generalised advantage estimates without discount, [B, T] (Schulman et al. 2016, eq. 16).

    lengths_B: the tokens of each completion; after the last there is neither reward nor value.
    """
    steps_T = jnp.arange(rewards_BT.shape[1])
    is_token_BT = steps_T < lengths_B[:, None]
    has_next_BT = steps_T + 1 < lengths_B[:, None]
    # After the last token the episode is over: its next value is 0.
    next_values_BT = jnp.pad(values_BT, ((0, 0), (0, 1)))[:, 1:] * has_next_BT
    delta_BT = (rewards_BT + next_values_BT - values_BT) * is_token_BT

    # From the end backwards: A_t = delta_t + lam A_(t+1).
    def add_later(later_B, delta_B):
        advantage_B = delta_B + lam * later_B
        return advantage_B, advantage_B

    nothing_B = jnp.zeros_like(delta_BT[:, 0])
    _, advantage_TB = jax.lax.scan(add_later, nothing_B, delta_BT.T, reverse=True)
    return advantage_TB.T * is_token_BT


def _smoothed_sigmoid(margin, beta, label_smoothing) -> jax.Array:
    scaled = beta * margin
    right = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    flipped = label_smoothing * jax.nn.log_sigmoid(-scaled)
    return right - flipped

"""Losses on log-probabilities, in plain jnp.

A preference loss is a function of pairs and of its own numbers, which are fields of config.dpo. To
add one, write it here, and a line of the same name in loss_table.py:

    def squared_hinge(pairs, beta):
        return jnp.square(jax.nn.relu(1 - beta * pairs.margin))

    "squared_hinge": Loss(("beta",)),

`pairs` is a `Pairs`, whose arrays have the same shape; numbers are scalars. The result is one value
for each pair, in the shape of those arrays. All are traced, so that a sweep compiles nothing: use
jnp, and no Python branch on a value. Without a reference (config.dpo.reference=none, or a loss that
needs none) the log-ratios are the policy's own log-probs.

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

from dpo_jax import loss_table
from dpo_jax.loss_table import LOSSES, OWN_NUMBERS
from dpo_jax.models.log_probs import ExampleSums

# Scores of another divergence than reverse KL grow like e^|log-ratio|. At this one float32 still
# holds their square; beyond it they are flat.
LARGEST_EXPONENT = 40.0
CERTAIN = -1e-7  # log-probs per token nearer to 0 than this are taken as this: odds are finite


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The inputs of a preference loss; every array has one value per pair.

    Under another divergence than reverse KL, its scores stand in the place of log-ratios. A loss
    that takes data.margin has the scaled margin `beyond_target`, and its line in the table says so.
    """

    chosen_log_ratios: jax.Array
    rejected_log_ratios: jax.Array
    chosen_log_probs: jax.Array  # under the policy
    rejected_log_probs: jax.Array
    chosen_lengths: jax.Array  # in completion tokens
    rejected_lengths: jax.Array
    # The margin that each pair is to have, on the scale of beta times log-ratios; None: 0 for all.
    target_margins: jax.Array | None = None

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

    def beyond_target(self, scaled: jax.Array) -> jax.Array:
        """Return how far a scaled margin is beyond the pair's target, if pairs have targets."""
        return scaled if self.target_margins is None else scaled - self.target_margins

    @property
    def chosen_per_token(self) -> jax.Array:
        """The mean log-prob of the tokens of the chosen response."""
        return self.chosen_log_probs / self.chosen_lengths

    @property
    def rejected_per_token(self) -> jax.Array:
        """The mean log-prob of the tokens of the rejected response."""
        return self.rejected_log_probs / self.rejected_lengths


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of config.dpo, beside its loss, that are compiled in."""

    divergence: str = "reverse_kl"  # as config.dpo.divergence
    weighting: str = "none"  # as config.dpo.weighting
    is_length_desensitized: bool = False  # config.dpo.ld_alpha is below 1


PLAIN = Choices()


def choices_of(block) -> Choices:
    """Return the choices in the config block of a stage; the defaults where it is not dpo's."""
    return Choices(
        divergence=block.get("divergence", "reverse_kl"),
        weighting=block.get("weighting", "none"),
        is_length_desensitized=block.get("ld_alpha", 1.0) < 1.0,
    )


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss function of pairs, and the numbers that it takes."""

    function: Callable  # of `Pairs` and the numbers
    numbers: tuple[str, ...] = OWN_NUMBERS

    def __call__(self, pairs: Pairs, hyper: dict) -> jax.Array:
        """Return the loss of each pair; ValueError where it has another shape than the pairs."""
        values = self.function(pairs, *[hyper[name] for name in self.numbers])
        # It would be broadcast to the pairs, and train on something else without a word.
        expected = pairs.chosen_log_ratios.shape
        if jnp.shape(values) != expected:
            raise ValueError(
                f"the loss function {name_of(self.function)} returned shape {jnp.shape(values)}, "
                f"expected one value per pair, {expected}."
            )
        return values


@dataclasses.dataclass(frozen=True)
class Preference:
    """A preference loss with what it is made of, as the objective takes it."""

    terms: tuple[Term, ...]
    is_mixture: bool = False  # the sum of terms, weighted; otherwise there is one term
    choices: Choices = PLAIN

    def compared(self, sums: ExampleSums, hyper: dict) -> jax.Array:
        """Return the log-probs of responses that log-ratios are made of.

        LD-DPO (Liu et al. 2024) counts the tokens beyond the length of the pair's shorter
        response by a factor alpha.
        """
        if not self.choices.is_length_desensitized:
            return sums.log_probs
        rest = sums.log_probs - sums.shared_log_probs
        return sums.shared_log_probs + hyper["ld_alpha"] * rest

    def scores(self, log_ratios: jax.Array, hyper: dict) -> jax.Array:
        """Return what beta turns into implicit rewards."""
        return divergence_scores(log_ratios, self.choices.divergence, hyper.get("divergence_alpha"))

    def __call__(self, pairs: Pairs, hyper: dict) -> jax.Array:
        """Return the loss of each pair, with the numbers that are in `hyper`."""
        if not self.is_mixture:
            return self.terms[0](pairs, hyper)
        weighted = zip(hyper["loss_weights"], self.terms, strict=True)
        return sum(weight * term(pairs, hyper) for weight, term in weighted)

    def gradient_weight(self, pairs: Pairs, hyper: dict) -> jax.Array | None:
        """Return the weight of each pair in the gradient; None where the loss is not `sigmoid`.

        The gradient of a pair's loss is -beta times this, times the gradient of its margin. Other
        losses have other weights, or none: those that move the two log-ratios apart.
        """
        if self.is_mixture or self.terms[0].function is not sigmoid:
            return None
        return Term(sigmoid_weight, self.terms[0].numbers)(pairs, hyper)


def preference(loss: str | tuple[str, ...] | Callable, choices: Choices = PLAIN) -> Preference:
    """Return a loss of the config, or one that is made of a function: the caller's, or one here.

    loss: config.dpo.loss, or the names in a mixture, as its weights are traced.
    """
    if isinstance(loss, str) and loss_table.is_mixture(loss):
        loss = tuple(loss_table.names(loss))
    if isinstance(loss, tuple):
        return Preference(tuple(map(_term, loss)), is_mixture=True, choices=choices)
    return Preference((_term(loss),), choices=choices)


def _term(loss: str | Callable) -> Term:
    for name, function in PREFERENCE.items():
        if loss in (name, function):
            return Term(function, LOSSES[name].numbers)
    return Term(loss)


def wpo_weights(log_probs, log_sum_squares, lengths) -> jax.Array:
    """Return the weight of each pair in WPO (Zhou et al. 2024, eq. 2 with sampled alignment).

    exp of the sum over both responses of the mean of log p - log sum_v p(v)^2 over tokens: near 1
    for pairs that the policy itself might have written, and above it for its likeliest tokens. No
    gradient goes through it. Arrays [..., 2]: chosen, rejected.
    """
    aligned = (log_probs - log_sum_squares) / lengths
    return jax.lax.stop_gradient(jnp.exp(aligned.sum(-1)))


def divergence_scores(log_ratios: jax.Array, divergence: str, alpha=None) -> jax.Array:
    """Return f'(ratio), the implicit reward over beta under an f-divergence.

    f-DPO (Wang et al. 2023, table 1 and theorem 1): log u under reverse KL, which is DPO; 1 - 1/u
    under forward KL; log(2u / (1 + u)) under Jensen-Shannon; (1 - u^-alpha) / alpha under the
    alpha-divergence, from 0 (the limit: reverse KL) to 1 (forward KL). All are 0 at u = 1.
    """
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "jensen_shannon":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)
    alpha = 1.0 if divergence == "forward_kl" else alpha
    # At alpha 0 both sides of the choice are computed, and both must be finite.
    is_limit = jnp.abs(alpha) < 1e-6
    divisor = jnp.where(is_limit, 1.0, alpha)
    exponent = jnp.minimum(-divisor * log_ratios, LARGEST_EXPONENT)
    return jnp.where(is_limit, log_ratios, -jnp.expm1(exponent) / divisor)


def sigmoid(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """DPO: -log sigmoid(beta margin), eq. 7.

    label_smoothing > 0 is conservative DPO: that share of the labels is taken as flipped.
    """
    return _smoothed_sigmoid(pairs.beyond_target(beta * pairs.margin), label_smoothing)


def sigmoid_weight(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """Return the weight of each pair in the gradient of `sigmoid`.

    sigmoid(rejected reward - chosen reward), from 1 where the policy orders a pair wrongly to 0
    where it is sure (section 4, "What does the DPO update do?"). label_smoothing is subtracted: the
    weight falls below 0 beyond the margin at which that loss is least.
    """
    return jax.nn.sigmoid(-pairs.beyond_target(beta * pairs.margin)) - label_smoothing


def sigmoid_norm(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """DPO on log-ratios that are means over tokens."""
    return _smoothed_sigmoid(pairs.beyond_target(beta * pairs.margin_per_token), label_smoothing)


def robust(pairs: Pairs, beta, label_smoothing=0.0) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024), an unbiased estimate of DPO's loss.

    label_smoothing: the share of labels that are flipped, less than 0.5.
    """
    scaled = pairs.beyond_target(beta * pairs.margin)
    # This weighting of both orders undoes, in expectation, what flipped labels do to the loss.
    right = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    flipped = label_smoothing * jax.nn.log_sigmoid(-scaled)
    return (right + flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta) -> jax.Array:
    """Hinge on the scaled margin (SLiC, Zhao et al. 2023, with DPO's reward)."""
    return jax.nn.relu(1 - pairs.beyond_target(beta * pairs.margin))


def ipo(pairs: Pairs, beta) -> jax.Array:
    """IPO (Azar et al. 2023, eq. 17): pulls the margin, of means over tokens, to 1 / (2 beta)."""
    return jnp.square(pairs.margin_per_token - _ipo_target(pairs, beta))


def ipo_sum(pairs: Pairs, beta) -> jax.Array:
    """IPO on the margin of sums over tokens, as the paper has it."""
    return jnp.square(pairs.margin - _ipo_target(pairs, beta))


def exo(pairs: Pairs, beta, label_smoothing) -> jax.Array:
    """EXO (Ji et al. 2024, eq. 16): KL from the policy's preference to the smoothed label's.

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e), with q = sigmoid(beta margin) and e, the share of
    flipped labels, above 0.
    """
    scaled = pairs.beyond_target(beta * pairs.margin)
    right = jax.nn.log_sigmoid(scaled) - jnp.log1p(-label_smoothing)
    flipped = jax.nn.log_sigmoid(-scaled) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(scaled) * right + jax.nn.sigmoid(-scaled) * flipped


def discopop(pairs: Pairs, beta, discopop_tau) -> jax.Array:
    """DiscoPOP (Lu et al. 2024, eq. 5): logistic and exponential loss, mixed by the margin.

    (1 - w) (-log sigmoid(x)) + w exp(-x), with x = beta margin and w = sigmoid(x / tau).
    """
    scaled = pairs.beyond_target(beta * pairs.margin)
    modulation = scaled / discopop_tau
    logistic = -jax.nn.sigmoid(-modulation) * jax.nn.log_sigmoid(scaled)
    # In one exponent: at a very negative margin exp(-x) alone is infinite, and its weight 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(modulation) - scaled)
    return logistic + exponential


def dpop(pairs: Pairs, beta, dpop_lambda) -> jax.Array:
    """DPO-Positive (Pal et al. 2024): DPO that keeps the chosen response's probability up.

    -log sigmoid(beta (margin - lambda max(0, -chosen log-ratio))).
    """
    lost = jax.nn.relu(-pairs.chosen_log_ratios)
    scaled = beta * (pairs.margin - dpop_lambda * lost)
    return -jax.nn.log_sigmoid(pairs.beyond_target(scaled))


def apo_zero(pairs: Pairs, beta) -> jax.Array:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen responses up, rejected ones down.

    1 - sigmoid(chosen reward) + sigmoid(rejected reward); a reward is beta times the log-ratio.
    """
    chosen = jax.nn.sigmoid(-beta * pairs.chosen_log_ratios)
    return chosen + jax.nn.sigmoid(beta * pairs.rejected_log_ratios)


def apo_down(pairs: Pairs, beta) -> jax.Array:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): both down, the rejected response further.

    sigmoid(chosen reward) + 1 - sigmoid(beta margin).
    """
    chosen = jax.nn.sigmoid(beta * pairs.chosen_log_ratios)
    return chosen + jax.nn.sigmoid(-beta * pairs.margin)


def nca(pairs: Pairs, beta) -> jax.Array:
    """NCA for pairs (Chen et al. 2024): noise-contrastive, with the reward's own level.

    -log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2, with the rewards c and r.
    """
    chosen = beta * pairs.chosen_log_ratios
    rejected = beta * pairs.rejected_log_ratios
    contrast = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * contrast


def bco_pair(pairs: Pairs, beta) -> jax.Array:
    """BCO on pairs (Jung et al. 2024): a classifier of chosen and rejected, by the reward.

    -log sigmoid(chosen reward) - log sigmoid(-rejected reward), without the paper's running shift.
    """
    chosen = jax.nn.log_sigmoid(beta * pairs.chosen_log_ratios)
    return -chosen - jax.nn.log_sigmoid(-beta * pairs.rejected_log_ratios)


def sppo_hard(pairs: Pairs, beta) -> jax.Array:
    """SPPO (Wu et al. 2024, eq. 4.7) where the chosen response wins with probability 1.

    Pulls the chosen log-ratio to 1 / (2 beta) and the rejected one to -1 / (2 beta).
    """
    target = 1 / (2 * beta)
    chosen = jnp.square(pairs.chosen_log_ratios - target)
    return chosen + jnp.square(pairs.rejected_log_ratios + target)


def simpo(pairs: Pairs, beta, simpo_gamma) -> jax.Array:
    """SimPO (Meng et al. 2024): a margin between mean log-probs per token, without a reference.

    -log sigmoid(beta (chosen - rejected) - gamma).
    """
    margin = pairs.chosen_per_token - pairs.rejected_per_token
    return -jax.nn.log_sigmoid(pairs.beyond_target(beta * margin - simpo_gamma))


def orpo(pairs: Pairs, orpo_lambda) -> jax.Array:
    """ORPO (Hong et al. 2024, eqs. 4, 6, 7): likelihood and an odds ratio, without a reference.

    -c - lambda log sigmoid(log odds(c) - log odds(r)), with the mean log-probs per token c and r,
    and odds(p) = p / (1 - p).
    """
    log_odds = _log_odds(pairs.chosen_per_token) - _log_odds(pairs.rejected_per_token)
    return -pairs.chosen_per_token - orpo_lambda * jax.nn.log_sigmoid(log_odds)


def cpo(pairs: Pairs, beta, cpo_alpha) -> jax.Array:
    """CPO (Xu et al. 2024, eq. 3): DPO without a reference, and likelihood of the chosen response.

    -log sigmoid(beta (log p(chosen) - log p(rejected))) - alpha log p(chosen) / length. The paper
    does not divide by the length; its code does.
    """
    scaled = beta * (pairs.chosen_log_probs - pairs.rejected_log_probs)
    return -jax.nn.log_sigmoid(pairs.beyond_target(scaled)) - cpo_alpha * pairs.chosen_per_token


def nll(pairs: Pairs) -> jax.Array:
    """Negative log-likelihood of the chosen response, per token: -log p(chosen) / length.

    In a mixture with sigmoid it is RPO's second term (Pang et al. 2024, eq. 1).
    """
    return -pairs.chosen_per_token


# config.dpo.loss -> the loss: the function of that name
PREFERENCE = {name: globals()[name] for name in LOSSES}


def name_of(function: Callable) -> str:
    """Return the name by which messages and a run's record know a function of the caller's."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def unlikelihood(chosen_log_probs, rejected_log_probs, alpha) -> jax.Array:
    """Likelihood of the chosen response, and unlikelihood of the rejected one by a factor alpha.

    -log p(chosen) + alpha log p(rejected), unbounded below, as the paper describes its baseline
    (section 6.1, appendix C.3) without writing it down: the form is ours. Welleck et al. 2019 bound
    it: -log(1 - p(rejected)).
    """
    return -chosen_log_probs + alpha * rejected_log_probs


def kto(log_ratios, is_desirable, kl, beta, desirable_weight, undesirable_weight) -> jax.Array:
    """KTO on unpaired rows (Ethayarajh et al. 2024, eq. 8): the loss of each.

    w (1 - sigmoid(beta (r - z))) of a desirable row with the log-ratio r, and
    w (1 - sigmoid(beta (z - r))) of an undesirable one, each with its kind's weight w.
    kl: z, an estimate of KL(policy || reference) in nats, through which no gradient goes.
    """
    sign = jnp.where(is_desirable, 1.0, -1.0)
    weight = jnp.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (log_ratios - kl))


def bradley_terry(chosen_rewards, rejected_rewards, target_margins=None) -> jax.Array:
    """A reward model's loss: minus the log-probability that the chosen response wins (eq. 2).

    target_margins: by how much it is to win, as in Llama 2 (Touvron et al. 2023, eq. 2).
    """
    margin = chosen_rewards - rejected_rewards
    if target_margins is not None:
        margin = margin - target_margins
    return -jax.nn.log_sigmoid(margin)


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


def _smoothed_sigmoid(scaled, label_smoothing) -> jax.Array:
    right = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled)
    flipped = label_smoothing * jax.nn.log_sigmoid(-scaled)
    return right - flipped


def _ipo_target(pairs: Pairs, beta) -> jax.Array:
    """Return the margin of log-ratios that IPO pulls to; a pair's own target comes on top."""
    target = 1 / (2 * beta)
    return target if pairs.target_margins is None else target + pairs.target_margins / beta


def _log_odds(log_probs) -> jax.Array:
    """Return log(p / (1 - p))."""
    log_probs = jnp.minimum(log_probs, CERTAIN)
    return log_probs - jax.nn.log1mexp(-log_probs)

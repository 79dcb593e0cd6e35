"""Exact reward and KL of policies over a language small enough to enumerate, and their bound.

All sums run over every completion in float64, so there is no sampling noise. The KL is to the
reference, in nats. Rewards and KLs are averaged over prompts, as in the paper's figure 2, left.

Letters: P prompts, C completions, X contexts (completions without their last word), T words, V
vocabulary, B betas, U distinct rewards.
"""

import functools

import jax
import numpy as np

from dpo_jax.data.toy import LENGTH
from dpo_jax.models.transformer import TransformerConfig, logits
from dpo_jax.parallel.sharding import constrain

MASS_TOLERANCE = 1e-5
# A wide and fine grid: for rewards up to 10 the bound is exact to 1e-5.
BETAS = np.geomspace(1e-6, 1e6, 20_000)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BT):
    return constrain(logits(config, params, tokens_BT))  # on a mesh, whole on every process


def enumerate_log_probs(
    config: TransformerConfig, params, prompts_P, length: int = LENGTH
) -> np.ndarray:
    """Return the log-probs of all completions of `length` words, nats, float64 [P, C].

    Prompts are single words. Completions come in the order of base-V numbers, as in
    `toy.completions()`. They share their contexts, so one forward pass over V^(T-1) contexts per
    prompt is enough. Nothing is renormalised: ArithmeticError if the probabilities of a prompt's
    completions do not sum to 1.
    """
    # All words in all places but the last, in the order of base-V numbers.
    contexts_XT = np.indices((config.vocab,) * (length - 1)).reshape(length - 1, -1).T
    tokens_PXT = np.stack([np.insert(contexts_XT, 0, prompt, axis=1) for prompt in prompts_P])
    prompts, contexts, words = tokens_PXT.shape
    # Float64 from here on: sums over thousands of completions would lose digits in float32.
    logits_BTV = np.asarray(_logits(config, params, tokens_PXT.reshape(-1, words)), np.float64)
    log_probs_PXTV = _log_softmax(logits_BTV.reshape(prompts, contexts, words, config.vocab))
    # The words of a context are predicted at all positions but the last, and any word at the last.
    of_context_PXT = np.take_along_axis(
        log_probs_PXTV[:, :, :-1], contexts_XT[None, ..., None], axis=-1
    )
    context_PX = of_context_PXT.sum((-1, -2))
    log_probs_PC = (context_PX[..., None] + log_probs_PXTV[:, :, -1]).reshape(prompts, -1)
    mass_P = np.exp(log_probs_PC).sum(axis=-1)
    if not np.allclose(mass_P, 1, rtol=0, atol=MASS_TOLERANCE):
        raise ArithmeticError(
            f"the probabilities of each prompt's completions sum to {mass_P}, not to 1: the "
            "weights are not finite, or logits depend on later words."
        )
    return log_probs_PC


def reward_and_kl(log_probs_PC, reference_log_probs_PC, rewards_PC) -> tuple[float, float]:
    """Return the expected reward of a policy and its KL(policy || reference)."""
    probability_PC = np.exp(log_probs_PC)
    reward_P = (probability_PC * rewards_PC).sum(axis=-1)
    kl_P = (probability_PC * (log_probs_PC - reference_log_probs_PC)).sum(axis=-1)
    return float(reward_P.mean()), float(kl_P.mean())


def optimum(
    reference_log_probs_PC, rewards_PC, beta: float, learned_PC=None
) -> tuple[float, float]:
    """Return reward and KL of DPO's optimum, reference * exp(reward / beta) / Z (eq. 4).

    learned_PC: rewards that the policy is the optimum of, if it is measured by others (the true
    ones, rewards_PC).
    """
    # The optimum is for the learned rewards, but measured by the true ones.
    aimed_PC = rewards_PC if learned_PC is None else learned_PC
    # In logs, so that small betas do not overflow; the softmax divides by Z.
    optimum_PC = _log_softmax(reference_log_probs_PC + aimed_PC / beta)
    return reward_and_kl(optimum_PC, reference_log_probs_PC, rewards_PC)


def best_of_n(reference_log_probs_PC, rewards_PC, n: int) -> tuple[float, float]:
    """Return reward and KL of the best of n samples of the reference; ties are broken at random.

    The best has a reward of at most r with probability F(r)^n, where F is the distribution of one
    sample's reward. Completions of equal reward share that probability as the reference does.
    """
    values_U, log_share_PU = _reward_distribution(reference_log_probs_PC, rewards_PC)
    # F(r). Clipped, for rounding may take the last above 1.
    up_to_PU = np.exp(log_share_PU).cumsum(axis=-1).clip(0, 1)
    chance_PU = np.diff(up_to_PU**n, axis=-1, prepend=0)
    # A reward of no chance adds nothing to the KL: 0 log 0 = 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weight_PU = np.where(chance_PU > 0, np.log(chance_PU) - log_share_PU, 0)
    reward_P = (chance_PU * values_U).sum(axis=-1)
    kl_P = (chance_PU * log_weight_PU).sum(axis=-1)
    return float(reward_P.mean()), float(kl_P.mean())


def preferred_ft(reference_log_probs_PC, rewards_PC, labels: str) -> tuple[float, float]:
    """Return reward and KL of the chosen responses, the limit of Preferred-FT with many pairs.

    Their distribution is reference(y) * E_y'[2 P(y is chosen over y')]. Pairs of equal completions
    are left out, and so are, with deterministic labels, pairs of equal reward.
    """
    values_U, log_share_PU = _reward_distribution(reference_log_probs_PC, rewards_PC)
    share_PU = np.exp(log_share_PU)
    margin_UU = values_U[:, None] - values_U
    if labels == "deterministic":
        wins_UU = (margin_UU > 0).astype(float)
    else:
        # Bradley-Terry (eq. 1); a pair of equal rewards is a coin toss.
        wins_UU = 1 / (1 + np.exp(-margin_UU))
    # By distinct rewards rather than by completions: few by few, not thousands by thousands.
    wins_PU = share_PU @ wins_UU.T
    index_PC = np.searchsorted(values_U, rewards_PC)
    wins_PC = np.take_along_axis(wins_PU, index_PC, axis=-1)
    if labels != "deterministic":
        # A completion makes no pair with itself.
        wins_PC = wins_PC - np.exp(reference_log_probs_PC) / 2
    with np.errstate(divide="ignore"):
        log_probs_PC = _log_softmax(reference_log_probs_PC + np.log(wins_PC))
    finite_PC = np.where(np.isfinite(log_probs_PC), log_probs_PC, -1e9)  # 0 log 0 = 0
    return reward_and_kl(finite_PC, reference_log_probs_PC, rewards_PC)


def bound(reference_log_probs_PC, rewards_PC, kls) -> np.ndarray:
    """Return the highest expected reward that any policy can have at each of the KLs.

    It is the minimum over beta of beta * KL + beta * E_x[log Z(x)], with the mean over prompts x
    (the dual of eq. 3). Every beta gives a valid bound, so a coarse grid could only raise it.
    """
    values_U, log_share_PU = _reward_distribution(reference_log_probs_PC, rewards_PC)
    log_z_BP = np.logaddexp.reduce(log_share_PU + values_U / BETAS[:, None, None], axis=-1)
    return (BETAS * np.asarray(kls)[..., None] + BETAS * log_z_BP.mean(axis=-1)).min(axis=-1)


def _reward_distribution(reference_log_probs_PC, rewards_PC) -> tuple[np.ndarray, np.ndarray]:
    """The U distinct rewards (few, in the toy) and their log-probs under the reference [P, U]."""
    values_U, index_PC = np.unique(rewards_PC, return_inverse=True)
    shares = []
    for index_C, log_probs_C in zip(index_PC, reference_log_probs_PC, strict=True):
        # The reference's probability of each reward, prompt by prompt.
        shares.append(np.bincount(index_C, np.exp(log_probs_C), len(values_U)))
    with np.errstate(divide="ignore"):  # no completion of a prompt may have some reward
        log_share_PU = np.log(np.stack(shares))
    # Normalise: a rounding error of the sum, times the largest beta, would show in the bound.
    return values_U, log_share_PU - np.logaddexp.reduce(log_share_PU, axis=-1, keepdims=True)


def _log_softmax(x) -> np.ndarray:
    """Log-softmax over the last axis."""
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)

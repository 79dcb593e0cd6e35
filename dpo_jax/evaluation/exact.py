"""Exact reward and KL of a policy over a language small enough to enumerate, and the most that any
can reach.

Every completion is summed over, in float64, so there is no sampling noise. KL is to the reference,
in nats; rewards and KLs are means over prompts, as in the paper's frontier (figure 2, left).

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
BETAS = np.geomspace(
    1e-6, 1e6, 20_000
)  # wide and fine: for rewards up to 10 the bound is exact to 1e-5


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BT):
    return constrain(logits(config, params, tokens_BT))  # under a mesh, whole on every process


def enumerate_logps(
    config: TransformerConfig, params, prompts_P, length: int = LENGTH
) -> np.ndarray:
    """Log-probability of each completion of `length` words after each one-word prompt, nats,
    float64 [P, C].

    The order is that of base-V numbers, as in `toy.completions()`. Completions share their
    contexts, so one forward over V^(T-1) of them per prompt is enough. Nothing is renormalised:
    ArithmeticError where the probabilities of a prompt's completions do not sum to 1.
    """
    contexts_XT = np.indices((config.vocab,) * (length - 1)).reshape(length - 1, -1).T
    tokens_PXT = np.stack([np.insert(contexts_XT, 0, prompt, axis=1) for prompt in prompts_P])
    prompts, contexts, words = tokens_PXT.shape
    logits_BTV = np.asarray(_logits(config, params, tokens_PXT.reshape(-1, words)), np.float64)
    logp_PXTV = _log_softmax(logits_BTV.reshape(prompts, contexts, words, config.vocab))
    context_PX = np.take_along_axis(
        logp_PXTV[:, :, :-1], contexts_XT[None, ..., None], axis=-1
    ).sum((-1, -2))
    logps_PC = (context_PX[..., None] + logp_PXTV[:, :, -1]).reshape(prompts, -1)
    mass_P = np.exp(logps_PC).sum(axis=-1)
    if not np.allclose(mass_P, 1, rtol=0, atol=MASS_TOLERANCE):
        raise ArithmeticError(
            f"the probabilities of all completions of each prompt sum to {mass_P}, not 1: "
            "weights that are not finite, or logits that depend on later words."
        )
    return logps_PC


def reward_and_kl(logps_PC, reference_logps_PC, rewards_PC) -> tuple[float, float]:
    """Expected reward of a policy and its KL(policy || reference)."""
    probability_PC = np.exp(logps_PC)
    reward_P = (probability_PC * rewards_PC).sum(axis=-1)
    kl_P = (probability_PC * (logps_PC - reference_logps_PC)).sum(axis=-1)
    return float(reward_P.mean()), float(kl_P.mean())


def optimum(reference_logps_PC, rewards_PC, beta: float, learned_PC=None) -> tuple[float, float]:
    """Reward and KL of the policy that DPO aims at, reference exp(reward / beta) / Z (eq. 4).

    learned_PC: the rewards that it is the optimum of, where these are not the true ones by which it
    is measured.
    """
    aimed_PC = rewards_PC if learned_PC is None else learned_PC
    return reward_and_kl(
        _log_softmax(reference_logps_PC + aimed_PC / beta), reference_logps_PC, rewards_PC
    )


def best_of_n(reference_logps_PC, rewards_PC, n: int) -> tuple[float, float]:
    """Reward and KL of the best of n samples of the reference; equal rewards are told apart by a
    coin.

    The chance that the best is among the rewards up to r is F(r)^n, of which each completion of
    reward r has its share.
    """
    values_U, log_share_PU = _reward_distribution(reference_logps_PC, rewards_PC)
    up_to_PU = np.exp(log_share_PU).cumsum(axis=-1).clip(0, 1)
    chance_PU = np.diff(up_to_PU**n, axis=-1, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weight_PU = np.where(chance_PU > 0, np.log(chance_PU) - log_share_PU, 0)
    return (
        float((chance_PU * values_U).sum(axis=-1).mean()),
        float((chance_PU * log_weight_PU).sum(axis=-1).mean()),
    )


def preferred_ft(reference_logps_PC, rewards_PC, labels: str) -> tuple[float, float]:
    """Reward and KL of the distribution of the chosen responses, to which Preferred-FT tends with
    many pairs.

    reference(y) E_y'[2 P(y is chosen over y')], with equal completions left out, and with
    deterministic labels equal rewards too.
    """
    values_U, log_share_PU = _reward_distribution(reference_logps_PC, rewards_PC)
    share_PU = np.exp(log_share_PU)
    margin_UU = values_U[:, None] - values_U
    wins_UU = (
        (margin_UU > 0).astype(float) if labels == "deterministic" else 1 / (1 + np.exp(-margin_UU))
    )
    wins_PU = share_PU @ wins_UU.T
    index_PC = np.searchsorted(values_U, rewards_PC)
    wins_PC = np.take_along_axis(wins_PU, index_PC, axis=-1)
    if labels != "deterministic":
        wins_PC = wins_PC - np.exp(reference_logps_PC) / 2  # a completion is no pair with itself
    with np.errstate(divide="ignore"):
        logps_PC = _log_softmax(reference_logps_PC + np.log(wins_PC))
    finite_PC = np.where(np.isfinite(logps_PC), logps_PC, -1e9)  # 0 log 0 = 0
    return reward_and_kl(finite_PC, reference_logps_PC, rewards_PC)


def bound(reference_logps_PC, rewards_PC, kls) -> np.ndarray:
    """The highest expected reward of any policy at each KL of the array `kls`.

    It is the least over beta of beta KL + beta E_x log Z(x), where E_x is the mean over prompts
    (the dual of eq. 3). As each beta's value holds for every policy, a coarse grid could only raise
    the bound.
    """
    values_U, log_share_PU = _reward_distribution(reference_logps_PC, rewards_PC)
    log_z_BP = np.logaddexp.reduce(log_share_PU + values_U / BETAS[:, None, None], axis=-1)
    return (BETAS * np.asarray(kls)[..., None] + BETAS * log_z_BP.mean(axis=-1)).min(axis=-1)


def _reward_distribution(reference_logps_PC, rewards_PC) -> tuple[np.ndarray, np.ndarray]:
    """The U distinct rewards, few in the toy, and the log-probability of each under the reference
    [P, U].
    """
    values_U, index_PC = np.unique(rewards_PC, return_inverse=True)
    share_PU = np.stack(
        [
            np.bincount(index_C, np.exp(logps_C), len(values_U))
            for index_C, logps_C in zip(index_PC, reference_logps_PC, strict=True)
        ]
    )
    with np.errstate(divide="ignore"):  # a reward that a prompt's completions never get
        log_share_PU = np.log(share_PU)
    # Rounding in the sum over completions, times the largest beta, would be seen in the bound.
    return values_U, log_share_PU - np.logaddexp.reduce(log_share_PU, axis=-1, keepdims=True)


def _log_softmax(x) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)

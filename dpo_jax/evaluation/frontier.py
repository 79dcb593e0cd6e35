"""Estimate the optimal frontier and best of N from samples of the reference and their rewards.

Where completions cannot be enumerated (see exact.py), M samples per prompt stand for all of them.
The optimum for a beta, reference * exp(reward / beta) / Z (eq. 4), then gives each sample the
weight exp(reward / beta) / sum.

Letters: P prompts, M samples of the reference for each prompt, B betas.
"""

import math

import numpy as np

BETAS = np.geomspace(1e3, 1e-3, 400)
# The estimate is trusted up to log M minus this many nats. There, e^2 (about 7) samples carry the
# weight.
UNTRUSTED = 2.0


def frontier(rewards_PM) -> tuple[np.ndarray, np.ndarray]:
    """Return KLs and expected rewards of the optima: the highest reward at each KL, from KL 0 on.

    M samples hide whatever is rarer than 1 in M. No KL above log M can be found, and log Z and the
    curve come out too low (Jensen's inequality). The curve therefore ends where the mean KL passes
    log M - 2, where it is low by 0.1 standard deviations of a normal reward. Raises ValueError for
    fewer than 8 samples, which leave nothing of the curve.
    """
    samples = rewards_PM.shape[1]
    trusted = math.log(samples) - UNTRUSTED
    if trusted < 0:
        raise ValueError(
            f"{samples} samples per prompt are too few to estimate a frontier: expected 8 or more. "
            f"The curve reaches a KL of log(samples) - {UNTRUSTED:g}."
        )
    kls_B, rewards_B = np.array([_optimum(rewards_PM, beta) for beta in BETAS]).T
    return kls_B[kls_B <= trusted], rewards_B[kls_B <= trusted]


def _optimum(rewards_PM, beta: float) -> tuple[float, float]:
    """KL and reward of the optimum for a beta, averaged over prompts."""
    log_weights_PM = rewards_PM / beta
    log_weights_PM = log_weights_PM - np.logaddexp.reduce(log_weights_PM, axis=-1, keepdims=True)
    weights_PM = np.exp(log_weights_PM)
    kl_P = (weights_PM * log_weights_PM).sum(axis=-1) + math.log(rewards_PM.shape[1])
    return kl_P.mean(), (weights_PM * rewards_PM).sum(axis=-1).mean()


def best_of_n(rewards_PM, ranking_PM, n: int) -> dict[str, float]:
    """Estimate the true reward of the best of n samples, its standard error and a bound of its KL.

    rewards_PM: true rewards. ranking_PM: the reward that picks the best.

    The reward is averaged over all subsets of n of the M samples, so it is unbiased: the m-th
    lowest sample is the best of C(m - 1, n - 1) of the C(M, n) subsets. The KL,
    log n - (n - 1) / n, is exact if no two samples tie and an upper bound otherwise. Raises
    ValueError unless 1 <= n <= M.
    """
    samples = rewards_PM.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(
            f"best of {n}: there are {samples} samples per prompt. Choose n from 1 to {samples}, "
            "or draw more samples."
        )
    subsets = math.comb(samples, n)
    share_M = np.array([math.comb(m, n - 1) / subsets for m in range(samples)])
    order_PM = ranking_PM.argsort(axis=-1, kind="stable")
    ordered_PM = np.take_along_axis(rewards_PM, order_PM, axis=-1)
    reward_P = np.einsum("PM,M->P", ordered_PM, share_M)
    return dict(
        reward=float(reward_P.mean()),
        reward_se=float(reward_P.std(ddof=1) / math.sqrt(len(reward_P))),
        kl=math.log(n) - (n - 1) / n,
    )

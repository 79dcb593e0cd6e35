"""Estimate the optimal frontier and best of N from samples of the reference and their rewards.

Where completions cannot be enumerated (see exact.py), M samples per prompt stand for all of them.
The optimum for a beta, reference * exp(reward / beta) / Z (eq. 4), then gives each sample the
weight exp(reward / beta) / sum.

Letters: P prompts, M samples of the reference for each prompt, B betas, K betas on the curve, R
resamples.
"""

import math
from typing import NamedTuple

import numpy as np

from dpo_jax.evaluation import statistics

BETAS = np.geomspace(1e3, 1e-3, 400)
# The estimate is trusted up to log M minus this many nats. There, e^2 (about 7) samples carry the
# weight.
UNTRUSTED = 2.0
FEWEST_SAMPLES = math.ceil(math.exp(UNTRUSTED))  # fewer leave nothing of the curve
RESAMPLES = 1000  # of prompts, for the interval of the curve


class Curve(NamedTuple):
    """The highest expected reward at each KL, from KL 0 on, [K] each.

    low and high are its interval where the curve is an estimate; an exact one has none.
    """

    kls: np.ndarray
    rewards: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def frontier(rewards_PM, clusters_P=None) -> Curve:
    """Return KLs and expected rewards of the optima, with a 95 % interval over prompts.

    clusters_P: a number or the text of each prompt, equal for equal ones; None: they all differ.

    M samples hide whatever is rarer than 1 in M. No KL above log M can be found, and log Z and the
    curve come out too low (Jensen's inequality), the more so the further the KL is. The curve
    therefore ends where the mean KL passes log M - 2. There a normal reward comes out low by 0.11
    standard deviations with 32 samples, by 0.13 with 128 and by 0.14 with 1024; one nat before the
    end by half of that or less.

    The interval is a bootstrap over prompts: it is of the noise, in prompts and samples alike, and
    not of that bias. Raises ValueError for fewer than FEWEST_SAMPLES.
    """
    samples = rewards_PM.shape[1]
    if samples < FEWEST_SAMPLES:
        raise ValueError(
            f"{samples} samples per prompt are too few to estimate a frontier: expected "
            f"{FEWEST_SAMPLES} or more. The curve reaches a KL of log(samples) - {UNTRUSTED:g}."
        )
    trusted = math.log(samples) - UNTRUSTED
    of_betas = [_optimum(rewards_PM, beta) for beta in BETAS]
    kls_BP, rewards_BP = (np.stack(values) for values in zip(*of_betas, strict=True))
    kls_B, rewards_B = kls_BP.mean(axis=-1), rewards_BP.mean(axis=-1)
    kls_K = kls_B[kls_B <= trusted]

    def rewards_of(drawn_P):
        # Each row counts as often as it was drawn; the product is faster than taking columns.
        weights_P = np.bincount(drawn_P, minlength=len(rewards_PM)) / len(drawn_P)
        # At the KLs of the curve: those of a resample's optima are others. Its betas go on beyond
        # the curve's end, so nothing is extrapolated.
        return np.interp(kls_K, kls_BP @ weights_P, rewards_BP @ weights_P)

    distinct = len(rewards_PM) if clusters_P is None else len(np.unique(clusters_P))
    if distinct < 2:
        return Curve(kls_K, rewards_B[: len(kls_K)])
    found_RK = statistics.bootstrap(
        rewards_of, len(rewards_PM), clusters=clusters_P, resamples=RESAMPLES
    )
    return Curve(kls_K, rewards_B[: len(kls_K)], *statistics.percentiles(found_RK))


def _optimum(rewards_PM, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward of the optimum for a beta, of each prompt."""
    log_weights_PM = rewards_PM / beta
    log_weights_PM = log_weights_PM - np.logaddexp.reduce(log_weights_PM, axis=-1, keepdims=True)
    weights_PM = np.exp(log_weights_PM)
    kl_P = (weights_PM * log_weights_PM).sum(axis=-1) + math.log(rewards_PM.shape[1])
    return kl_P, (weights_PM * rewards_PM).sum(axis=-1)


def best_of_n(rewards_PM, ranking_PM, n: int, clusters_P=None) -> dict[str, float | None]:
    """Estimate the true reward of the best of n samples, its standard error and a bound of its KL.

    rewards_PM: true rewards. ranking_PM: the reward that picks the best. clusters_P: as for
    `statistics.standard_error`.

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
        reward_se=statistics.standard_error(reward_P, clusters_P),
        kl=math.log(n) - (n - 1) / n,
    )

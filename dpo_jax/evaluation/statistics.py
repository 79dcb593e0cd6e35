"""Statistics of seeds and prompts: intervals, bootstraps, paired differences, equal KL, Holm.

Intervals cover 95 %. What cannot be said of so few values, such as the error of one, is None.
Prompts are the units of everything that is measured on data: values of one prompt are alike, so
they count as one cluster. Win rates have their own statistics in winrate_stats.py.

Letters: N values, C clusters (prompts), R resamples, K points of a path, U units (prompts or
seeds).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from dpo_jax.data.grouping import clustered_error, numbered

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
NORMAL = float(special.ndtri(TAILS[1]))  # standard errors on either side, of many values
RESAMPLES = 2000
# Resamples that must reach a KL before an interval there is given: those that do not would be left
# out of it, and they are not like the others.
REACHED = LEVEL


def mean_interval(values, *, is_share: bool = False) -> dict:
    """Return mean, se, low and high of independent values, such as those of seeds, and n.

    The interval is Student's t; that of shares ends at 0 and 1. se, low and high are None for one
    value, and all but n for none.
    """
    values_N = np.asarray(values, float)
    n = len(values_N)
    if not n:
        return dict(mean=None, se=None, low=None, high=None, n=0)
    mean = float(values_N.mean())
    if n == 1:
        return dict(mean=mean, se=None, low=None, high=None, n=1)
    se = float(values_N.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(n - 1) * se
    low, high = mean - half, mean + half
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return dict(mean=mean, se=se, low=low, high=high, n=n)


def over_seeds(rows: Sequence[dict], name: str) -> dict:
    """Return the mean of a measure over rows that differ in their seed: NAME, NAME_low, NAME_high.

    The interval is over prompts where all rows have NAME_se, the noise of an evaluation on sampled
    prompts, whatever the number of seeds. The seeds share their prompts, so the error of their mean
    is at most the mean of their errors, which is taken. The spread between seeds is no part of it.
    Other rows are exact: their interval is over seeds, that of `mean_interval`. `interval_unit`
    says which of both it is, "prompts" or "seeds"; None: there is no interval.
    """
    errors = [row.get(f"{name}_se") for row in rows]
    found = mean_interval([row[name] for row in rows])
    low, high, unit = found["low"], found["high"], "seeds"
    if None not in errors:
        half = NORMAL * float(np.mean(errors))
        low, high, unit = found["mean"] - half, found["mean"] + half, "prompts"
    return {
        name: found["mean"],
        f"{name}_low": low,
        f"{name}_high": high,
        "interval_unit": None if low is None else unit,
    }


def t_quantile(degrees: int) -> float:
    """Return how many standard errors the interval of Student's t reaches on either side."""
    return float(special.stdtrit(degrees, TAILS[1]))


def standard_error(values_N: np.ndarray, clusters_N: np.ndarray | None = None) -> float | None:
    """Return the standard error of a mean, clustered where several values share a prompt.

    clusters_N: a number for each value, equal for equal prompts; None: the values are independent.
    None where there is one prompt, or one value.
    """
    if len(values_N) < 2:
        return None
    if clusters_N is not None and len(np.unique(clusters_N)) < len(values_N):
        return clustered_error(values_N, clusters_N)
    return float(np.std(values_N, ddof=1) / np.sqrt(len(values_N)))


def clustered_interval(values, clusters) -> dict:
    """Return mean, se, low and high of values that may be alike within a cluster, and n clusters.

    The interval is Student's t with the clustered error and one degree of freedom fewer than there
    are clusters.
    """
    values_N, clusters_N = np.asarray(values, float), np.asarray(clusters)
    n = len(np.unique(clusters_N))
    mean = float(values_N.mean()) if n else None
    se = clustered_error(values_N, clusters_N) if n else None
    if se is None:
        return dict(mean=mean, se=None, low=None, high=None, n=n)
    half = t_quantile(n - 1) * se
    return dict(mean=mean, se=se, low=mean - half, high=mean + half, n=n)


def paired_difference(first, second, clusters=None) -> dict:
    """Compare two methods on the same units: first minus second, with se, low, high, p and n.

    first, second: values of the same prompts, or seeds, in the same order. clusters: the prompt of
    each value, where prompts have several; None: each value is a unit of its own. p is two-sided,
    of the paired t-test. A difference that is the same everywhere has p 0, or 1 if it is 0.
    """
    first_N, second_N = np.asarray(first, float), np.asarray(second, float)
    if first_N.shape != second_N.shape:
        raise ValueError(
            f"{first_N.size} values are to be compared with {second_N.size}: expected values of "
            "the same prompts or seeds, in the same order."
        )
    units_N = np.arange(len(first_N)) if clusters is None else np.asarray(clusters)
    found = clustered_interval(first_N - second_N, units_N)
    difference = found.pop("mean")
    return dict(difference=difference) | found | dict(p=_two_sided(difference, found))


def _two_sided(difference: float | None, found: dict) -> float | None:
    """The two-sided p of a mean difference with its error, by Student's t."""
    if found["se"] is None:
        return None
    if not found["se"]:
        return 0.0 if difference else 1.0
    return float(2 * special.stdtr(found["n"] - 1, -abs(difference) / found["se"]))


def bootstrap(
    statistic: Callable, units: int, *, clusters=None, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return a statistic of each resample of units, stacked: [R, ...].

    statistic: takes the indices of the drawn units and returns a number or an array. clusters: the
    prompt of each unit, where prompts have several: whole prompts are drawn, with all their units.
    Resample r is the same whatever the statistic, so that those of two methods are paired.
    """
    rng = np.random.default_rng(seed)
    number_U = np.arange(units) if clusters is None else numbered(np.asarray(clusters))
    sizes_C = np.bincount(number_U)
    # Of each prompt, where its units stand.
    members_CU = np.split(np.argsort(number_U, kind="stable"), np.cumsum(sizes_C)[:-1])
    repeats = len(sizes_C) < units
    found = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(sizes_C), len(sizes_C))
        if repeats:
            drawn = np.concatenate([members_CU[cluster] for cluster in drawn])
        found.append(statistic(drawn))
    return np.stack(found)


def percentiles(values_R) -> tuple:
    """Return the interval between the resamples' percentiles, over the first axis."""
    low, high = np.quantile(values_R, TAILS, axis=0)
    return low, high


@dataclasses.dataclass(frozen=True)
class Path:
    """Reward and KL of each unit at the points that a method goes through, in that order.

    Points are the checkpoints of a run, or runs ordered by the number that is swept. Units are
    prompts, or seeds.
    """

    kls_KU: np.ndarray
    rewards_KU: np.ndarray

    def reward_at(self, kl: float, drawn_U=slice(None)) -> float:
        """Return the reward at a KL, both averaged over the drawn units before interpolation."""
        kls_K = self.kls_KU[:, drawn_U].mean(axis=-1)
        rewards_K = self.rewards_KU[:, drawn_U].mean(axis=-1)
        return reward_at_kl(kls_K, rewards_K, kl)


def reward_at_kl(kls: Sequence[float], rewards: Sequence[float], kl: float) -> float:
    """Return the reward where a path of points has a KL, interpolated over sqrt(KL); else nan.

    Rewards near the reference grow like the root of the KL, so a chord over the KL itself would be
    too low between points that are far apart. Where the bound is exact, interpolate the gap to it
    in place of the reward, for it bends less. A path that comes by this KL several times counts
    where it does so last, as it is trained furthest there. To read below its first point, begin
    it with the reference: KL 0 and its reward.
    """
    # Rounding can take a KL of 0 below it.
    roots_K, values_K = np.sqrt(np.clip(kls, 0, None)), np.asarray(rewards, float)
    root = math.sqrt(max(kl, 0.0))
    low_K = np.minimum(roots_K[:-1], roots_K[1:])
    high_K = np.maximum(roots_K[:-1], roots_K[1:])
    between = np.flatnonzero((low_K <= root) & (root <= high_K))
    if not len(between):
        return float(values_K[0]) if len(roots_K) == 1 and roots_K[0] == root else math.nan
    k = between[-1]
    if root == roots_K[k + 1]:
        return float(values_K[k + 1])
    slope = (values_K[k + 1] - values_K[k]) / (roots_K[k + 1] - roots_K[k])
    return float(values_K[k] + slope * (root - roots_K[k]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, by Holm (1979), in the order given.

    Rejecting those below a level keeps the chance of any false rejection below it, whatever depends
    on what.
    """
    p_N = np.asarray(p_values, float)
    order_N = np.argsort(p_N, kind="stable")
    # The smallest is multiplied by the number of tests, the next by one fewer, and so on; none
    # becomes smaller than the one before.
    scaled_N = p_N[order_N] * np.arange(len(p_N), 0, -1)
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order_N] = np.maximum.accumulate(scaled_N).clip(max=1.0)
    return adjusted_N.tolist()

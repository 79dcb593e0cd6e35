"""Statistics of seeds and prompts: intervals, bootstraps, paired differences, matched KL, Holm.

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

from dpo_jax.data.grouping import clustered_error

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

    The interval is that of `mean_interval`. The row of one seed gives its own, if it has NAME_se:
    the noise of its evaluation, as far as the measure was sampled.
    """
    found = mean_interval([row[name] for row in rows])
    low, high = found["low"], found["high"]
    error = rows[0].get(f"{name}_se")
    if len(rows) == 1 and error is not None:
        low, high = (float(rows[0][name] + side * NORMAL * error) for side in (-1, 1))
    return {name: found["mean"], f"{name}_low": low, f"{name}_high": high}


def t_quantile(degrees: int) -> float:
    """Return how many standard errors the interval of Student's t reaches on either side."""
    return float(special.stdtrit(degrees, TAILS[1]))


def standard_error(values_N: np.ndarray, clusters_N: np.ndarray | None = None) -> float | None:
    """Return the standard error of a mean, clustered where several values share a prompt.

    clusters_N: a number for each value, equal for equal prompts; None: the values are independent.
    None where there is one prompt.
    """
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
    statistic: Callable, units: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return a statistic of each resample of units, stacked: [R, ...].

    statistic: takes the indices of the drawn units, [units], and returns a number or an array.
    Resample r is the same whatever the statistic, so that those of two methods are paired.
    """
    rng = np.random.default_rng(seed)
    return np.stack([statistic(rng.integers(0, units, units)) for _ in range(resamples)])


def percentiles(values_R) -> tuple:
    """Return the interval between the resamples' percentiles, over the first axis."""
    low, high = np.quantile(values_R, TAILS, axis=0)
    return low, high


def bootstrap_mean(
    values, clusters, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of a mean: whole clusters are drawn, with all their values.

    The percentile interval covers less than it says where there are few clusters: about 88 %
    for 10, 93 % for 50. `clustered_interval` is better there.
    """
    _, number_N = np.unique(np.asarray(clusters), return_inverse=True)
    sizes_C = np.bincount(number_N)
    sums_C = np.bincount(number_N, np.asarray(values, float))

    def mean(drawn_C):
        return sums_C[drawn_C].sum() / sizes_C[drawn_C].sum()

    found_R = bootstrap(mean, len(sizes_C), resamples=resamples, seed=seed)
    low, high = percentiles(found_R)
    return float(low), float(high)


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
    """Return the reward where a path of points has a KL, by linear interpolation; else nan.

    A path that comes by this KL several times counts where it does so last, as it is trained
    furthest there. Start it at the reference: KL 0 and its reward.
    """
    kls_K, rewards_K = np.asarray(kls, float), np.asarray(rewards, float)
    low_K = np.minimum(kls_K[:-1], kls_K[1:])
    high_K = np.maximum(kls_K[:-1], kls_K[1:])
    between = np.flatnonzero((low_K <= kl) & (kl <= high_K))
    if not len(between):
        return float(rewards_K[0]) if len(kls_K) == 1 and kls_K[0] == kl else math.nan
    k = between[-1]
    step = kls_K[k + 1] - kls_K[k]
    share = (kl - kls_K[k]) / step if step else 1.0
    return float(rewards_K[k] + share * (rewards_K[k + 1] - rewards_K[k]))


def matched_difference(
    first: Path, second: Path, kl: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """Compare the rewards of two methods at one KL: kl, first, second, difference, se, low, high.

    Both paths have the same units in the same order, which are drawn again together. `reached` is
    the share of resamples in which both methods come to this KL; se, low and high are None where it
    is below 95 %, and the rewards are None where a method does not reach the KL. The percentile
    interval is for prompts; of a few seeds, take `reward_at_kl` of each seed and
    `paired_difference`.
    """
    units = first.kls_KU.shape[-1]
    if second.kls_KU.shape[-1] != units:
        raise ValueError(
            f"paths of {units} and {second.kls_KU.shape[-1]} units are to be compared: expected "
            "the same prompts or seeds in both."
        )

    def difference(drawn_U):
        return first.reward_at(kl, drawn_U) - second.reward_at(kl, drawn_U)

    rewards = first.reward_at(kl), second.reward_at(kl)
    differences_R = bootstrap(difference, units, resamples=resamples, seed=seed)
    found_R = differences_R[np.isfinite(differences_R)]
    low = high = se = None
    if len(found_R) >= REACHED * resamples and units > 1:
        low, high = map(float, percentiles(found_R))
        se = float(found_R.std(ddof=1))
    return dict(
        kl=kl,
        first=_known(rewards[0]),
        second=_known(rewards[1]),
        difference=_known(rewards[0] - rewards[1]),
        se=se,
        low=low,
        high=high,
        reached=len(found_R) / resamples,
        n=units,
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


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

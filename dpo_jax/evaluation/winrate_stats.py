"""Statistics of judgements: win rates, paired comparisons, and the agreement of judges.

A verdict is "win", "tie", "loss", or None if the judge gave none. None is left out and counted
apart. All intervals are 95 % confidence intervals.
"""

import math

import numpy as np

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def win_rate(verdicts: list[str | None]) -> dict:
    """Return the win rate and its interval: rate, low, high, wins, ties, losses, unparsable, n.

    A tie counts as half a win; n is the number of verdicts that count. The rate of no verdicts is
    None. The interval is Wilson's for n verdicts without ties. Ties lower the true variance by a
    quarter of their share, so the interval covers 95 % or more.
    """
    points_N = _points(verdicts)
    n = len(points_N)
    low, high = wilson(points_N.sum(), n)
    return dict(
        rate=float(points_N.mean()) if n else None,
        low=low,
        high=high,
        wins=verdicts.count("win"),
        ties=verdicts.count("tie"),
        losses=verdicts.count("loss"),
        unparsable=verdicts.count(None),
        n=n,
    )


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of the share successes / n; (0, 1) if n is 0."""
    if not n:
        return 0.0, 1.0
    share = successes / n
    # Pulled towards 1/2, so that it stays within [0, 1] and has a width even at 0 or n wins.
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired(first: list[str | None], second: list[str | None]) -> dict:
    """Compare two methods judged on the same prompts: difference of win rates, low, high, p, n.

    Prompts where either verdict is None are left out. `better` and `worse` count the prompts where
    the first method did better or worse. The interval is Agresti and Min's (2005), for differences
    that may be halves: Wald's after adding two prompts on which each method wins half of the
    disagreements, so that its width is not 0 if the methods never disagree. p is two-sided, from
    the exact sign test on the prompts where the methods differ; without ties that is McNemar's
    exact test.
    """
    kept = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    differences_N = _points([a for a, _ in kept]) - _points([b for _, b in kept])
    n = len(kept)
    better, worse = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    # Two prompts more, whose differences cancel: n + 2 below, and 1 more in the sum of squares.
    centre = differences_N.sum() / (n + 2)
    half = Z * math.sqrt((((differences_N**2).sum() + 1) / (n + 2) - centre**2) / (n + 2))
    return dict(
        difference=float(differences_N.mean()) if n else None,
        low=max(-1.0, float(centre - half)),
        high=min(1.0, float(centre + half)),
        p=sign_test(better, worse),
        better=better,
        worse=worse,
        n=n,
    )


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p of a split of fair coins that is as uneven as this, or more."""
    n = better + worse
    one_side = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * one_side / 2**n)


def agreement(pairs: list[list[tuple[str, str]]]) -> dict:
    """Measure how often two raters agree: rate and Cohen's kappa with intervals, and n items.

    pairs: for each item the (first, second) verdicts on it: one pair for two judges, none if
    either gave no verdict, several if people voted. n counts the items with any pair. Rate and
    kappa are over all pairs. The intervals treat an item's pairs as one observation: Wilson's for
    n items, and the jackknife over items for kappa. kappa is None if both raters always give the
    same single verdict; its interval is None if leaving out an item leads to that.
    """
    items = [item for item in pairs if item]
    labels = sorted({verdict for item in items for pair in item for verdict in pair})
    counts_NLL = np.zeros((len(items), len(labels), len(labels)))
    for row, item in enumerate(items):
        for a, b in item:
            counts_NLL[row, labels.index(a), labels.index(b)] += 1
    n = len(items)
    total_LL = counts_NLL.sum(axis=0)
    rate = float(np.trace(total_LL) / total_LL.sum()) if n else None
    low, high = wilson(rate * n if n else 0.0, n)
    kappa, kappa_low, kappa_high = _kappa_interval(total_LL, counts_NLL)
    return dict(
        rate=rate, low=low, high=high, kappa=kappa, kappa_low=kappa_low, kappa_high=kappa_high, n=n
    )


def _kappa_interval(total_LL, counts_NLL) -> tuple[float | None, float | None, float | None]:
    """Cohen's kappa and its jackknife interval; None for what is not defined."""
    kappa = float(_kappa(total_LL))
    n = len(counts_NLL)
    # The jackknife: kappa without each item in turn.
    without_N = _kappa(total_LL - counts_NLL)
    if math.isnan(kappa):
        return None, None, None
    if n < 2 or np.isnan(without_N).any():
        return kappa, None, None
    error = math.sqrt((n - 1) / n * ((without_N - without_N.mean()) ** 2).sum())
    return kappa, max(-1.0, kappa - Z * error), min(1.0, kappa + Z * error)


def _kappa(counts_LL) -> np.ndarray:
    """Cohen's kappa of tables of counts [..., L, L]; nan if it is not defined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = counts_LL / counts_LL.sum(axis=(-2, -1), keepdims=True)
        observed = np.trace(shares, axis1=-2, axis2=-1)
        chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
        # Where chance agreement is certain, kappa would be 0 / 0.
        return np.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), np.nan)


def _points(verdicts: list[str | None]) -> np.ndarray:
    """Points of each verdict that is not None."""
    given = [verdict for verdict in verdicts if verdict is not None]
    if unknown := set(given) - POINTS.keys():
        raise ValueError(
            f"verdicts {sorted(map(str, unknown))}: expected {', '.join(POINTS)} or None."
        )
    return np.array([POINTS[verdict] for verdict in given])

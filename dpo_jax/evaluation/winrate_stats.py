"""Statistics of judgements: win rates, two methods on the same prompts, agreement of judges. numpy
only.

A verdict is "win", "tie", "loss", or None where the judge gave none; those are left out and
counted. All intervals hold 95 %.
"""

import math

import numpy as np

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def win_rate(verdicts: list[str | None]) -> dict:
    """rate, low, high, wins, ties, losses, unparsable and n, the verdicts that count; a tie is half
    a win.

    The interval is Wilson's, with ties as half a success. It takes the variance for that of n
    verdicts without ties; the true one is lower by a quarter of the share of ties, so it holds 95 %
    or more. Without verdicts rate is None.
    """
    scores_N = _scores(verdicts)
    counts = {
        name: verdicts.count(verdict)
        for name, verdict in [("wins", "win"), ("ties", "tie"), ("losses", "loss")]
    }
    low, high = wilson(scores_N.sum(), len(scores_N))
    return dict(
        rate=float(scores_N.mean()) if len(scores_N) else None,
        low=low,
        high=high,
        **counts,
        unparsable=verdicts.count(None),
        n=len(scores_N),
    )


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, successes / n; (0, 1) where n is 0."""
    if not n:
        return 0.0, 1.0
    share = successes / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired(first: list[str | None], second: list[str | None]) -> dict:
    """Two methods judged against the same answers to the same prompts: difference of win rates,
    low, high, p, n.

    Prompts where either verdict is None are left out. The interval is Agresti and Min's of 2005,
    for differences that may be halves: Wald's after adding two prompts, on which the methods win
    half of the disagreements each, so that it has a width where they never disagree. p is
    two-sided, of the exact sign test on the prompts where one did better (better, worse: how many),
    which without ties is McNemar's exact test.
    """
    kept = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    differences_N = _scores([a for a, _ in kept]) - _scores([b for _, b in kept])
    n, better, worse = len(kept), int((differences_N > 0).sum()), int((differences_N < 0).sum())
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
    """Two-sided p of so uneven a split, or a more uneven one, of fair coins."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)


def agreement(pairs: list[list[tuple[str, str]]]) -> dict:
    """How often two raters say the same: rate, low, high; Cohen's kappa, kappa_low, kappa_high; n.

    pairs: for each item the (first's, second's) verdicts on it: one for two judges, none where
    either has no verdict, several where people voted; n counts the items that have any. rate and
    kappa are of all pairs; the intervals take an item's pairs for one observation: Wilson's of n,
    and for kappa the jackknife over items. kappa is None where both always say the same one thing,
    and its interval where the jackknife comes upon that.
    """
    items = [item for item in pairs if item]
    labels = sorted({verdict for item in items for pair in item for verdict in pair})
    counts_NLL = np.zeros((len(items), len(labels), len(labels)))
    for row, item in enumerate(items):
        for a, b in item:
            counts_NLL[row, labels.index(a), labels.index(b)] += 1
    total_LL, n = counts_NLL.sum(axis=0), len(items)
    rate = float(np.trace(total_LL) / total_LL.sum()) if n else None
    low, high = wilson(rate * n if n else 0.0, n)
    kappa, kappa_low, kappa_high = _kappa_interval(total_LL, counts_NLL)
    return dict(
        rate=rate, low=low, high=high, kappa=kappa, kappa_low=kappa_low, kappa_high=kappa_high, n=n
    )


def _kappa_interval(total_LL, counts_NLL) -> tuple[float | None, float | None, float | None]:
    kappa, n = float(_kappa(total_LL)), len(counts_NLL)
    without_N = _kappa(total_LL - counts_NLL)
    if math.isnan(kappa):
        return None, None, None
    if n < 2 or np.isnan(without_N).any():
        return kappa, None, None
    error = math.sqrt((n - 1) / n * ((without_N - without_N.mean()) ** 2).sum())
    return kappa, max(-1.0, kappa - Z * error), min(1.0, kappa + Z * error)


def _kappa(counts_LL) -> np.ndarray:
    """Cohen's kappa of tables of counts [..., L, L]; nan where it is not defined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = counts_LL / counts_LL.sum(axis=(-2, -1), keepdims=True)
        observed = np.trace(shares, axis1=-2, axis2=-1)
        chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
        return np.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), np.nan)


def _scores(verdicts: list[str | None]) -> np.ndarray:
    """1, 0.5 or 0 of each verdict that is not None."""
    if strange := {verdict for verdict in verdicts if verdict is not None} - SCORES.keys():
        raise ValueError(
            f"verdicts {sorted(map(str, strange))}: expected {', '.join(SCORES)} or None."
        )
    return np.array([SCORES[verdict] for verdict in verdicts if verdict is not None])

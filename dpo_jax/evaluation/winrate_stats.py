"""Statistics of judgements: win rates, paired comparisons, and the agreement of judges.

A verdict is "win", "tie", "loss", or None if the judge gave none. None is left out and counted
apart. All intervals are 95 % confidence intervals. `prompts` tells the prompt of each verdict, by
any values that are equal for equal prompts: several verdicts on a prompt are alike, and count as
one cluster.
"""

import math

import numpy as np
from scipy import special

from dpo_jax.evaluation import statistics

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def win_rate(verdicts: list[str | None], prompts: list | None = None) -> dict:
    """Return the win rate and its interval: rate, low, high, wins, ties, losses, unparsable, n.

    A tie counts as half a win; n is the number of verdicts that count. The rate of no verdicts is
    None. The interval is Wilson's for n verdicts without ties. Ties lower the true variance by a
    quarter of their share, so the interval covers 95 % or more. Of several verdicts on a prompt it
    is Wilson's for the number of independent ones that would be as accurate.
    """
    points_N = _points(verdicts)
    n = len(points_N)
    independent = n
    if prompts is not None and n:
        independent = _independent(points_N, _of_given(verdicts, prompts))
    low, high = wilson(points_N.mean() * independent if n else 0.0, independent)
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


def _independent(points_N, prompts_N) -> float:
    """Return how many independent verdicts without ties would be as accurate, at most N."""
    n, clusters = len(points_N), len(np.unique(prompts_N))
    if clusters == n:
        return n
    error = statistics.clustered_error(points_N, prompts_N)
    if not error:  # all verdicts are alike, or one prompt has them all
        return clusters
    share = points_N.mean()
    return min(n, float(share * (1 - share) / error**2))


def length_controlled(
    verdicts: list[str | None], longer_by: list[int], prompts: list | None = None
) -> dict:
    """Return the win rate that answers of equal length would have: rate, low, high, length_effect.

    longer_by: by how many characters our answer is the longer. As in AlpacaEval 2 (Dubois et al.
    2024), without its term for an instruction's difficulty, a logistic regression

        P(win) = sigmoid(theta + phi * tanh(d / s)), s the standard deviation of the differences d,

    is fitted by maximum likelihood, with a tie as half a win and half a loss; the rate is
    sigmoid(theta). length_effect is phi: above 0, the judge takes longer answers for better. The
    interval has the errors clustered by prompt (Huber's and White's sandwich).

    All are None where no finite theta fits best: if one side wins always, or each win is of a
    longer answer than each loss, or of a shorter one.
    """
    points_N = _points(verdicts)
    differences_N = np.asarray(_of_given(verdicts, longer_by), float)
    clusters_N = np.arange(len(points_N))
    if prompts is not None:
        clusters_N = _of_given(verdicts, prompts)
    scale = differences_N.std() if len(differences_N) else 0.0
    lengths_N = np.tanh(differences_N / scale) if scale else np.zeros(len(points_N))
    nothing = dict(rate=None, low=None, high=None, length_effect=None)
    if not _is_fitted(points_N, lengths_N):
        return nothing
    columns = [np.ones(len(points_N))]
    if scale:
        columns.append(lengths_N)
    inputs_NK = np.stack(columns, axis=-1)
    weights_K, hessian_KK = _logistic(inputs_NK, points_N)
    theta = float(weights_K[0])
    found = nothing | dict(
        rate=float(special.expit(theta)), length_effect=float(weights_K[1]) if scale else 0.0
    )
    _, number_N = np.unique(clusters_N, return_inverse=True)
    clusters = number_N.max() + 1
    if clusters < 2:
        return found
    errors_NK = inputs_NK * (points_N - special.expit(inputs_NK @ weights_K))[:, None]
    errors_CK = np.stack([np.bincount(number_N, errors_N) for errors_N in errors_NK.T], axis=-1)
    inverse_KK = np.linalg.inv(hessian_KK)
    spread_KK = errors_CK.T @ errors_CK * clusters / (clusters - 1)
    error = math.sqrt((inverse_KK @ spread_KK @ inverse_KK)[0, 0])
    half = statistics.t_quantile(clusters - 1) * error
    low, high = float(special.expit(theta - half)), float(special.expit(theta + half))
    return found | dict(low=low, high=high)


def _is_fitted(points_N, lengths_N) -> bool:
    """Return whether the logistic regression of length_controlled has a finite optimum.

    It has none if a threshold on the length parts all wins from all losses; a tie is both.
    """
    wins_N, losses_N = lengths_N[points_N > 0], lengths_N[points_N < 1]
    if not len(wins_N) or not len(losses_N):
        return False
    if np.ptp(lengths_N) == 0:
        return True
    return bool(losses_N.max() > wins_N.min() and wins_N.max() > losses_N.min())


def _logistic(inputs_NK, shares_N) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression of shares by Newton's method; return weights and Hessian."""

    def loss(weights_K):
        logits_N = inputs_NK @ weights_K
        return float(np.logaddexp(0, logits_N).sum() - shares_N @ logits_N)

    weights_K = np.zeros(inputs_NK.shape[1])
    while True:
        chances_N = special.expit(inputs_NK @ weights_K)
        hessian_KK = (inputs_NK * (chances_N * (1 - chances_N))[:, None]).T @ inputs_NK
        step_K = np.linalg.solve(hessian_KK, inputs_NK.T @ (shares_N - chances_N))
        before = loss(weights_K)
        # A full step may go too far where the verdicts nearly follow the length.
        while loss(weights_K + step_K) > before and np.abs(step_K).max() > 1e-9:
            step_K /= 2
        if np.abs(step_K).max() <= 1e-9:
            return weights_K, hessian_KK
        weights_K = weights_K + step_K


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval of the share successes / n; (0, 1) if n is 0."""
    if not n:
        return 0.0, 1.0
    share = successes / n
    # Pulled towards 1/2, so that it stays within [0, 1] and has a width even at 0 or n wins.
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired_points(first_N: np.ndarray, second_N: np.ndarray) -> dict:
    """Compare two methods judged on the same prompts: difference of win rates, low, high, p, n.

    first_N, second_N: their points on each prompt, nan for none: POINTS of the verdict, or the mean
    where a method has several answers. Prompts where either has none are left out. `better` and
    `worse` count the prompts where the first method did better or worse. The interval is Agresti
    and Min's (2005), for differences that may be halves: Wald's after adding two prompts on which
    each method wins half of the disagreements, so that its width is not 0 if the methods never
    disagree. p is two-sided, from the exact sign test on the prompts where the methods differ;
    without ties that is McNemar's exact test.
    """
    if len(first_N) != len(second_N):
        raise ValueError(
            f"{len(first_N)} verdicts are to be compared with {len(second_N)}: expected verdicts "
            "on the same prompts."
        )
    differences_N = first_N - second_N
    differences_N = differences_N[~np.isnan(differences_N)]
    n = len(differences_N)
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


def mean_points(runs: list[list[str | None]]) -> np.ndarray:
    """Return the mean points of each prompt over several runs' verdicts; nan where none has any."""
    points_RP = np.stack([_points_or_nan(verdicts) for verdicts in runs])
    counts_P = (~np.isnan(points_RP)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.nansum(points_RP, axis=0) / counts_P


def _points_or_nan(verdicts: list[str | None]) -> np.ndarray:
    """Points of each verdict; nan where it is None."""
    points_N = np.full(len(verdicts), np.nan)
    given_N = np.array([verdict is not None for verdict in verdicts], bool)
    points_N[given_N] = _points(verdicts)
    return points_N


def _of_given(verdicts: list[str | None], values: list) -> np.ndarray:
    """Those of the values whose verdict is not None."""
    both = zip(verdicts, values, strict=True)
    return np.array([value for verdict, value in both if verdict is not None])


def _points(verdicts: list[str | None]) -> np.ndarray:
    """Points of each verdict that is not None."""
    given = [verdict for verdict in verdicts if verdict is not None]
    if unknown := set(given) - POINTS.keys():
        raise ValueError(
            f"verdicts {sorted(map(str, unknown))}: expected {', '.join(POINTS)} or None."
        )
    return np.array([POINTS[verdict] for verdict in given])

"""Win rates and agreement against scipy, scikit-learn and published formulas."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.linear_model
import sklearn.metrics

from dpo_jax.evaluation import winrate_stats


def test_win_rate_tie_is_half():
    found = winrate_stats.win_rate(["win"] * 6 + ["tie"] * 2 + ["loss"] * 2 + [None])
    assert found["rate"] == 0.7
    assert [found[name] for name in ("wins", "ties", "losses", "unparsable", "n")] == [
        6,
        2,
        2,
        1,
        10,
    ]
    of_scipy = scipy.stats.binomtest(7, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose([found["low"], found["high"]], of_scipy, atol=1e-12)


@pytest.mark.parametrize("wins, n", [(0, 1), (1, 1), (0, 20), (20, 20), (143, 256)])
def test_wilson_equals_scipy(wins, n):
    found = winrate_stats.win_rate(["win"] * wins + ["loss"] * (n - wins))
    np.testing.assert_allclose(
        [found["low"], found["high"]],
        scipy.stats.binomtest(wins, n).proportion_ci(method="wilson"),
        atol=1e-12,
    )


def test_win_rate_of_none_or_strange():
    found = winrate_stats.win_rate([None, None])
    assert (
        found["rate"] is None
        and (found["low"], found["high"]) == (0, 1)
        and found["unparsable"] == 2
    )
    with pytest.raises(ValueError, match="'draw'.*win, tie, loss or None"):
        winrate_stats.win_rate(["win", "draw"])


@pytest.mark.parametrize(
    "shares", [(0.5, 0.0, 0.5), (0.5, 0.3, 0.2), (0.1, 0.8, 0.1), (0.92, 0.04, 0.04)]
)
def test_wilson_covers_truth(shares):
    rng, n = np.random.default_rng(0), 60
    truth = shares[0] + shares[1] / 2
    counts = rng.multinomial(n, shares, size=2000)
    held = [
        low <= truth <= high
        for low, high in (winrate_stats.wilson(wins + ties / 2, n) for wins, ties, _ in counts)
    ]
    assert np.mean(held) > 0.935


def paired(first: list[str | None], second: list[str | None]) -> dict:
    """Compare two methods by their verdicts on the same prompts."""
    points = winrate_stats.POINTS | {None: np.nan}
    of_methods = [
        np.array([points[verdict] for verdict in verdicts]) for verdicts in (first, second)
    ]
    return winrate_stats.paired_points(*of_methods)


def test_paired_by_hand():
    """Differences 1, 1/2, 0, -1/2, and one prompt without a verdict: sum 1, sum of squares 1.5, of
    4.
    """
    found = paired(["win", "win", "tie", "tie", "win"], ["loss", "tie", "tie", "win", None])
    assert found["difference"] == 0.25 and (found["better"], found["worse"], found["n"]) == (
        2,
        1,
        4,
    )
    assert found["p"] == 1
    half = 1.959963984540054 * math.sqrt((2.5 / 6 - (1 / 6) ** 2) / 6)
    np.testing.assert_allclose([found["low"], found["high"]], [1 / 6 - half, 1 / 6 + half])


def test_paired_without_ties_is_mcnemar():
    both = (
        [("win", "win")] * 20
        + [("win", "loss")] * 10
        + [("loss", "win")] * 3
        + [("loss", "loss")] * 17
    )
    found = paired(*map(list, zip(*both, strict=True)))
    assert found["difference"] == pytest.approx(7 / 50)
    b, c, n = 10.5, 3.5, 52  # half a prompt more in each cell
    half = 1.959963984540054 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    np.testing.assert_allclose(
        [found["low"], found["high"]], [(b - c) / n - half, (b - c) / n + half]
    )
    assert found["p"] == pytest.approx(scipy.stats.binomtest(10, 13).pvalue)
    swapped = paired(*[[pair[side] for pair in both] for side in (1, 0)])
    assert (swapped["low"], swapped["high"], swapped["p"]) == pytest.approx(
        (-found["high"], -found["low"], found["p"])
    )


def test_paired_equal_methods_have_width():
    found = paired(["win"] * 30, ["win"] * 30)
    assert found["difference"] == 0 and found["p"] == 1
    assert found["low"] == -found["high"] and 0.05 < found["high"] < 0.1


def test_paired_refuses_unequal_lists():
    assert paired([None], ["win"])["difference"] is None
    with pytest.raises(ValueError, match="1 verdicts are to be compared with 2"):
        paired(["win"], ["win", "loss"])


def test_paired_covers_truth():
    """Two methods whose verdicts depend on each other, with ties."""
    rng, n, verdicts = (
        np.random.default_rng(1),
        40,
        list(itertools.product(["win", "tie", "loss"], repeat=2)),
    )
    shares = [0.35, 0.1, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05, 0.15]
    scores = np.array([[winrate_stats.POINTS[verdict] for verdict in pair] for pair in verdicts])
    truth = shares @ (scores[:, 0] - scores[:, 1])
    held = []
    for row in rng.choice(len(verdicts), p=shares, size=(1000, n)):
        found = paired([verdicts[k][0] for k in row], [verdicts[k][1] for k in row])
        held.append(found["low"] <= truth <= found["high"])
    assert np.mean(held) > 0.935


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 0), (3, 9), (40, 60), (1500, 1400)])
def test_sign_test_equals_scipy(better, worse):
    expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1
    assert winrate_stats.sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def random_raters(n, seed=0):
    """Two raters of three verdicts, the second of whom says what the first says two times in
    three.
    """
    rng = np.random.default_rng(seed)
    first = rng.choice(["win", "tie", "loss"], p=[0.5, 0.2, 0.3], size=n)
    second = np.where(rng.random(n) < 0.65, first, rng.choice(["win", "tie", "loss"], size=n))
    return first.tolist(), second.tolist()


def test_agreement_equals_scikit_learn():
    first, second = random_raters(300)
    found = winrate_stats.agreement([[pair] for pair in zip(first, second, strict=True)])
    same = int(np.sum(np.array(first) == np.array(second)))
    assert found["rate"] == pytest.approx(same / 300) and found["n"] == 300
    np.testing.assert_allclose(
        [found["low"], found["high"]],
        scipy.stats.binomtest(same, 300).proportion_ci(method="wilson"),
    )
    assert found["kappa"] == pytest.approx(sklearn.metrics.cohen_kappa_score(first, second))


def test_kappa_interval_equals_delta_method():
    """The variance of kappa by its derivatives in the cells' shares (here by differences) and the
    multinomial's.
    """
    first, second = random_raters(2000, seed=3)
    names = ["loss", "tie", "win"]
    shares = (
        np.array(
            [
                [sum(pair == (a, b) for pair in zip(first, second, strict=True)) for b in names]
                for a in names
            ]
        )
        / 2000
    )

    def kappa(cells):
        table = cells.reshape(3, 3)
        chance = table.sum(axis=0) @ table.sum(axis=1)
        return (np.trace(table) - chance) / (1 - chance)

    cells = shares.ravel()
    slopes = np.array(
        [(kappa(cells + step) - kappa(cells - step)) / 2e-6 for step in 1e-6 * np.eye(9)]
    )
    variance = (cells @ slopes**2 - (cells @ slopes) ** 2) / 2000
    found = winrate_stats.agreement([[pair] for pair in zip(first, second, strict=True)])
    half = 1.96 * math.sqrt(variance)
    np.testing.assert_allclose(
        np.diff([found["kappa_low"], found["kappa"], found["kappa_high"]]), half, rtol=0.01
    )


def test_agreement_by_hand():
    """Of 20 + 5 + 10 + 15 pairs 35 agree; by chance 1/2 would: kappa 0.4."""
    pairs = (
        [("win", "win")] * 20
        + [("win", "loss")] * 5
        + [("loss", "win")] * 10
        + [("loss", "loss")] * 15
    )
    found = winrate_stats.agreement([[pair] for pair in pairs] + [[]])
    assert (
        found["rate"] == pytest.approx(0.7)
        and found["kappa"] == pytest.approx(0.4)
        and found["n"] == 50
    )


def test_agreement_counts_items_not_votes():
    """Three people who always vote alike tell as much as one."""
    items = [[pair] for pair in zip(*random_raters(50), strict=True)]
    assert winrate_stats.agreement([item * 3 for item in items]) == pytest.approx(
        winrate_stats.agreement(items)
    )


def test_agreement_with_undefined_kappa():
    alike = winrate_stats.agreement([[("win", "win")]] * 5)
    assert alike["rate"] == 1 and alike["kappa"] is None and alike["kappa_low"] is None
    assert (
        winrate_stats.agreement([])["rate"] is None and winrate_stats.agreement([[], []])["n"] == 0
    )
    perfect = winrate_stats.agreement([[("win", "win")]] * 5 + [[("loss", "loss")]] * 5)
    assert (perfect["kappa"], perfect["kappa_low"], perfect["kappa_high"]) == (1, 1, 1)


def biased_votes(rng, n, theta, phi, spread=100):
    """Votes of a judge with a known bias to length, and by how much ours are longer."""
    longer_by = rng.normal(0.8 * spread, spread, n).round()
    chances = scipy.special.expit(theta + phi * np.tanh(longer_by / longer_by.std()))
    verdicts = np.where(rng.random(n) < chances, "win", "loss")
    return verdicts.tolist(), longer_by.tolist()


def test_length_controlled_finds_the_rate_at_equal_length():
    """Our answers are longer and the judge likes that: 58 % at equal length, 71 % as they are."""
    verdicts, longer_by = biased_votes(np.random.default_rng(0), 20_000, 0.3, 1.5)
    found = winrate_stats.length_controlled(verdicts, longer_by)
    assert winrate_stats.win_rate(verdicts)["rate"] > 0.7
    assert found["low"] < scipy.special.expit(0.3) < found["high"] < found["low"] + 0.025
    assert found["length_effect"] == pytest.approx(1.5, abs=0.1)
    turned = ["loss" if verdict == "win" else "win" for verdict in verdicts]
    other = winrate_stats.length_controlled(turned, [-length for length in longer_by])
    assert other["rate"] == pytest.approx(1 - found["rate"])


def test_length_controlled_equals_sklearn():
    """Ties are half a win and half a loss."""
    verdicts, longer_by = biased_votes(np.random.default_rng(1), 60, -0.4, 0.8)
    verdicts[::7] = ["tie"] * len(verdicts[::7])
    verdicts[3] = None
    given = [number for number, verdict in enumerate(verdicts) if verdict]
    scale = np.std([longer_by[number] for number in given])
    inputs, wins, weights = [], [], []
    for number in given:
        points = winrate_stats.POINTS[verdicts[number]]
        inputs += [[np.tanh(longer_by[number] / scale)]] * 2
        wins += [1, 0]
        weights += [points, 1 - points]
    fit = sklearn.linear_model.LogisticRegression(C=1e10, tol=1e-10)
    fit.fit(inputs, wins, sample_weight=weights)
    found = winrate_stats.length_controlled(verdicts, longer_by)
    assert found["length_effect"] == pytest.approx(fit.coef_.item(), abs=1e-5)
    assert found["rate"] == pytest.approx(scipy.special.expit(fit.intercept_.item()), abs=1e-5)


def test_length_controlled_without_an_optimum():
    undefined = dict(rate=None, low=None, high=None, length_effect=None)
    for verdicts, longer_by in [
        ([], []),
        (["win", "win"], [3, 4]),
        (["loss", "loss", "win", "win"], [1, 2, 2, 9]),  # the longer answer always wins
        (["win", "tie", "loss"], [1, 2, 3]),
    ]:
        assert winrate_stats.length_controlled(verdicts, longer_by) == undefined
    # Lengths that are all alike explain nothing.
    found = winrate_stats.length_controlled(["win"] * 3 + ["loss"], [5] * 4)
    assert (found["rate"], found["length_effect"]) == (pytest.approx(0.75), 0)
    assert found["low"] < 0.75 < found["high"]


def test_intervals_cover_with_several_verdicts_on_a_prompt():
    """Prompts differ in how easily they are won; ignoring it, intervals would cover too little."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 4).tolist()
    held, held_at_equal_length, ignoring = [], [], []
    for _ in range(300):
        ease = np.repeat(rng.beta(1, 1, 60), 4)
        verdicts = np.where(rng.random(240) < ease, "win", "loss").tolist()
        longer_by = rng.integers(-9, 10, 240).tolist()
        found = winrate_stats.win_rate(verdicts, prompts)
        held.append(found["low"] <= 0.5 <= found["high"])
        found = winrate_stats.length_controlled(verdicts, longer_by, prompts)
        held_at_equal_length.append(found["low"] <= 0.5 <= found["high"])
        found = winrate_stats.win_rate(verdicts)
        ignoring.append(found["low"] <= 0.5 <= found["high"])
    assert 0.92 < np.mean(held) < 0.985 and 0.92 < np.mean(held_at_equal_length) < 0.985
    assert np.mean(ignoring) < 0.87


def test_one_verdict_on_each_prompt_is_wilson():
    verdicts = ["win", "tie", "loss", "win", None]
    assert winrate_stats.win_rate(verdicts, list("abcde")) == winrate_stats.win_rate(verdicts)
    # All alike: as many as there are prompts, not verdicts.
    found = winrate_stats.win_rate(["win"] * 6, list("aabbcc"))
    assert (found["low"], found["high"]) == winrate_stats.wilson(3, 3) and found["n"] == 6


def test_mean_points_of_several_runs():
    runs = [["win", "loss", None], ["loss", None, None]]
    points = winrate_stats.mean_points(runs)
    np.testing.assert_array_equal(points, [0.5, 0, np.nan])
    found = winrate_stats.paired_points(points, np.array([0, 0.5, 1]))
    assert (found["better"], found["worse"], found["n"]) == (1, 1, 2)

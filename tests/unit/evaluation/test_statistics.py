"""Intervals, bootstraps, matched KL and Holm against scipy, closed forms and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from dpo_jax.evaluation import statistics


def covers(found, truth) -> bool:
    return found["low"] < truth < found["high"]


@pytest.mark.parametrize("n", [2, 3, 10, 200])
def test_mean_interval_equals_scipy(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = statistics.mean_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found["low"], found["high"]], expected, rtol=1e-10)
    assert found["se"] == pytest.approx(scipy.stats.sem(values))
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == n


def test_mean_interval_of_few():
    assert statistics.mean_interval([2.0]) == dict(mean=2.0, se=None, low=None, high=None, n=1)
    assert statistics.mean_interval([])["mean"] is None


def test_over_seeds_of_exact_rows_is_over_seeds():
    found = statistics.over_seeds([dict(kl=1.0), dict(kl=2.0)], "kl")
    half = 12.7062 * 0.5  # the error of two seeds is half their distance
    assert found.pop("interval_unit") == "seeds"
    assert found == pytest.approx(dict(kl=1.5, kl_low=1.5 - half, kl_high=1.5 + half), abs=1e-4)
    of_one = statistics.over_seeds([dict(kl=1.0)], "kl")
    assert of_one == dict(kl=1.0, kl_low=None, kl_high=None, interval_unit=None)


def test_over_seeds_of_sampled_rows_is_over_prompts():
    """One kind of interval, however many seeds there are; an error that is None gives none."""
    rows = [dict(kl=1.0, kl_se=0.4), dict(kl=2.0, kl_se=0.6)]
    found = statistics.over_seeds(rows, "kl")
    assert found.pop("interval_unit") == "prompts"
    assert found == pytest.approx(dict(kl=1.5, kl_low=1.5 - 0.98, kl_high=1.5 + 0.98), abs=1e-4)
    found = statistics.over_seeds(rows[:1], "kl")
    assert found["kl_high"] == pytest.approx(1 + 0.784, abs=1e-4)
    assert statistics.over_seeds([dict(kl=1.0, kl_se=None)], "kl")["interval_unit"] is None


def test_error_of_shared_prompts_is_at_most_the_mean_of_the_errors():
    rng = np.random.default_rng(0)
    of_seeds = rng.normal(size=50) + rng.normal(scale=[[0.5], [1.0]], size=(2, 50))
    of_mean = statistics.standard_error(of_seeds.mean(axis=0))
    assert of_mean < np.mean([statistics.standard_error(values) for values in of_seeds])


def test_t_quantiles_are_those_of_the_tables():
    found = [statistics.t_quantile(degrees) for degrees in (1, 2, 4, 9, 1000)]
    np.testing.assert_allclose(found, [12.7062, 4.3027, 2.7764, 2.2622, 1.9623], atol=1e-4)


def test_clustered_error_of_single_values():
    """Where each value is a cluster, it is the ordinary error of a mean."""
    values = np.random.default_rng(0).normal(size=30)
    error = statistics.clustered_error(values, np.arange(30))
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(30), rel=1e-12)


def test_clustered_error_of_repeated_values():
    """Values that are all there three times say no more than once each."""
    values = np.random.default_rng(1).normal(size=20)
    once = statistics.clustered_error(values, np.arange(20))
    thrice = statistics.clustered_error(np.repeat(values, 3), np.repeat(np.arange(20), 3))
    assert thrice == pytest.approx(once, rel=1e-12)


def test_clustered_error_covers_the_mean():
    """About 95 % of means lie within two errors of the truth, where clusters are unequal."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        sizes = rng.integers(1, 6, 60)
        clusters = np.repeat(np.arange(60), sizes)
        values = rng.normal(size=60)[clusters] + 0.3 * rng.normal(size=len(clusters))
        covered += abs(values.mean()) < 1.96 * statistics.clustered_error(values, clusters)
    assert 0.91 < covered / 400 < 0.98


def test_clustered_error_of_one_cluster_is_unknown():
    assert statistics.clustered_error(np.array([1.0, 2.0]), np.array([7, 7])) is None


def test_standard_error_is_the_usual_one_unless_values_share_a_prompt():
    values = np.random.default_rng(5).normal(size=20)
    usual = values.std(ddof=1) / math.sqrt(20)
    assert statistics.standard_error(values) == usual
    assert statistics.standard_error(values, np.arange(20)) == usual
    prompts = np.repeat(np.arange(10), 2)
    clustered = statistics.clustered_error(values, prompts)
    assert statistics.standard_error(values, prompts) == clustered != usual
    assert statistics.standard_error(values, np.zeros(20)) is None
    assert statistics.standard_error(values[:1]) is None
    assert statistics.standard_error(values[:1], np.zeros(1)) is None


def test_clustered_interval_of_single_values_is_the_usual_one():
    values = np.random.default_rng(3).normal(size=12)
    found = statistics.clustered_interval(values, np.arange(12))
    assert found == pytest.approx(statistics.mean_interval(values))
    assert statistics.clustered_interval([1.0, 2.0], ["a", "a"])["low"] is None


def test_clustered_interval_covers_the_mean_of_few_clusters():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1000):
        clusters = np.repeat(np.arange(8), 5)
        values = rng.normal(size=8)[clusters] + rng.normal(size=40)
        covered += covers(statistics.clustered_interval(values, clusters), 0)
    assert 0.93 < covered / 1000 < 0.97


def test_paired_difference_equals_scipy():
    rng = np.random.default_rng(5)
    first = rng.normal(size=30)
    second = 0.7 * first + rng.normal(0.3, 0.5, 30)
    found = statistics.paired_difference(first, second)
    expected = scipy.stats.ttest_rel(first, second)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx([low, high])
    assert found["difference"] == pytest.approx(np.mean(first - second)) and found["n"] == 30


def test_paired_difference_of_clusters_of_one_size_is_that_of_their_means():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(2, 20, 3)) + rng.normal(size=(20, 1))
    found = statistics.paired_difference(
        first.ravel(), second.ravel(), clusters=np.repeat(np.arange(20), 3)
    )
    expected = scipy.stats.ttest_rel(first.mean(axis=1), second.mean(axis=1))
    assert found["p"] == pytest.approx(expected.pvalue) and found["n"] == 20
    assert (found["low"], found["high"]) == pytest.approx(expected.confidence_interval(0.95))


def test_paired_difference_of_extremes():
    assert statistics.paired_difference([2.0, 3.0], [1.0, 2.0])["p"] == 0
    assert statistics.paired_difference([1.0, 2.0], [1.0, 2.0])["p"] == 1
    assert statistics.paired_difference([1.0], [2.0])["p"] is None
    with pytest.raises(ValueError, match="2 values are to be compared with 3"):
        statistics.paired_difference([1, 2], [1, 2, 3])


def test_bootstrap_equals_scipy():
    values = np.random.default_rng(7).exponential(size=80)

    def mean(drawn):
        return values[drawn].mean()

    found = statistics.percentiles(statistics.bootstrap(mean, 80, resamples=4000))
    expected = scipy.stats.bootstrap(
        [values], np.mean, method="percentile", n_resamples=4000, random_state=0
    ).confidence_interval
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_bootstrap_draws_whole_prompts():
    """Each prompt's rows come together; prompts without repeats are drawn as units are."""
    clusters = np.array(["b", "a", "b", "c", "b"])

    def counts(drawn):
        return np.bincount(drawn, minlength=5)

    found_RU = statistics.bootstrap(counts, 5, clusters=clusters, resamples=50)
    of_b_R3 = found_RU[:, [0, 2, 4]]
    assert (of_b_R3 == of_b_R3[:, :1]).all()
    assert (of_b_R3[:, 0] + found_RU[:, 1] + found_RU[:, 3] == 3).all()
    alone = statistics.bootstrap(counts, 5, clusters=list("vwxyz"), resamples=50)
    np.testing.assert_array_equal(alone, statistics.bootstrap(counts, 5, resamples=50))


def test_reward_at_kl():
    assert statistics.reward_at_kl([0, 4], [1, 5], 1) == 3
    assert statistics.reward_at_kl([0, 1, 4], [0, 1, 2], 1) == 1
    assert statistics.reward_at_kl([0, 1, 4], [0, 1, 2], 4) == 2
    assert math.isnan(statistics.reward_at_kl([0, 1, 4], [0, 1, 2], 4.1))
    assert statistics.reward_at_kl([0], [7], 0) == 7
    assert math.isnan(statistics.reward_at_kl([0], [7], 1))
    assert statistics.reward_at_kl([-1e-16, 1], [3, 4], 0) == 3  # a KL of 0 but for rounding


def test_reward_at_kl_of_a_root_is_exact():
    """As the optimum of a normal reward has it, sqrt(2 KL): no chord cuts it short."""
    kls = np.array([0, 0.61, 1.73, 3.8])
    for kl in (0.05, 0.25, 1.0, 3.0):
        found = statistics.reward_at_kl(kls, np.sqrt(2 * kls) - 1, kl)
        assert found == pytest.approx(math.sqrt(2 * kl) - 1)


def test_reward_at_kl_of_a_path_that_returns():
    """From KL 0 up to 16 and back to 4: at 9 it is the way back that counts."""
    assert statistics.reward_at_kl([0, 16, 4], [0, 4, 6], 9) == 5
    assert statistics.reward_at_kl([0, 16, 4], [0, 4, 6], 1) == 1
    assert statistics.reward_at_kl([0, 4, 4], [0, 2, 3], 4) == 3


def test_holm_is_bonferroni_closed():
    """By the closure: the largest p of all sets with the hypothesis, each by Bonferroni."""
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.8, 0.03])
    expected = []
    for tested in range(len(p)):
        of_sets = [
            min(1.0, len(chosen) * p[list(chosen)].min())
            for size in range(1, len(p) + 1)
            for chosen in itertools.combinations(range(len(p)), size)
            if tested in chosen
        ]
        expected.append(max(of_sets))
    assert statistics.holm(p) == pytest.approx(expected)
    assert statistics.holm([]) == [] and statistics.holm([0.3]) == [0.3]

"""Frontiers estimated from samples against enumeration and closed forms."""

import itertools

import numpy as np
import pytest

from dpo_jax.evaluation import exact, frontier, statistics

SHORT_GRID = np.geomspace(4, 0.12, 70)  # of betas, for simulations
REWARDS = np.random.default_rng(0).normal(size=(3, 40))


def test_frontier_of_whole_language_is_exact():
    """Each of 40 completions once, alike under the reference: the estimate is the bound, as far as
    it goes.
    """
    kls, rewards, *_ = frontier.frontier(REWARDS)
    uniform = np.full(REWARDS.shape, -np.log(40))
    np.testing.assert_allclose(rewards, exact.bound(uniform, REWARDS, kls), atol=1e-5)
    assert kls[0] < 1e-5 and rewards[0] == pytest.approx(REWARDS.mean(), abs=1e-2)
    assert (np.diff(kls) >= 0).all() and len(kls) > 100


@pytest.mark.parametrize(
    ("samples", "simulations", "bias"), [(32, 60, -0.11), (128, 40, -0.13), (1024, 6, -0.14)]
)
def test_frontier_of_normal_reward_is_low(samples, simulations, bias, monkeypatch):
    """Its optimum has reward 1 / beta and KL 1 / (2 beta²), so sqrt(2 KL) at each KL. The docstring
    says by how much the estimate is low at the end, and one nat before.
    """
    monkeypatch.setattr(frontier, "RESAMPLES", 2)
    monkeypatch.setattr(frontier, "BETAS", SHORT_GRID)
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(simulations):
        kls, rewards, *_ = frontier.frontier(rng.normal(size=(64, samples)))
        at_end = rewards[-1] - np.sqrt(2 * kls[-1])
        before = kls[-1] - 1
        errors.append((at_end, np.interp(before, kls, rewards) - np.sqrt(2 * before)))
    at_end, before = np.mean(errors, axis=0)
    assert at_end == pytest.approx(bias, abs=0.03)
    assert bias / 2 - 0.02 < before < 0.01


def test_frontier_interval_covers_the_optimum(monkeypatch):
    """At half a nat, where 128 samples are hardly low.

    Prompts differ in their mean reward, so that most of the noise is of the prompts.
    """
    monkeypatch.setattr(frontier, "RESAMPLES", 200)
    monkeypatch.setattr(frontier, "BETAS", SHORT_GRID)
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        rewards = rng.normal(size=(40, 128)) + 0.5 * rng.normal(size=(40, 1))
        found = frontier.frontier(rewards)
        low, high = (np.interp(0.5, found.kls, bound) for bound in (found.low, found.high))
        covered += low < 1.0 < high
    assert 52 <= covered <= 60


def test_frontier_interval_is_around_the_curve():
    found = frontier.frontier(REWARDS)
    assert (found.low <= found.rewards).all() and (found.rewards <= found.high).all()
    assert frontier.frontier(REWARDS[:1]).low is None  # one prompt says nothing of others
    assert frontier.frontier(REWARDS, ["alike"] * 3).low is None
    twice = frontier.frontier(np.repeat(REWARDS, 2, axis=0), np.repeat(list("abc"), 2))
    np.testing.assert_allclose(twice.low, found.low)  # rows of one prompt count as one


def test_frontier_ends_where_untrusted():
    kls = frontier.frontier(REWARDS).kls
    assert np.log(40) - 2.1 < kls[-1] <= np.log(40) - 2
    # Half the samples have all the reward there is.
    halves = np.repeat([[0.0, 1.0]], 20, axis=0).T.reshape(1, -1)
    kls, rewards, *_ = frontier.frontier(halves)
    assert len(kls) == len(frontier.BETAS)  # the samples tell it all
    assert kls[-1] == pytest.approx(np.log(2)) and rewards[-1] == pytest.approx(1)


def test_frontier_refuses_few_samples():
    with pytest.raises(ValueError, match="7 samples .* expected 8 or more"):
        frontier.frontier(REWARDS[:, :7])
    assert len(frontier.frontier(REWARDS[:, :8]).kls)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("ranked_by", ["itself", "another"])
def test_best_of_n_equals_all_subsets(n, ranked_by):
    rewards = REWARDS[:, :8]
    ranking = rewards if ranked_by == "itself" else REWARDS[:, 8:16]
    best = [
        [row[max(subset, key=lambda m: rank[m])] for subset in itertools.combinations(range(8), n)]
        for row, rank in zip(rewards, ranking, strict=True)
    ]
    found = frontier.best_of_n(rewards, ranking, n)
    of_prompt = np.mean(best, axis=1)
    assert found["reward"] == pytest.approx(of_prompt.mean())
    assert found["reward_se"] == pytest.approx(of_prompt.std(ddof=1) / np.sqrt(3))


def test_error_of_best_of_n_is_clustered_by_prompt():
    """Rows that are all there twice say no more than once each."""
    twice = np.repeat(REWARDS, 2, axis=0)
    once = statistics.clustered_error(REWARDS[:, :8].max(axis=1), np.arange(len(REWARDS)))
    clusters = np.repeat(np.arange(len(REWARDS)), 2)
    found = frontier.best_of_n(twice[:, :8], twice[:, :8], 8, clusters)
    assert found["reward_se"] == pytest.approx(once)
    one_prompt = np.zeros(len(REWARDS))
    assert frontier.best_of_n(REWARDS, REWARDS, 1, one_prompt)["reward_se"] is None


def test_best_of_n_with_ties():
    rewards = np.array([[0.0, 0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    found = frontier.best_of_n(rewards, rewards, 2)  # of 10 pairs, one is (0, 0)
    assert found["reward"] == pytest.approx((0.9 + 2) / 2)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_best_of_n_kl(n):
    """Next to none tie among 32,768 completions alike under the reference; where some do, the KL is
    less.
    """
    kl = frontier.best_of_n(REWARDS, REWARDS, n)["kl"]
    rng, uniform = np.random.default_rng(2), np.full((1, 32_768), -np.log(32_768))
    assert kl == pytest.approx(
        exact.best_of_n(uniform, rng.normal(size=uniform.shape), n)[1], abs=1e-3
    )
    assert exact.best_of_n(uniform, rng.integers(0, 9, uniform.shape), n)[1] < kl or n == 1


@pytest.mark.parametrize("n", [0, 41])
def test_best_of_n_refuses_more_than_samples(n):
    with pytest.raises(ValueError, match=f"best of {n}: there are 40 samples"):
        frontier.best_of_n(REWARDS, REWARDS, n)

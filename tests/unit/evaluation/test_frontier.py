"""Frontiers estimated from samples against enumeration and closed forms."""

import itertools

import numpy as np
import pytest

from dpo_jax.evaluation import exact, frontier

REWARDS = np.random.default_rng(0).normal(size=(3, 40))


def test_frontier_of_whole_language_is_exact():
    """Each of 40 completions once, alike under the reference: the estimate is the bound, as far as
    it goes.
    """
    kls, rewards = frontier.frontier(REWARDS)
    uniform = np.full(REWARDS.shape, -np.log(40))
    np.testing.assert_allclose(rewards, exact.bound(uniform, REWARDS, kls), atol=1e-5)
    assert kls[0] < 1e-5 and rewards[0] == pytest.approx(REWARDS.mean(), abs=1e-2)
    assert (np.diff(kls) >= 0).all() and len(kls) > 100


def test_frontier_of_normal_reward():
    """Its optimum has reward 1 / beta and KL 1 / (2 beta^2), so sqrt(2 KL) at each KL; the estimate
    is just below.
    """
    rng, errors = np.random.default_rng(1), []
    for _ in range(5):
        kls, rewards = frontier.frontier(rng.normal(size=(64, 256)))
        errors.append(np.interp([0.5, 2.0, 3.5], kls, rewards) - np.sqrt([1.0, 4.0, 7.0]))
    np.testing.assert_allclose(np.mean(errors, axis=0), [0, -0.02, -0.11], atol=0.03)


def test_frontier_ends_where_untrusted():
    kls, _ = frontier.frontier(REWARDS)
    assert np.log(40) - 2.1 < kls[-1] <= np.log(40) - 2
    # Half the samples have all the reward there is.
    halves = np.repeat([[0.0, 1.0]], 20, axis=0).T.reshape(1, -1)
    kls, rewards = frontier.frontier(halves)
    assert len(kls) == len(frontier.BETAS)  # the samples tell it all
    assert kls[-1] == pytest.approx(np.log(2)) and rewards[-1] == pytest.approx(1)


def test_frontier_refuses_few_samples():
    with pytest.raises(ValueError, match="7 samples .* expected 8 or more"):
        frontier.frontier(REWARDS[:, :7])
    assert len(frontier.frontier(REWARDS[:, :8])[0])


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

"""PPO's own arithmetic against plain loops; whole runs are in test_baselines.py."""

import numpy as np
import pytest

from dpo_jax import ppo

RNG = np.random.default_rng(0)


def rollout(counts=(4, 1, 3)):
    per_token = [[RNG.normal(size=count).astype(np.float32) for count in counts] for _ in range(4)]
    return ppo.Rollout([], RNG.normal(size=len(counts)), np.ones(len(counts), bool), *per_token)


def test_targets_are_what_a_plain_loop_makes_of_them():
    """Reward to go of -kl_coef log-ratio, the normalised score at the end, less the value; then normalised."""
    found, kl_coef, lam = rollout(), 0.3, 0.9
    targets = ppo.targets(found, kl_coef=kl_coef, score_mean=0.5, score_std=2.0, gae_lambda=lam)
    scores = (found.scores - 0.5) / 2
    expected = []
    for row, score in enumerate(scores):
        reward = -kl_coef * (found.logps[row] - found.reference_logps[row])
        reward[-1] += score
        value = np.append(found.values[row], 0)
        advantage, later = [], 0.0
        for t in reversed(range(len(reward))):
            later = reward[t] + value[t + 1] - value[t] + lam * later
            advantage.insert(0, later)
        expected.append(np.array(advantage))
    for row, advantage in enumerate(expected):
        np.testing.assert_allclose(targets["value_targets"][row], advantage + found.values[row], atol=1e-5)
    flat = np.concatenate(expected)
    np.testing.assert_allclose(np.concatenate(targets["advantages"]), (flat - flat.mean()) / flat.std(), atol=1e-4)
    assert [len(row) for row in targets["advantages"]] == [4, 1, 3]


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.3, 1.05), (60.0, 1.2), (0.0, 0.8)])
def test_the_penalty_goes_after_its_target(kl, factor):
    """At most a fifth of the way per horizon; a horizon of completions here."""
    assert ppo.adapted_kl_coef(0.5, kl, 6.0, 1000, 1000.0) == pytest.approx(0.5 * factor)
    assert ppo.adapted_kl_coef(0.5, kl, 6.0, 100, 1000.0) == pytest.approx(0.5 * (1 + (factor - 1) / 10))

"""Exact reward, KL, optimum and bound against brute force and random policies."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import tiny_config

from dpo_jax import sharding
from dpo_jax.data import toy
from dpo_jax.evaluation import exact, plots
from dpo_jax.models import transformer

CONFIG = tiny_config(vocab=3, norm="layer", activation="gelu_new", gated=False, learned_positions=True)
PROMPTS = np.array([0, 2])
LENGTH = 4
COUNT = CONFIG.vocab**LENGTH
LOGITS = jax.jit(transformer.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """Weights so large that the log-probs are far from uniform."""
    small = jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x, small)


@pytest.fixture(scope="module")
def reference(params) -> np.ndarray:
    return exact.enumerate_logps(CONFIG, params, PROMPTS, LENGTH)


def random_policy(rng, scale: float) -> np.ndarray:
    logits = scale * rng.normal(size=(len(PROMPTS), COUNT))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(len(PROMPTS), COUNT))  # all distinct
WORD_REWARDS = np.broadcast_to(np.indices((3,) * LENGTH).sum(0).ravel() - 4.0, REWARDS.shape)  # few distinct
BETAS = (0.01, 0.1, 0.3, 1.0, 3.0, 30.0, 1000.0)


def test_enumeration_equals_scoring_each_sequence(params, reference):
    for prompt, logps_C in zip(PROMPTS, reference, strict=True):
        tokens_CT = np.array([[prompt, *words] for words in itertools.product(range(3), repeat=LENGTH)])
        logp_CTV = np.asarray(jax.nn.log_softmax(LOGITS(CONFIG, params, tokens_CT)))
        for words, logp_TV, found in zip(tokens_CT[:, 1:], logp_CTV, logps_C, strict=True):
            assert found == pytest.approx(sum(logp_TV[np.arange(LENGTH), words]), abs=2e-5)


def test_probabilities_sum_to_one(reference):
    assert reference.dtype == np.float64
    np.testing.assert_allclose(np.exp(reference).sum(-1), 1, atol=1e-6)
    assert np.ptp(reference) > 2  # not about uniform


def test_the_toys_length_is_the_default():
    config = dataclasses.replace(CONFIG, vocab=8, layers=1)
    params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    logps = exact.enumerate_logps(config, params, toy.PROMPTS)
    assert logps.shape == toy.rewards(toy.PROMPTS, toy.completions()).shape
    np.testing.assert_allclose(np.exp(logps).sum(-1), 1, atol=1e-6)


def test_enumeration_on_a_mesh(params, reference):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.param_shardings(mesh, params))
    with jax.set_mesh(mesh):
        found = exact.enumerate_logps(CONFIG, params, PROMPTS, LENGTH)
    np.testing.assert_allclose(found, reference, atol=1e-5)


def test_logits_that_see_later_words_are_found_out(params, monkeypatch):
    def leak(config, params, tokens_BT):
        return LOGITS(config, params, tokens_BT[:, ::-1])
    monkeypatch.setattr(exact, "_logits", leak)
    with pytest.raises(ArithmeticError, match="later words"):
        exact.enumerate_logps(CONFIG, params, PROMPTS, LENGTH)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_weights_that_are_not_finite_are_found_out(params):
    with pytest.raises(ArithmeticError, match="not finite"):
        exact.enumerate_logps(CONFIG, jax.tree.map(lambda x: x * np.nan, params), PROMPTS, LENGTH)


def test_reward_and_kl_by_hand():
    policy, reference = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    reward, kl = exact.reward_and_kl(policy, reference, np.array([[1.0, 3.0], [0.0, 10.0]]))
    assert reward == pytest.approx((2 + 1) / 2)
    assert kl == pytest.approx((0.9 * np.log(1.8) + 0.1 * np.log(0.2)) / 2)


def test_optimum_by_hand():
    """Two completions, alike under the reference, with rewards 0 and r: p = sigmoid(r / beta)."""
    for r, beta in ((1.0, 0.5), (-2.0, 3.0)):
        p = 1 / (1 + np.exp(-r / beta))
        reward, kl = exact.optimum(np.log([[0.5, 0.5]]), np.array([[0.0, r]]), beta)
        assert reward == pytest.approx(p * r)
        assert kl == pytest.approx(np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p))


@pytest.mark.parametrize("beta", BETAS)
def test_kl_of_the_optimum_is_its_reward_over_beta_minus_log_z(reference, beta):
    reward, kl = exact.optimum(reference, REWARDS, beta)
    log_z_P = np.log((np.exp(reference) * np.exp(REWARDS / beta)).sum(-1))
    assert kl == pytest.approx(reward / beta - log_z_P.mean(), abs=1e-9 * max(1, 1 / beta))


@pytest.mark.parametrize("beta", (0.1, 0.3, 1.0, 3.0))
def test_no_policy_near_the_optimum_has_a_better_objective(reference, beta):
    """max E r - beta KL (eq. 3) is attained by the optimum."""
    reward, kl = exact.optimum(reference, REWARDS, beta)
    tilted = reference + REWARDS / beta
    rng = np.random.default_rng(1)
    for scale in (0.01, 0.1, 1.0):
        logits = tilted + scale * rng.normal(size=tilted.shape)
        other = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        other_reward, other_kl = exact.reward_and_kl(other, reference, REWARDS)
        assert other_reward - beta * other_kl < reward - beta * kl


@pytest.mark.parametrize("rewards", [REWARDS, WORD_REWARDS], ids=["all distinct", "few distinct"])
@pytest.mark.parametrize("beta", BETAS)
def test_the_bound_is_tight_at_each_optimum(reference, rewards, beta):
    reward, kl = exact.optimum(reference, rewards, beta)
    gap = exact.bound(reference, rewards, kl) - reward
    assert -1e-9 < gap < 1e-5


@pytest.mark.parametrize("rewards", [REWARDS, WORD_REWARDS], ids=["all distinct", "few distinct"])
def test_no_policy_is_above_the_bound(reference, rewards):
    rng = np.random.default_rng(2)
    policies = [random_policy(rng, scale) for scale in (0.1, 1, 3, 10) for _ in range(20)]
    policies += [np.logaddexp(np.log(1 - mix) + reference, np.log(mix) + policy)  # near the reference
                 for mix in (1e-4, 1e-2, 0.3) for policy in policies[::4]]
    points = np.array([exact.reward_and_kl(policy, reference, rewards) for policy in policies])
    assert (exact.bound(reference, rewards, points[:, 1]) - points[:, 0] >= -1e-6).all()


def test_the_ends_of_the_bound(reference):
    """At no KL it is the reference's reward; where KL is plenty, the best completion's."""
    nothing, plenty = exact.bound(reference, REWARDS, [0, 50])
    assert nothing == pytest.approx(exact.reward_and_kl(reference, reference, REWARDS)[0], abs=1e-5)
    assert plenty == pytest.approx(REWARDS.max(-1).mean(), abs=1e-4)


def test_the_bound_rises_and_is_concave(reference):
    rewards = exact.bound(reference, REWARDS, np.linspace(0, 6, 200))
    assert (np.diff(rewards) > 0).sum() > 100
    assert (np.diff(rewards) > -1e-9).all()
    assert (np.diff(rewards, 2) < 1e-5).all()


def test_frontier_is_drawn(reference, tmp_path):
    kls = np.linspace(0, 2, 50)
    plots.frontier(tmp_path / "toy.png", curve=(kls, exact.bound(reference, REWARDS, kls)), reference=0.0,
                   trajectory=[(0, 0.0, 0.0), (10, 0.3, 0.1), (20, 0.5, 0.3)],
                   optimum=exact.optimum(reference, REWARDS, 1.0), title="beta 1")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")

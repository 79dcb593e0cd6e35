"""Losses against published values, closed forms and finite differences."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config import PREFERENCE_LOSSES
from dpo_jax.training import losses
from tests.helpers.paths import SHARED, needs_shared

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0, 3, (2, 50))  # log-ratios
COUNTS = RNG.integers(1, 20, (2, 50))
BETA = 0.3


def loss(name, chosen=CHOSEN, rejected=REJECTED, counts=COUNTS, beta=BETA, eps=0.0):
    nothing = jnp.zeros(len(chosen))
    pairs = losses.Pairs(chosen, rejected, nothing, nothing, *counts)
    return losses.PREFERENCE[name](pairs, beta, eps)


def pairs_of_margin(margin):
    """Pairs whose chosen log-ratio is the margin, and all else 0 or a length of 1."""
    nothing, one = jnp.zeros_like(margin), jnp.ones_like(margin)
    return losses.Pairs(margin, nothing, nothing, nothing, one, one)


@needs_shared
def test_losses_equal_published_values():
    golden = json.loads((SHARED / "golden" / "dpo_loss_golden.json").read_text())
    case = golden["tunix_dpo_loss_fn"]
    chosen, rejected = np.split(np.array(case["policy_logps"]) - np.array(case["ref_logps"]), 2)
    for eps in (0, 0.3):
        found = loss("sigmoid", chosen, rejected, np.ones((2, 4)), case["beta"], eps).mean()
        np.testing.assert_allclose(
            found, case["expected_loss"][f"label_smoothing={eps}"], atol=case["atol"]
        )
    case = golden["torchtune_dpo_loss"]
    chosen = np.array(case["policy_chosen"]) - np.array(case["ref_chosen"])
    rejected = np.array(case["policy_rejected"]) - np.array(case["ref_rejected"])
    found = loss("sigmoid", chosen, rejected, np.ones((2, 3)), case["beta"])
    np.testing.assert_allclose(found, case["expected_losses_num"], rtol=1e-6)
    found = loss("hinge", chosen, rejected, np.ones((2, 3)), case["beta"])
    np.testing.assert_allclose(found, case["rso_hinge_gamma_0_1"], atol=1e-6)


def test_sigmoid_gradient_is_closed_form():
    """d loss / d chosen = -beta sigmoid(-beta margin): beta enters once."""
    gradient = jax.grad(lambda c: loss("sigmoid", c).sum())(CHOSEN)
    np.testing.assert_allclose(
        gradient, -BETA / (1 + np.exp(BETA * (CHOSEN - REJECTED))), rtol=1e-5
    )


def test_config_names_every_preference_loss():
    assert set(losses.PREFERENCE) == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preference_gradient_equals_finite_differences(name):
    with jax.enable_x64(True):
        step = 1e-6
        gradient = jax.grad(lambda c: loss(name, c).sum())(CHOSEN)
        slope = (loss(name, CHOSEN + step) - loss(name, CHOSEN - step)) / (2 * step)
    away = np.abs(1 - BETA * (CHOSEN - REJECTED)) > 1e-3  # the hinge's corner has no slope
    np.testing.assert_allclose(gradient[away], slope[away], rtol=1e-5, atol=1e-7)


def test_preference_at_zero_log_ratios():
    zeros = np.zeros(3)
    counts = np.ones((2, 3))
    for name, expected in dict(
        sigmoid=np.log(2),
        sigmoid_norm=np.log(2),
        hinge=1,
        ipo=1 / (2 * BETA) ** 2,
        ipo_sum=1 / (2 * BETA) ** 2,
        robust=np.log(2),
    ).items():
        np.testing.assert_allclose(loss(name, zeros, zeros, counts), expected, rtol=1e-6)


def test_sigmoid_mirrors_swapped_sides():
    """sigmoid: loss(m) - loss(-m) = -beta m."""
    forward, swapped = loss("sigmoid"), loss("sigmoid", REJECTED, CHOSEN, COUNTS[::-1])
    np.testing.assert_allclose(forward - swapped, -BETA * (CHOSEN - REJECTED), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo_sum", "robust"])
def test_preference_cancels_shared_log_ratio(name):
    np.testing.assert_allclose(
        loss(name, CHOSEN + 5, REJECTED + 5), loss(name), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_ipo_divides_by_own_length(name):
    np.testing.assert_allclose(
        loss(name, CHOSEN * COUNTS[0], REJECTED * COUNTS[1]),
        loss({"ipo": "ipo_sum", "sigmoid_norm": "sigmoid"}[name]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_robust_without_smoothing_is_sigmoid():
    np.testing.assert_array_equal(loss("robust"), loss("sigmoid"))


def test_sigmoid_minimum_with_smoothing():
    margins = np.linspace(-30, 30, 60001)
    values = losses.sigmoid(pairs_of_margin(margins), BETA, 0.2)
    best = margins[int(np.argmin(values))]
    np.testing.assert_allclose(1 / (1 + np.exp(-BETA * best)), 0.8, atol=1e-3)


def test_sigmoid_of_large_margin():
    found = losses.sigmoid(pairs_of_margin(jnp.array([-5000.0, 5000.0], jnp.float32)), 1.0)
    np.testing.assert_allclose(found, [5000.0, 0.0])
    slope = jax.grad(lambda margin: losses.sigmoid(pairs_of_margin(margin), 1.0))
    assert np.isfinite(slope(jnp.float32(-5000.0)))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_advantages_equal_definition(lam):
    """Sums of discounted temporal differences, row by row, with nothing behind a row's end."""
    counts = np.array([5, 1, 3])
    rewards, values = RNG.normal(size=(2, 3, 5))
    found = losses.advantages(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(counts), lam)
    expected = np.zeros((3, 5))
    for row, count in enumerate(counts):
        delta = [
            rewards[row, t] + (values[row, t + 1] if t + 1 < count else 0) - values[row, t]
            for t in range(count)
        ]
        for t in range(count):
            expected[row, t] = sum(lam ** (later - t) * delta[later] for later in range(t, count))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_advantages_with_lambda_1():
    rewards, values = RNG.normal(size=(2, 4, 6))
    found = losses.advantages(jnp.asarray(rewards), jnp.asarray(values), jnp.full(4, 6), 1.0)
    np.testing.assert_allclose(found, rewards[:, ::-1].cumsum(1)[:, ::-1] - values, atol=1e-5)

"""Losses against published values, closed forms and finite differences."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.loss_table import DIVERGENCES, LOSSES
from dpo_jax.training import losses
from tests.helpers.paths import SHARED, needs_shared

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0, 3, (2, 50))  # log-ratios
COUNTS = RNG.integers(1, 20, (2, 50))
BETA = 0.3


# Of a log-prob that is below 0, as odds need.
LOG_PROBS = -np.abs(CHOSEN) - 0.1, -np.abs(REJECTED) - 0.1
NUMBERS = dict(
    beta=BETA,
    label_smoothing=0.0,
    simpo_gamma=0.7,
    orpo_lambda=0.4,
    cpo_alpha=0.6,
    dpop_lambda=3.0,
    discopop_tau=0.4,
    divergence_alpha=0.3,
)


def loss(name, chosen=CHOSEN, rejected=REJECTED, counts=COUNTS, beta=BETA, eps=0.0, **numbers):
    """A loss by its name; eps: label smoothing, which exo cannot do without."""
    nothing = jnp.zeros(len(chosen))
    pairs = losses.Pairs(chosen, rejected, nothing, nothing, *counts)
    eps = eps or (0.1 if name == "exo" else 0.0)
    hyper = NUMBERS | dict(beta=beta, label_smoothing=eps) | numbers
    return losses.preference(name)(pairs, hyper)


def loss_of_log_probs(name, chosen, rejected, counts=COUNTS, **numbers):
    nothing = jnp.zeros(len(chosen))
    pairs = losses.Pairs(nothing, nothing, chosen, rejected, *counts)
    return losses.preference(name)(pairs, NUMBERS | numbers)


OF_LOG_PROBS = [name for name, properties in LOSSES.items() if not properties.needs_reference]
OF_LOG_RATIOS = [name for name in LOSSES if name not in OF_LOG_PROBS]


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


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("target", [None, 1.5])
def test_gradient_weight_is_the_derivative_by_the_scaled_margin(eps, target):
    """The paper's section 4: sigmoid of the rejected minus the chosen reward."""
    hyper = NUMBERS | dict(label_smoothing=eps)
    targets = None if target is None else jnp.full(50, target)
    of_pairs = losses.preference("sigmoid")

    def pairs(margin):
        return dataclasses.replace(pairs_of_margin(margin), target_margins=targets)

    margin = jnp.asarray(CHOSEN - REJECTED)
    gradient = jax.grad(lambda margin: of_pairs(pairs(margin), hyper).sum())(margin)
    found = of_pairs.gradient_weight(pairs(margin), hyper)
    np.testing.assert_allclose(-BETA * found, gradient, atol=1e-6)
    if target is None and not eps:
        rewards = BETA * CHOSEN, BETA * REJECTED
        np.testing.assert_allclose(found, 1 / (1 + np.exp(rewards[0] - rewards[1])), rtol=1e-5)


@pytest.mark.parametrize("name", [*(name for name in LOSSES if name != "sigmoid"), "sigmoid=1"])
def test_other_losses_have_no_gradient_weight(name):
    pairs = pairs_of_margin(jnp.asarray(CHOSEN))
    assert losses.preference(name).gradient_weight(pairs, NUMBERS) is None


def test_sigmoid_gradient_is_closed_form():
    """d loss / d chosen = -beta sigmoid(-beta margin): beta enters once."""
    gradient = jax.grad(lambda c: loss("sigmoid", c).sum())(CHOSEN)
    np.testing.assert_allclose(
        gradient, -BETA / (1 + np.exp(BETA * (CHOSEN - REJECTED))), rtol=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_are_those_of_the_table(name):
    """A loss is called with the table's numbers in the table's order."""
    taken = list(inspect.signature(losses.PREFERENCE[name]).parameters)
    assert taken == ["pairs", *LOSSES[name].numbers]


# The values for log-ratios (2, -1, 0) against (-1.5, 3, 0), beta 0.1.
KNOWN = {
    "sigmoid": (0.533382, 0.913015, 0.693147),
    "exo": (0.335589, 0.747272, 0.510826),
    "nca": (1.307687, 1.493773, 1.386294),
    "bco_pair": (1.219096, 1.598752, 1.386294),
    "sppo_hard": (21.25, 100, 50),
    "apo_zero": (0.912736, 1.099422, 1),
    "apo_down": (0.963216, 1.073708, 1),
    "discopop": (0.704532, 0.913209, 0.846574),
    "dpop": (0.533382, 5.404506, 0.693147),
}
KNOWN_OF_SIGMOID = {
    "reverse_kl": (0.533382, 0.913015, 0.693147),
    "forward_kl": (0.499259, 0.835447, 0.693147),
    "jensen_shannon": (0.617518, 0.758379, 0.693147),
    "alpha": (0.533455, 0.845834, 0.693147),
}
KNOWN_PAIRS = jnp.array([2.0, -1.0, 0.0]), jnp.array([-1.5, 3.0, 0.0])
KNOWN_COUNTS = np.array([10, 4, 5]), np.array([8, 20, 5])


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name):
    numbers = dict(discopop_tau=0.05, dpop_lambda=50.0)
    found = loss(name, *KNOWN_PAIRS, KNOWN_COUNTS, beta=0.1, **numbers)
    np.testing.assert_allclose(found, KNOWN[name], atol=1e-6)


def test_known_values_without_reference():
    log_probs = jnp.array([-20.0, -9.0, -10.0]), jnp.array([-18.0, -50.0, -10.0])
    found = loss_of_log_probs("simpo", *log_probs, KNOWN_COUNTS, beta=2.0, simpo_gamma=1.0)
    np.testing.assert_allclose(found, (0.974077, 0.974077, 1.313262), atol=1e-6)
    found = loss_of_log_probs("orpo", *log_probs, KNOWN_COUNTS, orpo_lambda=0.1)
    np.testing.assert_allclose(found, (2.056118, 2.306476, 2.069315), atol=1e-6)
    found = loss_of_log_probs("cpo", *log_probs, KNOWN_COUNTS, beta=0.1, cpo_alpha=1.0)
    margins = np.array([-2, 41, 0])
    expected = np.log1p(np.exp(-0.1 * margins)) + np.array([2, 9 / 4, 2])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_known_values_of_divergences(divergence):
    assert list(KNOWN_OF_SIGMOID) == list(DIVERGENCES)
    scores = [losses.divergence_scores(side, divergence, 0.5) for side in KNOWN_PAIRS]
    found = loss("sigmoid", *scores, KNOWN_COUNTS, beta=0.1)
    np.testing.assert_allclose(found, KNOWN_OF_SIGMOID[divergence], atol=1e-6)


def slope_of(function, x, step=1e-6):
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize("name", OF_LOG_RATIOS)
@pytest.mark.parametrize("side", [0, 1])
def test_preference_gradient_equals_finite_differences(name, side):
    def of_side(x):
        sides = [CHOSEN, REJECTED]
        sides[side] = x
        return loss(name, *sides)

    with jax.enable_x64(True):
        start = (CHOSEN, REJECTED)[side]
        gradient = jax.grad(lambda x: of_side(x).sum())(start)
        slope = slope_of(of_side, start)
    away = np.abs(1 - BETA * (CHOSEN - REJECTED)) > 1e-3  # the hinge's corner has no slope
    np.testing.assert_allclose(gradient[away], slope[away], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OF_LOG_PROBS)
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_without_reference_equals_finite_differences(name, side):
    def of_side(x):
        sides = list(LOG_PROBS)
        sides[side] = x
        return loss_of_log_probs(name, *sides)

    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: of_side(x).sum())(LOG_PROBS[side])
        slope = slope_of(of_side, LOG_PROBS[side])
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


def test_nll_is_of_the_chosen_response_per_token():
    found = loss_of_log_probs("nll", *LOG_PROBS)
    np.testing.assert_allclose(found, -LOG_PROBS[0] / COUNTS[0], rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_gradient_equals_finite_differences(divergence):
    def scores(x):
        return losses.divergence_scores(x, divergence, 0.3)

    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: scores(x).sum())(CHOSEN)
        np.testing.assert_allclose(gradient, slope_of(scores, CHOSEN), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alpha, limit", [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_ends_in_kl(alpha, limit):
    log_ratios, alpha = jnp.asarray(CHOSEN), jnp.float32(alpha)
    slope = jax.grad(lambda *given: losses.divergence_scores(*given).sum())
    for function in (losses.divergence_scores, slope):
        found = function(log_ratios, "alpha", alpha)
        np.testing.assert_allclose(found, function(log_ratios, limit), rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "name", [name for name, properties in LOSSES.items() if properties.takes_divergence]
)
def test_losses_are_finite_far_from_the_reference(name, divergence):
    """In float32, with gradients: a response that the policy has given up has a ratio of e^-300."""
    far = jnp.array([-300.0, 300.0, -300.0, 300.0]), jnp.array([-300.0, 300.0, 300.0, -300.0])
    ones = np.ones((2, 4))

    def total(chosen, rejected):
        sides = [losses.divergence_scores(x, divergence, 0.3) for x in (chosen, rejected)]
        return loss(name, *sides, ones, beta=0.1).sum()

    # DiscoPOP grows like the exponential of the margin.
    if name != "discopop" or divergence == "reverse_kl":
        assert np.isfinite(total(*far))
        assert np.isfinite(jax.grad(total, argnums=(0, 1))(*far)).all()


def test_orpo_is_finite_at_certain_responses():
    certain = jnp.zeros(2)
    slope = jax.grad(lambda x: loss_of_log_probs("orpo", x, x - 3, np.ones((2, 2))).sum())
    assert np.isfinite(slope(certain)).all()
    assert np.isfinite(loss_of_log_probs("orpo", certain, certain, np.ones((2, 2)))).all()


def test_numbers_at_which_a_loss_becomes_another():
    np.testing.assert_allclose(loss("dpop", dpop_lambda=0.0), loss("sigmoid"), rtol=1e-6)
    kept = np.abs(CHOSEN)  # dpop asks nothing of a chosen response that is more likely than before
    np.testing.assert_allclose(loss("dpop", kept), loss("sigmoid", kept), rtol=1e-6)
    # At a width without end half of each: (sigmoid + exponential) / 2.
    mixed = (loss("sigmoid") + np.exp(-BETA * (CHOSEN - REJECTED))) / 2
    np.testing.assert_allclose(loss("discopop", discopop_tau=1e8), mixed, rtol=1e-5)
    # SimPO's is the length-normalised loss where the reference's log-probs are 0.
    np.testing.assert_allclose(
        loss_of_log_probs("simpo", *LOG_PROBS, simpo_gamma=0.0),
        loss("sigmoid_norm", *LOG_PROBS),
        rtol=1e-6,
    )
    free = loss_of_log_probs("cpo", *LOG_PROBS, cpo_alpha=0.0)
    np.testing.assert_allclose(free, loss("sigmoid", *LOG_PROBS), rtol=1e-6)
    likelihood = loss_of_log_probs("orpo", *LOG_PROBS, orpo_lambda=0.0)
    np.testing.assert_allclose(likelihood, -LOG_PROBS[0] / COUNTS[0], rtol=1e-6)


def test_mixture_is_the_weighted_sum():
    """Not a mean: weights need not add up to 1."""
    pairs = losses.Pairs(CHOSEN, REJECTED, *LOG_PROBS, *COUNTS)
    mixture = losses.preference("sigmoid=2, nll = 0.25,hinge")
    assert mixture == losses.preference(("sigmoid", "nll", "hinge"))
    found = mixture(pairs, NUMBERS | dict(loss_weights=(2, 0.25, 1)))
    expected = 2 * loss("sigmoid") - 0.25 * LOG_PROBS[0] / COUNTS[0] + loss("hinge")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # One of a single loss is weighted too, and 0 takes a loss out.
    doubled = losses.preference("sigmoid=2")(pairs, NUMBERS | dict(loss_weights=(2,)))
    np.testing.assert_allclose(doubled, 2 * loss("sigmoid"), rtol=1e-6)
    alone = mixture(pairs, NUMBERS | dict(loss_weights=(1, 0, 0)))
    np.testing.assert_allclose(alone, loss("sigmoid"), rtol=1e-6)


def test_wpo_weights():
    """Of mean (log p - log sum p^2) over tokens, added up over both responses."""
    log_probs = jnp.array([[-4.0, -6.0], [-1.0, -1.0]])
    squares = jnp.array([[-2.0, -3.0], [-4.0, -3.0]])
    found = losses.wpo_weights(log_probs, squares, jnp.array([[2, 6], [1, 1]]))
    np.testing.assert_allclose(found, [np.exp(-1 - 0.5), np.exp(3 + 2)], rtol=1e-6)


def test_exo_is_kl_between_preferences():
    """0 where the policy prefers as the smoothed labels do, and nowhere less."""
    margins = np.linspace(-30, 30, 60001)
    values = losses.exo(pairs_of_margin(margins), BETA, 0.2)
    best = int(np.argmin(values))
    np.testing.assert_allclose(1 / (1 + np.exp(-BETA * margins[best])), 0.8, atol=1e-3)
    np.testing.assert_allclose(values[best], 0.0, atol=1e-6)


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
        exo=-np.log(2) - np.log(0.1 * 0.9) / 2,
        discopop=(np.log(2) + 1) / 2,
        dpop=np.log(2),
        apo_zero=1,
        apo_down=1,
        nca=2 * np.log(2),
        bco_pair=2 * np.log(2),
        sppo_hard=2 / (2 * BETA) ** 2,
    ).items():
        np.testing.assert_allclose(loss(name, zeros, zeros, counts), expected, rtol=1e-6)


def test_sigmoid_mirrors_swapped_sides():
    """sigmoid: loss(m) - loss(-m) = -beta m."""
    forward, swapped = loss("sigmoid"), loss("sigmoid", REJECTED, CHOSEN, COUNTS[::-1])
    np.testing.assert_allclose(forward - swapped, -BETA * (CHOSEN - REJECTED), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo_sum", "robust", "exo", "discopop"])
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


TAKES_MARGIN = [name for name, properties in LOSSES.items() if properties.takes_margin]


@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_target_margin_is_an_offset_of_the_scaled_margin(name):
    """A pair that is to win by d has the loss of a pair whose scaled margin is smaller by d."""
    log_probs = [jnp.asarray(side) for side in LOG_PROBS]
    one = jnp.ones(len(CHOSEN))
    pairs = losses.Pairs(jnp.abs(CHOSEN), jnp.asarray(REJECTED), *log_probs, one, one)
    targets = jnp.asarray(RNG.normal(0, 2, len(CHOSEN)))
    # The rejected side alone, for dpop and cpo ask more of the chosen one.
    shifted = dataclasses.replace(
        pairs,
        rejected_log_ratios=pairs.rejected_log_ratios + targets / BETA,
        rejected_log_probs=pairs.rejected_log_probs + targets / BETA,
    )
    hyper = NUMBERS | dict(label_smoothing=0.1)
    of_pairs = losses.preference(name)
    found = of_pairs(dataclasses.replace(pairs, target_margins=targets), hyper)
    np.testing.assert_allclose(found, of_pairs(shifted, hyper), rtol=1e-4, atol=1e-5)
    nothing = dataclasses.replace(pairs, target_margins=0 * targets)
    np.testing.assert_allclose(of_pairs(nothing, hyper), of_pairs(pairs, hyper), rtol=1e-6)


def test_target_margin_of_known_values():
    pairs = losses.Pairs(*jnp.array([[2.0], [-1.5], [0.0], [0.0], [1.0], [1.0]]))
    pairs = dataclasses.replace(pairs, target_margins=jnp.array([1.0]))
    # -log sigmoid(0.1 x 3.5 - 1), max(0, 1 - 0.35 + 1) and (3.5 - 5 - 10)^2
    np.testing.assert_allclose(losses.sigmoid(pairs, 0.1), np.log1p(np.exp(0.65)), rtol=1e-6)
    np.testing.assert_allclose(losses.hinge(pairs, 0.1), 1.65, rtol=1e-6)
    np.testing.assert_allclose(losses.ipo(pairs, 0.1), 11.5**2, rtol=1e-6)
    np.testing.assert_allclose(
        losses.bradley_terry(jnp.array([2.0]), jnp.array([0.5]), 1.0), np.log1p(np.exp(-0.5))
    )

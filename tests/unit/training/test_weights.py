"""A pair of weight 2 counts as two, one of weight 0 as none; margins shift what a loss asks for."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Examples
from dpo_jax.data.packing import FILLER
from dpo_jax.data.rows import Numbers
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training import objectives, step
from tests.helpers.tiny import HYPER, random_pairs

WEIGHTS = (2.0, 0.0, 1.0, 3.0)
MARGINS = (0.5, 2.0, -1.0, 0.0)
OBJECTIVES = [("dpo", "sigmoid"), ("preferred_ft", "token_mean")]


def examples_of(name, order=range(4), weights=None, margins=None) -> Examples:
    """Return some of four pairs, in an order, with numbers or without."""
    pairs = random_pairs(4, longest=6)
    examples = Examples()
    for index in order:
        responses = pairs[index].responses[: 1 if name == "preferred_ft" else 2]
        numbers = Numbers(weights and weights[index], margins and margins[index])
        examples.append(pairs[index].prompt, responses, f"row {index}", numbers=numbers)
    return examples


@pytest.fixture(scope="module")
def measure(tiny):
    """Return (objective, loss, batch) -> (gradient, means) of the tiny model."""

    @functools.cache
    def compiled(name, loss):
        config, _ = tiny
        if name == "rm":
            config = dataclasses.replace(config, head="reward")
        objective = objectives.make(name, config, loss)
        return jax.jit(functools.partial(step.accumulate, objective))

    def measured(name, loss, batch):
        _, params = tiny
        params = jax.tree.map(lambda x: x / 2, params)
        if name == "rm":
            params = params | {"head": {"scalar": np.ones(16, np.float32)}}
        reference = jax.tree.map(lambda x: x * 1.05, params)
        gradient, metrics = compiled(name, loss)(params, reference, HYPER, batch)
        return gradient, metrics_lib.named(metrics, "train")

    return measured


def assert_same(found, expected, rtol=3e-6):
    """Compare gradients and means; the order of a sum's terms is all that may differ."""
    for gradient, other in zip(
        *(jax.tree.leaves(each[0]) for each in (found, expected)), strict=True
    ):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(gradient, other, rtol=rtol, atol=rtol * max(scale, 1e-3) * 10)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=rtol, atol=1e-6, err_msg=name)


def batch_of(examples, order=None, **layout):
    order = np.arange(len(examples)) if order is None else np.array(order)
    return Batches(examples, order[None], **layout)[0]


@pytest.mark.parametrize("name, loss", OBJECTIVES)
def test_weight_counts_how_often(measure, name, loss):
    weighted = measure(name, loss, batch_of(examples_of(name, weights=WEIGHTS)))
    repeated = measure(name, loss, batch_of(examples_of(name, [0, 0, 2, 3, 3, 3])))
    assert_same(weighted, repeated)


def test_weights_that_change_nothing(measure):
    plain = measure("dpo", "sigmoid", batch_of(examples_of("dpo")))
    # A power of two rounds nothing, and the gradient is divided by the sum of the weights.
    for weight in (1.0, 4.0):
        equal = measure("dpo", "sigmoid", batch_of(examples_of("dpo", weights=(weight,) * 4)))
        for found, expected in zip(*map(jax.tree.leaves, (equal, plain)), strict=True):
            np.testing.assert_array_equal(found, expected)
    # Weights that are all 0 make no nan.
    gradient, means = measure("dpo", "sigmoid", batch_of(examples_of("dpo", weights=(0.0,) * 4)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    assert set(means.values()) == {0.0}


def test_weights_and_margins_in_any_layout(measure):
    examples = examples_of("dpo", weights=WEIGHTS, margins=MARGINS)
    whole = measure("dpo", "sigmoid", batch_of(examples))
    for layout in (
        dict(microbatches=2, shards=2),  # one cell has the pair of weight 0 alone
        dict(order=[2, 0, 3, 1, FILLER, FILLER], microbatches=3),
    ):
        assert_same(measure("dpo", "sigmoid", batch_of(examples, **layout)), whole, rtol=2e-5)


def test_margin_is_asked_and_not_measured(measure):
    zeros = measure("rm", "", batch_of(examples_of("rm", margins=(0.0,) * 4)))
    plain = measure("rm", "", batch_of(examples_of("rm")))
    assert_same(zeros, plain, rtol=1e-6)
    asked = measure("rm", "", batch_of(examples_of("rm", margins=(1.0,) * 4)))
    assert asked[1]["loss/train"] > plain[1]["loss/train"]
    name = "rewards_train/margins"
    np.testing.assert_allclose(asked[1][name], plain[1][name], rtol=1e-6)

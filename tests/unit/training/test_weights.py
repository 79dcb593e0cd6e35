"""A pair of weight 2 counts as two, one of weight 0 as none; margins shift what a loss asks for."""

import functools

import jax
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Examples
from dpo_jax.data.packing import FILLER
from dpo_jax.data.rows import Numbers
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training import objectives, step
from dpo_jax.training.losses import PLAIN, Choices
from tests.helpers.tiny import HYPER, random_pairs, tiny_config
from tests.helpers.tiny_models import random_params

WEIGHTS = (2.0, 0.0, 1.0, 3.0)
MARGINS = (0.5, 2.0, -1.0, 0.0)
OBJECTIVES = [
    ("dpo", "sigmoid"),
    ("preferred_ft", "token_mean"),
    ("unlikelihood", ""),
    ("rm", ""),
]
MIXTURE = "sigmoid=1,nll=0.5"
# WPO and LD-DPO at once; the numbers that they and the mixture take.
WEIGHTED = Choices(weighting="wpo", is_length_desensitized=True)
NUMBERS = HYPER | dict(ld_alpha=np.float32(0.4), loss_weights=np.float32([1, 0.5]))


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
def measure():
    """Return (objective, loss, batch, choices) -> (gradient, means) of a model of one layer."""

    def config_of(name):
        return tiny_config(layers=1, head="reward" if name == "rm" else "lm")

    @functools.cache
    def compiled(name, loss, choices):
        config = config_of(name)
        objective = objectives.make(name, config, loss, choices)
        return jax.jit(functools.partial(step.accumulate, objective))

    def measured(name, loss, batch, choices=PLAIN):
        params = random_params(config_of(name))
        reference = jax.tree.map(lambda x: x * 1.05, params)
        gradient, metrics = compiled(name, loss, choices)(params, reference, NUMBERS, batch)
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
    # A shape that holds both, and so one program.
    limits = packing.RowLimits(buckets=1)
    shape = packing.shape_of(examples_of(name, [0, 0, 1, 2, 3, 3, 3]), limits=limits)
    weighted = batch_of(examples_of(name, weights=WEIGHTS), shape=shape)
    repeated = batch_of(examples_of(name, [0, 0, 2, 3, 3, 3]), shape=shape)
    assert_same(measure(name, loss, weighted), measure(name, loss, repeated))


@pytest.mark.slow
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
    whole = measure("dpo", MIXTURE, batch_of(examples), WEIGHTED)
    # The fourth cell has the pair of weight 0 alone, or none at all.
    order = [2, 0, 3, 1, FILLER, FILLER]
    split = batch_of(examples, order=order, microbatches=2, shards=2)
    assert_same(measure("dpo", MIXTURE, split, WEIGHTED), whole, rtol=2e-5)


def test_margin_is_asked_and_not_measured(measure):
    zeros = measure("rm", "", batch_of(examples_of("rm", margins=(0.0,) * 4)))
    asked = measure("rm", "", batch_of(examples_of("rm", margins=(1.0,) * 4)))
    assert asked[1]["loss/train"] > zeros[1]["loss/train"]
    assert asked[1]["rewards_train/margins"] == zeros[1]["rewards_train/margins"]

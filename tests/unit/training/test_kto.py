"""KTO: its values, its KL over the whole batch, and what a batch of one kind gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.batches import unpaired, unpaired_evaluation
from dpo_jax.data.examples import FILLER, Examples
from dpo_jax.data.mismatched import Mismatched, longest, partners
from dpo_jax.training import losses, objectives
from dpo_jax.training.step import means

CHOSEN, REJECTED = (2.0, -1.0, 0.0), (-1.5, 3.0, 0.0)


def rows(prompts):
    """Return a row for each prompt, whose completion is told from all others."""
    examples = Examples()
    for number, prompt in enumerate(prompts):
        response = [100 + number] * (1 + number % 3)
        examples.append(prompt, [response], f"row {number}", label=number % 2 == 0)
    return examples


def kto(log_ratios, label, kl=0.5, weights=(1.0, 1.0)):
    return losses.kto(jnp.array(log_ratios), jnp.array(label), kl, 0.1, *weights)


def test_values():
    """KL terms (1.2, -.4, .7), so z = .5."""
    kl = np.mean([1.2, -0.4, 0.7])
    np.testing.assert_allclose(kto(CHOSEN, True, kl), (0.462570, 0.537430, 0.512497), atol=1e-6)
    np.testing.assert_allclose(kto(REJECTED, False, kl), (0.450166, 0.562177, 0.487503), atol=1e-6)
    both = kto(CHOSEN, [True, False, True], kl, (2.0, 3.0))
    apart = [2 * kto(2.0, True, kl), 3 * kto(-1.0, False, kl), 2 * kto(0.0, True, kl)]
    np.testing.assert_allclose(both, apart, rtol=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_gradient_is_the_slope_and_vanishes_far_away(label):
    gradient = jax.grad(lambda log_ratio: kto(log_ratio, label))
    for log_ratio in (-3.0, 0.5, 4.0):
        slope = (kto(log_ratio + 1e-2, label) - kto(log_ratio - 1e-2, label)) / 2e-2
        np.testing.assert_allclose(gradient(log_ratio), slope, rtol=1e-2)
        # A desirable completion is to become likelier.
        assert (gradient(log_ratio) < 0) == label
    for log_ratio in (-1e4, 1e4):
        assert gradient(log_ratio) == 0


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ([1, 2, 3, 4], [3, 0, 1, 2]),  # as in TRL
        ([1, 1, 2, 3], [2, 3, 0, 1]),
        ([1, 2, 1, 2], [1, 0, 3, 2]),
        ([7], [0]),
    ],
)
def test_partners(prompts, expected):
    found = partners(np.array(prompts))
    assert sorted(found) == list(range(len(prompts)))
    assert found.tolist() == expected


def test_no_row_gets_a_completion_of_its_own_prompt_unless_most_have_that_prompt():
    generator = np.random.default_rng(0)
    for _ in range(50):
        prompts = generator.integers(0, 5, size=12)
        own = (prompts[partners(prompts)] == prompts).sum()
        most = np.bincount(prompts).max()
        assert own == max(2 * most - 12, 0)


def test_mismatched_rows_of_an_order():
    """Those of each batch alone; a long completion is cut, and so is its mask."""
    examples = rows([[1, 2], [3], [4, 5, 6], [7]])
    order = np.array([[0, 2, 3], [1, 0, FILLER]])
    found = Mismatched(examples, order, max_length=4)
    texts = [(row.prompt.tolist(), row.responses[0].tolist()) for row in found]
    assert texts == [
        ([1, 2], [103]),
        ([4, 5, 6], [100]),
        ([7], [102, 102, 102]),
        ([3], [100]),
        ([1, 2], [101, 101]),
    ]
    assert found.order.tolist() == [[0, 1, 2], [3, 4, FILLER]]
    prompt_P, response_P1, completion_P1 = found.lengths()
    assert prompt_P.tolist() == [len(prompt) for prompt, _ in texts]
    assert response_P1[:, 0].tolist() == [len(response) for _, response in texts]
    assert completion_P1.tolist() == response_P1.tolist()
    assert found.own_prompts == 0
    assert longest(examples, 512, 6) == 6 and longest(examples, 4, 6) == 6


def test_mismatched_masks_are_cut():
    examples = Examples()
    examples.append([1, 2], [[3]], "a", label=True)
    examples.append([4], [[5, 6, 7]], "b", (np.array([True, False, True]),), label=False)
    first, second = Mismatched(examples, np.array([[0, 1]]), max_length=4)
    assert first.responses[0].tolist() == [5, 6]
    assert first.completion_masks[0].tolist() == [True, False]
    assert second.completion_masks is None


def test_mismatched_completion_without_a_trained_token_does_not_count(monkeypatch):
    examples = Examples()
    examples.append([1, 2, 3], [[4]], "a", label=True)
    examples.append([5], [[6, 7, 8]], "b", (np.array([False, False, True]),), label=False)
    batch = unpaired(examples, np.array([[0, 1]]), max_length=4)[0].mismatched
    cell = jax.tree.map(lambda x: x[0], batch)

    def log_probs(_model, params, batch, **_):
        return jnp.full(batch.response_lengths.shape, params)

    monkeypatch.setattr(objectives, "response_log_probs", log_probs)
    sums = objectives.kto_first_pass(None, 3.0, 1.0, {}, cell)
    total, count = sums["mismatched_log_ratio"]
    assert (total, count) == (2, 1)  # that of prompt b with completion a
    assert means({"mismatched_log_ratio": (0.0, 0.0)}) == {"mismatched_log_ratio": 0}


def test_batches_carry_labels_and_mismatched_rows():
    examples = rows([[number] for number in range(1, 13)])
    order = np.arange(12).reshape(2, 6)
    batches = unpaired(examples, order, 10, microbatches=3, shards=2)
    assert len(batches.mismatched.shapes) == 1
    batch = batches[1]
    assert batch.labels.shape == batch.weights.shape == (3, 2, 1)
    real = batches.indices(1)
    assert batch.labels.ravel().tolist() == (real % 2 == 0).tolist()
    assert batch.mismatched.weights.sum() == 6
    assert batches.without_mismatched(1).mismatched is None


def test_mismatched_rows_of_an_evaluation_do_not_depend_on_its_batches():
    examples = rows([[number] for number in range(1, 8)])

    def mismatched(batch_size):
        batches = unpaired_evaluation(examples, batch_size, 10)
        return sorted(
            (row.prompt.tolist(), row.responses[0].tolist()) for row in batches.mismatched.examples
        )

    assert mismatched(2) == mismatched(4) == mismatched(7)

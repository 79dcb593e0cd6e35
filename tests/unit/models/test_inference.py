"""Batched forward passes give each example its own values, whatever the batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.examples import Examples
from dpo_jax.models import inference
from dpo_jax.models.inference import DistinctResponses, map_batches, map_responses, map_tokens
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import by_example
from dpo_jax.parallel import sharding
from tests.helpers.tiny import random_pairs


def collected(pairs) -> Examples:
    examples = Examples()
    for number, (prompt, responses, masks) in enumerate(pairs, 1):
        examples.append(prompt, responses, f"pairs row {number}", masks)
    return examples


def pairs_of_prompts(prompts: int = 5, completions: int = 4) -> Examples:
    """Return all pairs of some completions of each prompt, not those of a prompt together."""
    drawn = random_pairs(prompts * completions, seed=4)
    rows = []
    for first in range(0, len(drawn), completions):
        answers = []
        for number in range(completions):
            # A number of its own makes each differ.
            answers.append(np.append(drawn[first + number].responses[0], number).astype(np.int32))
        for two in itertools.combinations(answers, 2):
            rows.append((drawn[first].prompt, two, None))
    order = np.random.default_rng(0).permutation(len(rows))
    return collected([rows[index] for index in order])


APART = random_pairs(11, seed=3)
EXAMPLES = collected([(pair.prompt, pair.responses, None) for pair in APART])
# Each response's value is the sum of its ids, each token's value its id.
SUMS = np.array([[tokens.sum() for tokens in pair.responses] for pair in EXAMPLES])


@pytest.fixture(params=[1, 4])
def mesh(request):
    return sharding.make_mesh(devices=jax.devices()[: request.param])


@jax.jit
def response_sums(batch):
    def of_shard(targets_M, segment_ids_M):
        return jax.ops.segment_sum(targets_M, segment_ids_M, batch.response_lengths.shape[-1])

    sums_SQ = jax.vmap(of_shard)(batch.targets, batch.segment_ids)
    return sharding.constrain(by_example(sums_SQ, batch))


def test_responses_of_all_examples(mesh):
    """Eleven, by four at a time over one device or four."""
    found = list(map_responses(response_sums, EXAMPLES, mesh, batch_size=3))
    indices = np.concatenate([indices for indices, _ in found])
    values = np.concatenate([values for _, values in found])
    assert sorted(indices) == list(range(11))
    np.testing.assert_array_equal(values, SUMS[indices])


def test_most_prompts_are_in_one_batch(mesh):
    examples = pairs_of_prompts()
    prompts_of_batch = []
    for indices, values in map_responses(response_sums, examples, mesh, batch_size=16):
        prompts_of_batch.append({examples[index].prompt.tobytes() for index in indices})
        sums = [[tokens.sum() for tokens in examples[index].responses] for index in indices]
        np.testing.assert_array_equal(values, sums)
    # Two prompts of 6 are whole in each batch of 16, and the fifth fills up both.
    assert [len(prompts) for prompts in prompts_of_batch] == [3, 3]
    assert len(set.union(*prompts_of_batch)) == 5


def test_tokens(mesh):
    def function(batch):
        targets = sharding.constrain(jnp.asarray(batch.targets))
        return targets, -targets

    for examples in (APART, list(pairs_of_prompts())):
        shape = packing.shape_of(examples, share=False)
        same, negative = map_tokens(function, examples, mesh, batch_size=5, shape=shape)
        for index, pair in enumerate(examples):
            np.testing.assert_array_equal(same[index], np.concatenate(pair.responses))
            np.testing.assert_array_equal(negative[index], -np.concatenate(pair.responses))


def test_distinct_responses():
    """One response comes twice to a prompt, once to another, and once with a mask."""
    prompts = np.array([[1, 2], [3, 4]], np.int32)
    a, b, c = np.array([[5, 6], [7, 8], [9, 9]], np.int32)
    mask = np.array([True, False])
    every = np.ones(2, bool)
    examples = collected(
        [
            (prompts[0], (a, b), None),
            (prompts[1], (a, c), None),
            (prompts[0], (c, a), None),
            (prompts[0], (a, b), (mask, every)),
        ]
    )
    found = DistinctResponses(examples)
    assert len(found) == 7
    places = [found.places(number).tolist() for number in range(7)]
    assert places == [[0, 5], [1], [2], [3], [4], [6], [7]]
    for number, (place, *_) in enumerate(places):
        example, alone = examples[place // 2], found.alone[number]
        np.testing.assert_array_equal(alone.prompt, example.prompt)
        np.testing.assert_array_equal(alone.responses[0], example.responses[place % 2])
    np.testing.assert_array_equal(found.alone[5].completion_masks[0], mask)
    # Of the wanted ones, those that stand elsewhere too are found there as well.
    wanted = np.zeros((4, 2), bool)
    wanted[2] = True
    some = DistinctResponses(examples, wanted)
    assert [some.places(number).tolist() for number in range(len(some))] == [[4], [0, 5]]


def test_log_probs_of_each_distinct_response_once(tiny, mesh, monkeypatch):
    config, params = tiny
    model = Model(config, params, None, mesh)
    examples = pairs_of_prompts()
    readings = []
    make_batches = inference.Batches

    def recorded(*args, **options):
        batches = make_batches(*args, **options)
        readings.append(batches.reading())
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(inference, "Batches", recorded)
        found = inference.log_probs("", model, examples, 6)
    distinct = {}
    for pair in examples:
        distinct[pair.prompt.tobytes()] = len(pair.prompt)
        for response in pair.responses:
            distinct[pair.prompt.tobytes(), response.tobytes()] = len(response)
    assert len(distinct) == 5 + 5 * 4
    (reading,) = readings
    assert reading.examples == 5 * 4
    # Several devices share out the responses of a prompt, where they have more than their part.
    if len(mesh.devices.ravel()) == 1:
        assert reading.tokens == sum(distinct.values())
    # Equal responses have the same number, to the bit.
    numbers = {}
    for index, pair in enumerate(examples):
        for side, response in enumerate(pair.responses):
            key = (pair.prompt.tobytes(), response.tobytes())
            assert numbers.setdefault(key, found[index, side]) == found[index, side]
    assert len(numbers) == 20
    # Each pair alone shares nothing with others.
    for index in range(0, len(examples), 7):
        alone = inference.log_probs("", model, examples[[index]], 1)
        np.testing.assert_allclose(found[index], alone[0], rtol=1e-5, atol=1e-5)


def test_batches_come_in_order_with_progress(capsys):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = map_batches(lambda batch: batch * 2, lambda step: np.full(2, step), 3, mesh, "doubles")
    assert [(step, values.tolist()) for step, values in found] == [
        (0, [0, 0]),
        (1, [2, 2]),
        (2, [4, 4]),
    ]
    assert "doubles 3/3" in capsys.readouterr().out

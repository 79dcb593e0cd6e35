"""Batched forward passes give each example its own values, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.inference import map_batches, map_responses, map_tokens
from dpo_jax.models.log_probs import by_example
from dpo_jax.parallel import sharding
from tests.helpers.tiny import random_pairs

EXAMPLES = random_pairs(11, seed=3)
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


def test_responses_of_some_examples(mesh):
    wanted = np.array([7, 2, 9])
    found = dict()
    for indices, values in map_responses(
        response_sums, EXAMPLES, mesh, batch_size=2, indices=wanted
    ):
        found |= dict(zip(indices.tolist(), values, strict=True))
    assert found.keys() == set(wanted)
    for index, values in found.items():
        np.testing.assert_array_equal(values, SUMS[index])


def test_tokens(mesh):
    def function(batch):
        targets = sharding.constrain(jnp.asarray(batch.targets))
        return targets, -targets

    same, negative = map_tokens(function, EXAMPLES, mesh, batch_size=5)
    for index, pair in enumerate(EXAMPLES):
        np.testing.assert_array_equal(same[index], np.concatenate(pair.responses))
        np.testing.assert_array_equal(negative[index], -np.concatenate(pair.responses))


def test_batches_come_in_order_with_progress(capsys):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = map_batches(lambda batch: batch * 2, lambda step: np.full(2, step), 3, mesh, "doubles")
    assert [(step, values.tolist()) for step, values in found] == [
        (0, [0, 0]),
        (1, [2, 2]),
        (2, [4, 4]),
    ]
    assert "doubles 3/3" in capsys.readouterr().out

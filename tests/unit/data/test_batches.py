"""Batches and their order, a pure function of (seed, step)."""

import collections
import dataclasses
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax.data import packing
from dpo_jax.data.batches import (
    FILLER,
    SHAPES,
    Batches,
    _deal,
    evaluation_order,
    microbatch_size_of,
    microbatches_of,
    prefetch,
    steps_of,
    training_order,
)
from dpo_jax.data.examples import Example, Examples
from tests.helpers.tiny import random_pairs


def test_steps_of_whole_batches():
    assert steps_of(10, 4, steps=0, epochs=1.0) == 2
    assert steps_of(10, 4, steps=0, epochs=2.0) == 5
    assert steps_of(3, 4, steps=0, epochs=1.0) == 0
    assert steps_of(10, 4, steps=7, epochs=1.0) == 7


@pytest.mark.parametrize(
    "fields, size, number",
    [
        (dict(batch_size=8, microbatch_size=0), 8, 1),
        (dict(batch_size=8, microbatch_size=2), 2, 4),
        (dict(batch_size=8, minibatch_size=4, microbatch_size=0), 4, 1),
        (dict(batch_size=8, minibatch_size=4, microbatch_size=2), 2, 2),
    ],
)
def test_microbatches_of_update(fields, size, number):
    block = ConfigDict(fields)
    assert microbatch_size_of(block) == size
    assert microbatches_of(block) == number


def test_training_order_epoch_has_each_example_once():
    order = training_order(10, 5, 6, seed=3).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order)
    assert not (order[0] == order[1]).all()


def test_training_order_ignores_number_of_steps():
    np.testing.assert_array_equal(
        training_order(7, 4, 3, seed=0), training_order(7, 4, 30, seed=0)[:3]
    )


def test_training_order_without_shuffle():
    np.testing.assert_array_equal(training_order(5, 2, 4, None).ravel(), [0, 1, 2, 3, 4, 0, 1, 2])


def test_training_order_differs_by_seed():
    assert not (training_order(50, 5, 10, 0) == training_order(50, 5, 10, 1)).all()


def test_training_order_keeps_groups_together():
    groups = np.array([0, 1, 0, 2, 1, 2, 3, 3, 3])
    order = training_order(9, 9, 4, 0, groups)
    for epoch in order:
        assert sorted(epoch) == list(range(9))
        for group in range(4):
            places = np.flatnonzero(groups[epoch] == group)
            assert (np.diff(places) == 1).all()  # side by side
            members = epoch[places]
            assert (np.diff(members) > 0).all()  # in the data's order
    assert len({tuple(epoch) for epoch in order}) > 1
    # A group of its own for each: what shuffling examples gives.
    np.testing.assert_array_equal(
        training_order(9, 3, 5, 7, np.arange(9)), training_order(9, 3, 5, 7)
    )


def groups_of(prompts, pairs, most=100):
    """Return the pairs of some prompts, dealt in turn, and the group of each."""
    examples = Examples()
    for pair in range(pairs):
        for prompt in range(prompts):
            chosen, rejected = [prompt, 2 * pair], [prompt, 2 * pair + 1]
            examples.append([prompt] * 5, (chosen, rejected), f"file row {len(examples) + 1}")
    return examples, examples.groups(most)


def test_batch_end_cuts_group():
    examples, groups = groups_of(prompts=5, pairs=6)
    order = training_order(30, 8, 6, 0, groups)
    assert order.shape == (6, 8)  # as many pairs as asked for, whatever the groups
    in_turn = groups[order.ravel()][:30].reshape(5, 6)
    assert (in_turn == in_turn[:, :1]).all() and sorted(in_turn[:, 0]) == list(range(5))
    # The second batch has the last 4 pairs of a group and the first 4 of another.
    assert (groups[order[1]] == np.repeat([in_turn[1, 0], in_turn[2, 0]], 4)).all()
    batches = Batches(examples, order)
    for step in range(3):
        parts = len(set(groups[order[step]]))
        # Each part of a group has its prompt of 5 tokens, and both responses of its pairs.
        assert batches.tokens(step) == parts * 5 + 8 * 4
        assert batches[step].weights.sum() == 8


def test_large_group_is_cut_and_its_parts_shuffled():
    _, groups = groups_of(prompts=2, pairs=10, most=4)
    order = training_order(20, 20, 8, 0, groups)
    sizes = []
    for epoch in order:
        # Where the group changes.
        ends = np.flatnonzero(np.diff(groups[epoch])) + 1
        sizes.append(tuple(np.diff([0, *ends, 20]).tolist()))
        assert sorted(sizes[-1]) == [2, 2, 4, 4, 4, 4]
    assert len(set(sizes)) > 1
    # Parts of one prompt do not all stay side by side.
    prompts = order % 2
    assert (np.diff(prompts, axis=1) != 0).sum(axis=1).max() > 1


@pytest.mark.parametrize("seed", [0, 11])
def test_order_of_groups_is_known_from_seed_and_step(seed):
    _, groups = groups_of(prompts=7, pairs=3)
    whole = training_order(21, 4, 40, seed, groups)
    np.testing.assert_array_equal(whole[:9], training_order(21, 4, 9, seed, groups))
    np.testing.assert_array_equal(whole, training_order(21, 4, 40, seed, groups))
    assert not (whole == training_order(21, 4, 40, seed + 1, groups)).all()


@pytest.mark.parametrize("microbatches, shards", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_step_has_same_pairs_on_any_mesh(microbatches, shards):
    examples, groups = groups_of(prompts=5, pairs=6)
    order = training_order(30, 8, 8, 3, groups)
    batches = Batches(examples, order, microbatches=microbatches, shards=shards)
    for step in range(8):
        placed = batches.indices(step)
        assert sorted(placed[placed != FILLER]) == sorted(order[step])


def test_evaluation_order_fills_last_batch():
    order = evaluation_order(5, 4)
    np.testing.assert_array_equal(order, [[0, 1, 2, 3], [4, FILLER, FILLER, FILLER]])
    batch = Batches(random_pairs(5), order)[1]
    assert batch.weights.sum() == 1


def batches_of_prompts(order, prompt_ids):
    """Return in how many batches each prompt is, after checking that each example is in one."""
    assert sorted(order[order != FILLER]) == list(range(len(prompt_ids)))
    batches_of = collections.defaultdict(set)
    for step, batch in enumerate(order):
        for index in batch[batch != FILLER].tolist():
            batches_of[prompt_ids[index]].add(step)
    return np.array([len(batches) for batches in batches_of.values()])


@pytest.mark.parametrize(
    "pairs, batch_size, whole, read",
    # Of the 100 prompts. One of 5 fits into 8 as a whole, and the room of 3 is for parts of others.
    [
        (5, 8, 62, 150),
        (6, 8, 75, 150),
        (3, 8, 75, 125),
        (4, 8, 100, 100),
        (6, 64, 94, 106),
        (20, 8, 0, 300),
    ],
)
def test_evaluation_order_fills_batches_and_keeps_most_prompts_whole(
    pairs, batch_size, whole, read
):
    prompt_ids = np.repeat(np.random.default_rng(0).permutation(100) - 50, pairs)
    order = evaluation_order(100 * pairs, batch_size, prompt_ids)
    assert len(order) == -(-100 * pairs // batch_size)
    assert FILLER not in order[:-1]
    batches_of = batches_of_prompts(order, prompt_ids)
    assert (batches_of == 1).sum() == whole
    assert batches_of.sum() == read  # once for each batch that a prompt is in


def test_evaluation_order_cuts_no_prompt_where_others_fill_the_room():
    rng = np.random.default_rng(1)
    prompt_ids = rng.permutation(np.repeat(np.arange(500), rng.integers(1, 9, 500)))
    order = evaluation_order(len(prompt_ids), 32, prompt_ids)
    assert len(order) == -(-len(prompt_ids) // 32)
    assert (batches_of_prompts(order, prompt_ids) == 1).sum() >= 495


def test_evaluation_order_by_hand():
    prompt_ids = np.array([90, -7, 90, 20, -7, -7, 30])
    order = evaluation_order(7, 4, prompt_ids)
    assert order.tolist() == [[0, 2, 3, 6], [1, 4, 5, FILLER]]
    # What fills whole batches comes first, and its last two share a batch with the other prompt.
    order = evaluation_order(6, 3, np.array([2, 1, 1, 1, 1, 1]))
    assert order.tolist() == [[1, 2, 3], [0, 4, 5]]
    # A prompt for each example: the data's order.
    np.testing.assert_array_equal(evaluation_order(7, 4, -np.arange(7)), evaluation_order(7, 4))
    # One prompt for all: the data's order, too.
    np.testing.assert_array_equal(evaluation_order(7, 3, np.zeros(7)), evaluation_order(7, 3))
    assert evaluation_order(0, 4).shape == evaluation_order(0, 4, np.zeros(0, int)).shape == (0, 4)


def test_group_is_dealt_out_where_no_cell_has_room_for_it():
    """Two large examples come first, one in each cell, and two of a prompt are left."""
    prompts = [[1], [2], [3], [3]]
    lengths = [9, 9, 2, 2]
    examples = []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        response = np.full(length, number, np.int32)
        examples.append(Example(np.array(prompt, np.int32), (response,)))
    shape = packing.shape_of(examples[:2], share=False)
    shape = dataclasses.replace(shape, slots_per_token=2)
    batches = Batches(examples, np.arange(4)[None], shards=2, shape=shape)
    assert sorted(map(sorted, batches.indices(0).reshape(2, 2).tolist())) == [[0, 2], [1, 3]]


def dealt_plainly(examples, indices, cells, most):
    """Return which examples are in each cell, one group after the other in plain loops."""

    def tokens(members):
        prompts, responses = {}, {}
        for index in members:
            prompt = examples[index].prompt.tobytes()
            prompts[prompt] = len(examples[index].prompt)
            for response in examples[index].responses:
                responses[prompt, response.tobytes()] = len(response)
        return sum(prompts.values()) + sum(responses.values())

    groups = {}
    for index in indices:
        groups.setdefault(examples[index].prompt.tobytes(), []).append(index)
    part = sum(tokens(members) for members in groups.values()) / cells
    counts = {}
    for key, members in groups.items():
        counts[key] = min(int(np.ceil(tokens(members) / part)), len(members))
    while sum(counts.values()) < min(cells, len(indices)):
        # Of those that can be cut further, the one whose pieces are largest.
        able = [key for key, members in groups.items() if counts[key] < len(members)]
        counts[max(able, key=lambda key: tokens(groups[key]) / counts[key])] += 1
    pieces = []
    for key, members in groups.items():
        pieces += [piece.tolist() for piece in np.array_split(members, counts[key])]
    dealt = [[] for _ in range(cells)]
    loads = [0] * cells
    for piece in sorted(pieces, key=tokens, reverse=True):  # which keeps the order of equals
        fits_one = any(len(cell) + len(piece) <= most for cell in dealt)
        for together in [piece] if fits_one else [[index] for index in piece]:
            free = [n for n in range(cells) if len(dealt[n]) + len(together) <= most]
            chosen = min(free, key=lambda n: loads[n])
            dealt[chosen] += together
            loads[chosen] += tokens(piece) * len(together) // len(piece)
    return dealt


@pytest.mark.parametrize("room", ["tight", "wide"])
@pytest.mark.parametrize("cells", [2, 5, 8])
@pytest.mark.parametrize("prompts", [1, 3, 12, 40])
def test_dealt_as_by_plain_rule(prompts, cells, room):
    """Groups of equal and unequal sizes, some to be cut, some with equal responses."""
    rng = np.random.default_rng(prompts + cells)
    texts = [rng.integers(0, 9, rng.integers(1, 12)) for _ in range(prompts)]
    examples = Examples()
    for _ in range(40):
        # A third of all are of the first prompt.
        prompt = texts[rng.integers(prompts) * (rng.random() < 0.67)]
        responses = [rng.integers(0, 3, rng.integers(1, 5)) for _ in range(2)]
        examples.append(prompt, responses, "here")
    sizes = packing.sizes_of(examples)
    most = 40 // cells if room == "tight" else 40
    for seed in range(5):
        indices = np.random.default_rng(seed).permutation(40)
        found = _deal(indices, sizes, cells, most)
        wanted = dealt_plainly(examples, indices.tolist(), cells, most)
        assert [cell.tolist() for cell in found] == wanted


def test_no_cell_is_empty_while_another_has_several():
    """As many pairs as cells, some of a prompt: two that share it are little more than another."""
    examples, groups = groups_of(prompts=5, pairs=6)
    order = training_order(30, 8, 8, 0, groups)
    batches = Batches(examples, order, shards=8)
    for step in range(8):
        held = (batches.indices(step).reshape(8, -1) != FILLER).sum(axis=1)
        assert held.tolist() == [1] * 8
    assert [shape.examples for shape in batches.shapes] == [1]
    # Fewer pairs than cells have a cell each.
    order = np.array([[0, 5, 10, 1, FILLER, FILLER, FILLER, FILLER]])  # of two prompts
    held = (Batches(examples, order, shards=8).indices(0).reshape(8, -1) != FILLER).sum(axis=1)
    assert sorted(held) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("microbatches, shards", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_batches_equal_however_split(microbatches, shards):
    examples = random_pairs(30, seed=1)
    batches = Batches(
        examples, training_order(30, 8, 5, 0), microbatches=microbatches, shards=shards
    )
    for step in range(5):
        batch = batches[step]
        assert batch.tokens.shape[:2] == (microbatches, shards)
        placed = batches.indices(step)
        assert sorted(placed[placed != FILLER]) == sorted(training_order(30, 8, 5, 0)[step])
        completion_tokens = 0
        for cell in placed.reshape(microbatches * shards, -1):
            # A response that comes twice, as at an epoch's end, is there once.
            distinct = {}
            for row in cell[cell != FILLER]:
                for response in examples[row].responses:
                    distinct[examples[row].prompt.tobytes(), response.tobytes()] = len(response)
            completion_tokens += sum(distinct.values())
        responses = batch.response_lengths.shape[-1]
        assert (batch.segment_ids < responses).sum() == completion_tokens
        assert batch.weights.sum() == 8


def test_batches_have_few_shapes():
    batches = Batches(random_pairs(200, longest=40), training_order(200, 8, 60, 0), shards=2)
    assert 1 <= len(batches.shapes) <= SHAPES
    assert all(
        {batches[s].tokens.shape[-1]} <= {shape.tokens for shape in batches.shapes}
        for s in range(60)
    )


def test_batches_balance_tokens_over_shards():
    examples = random_pairs(400, longest=40)
    batches = Batches(examples, training_order(400, 64, 6, 0), shards=8)
    for step in range(6):
        tokens = [
            sum(len(ids) for i in cell for ids in (examples[i].prompt, *examples[i].responses))
            for cell in (cell[cell != FILLER] for cell in batches.indices(step).reshape(8, -1))
        ]
        assert max(tokens) < 1.1 * np.mean(tokens)


def test_batches_need_only_real_rows():
    examples = [
        Example(np.arange(3), (np.arange(2), np.arange(4))),
        Example(np.arange(1), (np.arange(1), np.arange(9))),
    ]
    batches = Batches(examples, evaluation_order(2, 3))  # one place is filled up
    contents = batches.contents(0)
    assert (contents.tokens, contents.completion_tokens) == (20, 16)
    assert sorted(contents.prompt) == [1, 3]
    found = sorted(zip(contents.context.tolist(), contents.response.tolist(), strict=True))
    assert found == [(1, 1), (1, 9), (3, 2), (3, 4)]
    assert batches.tokens(0) == 20


def test_padding_by_hand():
    even = [Example(np.arange(8), (np.arange(8), np.arange(8)))] * 4
    assert Batches(even, training_order(4, 4, 1, 0)).padding() == dict(dense=0.0, attention=0.0)
    padding = Batches(random_pairs(64, longest=40), training_order(64, 8, 8, 0)).padding()
    assert 0 < padding["dense"] < 0.3 and 0 < padding["attention"] < 0.6


@pytest.mark.parametrize("size", [3, 6])
def test_batches_pad_shards_that_have_fewer_examples(size):
    batches = Batches(random_pairs(size), training_order(size, size, 1, 0), shards=4)
    batch = batches[0]
    places = batches.indices(0)
    assert sorted(places[places != FILLER]) == list(range(size))
    per_shard = batch.weights.sum(axis=2)[0]
    assert per_shard.sum() == size and per_shard.max() - per_shard.min() == 1


def test_microbatches_have_an_example_for_each_shard():
    block = ConfigDict(dict(batch_size=24, microbatch_size=4))
    assert [microbatches_of(block, shards) for shards in (1, 4, 8, 32)] == [6, 6, 3, 1]


def test_prefetch_order_lookahead_and_errors():
    made, threads = [], set()

    def make(step):
        made.append(step)
        threads.add(threading.get_ident())
        if step == 4:
            raise KeyError("row 4")
        return step * 10

    seen = []
    with pytest.raises(KeyError, match="row 4"):
        for step, value in prefetch(make, range(6)):
            seen.append((step, value))
    assert seen == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert threading.get_ident() not in threads

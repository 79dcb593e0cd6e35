"""Packing: the packed batch by hand, and the few shapes that batches have."""

import dataclasses
import itertools

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from tests.helpers.tiny import random_pairs


def test_pack_by_hand(tiny):
    examples = [Example(np.array([1, 2, 3]), (np.array([4, 5]), np.array([6])))]
    batch = packing.pack(
        examples, packing.Shape(6, ((2, 5),), 3, examples=1, responses=2, rows_per_prompt=2)
    )
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3]
    # The prompt's last token predicts both first ones.
    assert batch.logit_positions.tolist() == [2, 3, 2]
    assert batch.targets.tolist() == [4, 5, 6]
    assert batch.segment_ids.tolist() == [0, 0, 1]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.last_token.tolist() == [4, 5]
    assert batch.weights.tolist() == [1]
    # One bucket of two rows of 5: a prompt's token has a slot in each.
    (rows_RT,) = batch.rows
    assert rows_RT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert batch.gather_index.tolist() == [0, 1, 2, 3, 4, 8]
    assert batch.token_slots.tolist() == [[0, 5], [1, 6], [2, 7], [3, -1], [4, -1], [8, -1]]


def test_pack_leaves_masked_tokens_untrained():
    """A turn of a tool within an answer is read like the rest, and nothing predicts it."""
    chosen, rejected = np.array([4, 5, 6, 7]), np.array([8, 9])
    masks = (np.array([True, False, False, True]), np.array([True, True]))
    example = Example(np.array([1, 2, 3]), (chosen, rejected), masks)
    shape = packing.shape_of([example])
    assert (shape.tokens, shape.completion_tokens) == (9, 4)
    batch = packing.pack([example], shape)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4]
    assert batch.targets.tolist() == [4, 7, 8, 9]
    assert batch.logit_positions.tolist() == [2, 5, 2, 7]
    assert batch.segment_ids.tolist() == [0, 0, 1, 1]
    assert batch.response_lengths.tolist() == [2, 2]
    assert batch.last_token.tolist() == [6, 8]
    all_trained_on = Example(example.prompt, (chosen, rejected))
    plain = packing.pack([all_trained_on], dataclasses.replace(shape, completion_tokens=6))
    for masked_rows, rows in zip(batch.rows, plain.rows, strict=True):
        assert masked_rows.tolist() == rows.tolist()


def needs_of(batches):
    examples = [example for batch in batches for example in batch]
    cells = np.arange(len(examples)).reshape(len(batches), -1)
    return packing.needs_of_cells(packing.sizes_of(examples), cells)


def test_choose_covers_all_batches():
    batches = [random_pairs(6, seed=s) for s in range(400)]
    needs = needs_of(batches)
    chosen = packing.choose_shapes(needs, 3)
    assert len(chosen) == 3 and all(len(shape.lengths) == 12 for shape in chosen)
    met_by = np.array([needs.met_by(shape) for shape in chosen])
    assert met_by.any(axis=0).all() and not met_by[0].all()
    for step, batch in enumerate(batches[:40]):
        packing.pack(batch, chosen[met_by[:, step].argmax()])  # raises where it does not fit
    padded = [shape.tokens for shape in chosen]
    assert padded == sorted(set(padded)) and padded[-1] < 1.04 * needs.tokens.max()


def test_choose_one_shape_for_short_run():
    assert len(packing.choose_shapes(needs_of([random_pairs(6, seed=s) for s in range(6)]), 6)) == 1


def test_partition_is_cheapest():
    rng = np.random.default_rng(0)
    for limit, price in ((1, 0), (2, 0), (3, 40.0), (8, 200.0)):
        sizes = rng.integers(1, 30, 9)
        levels = np.unique(sizes)

        def cost(ends, sizes=sizes, price=price):
            ends = np.array(sorted(ends))
            return (ends[np.searchsorted(ends, sizes)] ** 2).sum() + price * len(ends)

        every = [
            (*some, levels[-1])
            for count in range(limit)
            for some in itertools.combinations(levels[:-1], count)
        ]
        assert cost(packing._partition(sizes, 2, price, limit)) == min(map(cost, every))


def test_shape_of_equal_rows():
    example = Example(np.arange(8), (np.arange(8), np.arange(8)))
    assert packing.shape_of([example] * 4) == packing.Shape(
        16, ((1, 16),), 8, examples=4, responses=1, rows_per_prompt=1
    )


def test_pad_right_keeps_rows_and_fills_the_rest():
    rows = [[1, 2, 3], [], np.array([4])]
    np.testing.assert_array_equal(
        packing.pad_right(rows, 4, fill=9), [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]]
    )
    assert packing.pad_right([[0.5]], 2, dtype=np.float32).tolist() == [[0.5, 0.0]]

"""Packing: the packed batch by hand, and the few shapes that batches have."""

import dataclasses
import itertools

import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from tests.helpers.tiny import random_pairs


def test_pack_by_hand(tiny):
    examples = [Example(np.array([1, 2, 3]), (np.array([4, 5]), np.array([6])))]
    batch = packing.pack(
        examples,
        packing.Shape(
            6,
            (packing.RowShape(rows=2, prompt=0, responses=1, response=5),),
            0,
            3,
            examples=1,
            responses=2,
            slots_per_token=2,
        ),
    )
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.token_counts.tolist() == [2, 2, 2, 1, 1, 1]
    # The prompt's last token predicts both first ones.
    assert batch.logit_positions.tolist() == [2, 3, 2]
    assert batch.targets.tolist() == [4, 5, 6]
    assert batch.segment_ids.tolist() == [0, 0, 1]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.last_token.tolist() == [4, 5]
    assert batch.weights.tolist() == [1]
    # One bucket of two rows of 5: a prompt's token has a slot in each.
    (rows,) = batch.rows
    assert rows.prompts.size == 0
    assert rows.responses.tolist() == [[[0, 1, 2, 3, 4]], [[0, 1, 2, 5, 0]]]
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
        assert masked_rows.responses.tolist() == rows.responses.tolist()


@pytest.mark.parametrize("window", [None, 4], ids=["in two parts", "whole rows"])
def test_pack_in_stripes(window):
    """Tokens go round the stripes by their places in rows, and nothing else changes."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, length) for length in (30, 1, 14)]
    examples = []
    for prompt in prompts:
        responses = [rng.integers(0, 50, length) for length in rng.integers(1, 9, 3)]
        examples += [Example(prompt, (responses[0], other)) for other in responses[1:]]
    plain_shape = packing.shape_of(examples, limits=packing.RowLimits(window))
    shape = packing.shape_of(examples, limits=packing.RowLimits(window, stripes=4))
    assert (shape.responses_per_row == 0) == (window is not None)
    assert shape.tokens % 4 == 0
    plain, batch = packing.pack(examples, plain_shape), packing.pack(examples, shape)
    is_token = batch.token_slots[:, 0] >= 0
    assert is_token.sum() == (plain.token_slots[:, 0] >= 0).sum()

    slot = 0
    for rows, plain_rows in zip(batch.rows, plain.rows, strict=True):
        for part, plain_part in ((rows.prompts, plain_rows.prompts), (rows[2], plain_rows[2])):
            for index in np.ndindex(part.shape):
                token = part[index]
                if slot in batch.token_slots[token]:
                    # The stripe's part of the run, by the token's place in its row.
                    assert token // (shape.tokens // 4) == index[-1] % 4
                    assert batch.tokens[token] == plain.tokens[plain_part[index]]
                    assert batch.positions[token] == plain.positions[plain_part[index]]
                slot += 1
    for field in ("targets", "segment_ids", "response_lengths", "response_index"):
        np.testing.assert_array_equal(
            getattr(batch, field)[: len(plain.targets)], getattr(plain, field)
        )
    for field in ("logit_positions", "last_token"):
        for values in (lambda batch: batch.tokens, lambda batch: batch.positions):
            np.testing.assert_array_equal(
                values(batch)[getattr(batch, field)], values(plain)[getattr(plain, field)]
            )


def test_empty_response_ends_with_its_prompt():
    prompt = np.array([9, 8, 7])
    examples = [Example(prompt, (np.array([1, 2, 3]),)), Example(prompt, (np.array([], int),))]
    batch = packing.pack(examples, packing.shape_of(examples))
    assert batch.last_token[batch.response_index].tolist() == [[5], [2]]


def needs_of(batches):
    examples = [example for batch in batches for example in batch]
    cells = np.arange(len(examples)).reshape(len(batches), -1)
    return packing.needs_of_cells(packing.sizes_of(examples), cells)


def test_rows_of_very_long_examples():
    """Sizes past 2 ** 20 are packed into one number for sorting, and come back."""
    sizes = packing.Sizes(
        prompt=np.array([3 << 20, 5]),
        response=np.array([[(1 << 20) + 1, 7], [(1 << 26) + 9, 0]]),
        completion=np.zeros((2, 2), int),
        prompt_id=np.array([0, 1]),
        response_id=np.array([[0, 1], [2, 3]]),
    )
    needs = packing.needs_of_cells(sizes, np.array([[0, 1]]))
    long, short = [3 << 20, 2, (1 << 20) + 1], [5, 2, (1 << 26) + 9]
    assert needs.rows(2).tolist() == [[long, short]]
    whole = [(1 << 26) + 14, (4 << 20) + 1, (3 << 20) + 7, 5]
    assert needs.rows(0)[0].tolist() == [[0, 1, length] for length in whole]


def test_slots_past_those_gathered_are_not_noted():
    """The prompt of 12 responses in whole rows has 12 slots; one more than are gathered will do."""
    prompt = np.array([1, 2])
    examples = [Example(prompt, (np.array([number]),)) for number in range(12)]
    # A window that is shorter than a sequence asks for whole rows.
    shape = packing.shape_of(examples, limits=packing.RowLimits(window=2))
    assert shape.responses_per_row == 0
    assert shape.slots_per_token == packing.MOST_SLOTS + 1
    batch = packing.pack(examples, shape)
    assert (batch.token_slots[:2] >= 0).all()
    # The first is that of the first row that has the token.
    assert batch.token_slots[:2, 0].tolist() == [0, 1]
    assert ((batch.token_slots[2:14] >= 0).sum(axis=1) == 1).all()


def test_choose_covers_all_batches():
    batches = [random_pairs(6, seed=s) for s in range(400)]
    needs = needs_of(batches)
    chosen = packing.choose_shapes(needs, 3)
    assert len(chosen) == 3 and all(shape.responses == 12 for shape in chosen)
    met_by = np.array([needs.met_by(shape) for shape in chosen])
    assert met_by.any(axis=0).all() and not met_by[0].all()
    for step, batch in enumerate(batches[:40]):
        packing.pack(batch, chosen[met_by[:, step].argmax()])  # raises where it does not fit
    padded = [shape.tokens for shape in chosen]
    assert padded == sorted(set(padded)) and padded[-1] < 1.04 * needs.tokens.max()


def test_choose_one_shape_for_short_run():
    assert len(packing.choose_shapes(needs_of([random_pairs(6, seed=s) for s in range(6)]), 6)) == 1


def test_cut_is_cheapest():
    rng = np.random.default_rng(0)
    for limit, price in ((1, 0), (2, 0), (3, 40.0), (8, 200.0)):
        sizes = rng.integers(1, 30, 9)

        def cost(start, end, sizes=sizes, price=price):
            return (end - start) * sizes[start:end].max() ** 2 + price

        every = []
        for count in range(limit):
            for inner in itertools.combinations(range(1, 9), count):
                parts = itertools.pairwise([0, *inner, 9])
                every.append(sum(cost(start, end) for start, end in parts))

        def costs(end, cost=cost):
            return np.array([cost(start, end) for start in range(end)])

        parts = packing._cut(9, costs, limit)
        assert [start for start, _ in parts] == [0, *[end for _, end in parts[:-1]]]
        assert parts[-1][1] == 9 and len(parts) <= limit
        assert sum(cost(start, end) for start, end in parts) == min(every)


def test_shape_of_equal_rows():
    """Equal pairs are one prompt and one response; apart, each response has its own prompt."""
    pair = Example(np.arange(8), (np.arange(8), np.arange(8)))
    assert packing.shape_of([pair] * 4) == packing.Shape(
        tokens=16,
        rows=(packing.RowShape(rows=1, prompt=8, responses=1, response=8),),
        responses_per_row=1,
        completion_tokens=8,
        examples=4,
        responses=1,
        slots_per_token=1,
    )
    assert packing.shape_of([pair] * 4, share=False) == packing.Shape(
        tokens=128,
        rows=(packing.RowShape(rows=8, prompt=0, responses=1, response=16),),
        responses_per_row=0,
        completion_tokens=64,
        examples=4,
        responses=8,
        slots_per_token=1,
    )


def test_pad_right_keeps_rows_and_fills_the_rest():
    rows = [[1, 2, 3], [], np.array([4])]
    np.testing.assert_array_equal(
        packing.pad_right(rows, 4, fill=9), [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]]
    )
    assert packing.pad_right([[0.5]], 2, dtype=np.float32).tolist() == [[0.5, 0.0]]

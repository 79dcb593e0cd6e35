"""Tokenised examples: in memory and in a file, parts of them, and where they come from."""

import hashlib

import numpy as np
import pytest

from dpo_jax.data import examples as examples_module
from dpo_jax.data import packing
from dpo_jax.data.examples import Example, Examples, Places, Run


def ids(rng, least=0, most=9):
    return rng.integers(0, 50_000, rng.integers(least, most)).tolist()


def made(count=200, responses=2, masked=False):
    """Return (prompt, responses, masks) of random examples, and Examples of them."""
    rng = np.random.default_rng(0)
    rows, examples = [], Examples()
    for number in range(count):
        prompt, answers = ids(rng, least=1), [ids(rng) for _ in range(responses)]
        masks = None
        if masked and number % 3:
            masks = tuple(rng.integers(0, 2, len(answer)).astype(bool) for answer in answers)
        rows.append((prompt, answers, masks))
        examples.append(prompt, answers, f"rows.jsonl row {number + 1}", masks)
    return rows, examples


def assert_same(example: Example, row):
    prompt, answers, masks = row
    assert example.prompt.tolist() == prompt and example.prompt.dtype == np.int32
    assert [response.tolist() for response in example.responses] == answers
    assert all(response.dtype == np.int32 for response in example.responses)
    if masks is None:
        assert example.completion_masks is None
        return
    assert all(mask.dtype == bool for mask in example.completion_masks)
    for mask, expected in zip(example.completion_masks, masks, strict=True):
        np.testing.assert_array_equal(mask, expected)


# Room for all; for the last few; for less than an example.
@pytest.fixture(params=[1 << 22, 50, 3])
def in_memory(request, monkeypatch):
    monkeypatch.setattr(examples_module, "IN_MEMORY", request.param)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("responses", [1, 2])
def test_examples_come_back(in_memory, responses, masked):
    rows, examples = made(responses=responses, masked=masked)
    # Taken in any order, also while more are appended.
    for index in (0, 150, -1):
        assert_same(examples[index], rows[index])
    examples.append([1, 2], [[3]] * responses, "other row 5")
    rows.append(([1, 2], [[3]] * responses, None))
    for example, row in zip(examples, rows, strict=True):
        assert_same(example, row)
    order = np.random.default_rng(1).permutation(len(rows))
    for example, index in zip(examples[order], order, strict=True):
        assert_same(example, rows[index])
    assert examples.where[-1] == "other row 5"
    assert [prompt.tolist() for prompt in examples.prompts] == [row[0] for row in rows]
    prompt_P, response_PK, completion_PK = examples.lengths()
    assert prompt_P.tolist() == [len(example.prompt) for example in examples]
    lengths = [[len(response) for response in example.responses] for example in examples]
    assert response_PK.tolist() == lengths
    assert completion_PK.tolist() == [example.completion_lengths() for example in examples]


@pytest.mark.parametrize("masked", [False, True])
def test_fingerprint_in_blocks(in_memory, monkeypatch, masked):
    rows, examples = made(masked=masked)
    numbers = []
    for prompt, answers, masks in rows:
        numbers += [1 + len(answers), len(prompt), *map(len, answers)]
        for part in (prompt, *answers):
            numbers += part
        for mask in masks or ():
            numbers += [-1, *mask.tolist()]
    expected = hashlib.sha256(np.array(numbers, "<i4").tobytes()).hexdigest()
    for block in (1, 7, 1000):
        monkeypatch.setattr(examples_module, "BLOCK", block)
        assert examples[:].fingerprint == expected
    assert Examples().fingerprint == hashlib.sha256(b"").hexdigest()


def test_parts_share_ids():
    _, examples = made()
    part = examples[3:10]
    assert np.shares_memory(part[0].prompt, examples[3].prompt)
    part.append([7], [[8], [9]], "added")
    examples.append([4], [[5], [6]], "added too")
    assert part[-1].prompt.tolist() == [7] and examples[-1].prompt.tolist() == [4]
    assert len(examples[[]]) == 0 and len(part) == 8


def test_examples_have_as_many_responses():
    examples = Examples()
    examples.append([1], [[2], [3]], "row 1")
    with pytest.raises(ValueError, match="row 2 has 1 responses; those before it have 2"):
        examples.append([1], [[2]], "row 2")
    assert len(examples) == 1


def test_prompt_without_tokens_is_refused():
    examples = Examples()
    with pytest.raises(ValueError, match="a.jsonl row 3 has a prompt without tokens"):
        examples.append([], [[2], [3]], "a.jsonl row 3")
    assert len(examples) == 0
    with pytest.raises(ValueError, match="example 2 has a prompt without tokens"):
        none = np.zeros(0, np.int32)
        packing.sizes_of([Example(np.ones(1, np.int32), (none,)), Example(none, (none,))])


def test_too_long_example_is_refused(monkeypatch):
    monkeypatch.setattr(examples_module, "LENGTH_LIMIT", 10)
    examples = Examples()
    assert examples.append([1] * 5, [[2] * 4, [3]], "row 1")
    with pytest.raises(ValueError, match="row 2 has 10 tokens .*; expected fewer than 10"):
        examples.append([1] * 5, [[2], [3] * 5], "row 2")
    assert len(examples) == 1


def test_distinct_examples():
    examples = Examples(distinct=True)
    mask = np.array([True, False])
    rows = [([1], [2, 3], None), ([1, 2], [3], None), ([1], [2, 3], mask), ([1], [2, 3], None)]
    taken = []
    for number, (prompt, response, of_response) in enumerate(rows):
        masks = None if of_response is None else (of_response,)
        taken.append(examples.append(prompt, [response], f"row {number}", masks))
    assert taken == [True, True, True, False]
    assert list(examples.where) == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("masked", [False, True])
def test_single_responses_are_examples(masked):
    rows, examples = made(20, masked=masked)
    places = np.array([0, 3, 39, 3])
    singles = examples.single_responses(places)
    collected = Examples()
    for place, single in zip(places.tolist(), singles, strict=True):
        prompt, answers, masks = rows[place // 2]
        side = place % 2
        assert_same(single, (prompt, [answers[side]], masks and (masks[side],)))
        collected.append(single.prompt, single.responses, "here", single.completion_masks)
    for found, expected in (
        (singles.lengths(), collected.lengths()),
        (singles.identities(), collected.identities()),
    ):
        for numbers, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(numbers, wanted)


def test_places_are_written_back():
    labels = ["a.jsonl row 1", "a.jsonl row 2", "b c row 0", "rows[3]", "x row 007", "x row", ""]
    labels += [" row 3", "one row two row 4", "row 5", "x row ²", "x row 1.5", "x row -1"]
    places = Places()
    for label in labels:
        places.append(label)
    assert places == labels and len(places) == len(labels)
    assert places[-1] == labels[-1] and places[1:3] == labels[1:3]
    assert places.some(np.array([4, 0])) == [labels[4], labels[0]]
    with pytest.raises(IndexError):
        places[len(labels)]


def test_run_says_where_it_cannot_write(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    run = Run(np.int32, limit=4)
    run.extend([1, 2, 3])
    with pytest.raises(OSError, match="token ids are kept in a file in .*missing.*set TMPDIR"):
        run.extend([4, 5])


def test_file_is_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = Run(np.int32, limit=4)
    for number in range(20):
        run.append(number)
    assert run.all().tolist() == list(range(20))
    # It has no name: nothing is left behind, however the process ends.
    assert list(tmp_path.iterdir()) == []


def test_groups_by_prompt_or_sampled_set():
    examples = Examples()
    for prompt, sampled_set in [(1, None), (2, None), (1, None), (1, None), (1, 5), (1, 5), (2, 6)]:
        examples.append([prompt], ([3], [4]), "here", sampled_set=sampled_set)
    assert examples.groups(10).tolist() == [0, 1, 0, 0, 2, 2, 3]
    assert examples.groups(2).tolist() == [0, 1, 0, 2, 3, 3, 4]  # a large one is cut
    assert examples.groups(1).tolist() == list(range(7))
    assert examples[[6, 0, 2]].groups(10).tolist() == [0, 1, 1]


def test_groups_are_of_one_data_set():
    examples = Examples()
    for prompt in (1, 2, 1):
        examples.append([prompt], ([3], [4]), "a.jsonl row 1")
    examples.begin_data_set()
    for prompt in (1, 2, 1):
        examples.append([prompt], ([5], [6]), "b.jsonl row 1")
    assert examples.groups(10).tolist() == [0, 1, 0, 2, 3, 2]
    assert examples[[0, 3, 5, 2]].groups(10).tolist() == [0, 1, 1, 0]


def test_single_completions_are_alone_unless_sampled_together():
    examples = Examples()
    for sampled_set in (None, None, 3, None, 3):
        examples.append([1], ([7],), "here", sampled_set=sampled_set)
    assert examples.groups(10).tolist() == [0, 1, 2, 3, 2]
    assert Examples().groups(10).tolist() == []

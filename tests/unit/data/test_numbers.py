"""Columns of weights and margins: how they are read, refused, counted, and put into batches."""

import csv
import dataclasses

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import dataset
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Examples
from dpo_jax.data.packing import FILLER
from dpo_jax.data.rows import Numbers
from tests.helpers.letters import letters_tokenizer
from tests.helpers.rows import write_jsonl, write_parquet

ROWS = [
    {
        "prompt": f"ask {name}",
        "chosen": f" yes {name}",
        "rejected": " no",
        "votes": votes,
        "gap": gap,
    }
    for name, votes, gap in (("a", 2, 0.5), ("b", 0, -1), ("c", 0.25, 0))
]


def load(path, kind="pairs", *, distinct=False, **fields):
    data = configs.default(()).data
    data.update(path=str(path), eval_fraction=0.0, append_eos=False, **fields)
    return dataset.load(data, letters_tokenizer(), kind, distinct=distinct)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_of_every_kind_of_file(tmp_path, ending):
    write = dict(jsonl=write_jsonl, csv=write_csv, parquet=write_parquet)[ending]
    rows = [row | dict(votes=float(row["votes"]), gap=float(row["gap"])) for row in ROWS]
    found = load(write(tmp_path / f"pairs.{ending}", rows), weight="votes", margin="gap").train
    assert found.weights.tolist() == [2, 0, 0.25]
    assert found.target_margins.tolist() == [0.5, -1, 0]
    assert found[[2, 0]].weights.tolist() == [0.25, 2]
    assert found[1:].numbers(0) == Numbers(0, -1)


def test_no_column_no_numbers(tmp_path):
    found = load(write_jsonl(tmp_path / "pairs.jsonl", ROWS)).train
    assert found.weights is None and found.target_margins is None
    assert found.fingerprints == [found.fingerprint]
    batch = Batches(found, np.array([[0, 1, 2]]))[0]
    assert batch.weights.ravel().tolist() == [1, 1, 1] and batch.target_margins is None


@pytest.mark.parametrize(
    "value, reason",
    [
        (True, r"column 'votes' \(data.weight\) is not a finite number; found True \(bool\)"),
        (None, "is not a finite number; found None"),
        ("nan", "is not a finite number; found 'nan'"),
        (float("inf"), "is not a finite number; found inf"),
        ("many", r"is not a finite number; found 'many' \(str\)"),
        ([1], r"is not a finite number; found \[1\]"),
        (-0.5, "is not 0, or a number from 1e-12 to 1,000,000; found -0.5"),
        (1e-13, "is not 0, or a number from 1e-12 to 1,000,000; found 1e-13"),
        (2e6, "is not 0, or a number from 1e-12 to 1,000,000"),
    ],
)
def test_wrong_weight(tmp_path, value, reason):
    path = write_jsonl(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[1] | dict(votes=value)])
    with pytest.raises(ValueError, match=rf"pairs.jsonl row 2: .*{reason}") as error:
        load(path, weight="votes")
    # The texts are right, so no example has others.
    assert 'a right row for data.weight: {"votes": 1.5, ...}\n' in str(error.value)
    assert '"chosen"' not in str(error.value)
    dropped = load(path, weight="votes", on_bad_row="drop", max_dropped=0.5)
    assert dropped.ledger.train.kept == 1


@pytest.mark.parametrize("value", [-1_000_001, 1_000_001])
def test_margin_out_of_range(tmp_path, value):
    path = write_jsonl(tmp_path / "pairs.jsonl", [ROWS[0] | dict(gap=value)])
    expected = r"\(data.margin\) is not a number from -1,000,000 to 1,000,000; found -?1000001"
    with pytest.raises(ValueError, match=expected):
        load(path, margin="gap")


def test_column_that_is_not_there(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    expected = "row 1: data.margin names a column 'gaps', which is not there; found prompt, chosen"
    with pytest.raises(ValueError, match=expected):
        load(path, margin="gaps")
    # Rows that can be dropped do not hide that the name is wrong.
    with pytest.raises(ValueError, match="data.margin names a column 'gaps'"):
        load(path, margin="gaps", on_bad_row="drop")


def test_weights_of_zero_alone(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [row | dict(votes=0) for row in ROWS])
    with pytest.raises(ValueError, match="all 3 train rows of .* have a weight of 0 in column 'vo"):
        load(path, weight="votes")


def test_each_pair_of_a_row_has_its_numbers(tmp_path):
    ranked = {
        "prompt": "ask",
        "answers": [{"answer": text, "rank": rank} for rank, text in enumerate([" a", " b", " c"])],
    }
    rows = [ranked | dict(votes=3), ROWS[0]]
    found = load(write_jsonl(tmp_path / "ranked.jsonl", rows), weight="votes").train
    assert len(found) > 2
    assert found.weights.tolist() == [3] * (len(found) - 1) + [2]


def test_chosen_response_has_the_weight_of_its_pair(tmp_path):
    found = load(write_jsonl(tmp_path / "pairs.jsonl", ROWS), "sft", weight="votes").train
    assert len(found.responses[0]) == 1 and found.weights.tolist() == [2, 0, 0.25]


def test_equal_pairs_of_other_weights_stay_apart(tmp_path):
    rows = [ROWS[0], ROWS[0] | dict(votes=5), ROWS[0]]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = load(path, "sft", distinct=True, weight="votes").train
    assert found.weights.tolist() == [2, 5]
    other = load(path).train
    # The tokens are the same, so kept reference log-probs are; the data set is not.
    whole = load(path, weight="votes").train
    assert whole.fingerprint == other.fingerprint and whole.fingerprints != other.fingerprints
    changed = write_jsonl(tmp_path / "changed.jsonl", [*rows[:2], ROWS[0] | dict(votes=2.5)])
    assert load(changed, weight="votes").train.fingerprints != whole.fingerprints


def test_mixture_has_the_columns_in_every_set(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ROWS)
    two = write_jsonl(tmp_path / "two.jsonl", [row | dict(prompt="x", votes=7) for row in ROWS[:1]])
    bare = write_jsonl(tmp_path / "bare.jsonl", [{**ROWS[0], "votes": None}])
    found = load("", mix=f"{one}, {two}", weight="votes")
    assert sorted(found.train.weights.tolist()) == [0, 0.25, 2, 7]
    assert found.ledger.train.weights == dict(sum=9.25, least=0.0, most=7.0)
    with pytest.raises(ValueError, match=r"bare.jsonl row 1: column 'votes' \(data.weight\)"):
        load("", mix=f"{one}, {bare}", weight="votes")


def test_ledger_and_show(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    found = load(path, weight="votes", margin="gap")
    lines = found.ledger.table().splitlines()
    shown = [" ".join(line.split()) for line in lines]
    assert {"weights, sum 2.25 0 0", "weights, least 0 0 0"} <= {*shown}
    assert "target margins, least -1 0 0" in shown
    assert found.ledger.to_dict()["train"]["margins"] == dict(sum=-0.5, least=-1.0, most=0.5)
    assert "weights" not in load(path).ledger.to_dict()["train"]
    text = dataset.show(found.train, letters_tokenizer(), [0])
    assert "tokens, weight 2, target margin 0.5\n" in text


def test_batches_hold_numbers_in_any_layout(tmp_path):
    examples = load(write_jsonl(tmp_path / "p.jsonl", ROWS), weight="votes", margin="gap").train
    order = np.array([[2, 0, 1, 0, FILLER, FILLER]])
    for layout in (dict(), dict(microbatches=2), dict(shards=4), dict(microbatches=3, shards=2)):
        batch = Batches(examples, order, **layout)[0]
        numbers = zip(batch.weights.ravel(), batch.target_margins.ravel(), strict=True)
        # Padding has neither.
        there = sorted(pair for pair in numbers if pair != (0, 0))
        assert there == [(0, -1), (0.25, 0), (2, 0.5), (2, 0.5)]


def test_numbers_of_some_examples_alone():
    examples = Examples()
    examples.append([1], [[2], [3]], "row 1", numbers=Numbers(weight=1.0))
    with pytest.raises(ValueError, match="row 2 and the examples before it do not both have"):
        examples.append([1], [[2], [3]], "row 2")
    assert dataclasses.asdict(examples.numbers(0)) == dict(weight=1.0, target_margin=None)

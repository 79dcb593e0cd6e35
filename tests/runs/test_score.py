"""The score command: what it adds to each row."""

import datetime
import json
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest

from dpo_jax.models import families, hf
from dpo_jax.training.metrics import read_rows
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_models import random_params
from tests.helpers.tiny_runs import (
    dpo_config,
    run,
    score_file,
    scratch_config,
    write_model,
    write_pairs,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    model, pairs = write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", count=21)
    score_file(model, pairs, folder / "out.jsonl")
    return folder, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_score_rows_in_order(scored):
    folder, rows = scored
    given = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    added = {"logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"}
    assert [{k: v for k, v in row.items() if k not in added} for row in rows] == given
    # EOS included.
    assert all(row["tokens_chosen"] == len(row["chosen"].split()) + 1 for row in rows)


def test_score_equals_training_log(scored, tmp_path):
    """The first batch's log-probs, before any update, are the scores' means over the same rows."""
    folder, rows = scored
    config = dpo_config(
        folder / "model",
        folder / "pairs.jsonl",
        steps=1,
        batch_size=8,
        data__shuffle=False,
        data__eval_fraction=1e-9,
    )
    row = read_rows(run(config, tmp_path) / "metrics.jsonl")[1]
    held_out = json.loads((tmp_path / "dpo" / "ledger.json").read_text())["train"]["held_out"]
    assert held_out == 1  # one prompt at least is held out: find which, and leave it out here too
    candidates = [[r for r in rows if r["prompt"] != out["prompt"]][:8] for out in rows]
    means = [
        (np.mean([r["logp_chosen"] for r in c]), np.mean([r["logp_rejected"] for r in c]))
        for c in candidates
    ]
    found = (row["logps_train/chosen"], row["logps_train/rejected"])
    assert min(np.abs(np.array(means) - found).max(axis=1)) < 1e-3


def test_score_writes_other_types_as_text(scored, tmp_path):
    folder, _ = scored
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    table = {name: [row[name] for row in rows] for name in rows[0]} | {
        "when": [datetime.datetime(2024, 2, 29)] * 21
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "pairs.parquet")
    score_file(folder / "model", tmp_path / "pairs.parquet", tmp_path / "out.jsonl")
    assert (
        json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["when"]
        == "2024-02-29 00:00:00"
    )


def test_score_refuses_existing_file(scored):
    folder, _ = scored
    before = (folder / "out.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="the file exists. Give another name"):
        score_file(folder / "model", folder / "pairs.jsonl", folder / "out.jsonl")
    assert (folder / "out.jsonl").read_bytes() == before


def test_score_folder_with_other_split(scored, tmp_path):
    folder, rows = scored
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text((folder / "pairs.jsonl").read_text())
    score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows


def test_score_names_bad_row(scored, tmp_path):
    folder, _ = scored
    good, bad = (
        '{"prompt": "w1", "chosen": "w2", "rejected": "w3"}',
        '{"prompt": "w1", "chosen": 3}',
    )
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(ValueError, match="bad.jsonl row 2"):
        score_file(folder / "model", tmp_path / "bad.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# every row is kept


def score_rows(folder, tmp_path, rows, **options):
    """Score rows; return the lines written."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    score_file(folder / "model", tmp_path / "rows.jsonl", tmp_path / "out.jsonl", **options)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_score_equal_and_empty_answers(scored, tmp_path):
    """They teach nothing, and have log-probs like any other."""
    folder, _ = scored
    rows = [
        dict(prompt="w1", chosen="w2 w3", rejected="w2 w3"),
        dict(prompt="w1", chosen="w2 w3", rejected=""),
        dict(prompt="w1", chosen="", rejected=""),
    ]
    equal, half, empty = score_rows(folder, tmp_path, rows)
    assert equal["logp_chosen"] == equal["logp_rejected"] == pytest.approx(half["logp_chosen"])
    assert equal["tokens_chosen"] == 3 and half["tokens_rejected"] == 1  # EOS alone
    assert empty["logp_chosen"] == pytest.approx(half["logp_rejected"], abs=1e-4)


def test_score_completions(scored, tmp_path, capsys):
    """Rows of one completion, liked or not, beside pairs."""
    folder, _ = scored
    rows = [
        dict(prompt="w1", completion="w2 w3"),
        dict(prompt="w1", chosen="w2 w3", rejected="w4"),
        dict(prompt="w1", completion="w4", label=False),
    ]
    liked, pair, other = score_rows(folder, tmp_path, rows)
    assert liked["logp"] == pytest.approx(pair["logp_chosen"], abs=1e-4) and liked["tokens"] == 3
    assert other["logp"] == pytest.approx(pair["logp_rejected"], abs=1e-4)
    assert "scored 1 pairs and 2 completions" in capsys.readouterr().out


def test_score_several_pairs_of_a_row(scored, tmp_path):
    """A line for each, with the pair's own answers."""
    folder, _ = scored
    answers = [dict(answer="w3", rank=2), dict(answer="w2", rank=1), dict(answer="w4", rank=3)]
    rows = [dict(prompt="w1", answers=answers, id=7), dict(prompt="w1", chosen="w2", rejected="w3")]
    *lines, pair = score_rows(folder, tmp_path, rows)
    said = [(line["chosen"], line["rejected"]) for line in lines]
    assert len(lines) == 3 and all(line["id"] == 7 for line in lines)
    assert [tuple(map(str.strip, texts)) for texts in said] == [
        ("w2", "w3"),
        ("w2", "w4"),
        ("w3", "w4"),
    ]
    assert lines[0]["logp_chosen"] == lines[1]["logp_chosen"]
    assert lines[0]["logp_chosen"] == pytest.approx(pair["logp_chosen"], abs=1e-4)


def test_score_says_why_a_row_is_unscored(scored, tmp_path, capsys):
    folder, _ = scored
    rows = [
        dict(prompt="w1", chosen="w2", rejected="w3"),
        dict(prompt="w1", chosen="w2", rejected=4),
        dict(prompt="w1", answers=[dict(answer="w3", rank=1), dict(answer="w4", rank=1)]),
    ]
    with pytest.raises(ValueError, match="rows.jsonl row 2: .*\n.*\n.*\n.*--on_bad_row=drop"):
        score_rows(folder, tmp_path, rows)
    settings = dict(on_bad_row="drop")  # whatever their share is
    good, bad, *tie = score_rows(folder, tmp_path, rows, settings=settings)
    assert "unscored" not in good and good["logp_chosen"] < 0
    assert "'rejected' is not text" in bad["unscored"] and bad["rejected"] == 4
    # No answer is better, so there is no pair: each is a completion.
    assert [line["completion"].strip() for line in tie] == ["w3", "w4"]
    assert tie[0]["logp"] == pytest.approx(good["logp_rejected"], abs=1e-4)
    assert all(line["answers"] == rows[2]["answers"] for line in tie)
    told = capsys.readouterr().out
    assert "scored 1 pairs and 2 completions into" in told
    assert "not to be scored: 1 x field 'rejected' is not text (rows.jsonl row 2)" in told
    # There is one split, and nothing is held out.
    assert re.search(r"^rows +3$", told, re.M) and "eval" not in told


def test_score_keeps_all_rows_however_many_are_bad(scored, tmp_path, capsys):
    folder, _ = scored
    rows = [dict(prompt="w1", chosen="w2", rejected=number) for number in range(3)]
    lines = score_rows(folder, tmp_path, rows, settings=dict(on_bad_row="drop"))
    assert [line["rejected"] for line in lines] == [0, 1, 2]
    assert all("'rejected' is not text" in line["unscored"] for line in lines)
    assert "scored nothing into" in capsys.readouterr().out


def test_score_names_its_own_flags(scored, tmp_path):
    """A message for training names fields of a config, which these commands do not have."""
    folder, _ = scored
    row = dict(prompt="w1", chosen="w2", rejected="w3", images=["a"])
    with pytest.raises(ValueError, match="with --ignore=images") as told:
        score_rows(folder, tmp_path, [row])
    assert "data." not in str(told.value)
    with pytest.raises(FileNotFoundError, match="^--data='.*missing"):
        score_file(folder / "model", tmp_path / "missing", tmp_path / "out.jsonl")


def test_score_reports_accuracy(scored, tmp_path, capsys):
    """In all pairs and in each subset, in sum, per token and against a reference."""
    folder, _ = scored
    rows = []
    for number, subset in enumerate(["easy", "hard", "easy", "hard", "hard", "easy"]):
        chosen, rejected = f"w{number} w{number + 9}", f"w{30 - number}"
        rows.append(dict(prompt="w1", chosen=chosen, rejected=rejected, subset=subset))
    other = write_model(tmp_path / "other", scale=5)
    capsys.readouterr()
    lines = score_rows(folder, tmp_path, rows, reference=str(other))
    told = capsys.readouterr().out.splitlines()

    def rates(some):
        sums = np.array([[line["logp_chosen"], line["logp_rejected"]] for line in some])
        lengths = np.array([[line["tokens_chosen"], line["tokens_rejected"]] for line in some])
        theirs = np.array(
            [[line["reference_logp_chosen"], line["reference_logp_rejected"]] for line in some]
        )
        compared = (sums, sums / lengths, sums - theirs, (sums - theirs) / lengths)
        return [f"{(values[:, 0] > values[:, 1]).mean():.1%}" for values in compared]

    heads = "chosen more likely than rejected, by pairs log-prob per token log-ratio"
    title = told.index(next(line for line in told if line.split()[:2] == ["chosen", "more"]))
    assert " ".join(told[title].split()).startswith(heads)
    subsets = dict(all=lines)
    for name in ("easy", "hard"):
        subsets[name] = [line for line in lines if line["subset"] == name]
    for row, (name, some) in zip(told[title + 1 :], subsets.items(), strict=True):
        assert row.split() == [name, str(len(some)), *rates(some)]
    # The other model is a model of its own.
    score_file(other, tmp_path / "rows.jsonl", tmp_path / "other.jsonl")
    its = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    assert [line["logp_chosen"] for line in its] == [
        line["reference_logp_chosen"] for line in lines
    ]


def test_score_refuses_reference_of_another_vocabulary(scored, tmp_path):
    folder, _ = scored
    shape, other = scratch_config().model.scratch.to_dict(), tmp_path / "other"
    config = families.from_hf(hf.make_config(shape))
    hf.save(other, config, hf.make_config(shape), jax.device_put(random_params(config)))
    with pytest.raises(ValueError, match="other has a vocabulary of 128, .*one of 40"):
        score_file(
            folder / "model", folder / "pairs.jsonl", tmp_path / "out.jsonl", reference=str(other)
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_score_of_one_split(scored, tmp_path):
    folder, rows = scored
    text = (folder / "pairs.jsonl").read_text()
    (tmp_path / "data").mkdir()
    for name in ("filtered", "raw"):
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_text(text)
    with pytest.raises(ValueError, match="has the splits filtered, raw: choose one by --split"):
        score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="--split=test: .* has no such split; it has filtered"):
        score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl", split="test")
    score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl", split="raw")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows

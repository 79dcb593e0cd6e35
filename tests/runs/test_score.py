"""The score command: what it adds to each row."""

import datetime
import json

import numpy as np
import pyarrow.parquet
import pytest

from dpo_jax.training.metrics import read_rows
from tests.helpers.tiny_runs import dpo_config, run, score_file, write_model, write_pairs


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

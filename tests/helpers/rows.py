"""Rows of users' files, written and read."""

import copy
import gzip
import json
from pathlib import Path

import ml_collections
import pyarrow
import pyarrow.parquet

from dpo_jax.data import splits
from dpo_jax.whole_file import read_record, with_sha256

PAIR = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}


def data_config(**changes) -> ml_collections.ConfigDict:
    """Return the data block of a config, with these fields changed."""
    return ml_collections.ConfigDict(
        {
            "source": "local",
            "path": "",
            "train_split": "train",
            "eval_split": "",
            "eval_fraction": 0.0,
            "max_rows": 0,
            "max_eval_rows": 0,
            "on_bad_row": "error",
            "columns": "",
            "weight": "",
            "margin": "",
            "ignore": (),
            "turns": "all",
            "template": {},
            "max_dropped": 0.05,
            "mix": "",
        }
        | changes
    )


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def pairs(n: int, prefix: str = "p") -> list[dict]:
    """Return rows of n different pairs."""
    return [
        {"prompt": f"{prefix}{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)
    ]


def read(path, kind="pairs", **changes):
    """Read a file as a run does; return the rows of each split, and the ledger."""
    return splits.read(data_config(path=str(path), **changes), kind)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def change_record(path: Path, change) -> dict:
    """Let a function change the record in config.json or done.json; return it as it was."""
    record = read_record(path, "")
    before = copy.deepcopy(record)
    change(record)
    path.write_text(json.dumps(with_sha256(record)))
    return before

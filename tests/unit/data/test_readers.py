"""Files and folders: formats, splits, the hub, and lines that cannot be read."""

import csv
import json
import os
import subprocess
import sys
import time

import datasets
import pytest

from dpo_jax.data import readers
from dpo_jax.data.sources import TextExample
from tests.helpers.paths import ROOT, SHARED, needs_shared
from tests.helpers.rows import (
    PAIR,
    assistant,
    pairs,
    read,
    user,
    write_jsonl,
    write_parquet,
)


@pytest.mark.parametrize(
    "line, said",
    [
        (
            '{"prompt": "p" "chosen": 1}',
            "the line is not JSON; found Expecting ',' delimiter at character 16",
        ),
        ('["p"]', "a row is an object, {...}; found ['p']"),
        (
            r'{"prompt": "\ud83d", "completion": "c"}',
            r"half of a surrogate pair is no character; found '\ud83d'",
        ),
        (
            '{"prompt": "p", "completion": "c"}',
            "a pair needs two responses, in 'chosen' and 'rejected'",
        ),
    ],
)
def test_bad_line_stops_or_is_counted(tmp_path, line, said):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, line, PAIR])
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"rows.jsonl row 2: {said}.\n")
    rows, ledger = read(path, on_bad_row="drop")
    assert [row.where for row in rows["train"]] == ["rows.jsonl row 1", "rows.jsonl row 3"]
    reason = said.split("; found")[0]
    assert ledger.train.dropped == {reason: 1} and ledger.train.examples == {
        reason: ["rows.jsonl row 2"]
    }
    assert ledger.train.read == 3


def test_bad_character_in_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR, PAIR | {"chosen": "\ud83d"}]))
    rows, ledger = read(path, on_bad_row="drop")
    assert [row.where for row in rows["train"]] == ["rows.json row 1"]
    assert ledger.train.dropped == {"half of a surrogate pair is no character": 1}


def test_all_formats_agree(tmp_path):
    rows = [
        {"prompt": "NA", "chosen": "1", "rejected": "null"},
        {"prompt": 'line\nbreak, "quoted"', "chosen": "007", "rejected": "é\u2028"},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl.gz", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    write_parquet(tmp_path / "d.parquet", rows)
    with open(tmp_path / "e.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "f.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for name in ("a.jsonl", "b.jsonl.gz", "lines.json", "c.json", "d.parquet", "e.csv", "f.jsonl"):
        read_rows = read(tmp_path / name)[0]["train"]
        assert [row.where for row in read_rows] == [f"{name} row 1", f"{name} row 2"]
        assert [
            {"prompt": row.prompt, "chosen": row.responses[0], "rejected": row.responses[1]}
            for row in read_rows
        ] == rows, name


def test_chat_rows_and_mixed_rows(tmp_path):
    chat = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    write_parquet(tmp_path / "a.parquet", [chat, chat])
    (tmp_path / "b.json").write_text(json.dumps([chat, PAIR]))
    assert read(tmp_path / "a.parquet")[0]["train"][1].prompt == [user("q")]
    rows = read(tmp_path / "b.json")[0]["train"]
    assert [row.prompt for row in rows] == [[user("q")], "Name a colour."]


def test_number_among_texts(tmp_path):
    rows = [PAIR, PAIR | {"rejected": 3}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        with pytest.raises(
            ValueError, match=f"{name} row 2: field 'rejected' is not text; found 3"
        ):
            read(tmp_path / name)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(
        ValueError, match=r"latin.jsonl is not UTF-8 text: .*0xe9. Save it as UTF-8"
    ):
        read(tmp_path / "latin.jsonl", "sft")
    (tmp_path / "cut.json").write_text('[{"text": "a"},\n{"text":')
    with pytest.raises(ValueError, match="cut.json is not JSON: Expecting value at line 2"):
        read(tmp_path / "cut.json", "sft")
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="rows.txt' is none of .jsonl, .json, .csv, .parquet"):
        read(tmp_path / "rows.txt", "sft")


@pytest.mark.parametrize(
    "files, splits",
    [
        (["train.jsonl", "test.jsonl"], {"train": 1, "test": 1}),
        (["a/train.jsonl.gz", "b/train.jsonl.gz", "a/test.jsonl.gz"], {"train": 2, "test": 1}),
        (["one.jsonl", "two.jsonl"], {"train": 2}),
        (["train/one.jsonl", "train/two.jsonl", "dev/one.jsonl"], {"train": 2, "validation": 1}),
        (["my_training_set.jsonl", "my-eval-set.jsonl"], {"train": 1, "test": 1}),
        (["train.jsonl", "valid1.jsonl", "valid2.jsonl"], {"train": 1, "valid1": 1, "valid2": 1}),
        (
            [
                "x/train-00000-of-00002.jsonl",
                "x/train-00001-of-00002-0a1b.jsonl",
                "x/unsupervised-00000-of-00001.jsonl",
            ],
            {"train": 2, "unsupervised": 1},
        ),
        (
            ["train_sft-00000-of-00001.jsonl", "train_prefs-00000-of-00001.jsonl"],
            {"train_sft": 1, "train_prefs": 1},
        ),
        (
            ["pairs.jsonl", "config.json", "done.json", ".hidden/test.jsonl", "README.md"],
            {"train": 1},
        ),
    ],
)
def test_find_splits_of_folder(tmp_path, files, splits):
    for i, name in enumerate(files):
        write_jsonl(tmp_path / name, pairs(1, f"{i}:"))
    found = readers.find_splits(str(tmp_path))
    assert {name: len(list(rows())) for name, rows in found.items()} == splits


def test_find_splits_refuses_mixed_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="holds no files; expected one kind of .jsonl, .json, .csv"
    ):
        readers.find_splits(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [PAIR])
    write_parquet(tmp_path / "b.parquet", [PAIR])
    with pytest.raises(FileNotFoundError, match="holds .jsonl and .parquet files"):
        readers.find_splits(str(tmp_path))


def test_find_splits_of_glob_names(tmp_path):
    folder = tmp_path / ".cache" / "run[1] *"
    write_jsonl(folder / "rows.jsonl", [PAIR])
    assert len(read(folder)[0]["train"]) == 1
    assert len(read(folder / "rows.jsonl")[0]["train"]) == 1


@needs_shared
def test_find_splits_of_real_imdb():
    splits = readers.find_splits(str(SHARED / "imdb"))
    assert list(splits) == ["test", "train", "unsupervised"]
    where, record = next(splits["unsupervised"]())
    assert where == "plain_text/unsupervised-00000-of-00001.parquet row 1" and record["label"] == -1
    rows, _ = read(
        SHARED / "imdb" / "plain_text",
        "sft",
        source="imdb",
        train_split="test",
        eval_split="train",
        max_rows=5,
        max_eval_rows=5,
    )
    assert [len(side) for side in rows.values()] == [5, 5]
    assert not any("<br" in row.responses[0] for side in rows.values() for row in side)


def test_find_splits_of_hub_name(monkeypatch):
    parts = {
        "train": datasets.Dataset.from_list(pairs(1500)),
        "test": datasets.Dataset.from_list(pairs(2, "t")),
    }
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, path, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *path: {("me/mine", None): parts}[path])
    rows, _ = read("me/mine")
    assert [len(side) for side in rows.values()] == [1500, 2]
    assert rows["train"][-1] == TextExample(
        "p1499", ("good 1499", "bad 1499"), "me/mine[train] row 1500"
    )
    assert rows["eval"][0].where == "me/mine[test] row 1"


def test_find_splits_of_hub_subset(monkeypatch):
    """A data set that a script would make is taken from the parquet files that the hub made of
    it.
    """
    parts = {"train": datasets.Dataset.from_list(pairs(3))}

    def load(name, subset=None, data_dir=None, revision=None):
        if (name, subset) == ("me/mine", "small") or (name, data_dir, revision) == (
            "me/scripted",
            "small",
            "refs/convert/parquet",
        ):
            return parts
        raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, path, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("me/mine:small", "me/scripted:small"):
        assert read(path)[0]["train"][0].where == f"{path}[train] row 1"
    with pytest.raises(FileNotFoundError, match="data.path='me/scripted:other'"):
        read("me/scripted:other")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_name_without_network(tmp_path, offline):
    code = """if True:
        import time
        from dpo_jax.data import readers
        import datasets
        start = time.monotonic()
        try:
            readers.find_splits("Anthropic/hh-rlhf")
        except FileNotFoundError as error:
            print(time.monotonic() - start, error)
    """
    # an address where nothing listens, so the test is the same on a machine with a network
    environment = os.environ | {
        "HF_HUB_OFFLINE": offline,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    seconds, message = result.stdout.split(maxsplit=1)
    assert float(seconds) < 5
    assert "data.path='Anthropic/hh-rlhf': no such file or folder here" in message
    assert "--config.data.path=FOLDER" in message


@pytest.mark.parametrize(
    "path", ["/nowhere/rows.jsonl", "./rows", "~/nowhere", "a/b/c", "rows.jsonl", "my/rows.csv.gz"]
)
def test_find_splits_never_asks_hub_for_path(path, monkeypatch):
    monkeypatch.setattr(readers, "_hub_splits", None)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        readers.find_splits(path)
    assert time.monotonic() - start < 1
    with pytest.raises(
        FileNotFoundError, match="data.path is empty; pass a file, a folder, or the name"
    ):
        readers.find_splits("")


def test_read_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"a": 1}, "", {"a": "é"}])
    assert list(readers.read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "é"})]
    bad = write_jsonl(tmp_path / "b.jsonl", [{"a": 1}, "{'a': 1}"])
    with pytest.raises(
        ValueError, match="b.jsonl line 2: the line is not JSON; found Expecting property"
    ):
        list(readers.read_jsonl(bad))
    with pytest.raises(FileNotFoundError, match="none.jsonl': no such file"):
        list(readers.read_jsonl(tmp_path / "none.jsonl"))


def test_read_jsonl_is_lazy(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, "not JSON"])
    assert next(readers.read_jsonl(path)) == (1, {"a": 1})

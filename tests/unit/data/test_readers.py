"""Files and folders: formats, splits, the hub, and lines that cannot be read."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import time

import datasets
import pyarrow
import pytest

from dpo_jax.data import every_row, readers
from dpo_jax.data.rows import TextExample
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

# Where libraries would look for a cache before they look at HOME.
CACHES = {"HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"}


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
        ValueError, match=r"latin.jsonl is not UTF-8 text: .*0xe9, in line 1. Save it as UTF-8"
    ):
        read(tmp_path / "latin.jsonl", "sft")
    (tmp_path / "cut.json").write_text('[{"text": "a"},\n{"text":')
    with pytest.raises(ValueError, match="cut.json is not JSON: Expecting value at line 2"):
        read(tmp_path / "cut.json", "sft")
    whole = gzip.compress(b'[{"text": "a"}]' * 1000)
    for name, content in (("a.jsonl.gz", b"{}"), ("b.json.gz", b"[]"), ("c.json.gz", whole[:-20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a whole gzip file"):
            read(tmp_path / name, "sft")
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
        (["train.jsonl", "valid1.jsonl", "valid2.jsonl"], {"train": 1, "validation": 2}),
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


# The files of a folder that `datasets` parts into splits too; it is asked in the test.
AS_DATASETS = [
    "prefs.train prefs.test",
    "train_prefs test_prefs",
    "v1.0-train v1.0-test",
    "v1.0-train",
    "pairs.v2.train pairs.v2.dev",
    "train.v1.2 test.v1.2",
    "2024-05-train 2024-05-test",
    "data/train-00000-of-00001 data/test-00000-of-00001",
    "data/train-00000-of-00001-0123abcd data/validation-00000-of-00001-0123abcd",
    "data/train_prefs-00000-of-00002 data/train_prefs-00001-of-00002 "
    "data/test_prefs-00000-of-00001 data/train_sft-00000-of-00001",
    "data/unsupervised-00000-of-00001 data/train-00000-of-00001",
    "train-00000-of-00001 dev-00000-of-00001",
    "train/a train/b test/a",
    "train/data-00000-of-00001 test/data-00000-of-00001",
    "train/part-00000-of-00002 train/part-00001-of-00002 valid/part-00000-of-00001",
    "helpful/train helpful/test harmless/train",
    "set-train/rows set-test/rows",
    "x/train_v1/rows x/test_v1/rows",
    "train validation test",
    "train val",
    "train valid",
    "training testing",
    "train evaluation",
    "train1 train2 test1",
    "train valid1 valid2",
    "my_train my_eval",
    "a b",
    "pretrain latest",
    "__cache/train rows",
    ".hidden/train rows",
]


@pytest.mark.parametrize("names", AS_DATASETS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_find_splits_as_datasets_does(tmp_path, names, suffix):
    for name in names.split():
        write_jsonl(tmp_path / (name + suffix), [{"file": name}])
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    expected = {}
    for split, files in datasets.data_files.DataFilesDict.from_patterns(
        patterns, str(tmp_path)
    ).items():
        expected[str(split)] = sorted(
            os.path.relpath(file, tmp_path.resolve()).removesuffix(suffix) for file in files
        )
    found = {}
    for split, rows in readers.find_splits(str(tmp_path)).items():
        found[split] = sorted(readers.fields_of(record)["file"] for _, record in rows())
    assert found == expected


@pytest.mark.parametrize(
    "names, splits",
    [
        # `datasets` matches lower case alone, and would train on both.
        ("Train Test", {"train": ["Train"], "test": ["Test"]}),
        # It passes over files that no name tells the split of; here they have to be asked for.
        ("train extra", {"train": ["train"], "extra": ["extra"]}),
        # It puts the folder's name above the file's, and would find a test split alone.
        ("eval_runs/train eval_runs/dev", {"train": ["eval_runs/train"], "validation": [""]}),
        # Its name is no split's for `datasets`, which stops.
        ("data/v1.0-train-00000-of-00001", {"train": ["data/v1.0-train-00000-of-00001"]}),
    ],
)
def test_find_splits_where_datasets_does_otherwise(tmp_path, names, splits):
    for name in names.split():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"file": name}])
    found = readers.find_splits(str(tmp_path))
    assert sorted(found) == sorted(splits)
    rows = [readers.fields_of(record)["file"] for _, record in found["train"]()]
    assert rows == splits["train"]


def test_find_splits_refuses_name_of_two_splits(tmp_path):
    write_jsonl(tmp_path / "train_test.jsonl", [PAIR])
    with pytest.raises(FileNotFoundError, match="train_test.jsonl: its name says train and test"):
        readers.find_splits(str(tmp_path))


CARD = """---
license: mit
configs:
- config_name: preference
  data_files:
  - split: train
    path: "preference/a*.jsonl"
  - split: heldout
    path: ["preference/b.jsonl", "preference/c.jsonl"]
- config_name: edits
  data_files: "edits/*"
---
# A set with a card
"""


def test_find_splits_that_a_card_declares(tmp_path):
    for name in ("preference/a1", "preference/a2", "preference/b", "preference/c", "edits/d"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"file": name}])
    (tmp_path / "README.md").write_text(CARD)

    with pytest.raises(FileNotFoundError, match="holds the subsets preference, edits: pass the"):
        readers.find_splits(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=":other': the folder has no such subset; it has pre"
    ):
        readers.find_splits(f"{tmp_path}:other")
    assert splits_of(f"{tmp_path}:preference") == {
        "train": ["preference/a1", "preference/a2"],
        "heldout": ["preference/b", "preference/c"],
    }
    assert splits_of(f"{tmp_path}:edits") == {"train": ["edits/d"]}
    (tmp_path / "README.md").write_text(CARD.replace("edits\n", "edits\n  default: true\n"))
    assert splits_of(tmp_path) == {"train": ["edits/d"]}
    [rows] = readers.find_splits(str(tmp_path)).values()
    assert next(rows())[0] == "edits/d.jsonl row 1"


def splits_of(path):
    """Return the names in the rows of each split."""
    found = {}
    for split, rows in readers.find_splits(str(path)).items():
        found[split] = [readers.fields_of(record)["file"] for _, record in rows()]
    return found


def write_named(folder, names):
    """Write files of one row each, which has the name of the file."""
    for name in names.split():
        write = write_parquet if name.endswith(".parquet") else write_jsonl
        write(folder / name, [{"file": name}])


def test_card_that_declares_folders(tmp_path):
    write_named(tmp_path, "one/train.jsonl one/test.jsonl two/rows.jsonl")
    card = "---\nconfigs:\n- config_name: one\n  data_dir: one\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    of_one = {"train": ["one/train.jsonl"], "test": ["one/test.jsonl"]}
    assert splits_of(tmp_path) == splits_of(f"{tmp_path}:one") == of_one
    (tmp_path / "README.md").write_text(card + "- config_name: two\n  data_dir: two\n---\n")
    with pytest.raises(FileNotFoundError, match="holds the subsets one, two: pass the one to read"):
        readers.find_splits(str(tmp_path))
    assert splits_of(f"{tmp_path}:two") == {"train": ["two/rows.jsonl"]}
    assert splits_of(f"{tmp_path}:one") == of_one
    (tmp_path / "README.md").write_text(card.replace("dir: one", "dir: gone") + "---\n")
    with pytest.raises(FileNotFoundError, match="declares this subset in the folder 'gone', which"):
        readers.find_splits(str(tmp_path))


def test_card_of_files_that_are_not_there(tmp_path):
    write_named(tmp_path, "edits/d.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(FileNotFoundError, match="none of the files that README.md declares"):
        readers.find_splits(f"{tmp_path}:preference")


@pytest.mark.parametrize(
    "names, found",
    [
        ("trainset testset", "testset"),
        ("mytrain mytest", "mytest"),
        ("trainData testData", "testData"),
        ("TrainSet TestSet", "TestSet"),
        ("trainA trainB testA", "testA"),
        ("data data_holdout", "data_holdout"),
        ("data heldout", "heldout"),
        ("pairs held-out-pairs", "held-out-pairs"),
        ("pairs devset", "devset"),
        ("hhtrain shpeval", "shpeval"),
        ("pairs_trn pairs_tst", "pairs_tst"),
        ("pairs unseenPairs", "unseenPairs"),
        ("trainset/a evalset/a", "evalset/a"),
    ],
)
def test_names_that_look_like_splits(tmp_path, names, found):
    for name in names.split():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"file": name}])
    with pytest.raises(FileNotFoundError, match=f"{found}.jsonl looks like a file to evaluate on"):
        readers.find_splits(str(tmp_path))
    # The advice: pass the one to train on.
    first = names.split()[0]
    assert splits_of(tmp_path / f"{first}.jsonl") == {"train": [first]}


@pytest.mark.parametrize("names", ["latest contest", "values more", "trainA trainB", "trains rows"])
def test_names_that_only_resemble_splits(tmp_path, names):
    for name in names.split():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"file": name}])
    assert splits_of(tmp_path) == {"train": sorted(names.split())}


def test_layout_of_converted_sets(tmp_path):
    """The hub's branch refs/convert/parquet: CONFIG/SPLIT/0000.parquet."""
    files = "train_prefs/0000.parquet train_prefs/0001.parquet train_sft/0000.parquet "
    files += "partial-test_prefs/0000.parquet unsupervised/0000.parquet"
    write_named(tmp_path / "one" / "default", files)
    expected = {
        "train_prefs": ["train_prefs/0000.parquet", "train_prefs/0001.parquet"],
        "train_sft": ["train_sft/0000.parquet"],
        "test_prefs": ["partial-test_prefs/0000.parquet"],
        "unsupervised": ["unsupervised/0000.parquet"],
    }
    for path in ("one/default", "one", "one:default"):
        assert splits_of(tmp_path / path) == expected
    with pytest.raises(FileNotFoundError, match=":other': the folder has no such subset; it has d"):
        readers.find_splits(f"{tmp_path}/one:other")
    write_named(tmp_path / "two", "en/train/0000.parquet de/train/0000.parquet de/val/0000.parquet")
    with pytest.raises(FileNotFoundError, match="holds the subsets de, en: pass the one to read"):
        readers.find_splits(str(tmp_path / "two"))
    assert splits_of(f"{tmp_path}/two:de") == {
        "train": ["de/train/0000.parquet"],
        "validation": ["de/val/0000.parquet"],
    }
    # Numbered files of which no folder names a split are parts of one.
    write_named(tmp_path / "three", "a/0000.parquet b/0000.parquet")
    assert list(splits_of(tmp_path / "three")) == ["train"]


def test_missing_shards(tmp_path):
    write_named(tmp_path, "train-00000-of-00003.jsonl train-00002-of-00003.jsonl test.jsonl")
    splits = readers.find_splits(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"of the 3 files that train-00000-of-00003.jsonl "):
        list(splits["train"]())
    with pytest.raises(FileNotFoundError, match=r"1 are missing \(00001\). Download them too"):
        list(splits["train"]())
    assert len(list(splits["test"]())) == 1
    assert len(list(readers.find_splits(f"{tmp_path}/train-00000-of-00003.jsonl")["train"]())) == 1


@pytest.mark.parametrize(
    "names",
    [
        "train.jsonl train.jsonl.gz",
        "data/train.parquet data/train-00000-of-00001.parquet",
        "train-00000-of-00001.jsonl train-00000-of-00002.jsonl train-00001-of-00002.jsonl",
        "train-00000-of-00001-0a.jsonl train-00000-of-00001-1b.jsonl",
    ],
)
def test_rows_twice_by_name(tmp_path, names):
    write_named(tmp_path, names)
    with pytest.raises(FileNotFoundError, match="hold the same rows by their names"):
        splits_of(tmp_path)


def test_equal_files(tmp_path, monkeypatch):
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / name, pairs(50))
    # The same size, the same start, and another end.
    write_jsonl(tmp_path / "train-2.jsonl", [*pairs(49), pairs(50)[-1] | {"chosen": "evil 49"}])
    for chunk in (64, 1 << 20):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        assert len(list(readers.find_splits(str(tmp_path))["train"]())) == 100
    write_jsonl(tmp_path / "train (copy).jsonl", pairs(50))
    with pytest.raises(ValueError, match=r"copy\).jsonl and train-1.jsonl .* are the same file"):
        list(readers.find_splits(str(tmp_path))["train"]())


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_other_compressions(tmp_path, suffix):
    opener = {".bz2": bz2, ".xz": lzma}[suffix]
    (tmp_path / "f").mkdir()
    whole = opener.compress("".join(json.dumps(row) + "\n" for row in pairs(99)).encode())
    file = tmp_path / "f" / f"train.jsonl{suffix}"
    file.write_bytes(whole)
    for path in (tmp_path / "f", file):
        rows = read(path)[0]["train"]
        assert rows[98].where == f"train.jsonl{suffix} row 99" and rows[98].prompt == "p98"
    for content in (whole[:-20], b"no archive", whole[:20] + b"x" * 30 + whole[50:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"train.jsonl{suffix} is not a whole"):
            read(file)


def test_packed_files(tmp_path):
    for name in ("a/train.jsonl.zst", "b/rows.zip", "c/train.parquet.gz", "d/rows.tar.gz"):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_bytes(b"packed")
        with pytest.raises(FileNotFoundError, match=f"{file.name} is a packed file.*Unpack it"):
            readers.find_splits(str(file.parent))
        with pytest.raises(ValueError, match=f"{file.name} is a packed file"):
            read(file)
    # What has been unpacked is read, and so is what stands beside pictures.
    write_jsonl(tmp_path / "a" / "train.jsonl", [PAIR])
    write_jsonl(tmp_path / "b" / "train.jsonl", [PAIR])
    assert len(read(tmp_path / "a")[0]["train"]) == len(read(tmp_path / "b")[0]["train"]) == 1
    (tmp_path / "a" / "test.jsonl.zst").write_bytes(b"packed")
    with pytest.raises(FileNotFoundError, match="test.jsonl.zst is a packed file"):
        readers.find_splits(str(tmp_path / "a"))


@pytest.mark.parametrize("suffix", readers.READERS)
def test_empty_files(tmp_path, suffix):
    write_jsonl(tmp_path / "f" / "more.jsonl", [PAIR])
    file = tmp_path / "f" / f"rows{suffix}"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"rows\{suffix} has no rows; expected rows such as"):
        read(file)
    if suffix == ".jsonl":
        with pytest.raises(ValueError, match=r"rows.jsonl has no rows"):
            read(tmp_path / "f")


def test_files_without_rows(tmp_path):
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), schema):
        pass
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected\n")
    write_jsonl(tmp_path / "e.jsonl", ["", ""])
    write_jsonl(tmp_path / "f.jsonl.gz", [])
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{file.name} has no rows"):
            read(file)
        with pytest.raises(ValueError, match=f"{file.name} has no rows"):
            list(every_row.read(str(file)))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_tables(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    table = pyarrow.Table.from_pylist(pairs(3000))
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, compression="snappy", row_group_size=1000)
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = [b"x" * 100, b"PAR1" + b"x" * 100, whole[:middle], whole[:-5]]
    if suffix == ".arrow":
        damaged = damaged[:3]
    else:
        damaged.append(whole[:100] + b"\xff" * 3000 + whole[3100:])
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"rows\{suffix} is no whole .* file: .*again"):
            read(file)


def test_caches_beside_saved_sets(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        datasets.Dataset.from_list(pairs(count, split)).save_to_disk(tmp_path / split)
    saved = datasets.load_from_disk(str(tmp_path / "train"))
    saved.map(lambda row: row | {"chosen": "cached"})
    assert list((tmp_path / "train").glob("cache-*.arrow"))
    whole = (tmp_path / "train" / "data-00000-of-00001.arrow").read_bytes()
    for name in ("train/tmp0a1b.arrow", "tmpx.arrow", "train/data-00000-of-00002.arrow"):
        (tmp_path / name).write_bytes(whole)
    rows, _ = read(tmp_path)
    assert [row.responses[0] for row in rows["train"]] == ["good 0", "good 1", "good 2"]
    assert len(rows["eval"]) == 1


def test_save_to_disk(tmp_path):
    train = datasets.Dataset.from_list(pairs(1500))
    # Rows chosen and put in another order are written in that order; a cached file is no data.
    train = train.select(range(1499, -1, -1))
    train.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"")
    parts = datasets.DatasetDict(train=train, test=datasets.Dataset.from_list(pairs(2, "t")))
    parts.save_to_disk(tmp_path / "both")
    rows, _ = read(tmp_path / "one")
    assert [row.prompt for row in rows["train"]] == [f"p{i}" for i in range(1499, -1, -1)]
    assert rows["train"][0].where == "data-00000-of-00003.arrow row 1"
    rows, _ = read(tmp_path / "both")
    assert [len(rows["train"]), len(rows["eval"])] == [1500, 2]
    assert rows["eval"][0].where == "test/data-00000-of-00001.arrow row 1"
    [arrow] = (tmp_path / "both" / "test").glob("*.arrow")
    assert [row.prompt for row in read(arrow)[0]["train"]] == ["t0", "t1"]


def test_arrow_file_format(tmp_path):
    table = pyarrow.Table.from_pylist(pairs(3))
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert len(read(tmp_path / "rows.arrow")[0]["train"]) == 3


@pytest.mark.parametrize("name", ["ROWS.JSONL", "rows.ndjson", "Rows.JSONL.GZ", "rows.NDJSON"])
def test_names_of_json_lines(tmp_path, name):
    written = write_jsonl(tmp_path / ("a.gz" if name.lower().endswith("gz") else "a"), pairs(2))
    written.rename(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        assert [row.where for row in read(path)[0]["train"]] == [f"{name} row 1", f"{name} row 2"]


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_a_json_object(tmp_path, indent):
    path = tmp_path / "rows.json"
    wrapped = {"version": "1", "tags": ["a"], "data": pairs(2), "more": {"rows": 2}, "none": []}
    path.write_text(json.dumps(wrapped, indent=indent))
    assert [row.prompt for row in read(path)[0]["train"]] == ["p0", "p1"]
    path.write_text(json.dumps(wrapped, indent=indent)[:-3])
    with pytest.raises(ValueError, match=r"rows.json is not JSON: Expecting .* at line \d+"):
        read(path)
    path.write_text(json.dumps({"train": pairs(2), "test": pairs(1)}, indent=indent))
    with pytest.raises(ValueError, match="holds several lists of rows, train, test: save each"):
        read(path)
    # One row of chat is a row, though its messages are a list of objects.
    chat = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    path.write_text(json.dumps(chat, indent=indent))
    assert [row.prompt for row in read(path)[0]["train"]] == [[user("q")]]


def test_json_array_across_pieces(tmp_path, monkeypatch):
    rows = [*pairs(3), {"prompt": '[{,}]\\"\n' * 40, "chosen": "é\u2028", "rejected": "]"}]
    path = tmp_path / "rows.json"
    for piece in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(readers, "CHUNK", piece)
        for indent in (None, 2):
            path.write_text(json.dumps(rows, indent=indent))
            assert [fields for _, fields in every_row.read(path)] == rows
        for text, said in [
            ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "Expecting ',' delimiter at line 3"),
            ('[{"a": 1},\n{"a": 2},\n]', "a comma before the end at line 3"),
            ('[{"a": 1},\n{"a": 2}]\n[]', "text after the end at line 3"),
            ('[{"a": 1},\n{"a": tru}]', "Expecting value at line 2"),
        ]:
            path.write_text(text)
            with pytest.raises(ValueError, match=f"rows.json is not JSON: {said}"):
                list(every_row.read(path))


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_chat_lists_in_csv(tmp_path, write):
    chat = [user('it\'s "q"\n'), assistant(None) | {"tool_calls": [{"id": 1}]}, assistant("a")]
    structured = '{"role": "nurse", "age": 3}'
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["chosen", "rejected"])
        writer.writeheader()
        writer.writerow({"chosen": write(chat), "rejected": structured})
    [(_, fields)] = every_row.read(tmp_path / "rows.csv")
    assert fields == {"chosen": chat, "rejected": structured}


def test_chat_lists_in_csv_that_cannot_be_read(tmp_path):
    # As pandas writes an array of messages.
    cell = "\"[{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]\""
    (tmp_path / "rows.csv").write_text(f"prompt,chosen,rejected\np,{cell},r\n")
    with pytest.raises(ValueError, match="row 1: field 'chosen' holds chat messages as text that"):
        read(tmp_path / "rows.csv")


def test_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,chosen,rejected\nq,a,c,b\n")
    (tmp_path / "b.tsv").write_text("prompt\tchosen\trejected\tprompt\nq\ta\tb\tc\n")
    table = pyarrow.table([["a"], ["b"]], names=["chosen", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{file.name} has two columns named '(chosen|prompt)"):
            read(file)
    # Spreadsheets leave empty columns.
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected,,\nq,a,b,,\n")
    assert read(tmp_path / "e.csv")[0]["train"][0].responses == ("a", "b")


def test_key_twice_in_an_object(tmp_path):
    line = '{"prompt": "q", "chosen": "a", "chosen": "c", "rejected": "b"}'
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, line])
    with pytest.raises(ValueError, match="a.jsonl row 2: a key is twice in one object; found 'ch"):
        read(path)
    (tmp_path / "b.json").write_text(f"[{json.dumps(PAIR)},\n{line}]")
    with pytest.raises(ValueError, match="b.json .*a key is twice in one object; .* at line 2"):
        read(tmp_path / "b.json")


def test_repeated_header(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,a,b\nprompt,chosen,rejected\n")
    with pytest.raises(ValueError, match="a.csv row 2: the row repeats the names of the columns"):
        read(tmp_path / "a.csv")
    rows, ledger = read(tmp_path / "a.csv", on_bad_row="drop")
    assert len(rows["train"]) == 1 and sum(ledger.train.dropped.values()) == 1


def test_csv_row_with_too_many_cells(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\np,yes, a lot,no\n")
    with pytest.raises(ValueError, match="row 1: the row has more cells than .*found .'no'"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow"])
def test_local_files_use_neither_network_nor_home(tmp_path, name):
    code = f"""if True:
        import socket
        def refuse(*address):
            raise SystemExit(f"looked up {{address}}")
        socket.getaddrinfo = refuse
        from dpo_jax.data import every_row
        print(len(list(every_row.read({str(tmp_path / name)!r}))))
    """
    table = datasets.Dataset.from_list(pairs(3))
    if name.endswith("jsonl"):
        write_jsonl(tmp_path / name, pairs(3))
    elif name.endswith("csv"):
        table.to_csv(tmp_path / name)
    elif name.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        table.save_to_disk(tmp_path / "set")
        (tmp_path / "set" / "data-00000-of-00001.arrow").rename(tmp_path / name)
    # Nor do they need a home: none can be made here.
    home = {"HOME": "/dev/null/home"}
    kept = {key: value for key, value in os.environ.items() if key not in CACHES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=kept | home
    )
    assert done.stdout.strip() == "3", done.stderr


def test_types_that_datasets_wrote(tmp_path):
    """Columns whose stored form is not their value are read as `datasets` reads them."""
    features = datasets.Features(
        {"calls": datasets.List(datasets.Json()), "turns": {"role": datasets.Value("string")}}
    )
    rows = [{"calls": [{"a": 1}, {"b": [2]}], "turns": {"role": "user"}}]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "set")
    for path in (tmp_path / "rows.parquet", tmp_path / "set"):
        assert [fields for _, fields in every_row.read(path)] == rows


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
    assert [len(side) for side in rows.values()] == [5, 5, 5]
    assert not any("<br" in row.responses[0] for side in rows.values() for row in side)


def test_find_splits_of_hub_name(monkeypatch):
    parts = {
        "train": datasets.Dataset.from_list(pairs(1500)),
        "test": datasets.Dataset.from_list(pairs(2, "t")),
    }
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, path, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *path: {("me/mine", None): parts}[path])
    rows, _ = read("me/mine")
    assert [len(side) for side in rows.values()] == [1500, 2, 0]
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

"""Files that are written whole or not at all."""

import errno
import json
import os

import pytest

from dpo_jax.whole_file import (
    IsoDate,
    append,
    naming,
    parse_sealed,
    read_record,
    whole_file,
    with_sha256,
)
from tests.helpers import limits


def test_draft_takes_the_place_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file that is always full")
def test_full_disk_names_the_file():
    with pytest.raises(OSError) as raised, naming("a.jsonl"), open("/dev/full", "w") as file:
        file.write("x")
    assert str(raised.value) == "[Errno 28] No space left on device: 'a.jsonl'"


def test_full_disk_is_named_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, b"1234567890\n")
    with limits.file_size(15), pytest.raises(OSError, match=f"'{path}'$") as error:
        append(path, b"1234567890\n")
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert path.read_bytes() == b"1234567890\n"
    append(path, b"1234567890\n")
    assert path.read_bytes() == b"1234567890\n" * 2

    # The draft has another name, which is nobody's concern.
    with limits.file_size(15), pytest.raises(OSError) as error, whole_file(path) as draft:
        draft.write_bytes(bytes(1000))
    assert error.value.filename == str(path) and os.listdir(tmp_path) == ["rows.jsonl"]


def test_parse_sealed():
    line = json.dumps(with_sha256(dict(answer="Better: A", key="7"))).encode()
    assert parse_sealed(line) == dict(answer="Better: A", key="7")
    assert parse_sealed(line.replace(b": A", b": B")) is None
    assert parse_sealed(line[:-1]) is None and parse_sealed(b"[" * 100_000) is None
    assert parse_sealed(b'{"answer": "A"}') == dict(answer="A")  # of an earlier version


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (dict(stage=[7]), "its 'stage' is list in place of str"),
        (dict(tokens={}), "its 'tokens' is dict in place of str | list"),
        (dict(date=7), "its 'date' is 7 in place of a date, as 2026-01-31"),
        (dict(date="yesterday"), "its 'date' is 'yesterday' in place of a date"),
        (dict(train=3), "its 'train' is int in place of dict"),
        (dict(train={}), "in its 'train', there is no 'kept'"),
        (dict(train=dict(kept="3")), "in its 'train', its 'kept' is str in place of int"),
    ],
)
def test_record_with_fields_of_other_types(tmp_path, record, said):
    path = tmp_path / "config.json"
    fields = dict(stage=str, tokens=str | list, date=IsoDate, train=dict(kept=int))
    # As somebody leaves it who mends the sha256 too.
    path.write_text(json.dumps(with_sha256(record)))
    with pytest.raises(ValueError) as error:
        read_record(path, "Remove it.", **fields)
    assert str(error.value).startswith(f"{path} is not what was written there: {said}")
    assert str(error.value).endswith(". Remove it.")
    # What is not used may be anything.
    assert read_record(path, "Remove it.", other=str) == record

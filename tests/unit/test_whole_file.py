"""Files that are written whole or not at all."""

import errno
import json
import os

import pytest

from dpo_jax.whole_file import append, naming, parse_sealed, read_record, whole_file, with_sha256
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


def test_record_with_fields_of_other_types(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(date=7, stage="dpo")))
    assert read_record(path, "Remove it.", stage=str, versions=dict)["date"] == 7
    with pytest.raises(ValueError, match=f"^{path} .*: its 'date' is int in place of str. Remove"):
        read_record(path, "Remove it.", stage=str, date=str)

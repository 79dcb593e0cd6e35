"""Files that are written whole or not at all."""

import os

import pytest

from dpo_jax.whole_file import naming, whole_file


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

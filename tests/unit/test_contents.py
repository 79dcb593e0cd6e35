"""What files and folders hold is known by its sha256, wherever they are."""

import hashlib
import shutil

import pytest

from dpo_jax import contents
from dpo_jax.contents import contents_of, file_hashes
from dpo_jax.models import hf
from tests.helpers import bucket_folders


def test_file_hashes_reads_a_file_once(tmp_path, monkeypatch, capsys):
    """A model is a stage's result, the start of the next one, and its reference."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name)
    )
    monkeypatch.setattr(contents, "LONG_READ", 1)
    found = file_hashes(paths)
    assert found == [hashlib.sha256(name).hexdigest() for name in (b"a", b"b")]
    assert file_hashes([*paths, tmp_path / "c"]) == [*found, ""]
    assert hf.fingerprint(tmp_path) == hashlib.sha256(b"").hexdigest()
    assert sorted(read) == [str(path) for path in paths]
    assert capsys.readouterr().out.count(f"GB in {tmp_path}, to know it") == 1
    paths[0].write_text("other")
    assert file_hashes(paths)[0] == hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "a.safetensors").write_text("weights")
    return made


def test_contents_of_a_moved_folder_are_equal(folder, tmp_path):
    before = contents_of("model.path", str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "lock").write_text("left by a tool")
    (moved / "pytorch_model.bin").write_text("never read")
    (moved / "README.md").write_text("a card")
    (moved / "sub" / "optimizer.json").write_text("a trainer's checkpoint")
    assert before and contents_of("model.path", str(moved)) == before
    (moved / "a.safetensors").write_text("other")
    assert contents_of("model.path", str(moved)) != before


def test_contents_of_a_file_and_a_subset(folder):
    (folder / "sub" / "rows.jsonl.gz").write_text("rows")
    file = str(folder / "config.json")
    assert contents_of("data.path", file) != contents_of("data.path", str(folder))
    whole, subset = (contents_of("data.path", f"{folder}{part}") for part in ("", ":sub"))
    assert whole and subset and whole != subset
    # No rows are in a checkpoint, and those of runs may be large.
    (folder / "a.safetensors").write_text("other")
    assert contents_of("data.path", str(folder)) == whole
    (folder / "sub" / "rows.jsonl.gz").write_text("other")
    assert contents_of("data.path", str(folder)) != whole


@pytest.mark.parametrize("path", ["", "owner/name", "owner/name:subset", "/gone/file.jsonl"])
def test_contents_of_what_is_not_here_are_unknown(path):
    assert contents_of("data.path", path) == ""


def test_contents_of_a_mixture(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / f"{name}.jsonl").write_text(text)

    def of(mix):
        return contents_of("data.mix", mix.replace("/", f"{tmp_path}/", 1))

    assert of("/a.jsonl=5, owner/name=50%") == of("/b.jsonl=5,owner/name=50%")
    others = ["/c.jsonl=5, owner/name=50%", "/b.jsonl=6, owner/name=50%", "/b.jsonl=5"]
    assert of("/a.jsonl=5, owner/name=50%") not in [of(mix) for mix in others]
    assert of("") == ""


def test_contents_in_a_bucket_are_those_of_a_copy(folder, tmp_path, monkeypatch):
    bucket_folders.use(monkeypatch, tmp_path / "root", tmp_path / "shadow")
    shutil.copytree(folder, tmp_path / "root" / "bucket" / "model")
    assert contents_of("model.path", "s3://bucket/model") == contents_of("model.path", str(folder))
    file = contents_of("data.path", str(folder / "config.json"))
    assert contents_of("data.path", "s3://bucket/model/config.json") == file
    assert contents_of("data.path", "s3://bucket/gone") == ""

"""Runs with WORKDIR in a bucket: the same bits as in a folder, on machines that come and go."""

import pathlib

import pytest

from dpo_jax import check
from dpo_jax.storage import shadow
from tests.faults import files
from tests.helpers import bucket_folders
from tests.helpers.tiny_runs import sample_file, score_file

ADDRESS = "s3://bucket/run"


@pytest.mark.parametrize("method", ["dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_run_in_a_bucket_equals_one_in_a_folder(method, tmp_path, monkeypatch):
    config = files.small_config(method)
    files.run(config, tmp_path / "folder")
    wanted = files.result_without_paths(tmp_path / "folder")
    bucket = tmp_path / "buckets" / "bucket" / "run"
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "first")
    files.run_until(config, ADDRESS, method, 3 if method == "dpo" else 2)
    assert files.result_without_paths(bucket) != wanted
    # The machine is lost with all that it held.
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "second")
    shown = files.run(config, ADDRESS)
    assert f"{method}: resuming after step" in shown
    assert str(tmp_path) not in shown
    assert files.result_without_paths(bucket) == wanted

    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "third")
    assert f"{method}: already done, in {ADDRESS}/{method}" in files.run(config, ADDRESS)
    folder = shadow.place(ADDRESS)
    shadow.pull(folder)
    assert not [one for one in check.check(pathlib.Path(folder)) if one.problem or one.note]


def test_scores_in_a_bucket(tmp_path, monkeypatch, model, pairs):
    score_file(model, pairs, tmp_path / "scored.jsonl")
    wanted = (tmp_path / "scored.jsonl").read_text()
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "copies")
    score_file(model, pairs, "s3://bucket/out/scored.jsonl")
    assert (tmp_path / "buckets" / "bucket" / "out" / "scored.jsonl").read_text() == wanted
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "others")
    with pytest.raises(FileExistsError, match="the file exists"):
        score_file(model, pairs, "s3://bucket/out/scored.jsonl")


def test_samples_in_a_bucket_are_known_again(tmp_path, monkeypatch, model, pairs, capsys):
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "first")
    sample_file(model, pairs, "s3://bucket/out.jsonl")
    out = tmp_path / "buckets" / "bucket" / "out.jsonl"
    whole = out.read_text()
    names = ["out.jsonl", "out.jsonl.settings.json", "out.jsonl.sums"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    out.write_text(whole.replace('"completions": ["', '"completions": ["w1 ', 1))

    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "second")
    sample_file(model, pairs, "s3://bucket/out.jsonl")
    assert "is not what was written there from row 1 on" in capsys.readouterr().out
    assert out.read_text() == whole

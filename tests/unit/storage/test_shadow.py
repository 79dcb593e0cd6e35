"""Copies of a bucket's folders: what is pulled, what is pushed, and in which order."""

import json
import os
import pathlib

import pytest

from dpo_jax.storage import buckets, lease, shadow
from tests.helpers import bucket_folders


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that begins on an empty machine, by name."""

    def begin(name: str) -> pathlib.Path:
        bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / name)
        return shadow.place("s3://bucket/run")

    return begin


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def held(tmp_path) -> dict[str, str]:
    """Return what the bucket holds under run, by name."""
    root = tmp_path / "buckets" / "bucket" / "run"
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_text() for path in files}


def test_what_changes_is_pushed_and_pulled(machine, tmp_path):
    here = machine("first")
    write(here / "dpo/metrics.jsonl", "1\n")
    write(here / "dpo/.lock", "")
    write(here / "dpo/hf.partial/config.json", "half")
    shadow.push(here)
    assert held(tmp_path) == {"dpo/metrics.jsonl": "1\n"}
    write(here / "dpo/metrics.jsonl", "1\n2\n")
    write(here / "dpo/done.json", "{}")
    shadow.push(here)
    assert held(tmp_path) == {"dpo/metrics.jsonl": "1\n2\n", "dpo/done.json": "{}"}

    there = machine("second")
    shadow.pull(there / "dpo", exactly=True)
    assert (there / "dpo/metrics.jsonl").read_text() == "1\n2\n"
    # What was pulled and has gone is removed; what was never here stays.
    (there / "dpo/metrics.jsonl").unlink()
    write(tmp_path / "buckets/bucket/run/dpo/other", "of somebody else")
    shadow.push(there)
    assert held(tmp_path) == {"dpo/done.json": "{}", "dpo/other": "of somebody else"}


def test_copy_becomes_what_the_bucket_holds(machine, tmp_path):
    here = machine("first")
    write(here / "dpo/metrics.jsonl", "1\n2\n")
    shadow.push(here)
    # Of an attempt that was not pushed any more.
    write(here / "dpo/metrics.jsonl", "1\n2\n3\n")
    write(here / "dpo/ledger.json", "{}")
    shadow.pull(here / "dpo", exactly=True)
    assert sorted(os.listdir(here / "dpo")) == ["metrics.jsonl"]
    assert (here / "dpo/metrics.jsonl").read_text() == "1\n2\n"


def test_records_come_last(machine, tmp_path, monkeypatch):
    here = machine("first")
    for name in ("a.npy", "a.sha256", "completions.jsonl", "completions.sums", "done.json"):
        write(here / "dpo" / name, name)
    upload = buckets.upload

    def fail(path, address):
        if path.name == "a.npy":
            raise OSError("the machine is lost")
        upload(path, address)

    monkeypatch.setattr(buckets, "upload", fail)
    with pytest.raises(OSError, match="lost"):
        shadow.push(here)
    assert set(held(tmp_path)) <= {"dpo/completions.jsonl"}


def test_stage_that_changes_is_not_done_meanwhile(machine, tmp_path, monkeypatch):
    here = machine("first")
    write(here / "dpo/hf/config.json", "1")
    write(here / "dpo/done.json", "1")
    shadow.push(here)
    write(here / "dpo/hf/config.json", "22")
    write(here / "dpo/done.json", "22")
    seen = []
    upload = buckets.upload

    def look(path, address):
        seen.append(set(held(tmp_path)))
        upload(path, address)

    monkeypatch.setattr(buckets, "upload", look)
    shadow.push(here)
    assert seen == [{"dpo/hf/config.json"}]
    assert held(tmp_path) == {"dpo/hf/config.json": "22", "dpo/done.json": "22"}


def test_checkpoint_counts_with_its_marker(machine, tmp_path):
    here = machine("first")
    for step in (1, 2):
        write(here / f"dpo/checkpoints/{step}/state", f"state {step}")
    write(here / "dpo/checkpoints/3.orbax-checkpoint-tmp/state", "half")
    shadow.push(here)
    found = held(tmp_path)
    assert "dpo/checkpoints/2/commit_success.txt" in found
    assert not any("tmp" in name for name in found)
    # Half of one that a lost machine pushed.
    write(tmp_path / "buckets/bucket/run/dpo/checkpoints/4/state", "half")

    there = machine("second")
    shadow.pull(there / "dpo", exactly=True)
    assert sorted(os.listdir(there / "dpo/checkpoints")) == ["1", "2"]
    assert os.listdir(there / "dpo/checkpoints/2") == ["state"]
    (there / "dpo/checkpoints/1/state").unlink()
    (there / "dpo/checkpoints/1").rmdir()
    shadow.push(there)
    left = [name for name in held(tmp_path) if "checkpoints" in name]
    assert sorted(left) == ["dpo/checkpoints/2/commit_success.txt", "dpo/checkpoints/2/state"]


def test_parts_of_checkpoints_are_removed_from_gs(machine, tmp_path):
    machine("first")
    whole = ["checkpoints/1/state", "checkpoints/1/commit_success.txt"]
    others = ["checkpoints/3.damaged/state", "metrics.jsonl"]
    for name in [*whole, *others, "checkpoints/2/state", "checkpoints/12/d/state"]:
        write(tmp_path / "buckets/bucket/run/dpo" / name, "")
    folder = shadow.place("gs://bucket/run/dpo/checkpoints")
    shadow.remove_partial_checkpoints(folder)
    assert sorted(held(tmp_path)) == sorted(f"dpo/{name}" for name in [*whole, *others])


def test_run_elsewhere_does_not_lose_checkpoints_it_never_pulled(machine, tmp_path):
    here = machine("first")
    write(here / "dpo/checkpoints/1/state", "state 1")
    shadow.push(here)
    there = machine("second")
    (there / "dpo/checkpoints").mkdir(parents=True)
    shadow.push(there)
    assert "dpo/checkpoints/1/state" in held(tmp_path)


def test_lease_of_a_live_run_refuses(machine, monkeypatch):
    here = machine("first")
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "LEASE", 10)
    # As if the holder were on another machine.
    monkeypatch.setattr(lease, "_is_dead", lambda holder: False)
    told = []
    with (
        lease.held(here, "--workdir", print),
        pytest.raises(RuntimeError, match="at work in s3://bucket/run: .* --workdir"),
        lease.held(here, "--workdir", told.append),
    ):
        pass
    assert "waiting up to 10 s" in told[0]
    with lease.held(here, "--workdir", told.append):  # it was given back
        assert len(told) == 1


def test_lease_of_a_lost_run_expires(machine, monkeypatch, tmp_path):
    here = machine("first")
    monkeypatch.setattr(lease, "LEASE", 0.1)
    left = dict(holder=dict(host="lost", token="1", machine="another"), beat=3)
    write(tmp_path / "buckets/bucket/run/.lease", json.dumps(left))
    told = []
    with lease.held(here, "--workdir", told.append):
        assert "on lost" in told[0]
    # A process of this machine that has ended need not be waited for.
    ended = dict(lease._Lease("")._holder, process=2**22 + 1)
    write(tmp_path / "buckets/bucket/run/.lease", json.dumps(dict(holder=ended, beat=1)))
    told.clear()
    with lease.held(here, "--workdir", told.append):
        assert not told


def test_run_whose_lease_was_taken_writes_nothing_more(machine, monkeypatch, tmp_path):
    here = machine("first")
    monkeypatch.setattr(lease, "BEAT", 0.05)
    with (
        pytest.raises(RuntimeError, match="another run has taken over s3://bucket/run"),
        lease.held(here, "--workdir", print),
    ):
        other = json.dumps(dict(holder=dict(token="other"), beat=1))
        while not lease._lost:
            write(tmp_path / "buckets/bucket/run/.lease", other)
        write(here / "dpo/metrics.jsonl", "mine")
        shadow.push(here)
    assert set(held(tmp_path)) == {".lease"}


def test_whole_workdir_is_not_pushed_once_a_stage_is_another_runs(machine, monkeypatch, tmp_path):
    here = machine("first")
    write(here / "dpo/metrics.jsonl", "mine")
    monkeypatch.setattr(lease, "_lost", {"s3://bucket/run/dpo"})
    with pytest.raises(RuntimeError, match="another run has taken over s3://bucket/run/dpo"):
        shadow.push(here)
    assert not held(tmp_path)
    write(here.with_name("run-2") / "dpo/metrics.jsonl", "of another WORKDIR")
    shadow.push(here.with_name("run-2"))


def test_inputs_are_copied_once(machine, tmp_path, monkeypatch):
    machine("first")
    write(tmp_path / "buckets/bucket/data/train.jsonl", "{}\n")
    found = shadow.fetch("s3://bucket/data")
    assert (found / "train.jsonl").read_text() == "{}\n"
    assert shadow.fetch("s3:/bucket/data/train.jsonl").read_text() == "{}\n"
    monkeypatch.setattr(buckets, "download", None)
    assert shadow.fetch("s3://bucket/data") == found
    with pytest.raises(FileNotFoundError, match="s3://bucket/none does not exist"):
        shadow.fetch("s3://bucket/none")
    assert shadow.fetch("data/pairs.jsonl") == pathlib.Path("data/pairs.jsonl")

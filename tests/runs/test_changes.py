"""A resumed run takes changes that change no result, and those that the user allows."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from dpo_jax import runs
from dpo_jax.workdir import StageChanged, read_config
from tests.helpers import bucket_folders
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
)


@pytest.fixture(scope="module")
def equal_pairs(tmp_path_factory):
    """Sixty pairs of equal lengths, so that the batches of any run have one shape."""
    rows = []
    for number in range(60):
        words = [f"w{(number * 7 + i) % 37}" for i in range(12)]
        prompt, chosen, rejected = (" ".join(words[i : i + 4]) for i in (0, 4, 8))
        rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    return write_jsonl(tmp_path_factory.mktemp("equal") / "pairs.jsonl", rows)


@pytest.fixture
def config(model, equal_pairs):
    """Eight steps, evaluated after every third."""
    return dpo_config(model, equal_pairs, steps=8)


@pytest.fixture(scope="module")
def uninterrupted(model, equal_pairs, tmp_path_factory):
    with on_devices(1):
        return run(dpo_config(model, equal_pairs, steps=8), tmp_path_factory.mktemp("whole"))


def run_here(config, workdir, devices=1, **fields):
    """The run in this process, on one device; its folder. fields: as dpo_config's."""
    allowed = fields.pop("allowed", ())
    changed = config.copy_and_resolve_references()
    for name, value in fields.items():
        block, _, field = name.rpartition("__")
        changed[block or "dpo"][field] = value
    with on_devices(devices):
        return run(changed, workdir, allowed=frozenset(allowed))


def assert_close(folder, uninterrupted):
    for name, value in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)
    rows, expected = (rows_without_timings(each) for each in (folder, uninterrupted))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], atol=1e-5, rtol=1e-4)


def assert_equal(folder, uninterrupted):
    for name, value in weights(uninterrupted).items():
        np.testing.assert_array_equal(weights(folder)[name], value)


def test_run_resumes_with_other_microbatches_on_another_mesh(config, tmp_path, uninterrupted):
    with sigterm_at(3):
        run_here(config, tmp_path)
    folder = run_here(config, tmp_path, devices=2, microbatch_size=4)
    assert_close(folder, uninterrupted)
    # Nothing that is worth a row: no result depends on it.
    assert "changes" not in read_config(folder)


def test_finished_run_is_done_on_another_mesh(config, tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted, tmp_path / "dpo")
    run_here(config, tmp_path, devices=2, microbatch_size=2, mesh__fsdp=2)
    assert "dpo: already done" in capsys.readouterr().out


def test_longer_run_equals_one_from_the_start(config, tmp_path, uninterrupted, capsys):
    short = run_here(config, tmp_path, steps=4)
    before = weights(short)
    capsys.readouterr()
    longer = run_here(config, tmp_path)
    said = capsys.readouterr().out
    assert "dpo: config.dpo.steps is 8 now, 4 before" in said and "goes on from step 4" in said
    assert_equal(longer, uninterrupted)
    # The old end was evaluated, and its row says so still.
    rows, expected = rows_without_timings(longer), rows_without_timings(uninterrupted)
    assert [row | expected[row["step"]] for row in rows] == rows
    differing = [row["step"] for row in rows if row != expected[row["step"]]]
    assert differing == [4]

    # What was there is kept as it was.
    kept = longer / "results" / "4"
    assert json.loads((kept / "done.json").read_text())["files"].keys() >= {"hf/config.json"}
    for name, value in weights(kept).items():
        np.testing.assert_array_equal(before[name], value)
    (row,) = read_config(longer)["changes"]
    assert {name: row[name] for name in ("step", "field", "old", "new")} == dict(
        step=4, field="dpo.steps", old=4, new=8
    )
    assert "dpo: dpo.steps=8 at step 4, 4 before" in runs.table(tmp_path)
    run_here(config, tmp_path)
    assert "dpo: already done" in capsys.readouterr().out
    with pytest.raises(StageChanged, match=r"dpo.steps: 8 in the folder, 4 now \(8 steps are done"):
        run_here(config, tmp_path, steps=4)


def test_run_of_more_epochs_equals_one_from_the_start(config, tmp_path):
    """A batch goes from one epoch into the next, each of an order of its own."""
    fields = dict(steps=0, save_every=3)
    longer = [run_here(config, tmp_path / "longer", epochs=epochs, **fields) for epochs in (1, 2)]
    assert_equal(longer[-1], run_here(config, tmp_path / "whole", epochs=2, **fields))


def test_shorter_run_may_have_its_best_at_the_new_end(config, tmp_path):
    """Its last step was saved before anybody knew that it would be evaluated."""
    fields = dict(keep_best="rewards_eval/chosen", lr=0.005)
    with sigterm_at(4):
        run_here(config, tmp_path / "shorter", **fields)
    folder = run_here(config, tmp_path / "shorter", steps=4, **fields)
    evaluations = {
        row["step"]: row.get("rewards_eval/chosen") for row in rows_without_timings(folder)
    }
    assert evaluations[4] > evaluations[3]
    assert_equal(folder, run_here(config, tmp_path / "whole", steps=4, **fields))


def test_longer_run_keeps_its_result_through_a_stop(config, tmp_path, uninterrupted):
    """Stopped before its new end, it can go back to the old one or on to the new one."""
    run_here(config, tmp_path, steps=4)
    with sigterm_at(6):
        run_here(config, tmp_path)
    kept = tmp_path / "dpo" / "results" / "4"
    assert (kept / "done.json").exists() and not (tmp_path / "dpo" / "done.json").exists()
    assert_equal(run_here(config, tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(schedule="cosine"), "the cosine schedule falls to 0 at the end"),
        (dict(keep_best="loss/eval"), "the best checkpoint may be that of the old end, step 4"),
    ],
)
def test_longer_run_is_refused_where_it_would_differ(config, tmp_path, fields, reason):
    run_here(config, tmp_path, steps=4, **fields)
    with pytest.raises(StageChanged, match=f"dpo.steps: 4 in the folder, 8 now .{reason}"):
        run_here(config, tmp_path, **fields)
    folder = run_here(config, tmp_path, allowed=["dpo.steps"], **fields)
    assert rows_without_timings(folder)[-1]["step"] == 8


def test_moved_files_of_equal_contents_are_taken(config, tmp_path, uninterrupted, capsys):
    workdir = tmp_path / "run"
    moved = tmp_path / "moved"
    moved.mkdir()
    data = shutil.copy(config.data.path, moved / "other.jsonl")
    model = shutil.copytree(config.model.path, moved / "model")
    with sigterm_at(3):
        run_here(config, workdir)
    folder = run_here(config, workdir, data__path=str(data), model__path=str(model))
    assert "config.data.path is " in capsys.readouterr().out
    assert_equal(folder, uninterrupted)
    fields = [row["field"] for row in read_config(folder)["changes"]]
    assert fields == ["data.path", "model.path"]
    # A finished stage is used as it is, wherever its files are now.
    run_here(config, workdir)
    assert "dpo: already done" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [3, 8], ids=["unfinished", "finished"])
def test_moved_file_of_other_contents_is_refused(config, tmp_path, uninterrupted, steps):
    if steps == 8:
        shutil.copytree(uninterrupted, tmp_path / "dpo")
    else:
        with sigterm_at(steps):
            run_here(config, tmp_path)
    data = pathlib.Path(config.data.path).read_text()
    other = tmp_path / "other.jsonl"
    other.write_text(data.replace("w1 ", "w2 ", 1))
    with pytest.raises(StageChanged, match="config.data.path: .*they do not hold the same"):
        run_here(config, tmp_path, data__path=str(other))


def test_allowed_lr_is_said_and_recorded(config, tmp_path, capsys):
    with sigterm_at(3):
        run_here(config, tmp_path)
    with pytest.raises(StageChanged, match=r"dpo.lr: .*\(--allow_change=lr goes on with it\)"):
        run_here(config, tmp_path, lr=0.01)
    folder = run_here(config, tmp_path, lr=0.01, allowed=["dpo.lr"])
    said = capsys.readouterr().out
    assert "dpo: config.dpo.lr is 0.01 now, 0.05 before (by --allow_change)" in said
    rates = [row["lr"] for row in rows_without_timings(folder)[3:5]]
    np.testing.assert_allclose(rates, [0.05, 0.01], rtol=1e-6)
    assert "dpo: dpo.lr=0.01 at step 3, 0.05 before" in runs.table(tmp_path)
    card = (folder / "hf" / "README.md").read_text()
    assert "| dpo.lr, changed at step 3 | 0.05 before, 0.01 after |" in card
    # The same command finds its run done; another rate is for another run.
    run_here(config, tmp_path, lr=0.01, allowed=["dpo.lr"])
    assert "dpo: already done" in capsys.readouterr().out
    with pytest.raises(StageChanged, match=r"dpo.lr: 0.01 .* now \(the stage is done\)"):
        run_here(config, tmp_path, allowed=["dpo.lr"])


def test_longer_run_in_a_bucket_keeps_its_result(config, tmp_path, monkeypatch):
    """A machine that starts empty finds both ends there."""
    root = tmp_path / "root"
    bucket_folders.use(monkeypatch, root, tmp_path / "first")
    run_here(config, "s3://bucket/run", steps=4)
    stage = root / "bucket" / "run" / "dpo"
    before = weights(stage)
    bucket_folders.use(monkeypatch, root, tmp_path / "second")
    run_here(config, "s3://bucket/run")
    for name, value in weights(stage / "results" / "4").items():
        np.testing.assert_array_equal(before[name], value)
    done = json.loads((stage / "done.json").read_text())["files"]
    assert "hf/model.safetensors" in done and not any("results" in name for name in done)

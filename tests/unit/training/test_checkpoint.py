"""Checkpoints: which is the best, who handles preemption, and what many saves leave open."""

import errno
import json
import os
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from dpo_jax.training import checkpoint, step
from dpo_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, verify
from dpo_jax.workdir import saved_steps
from tests.helpers import limits


def test_best_of_equal_checkpoints_is_latest(tmp_path):
    state = step.TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, ())
    for keep, all_saved in ((1, False), (1, True), (3, True)):
        with Checkpoints(
            tmp_path / f"{keep}{all_saved}", keep=keep, best_metric="rewards_eval/accuracies"
        ) as saved:
            for number, accuracy in enumerate((0.6, 0.7, 0.7, 0.6), 1):
                better = saved.is_better(accuracy)
                assert better == (number < 4)
                if better or all_saved:
                    saved.save(number, state, {"rewards_eval/accuracies": accuracy})
            assert saved.best() == (3, 0.7)


def test_save_leaves_preemption_to_loop(tmp_path, monkeypatch):
    """orbax would ask jax with the step, and so move the number at which processes stop
    together.
    """
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, step.TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, ()))
    assert not asked


def test_saves_leave_nothing_open(tmp_path):
    """Each save of orbax's opens three files and a thread; a day's run has hundreds of saves."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, ())
    opened, threads = [], []
    with Checkpoints(tmp_path, keep=1) as saved:
        for number in range(1, 6):
            saved.save(number, state)
            saved._checkpointer.wait()
            opened.append(len(os.listdir("/proc/self/fd")))
            threads.append(threading.active_count())
    assert opened[-1] <= opened[1], opened
    assert threads[-1] <= threads[1], threads


def test_save_that_fails_is_told_once(tmp_path, capfd):
    """On a full disk; here by a limit of a file's size, which any user may set."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.arange(5000.0)}, ())
    with (
        pytest.raises(OSError) as failed,
        Checkpoints(tmp_path, keep=1) as saved,
        limits.file_size(1000),
    ):
        saved.save(1, state)
        saved.save(2, state)
    assert f"{tmp_path}: a checkpoint could not be written" in str(failed.value)
    assert "run the same command again" in str(failed.value)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path, keep=1) as saved:
        assert saved.latest() is None


def test_save_that_fails_says_its_own_reason(tmp_path):
    """And keeps the system's words: the run may be ending on a full disk at another file."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.arange(5000.0)}, ())
    with (
        pytest.raises(
            OSError, match="could not be written .*File too large.*begins again"
        ) as failed,
        limits.file_size(1000),
        Checkpoints(tmp_path, keep=1) as saved,
    ):
        saved.save(1, state)
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    assert "metrics.jsonl" not in str(failed.value)


def test_bug_of_ours_is_not_blamed_on_the_disk(tmp_path):
    """So that it keeps its traceback, and is reported."""
    wrong = ValueError("zip() argument 2 is shorter than argument 1")
    with Checkpoints(tmp_path, keep=1) as saved:
        with pytest.raises(ValueError) as error, saved._told_once():
            fail(wrong)
        assert error.value is wrong
        full = ValueError("RESOURCE_EXHAUSTED: Failed writing")
        with pytest.raises(OSError, match="make room") as error, saved._told_once():
            fail(full)
        assert error.value.__cause__ is full


def test_rating_a_checkpoint_never_removes_it(tmp_path):
    """A kill at any moment leaves the step, though it is the only one that is kept."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, ())
    metric = "loss/eval"
    with Checkpoints(tmp_path, keep=1, best_metric=metric) as saved:
        saved.save(1, state, row={"loss/train": 0.7})
        saved._checkpointer.wait()
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        saved.rate(1, {metric: 0.5})
        assert saved.best() == (1, 0.5) and not saved.is_better(0.6)
        assert all(path.read_bytes() == data for path, data in files.items())
    # Rated again, as after a kill, and kept while later ones are worse.
    with Checkpoints(tmp_path, keep=1, best_metric=metric) as saved:
        assert saved.best() == (1, 0.5)
        saved.rate(1, {metric: 0.5})
        saved.save(2, state, {metric: 0.6})
        saved.save(3, state, {metric: 0.7})
        saved._checkpointer.wait()
        assert saved.best() == (1, 0.5) and saved_steps(tmp_path) == [1, 3]
    assert verify(tmp_path, 1) == {}


def save_three(folder):
    """Save steps 1 to 3, whose weights are their steps; the state's shapes and placement."""
    states = [step.TrainState(jnp.int32(n), {"w": jnp.full(2000, float(n))}, ()) for n in range(4)]
    with Checkpoints(folder, keep=3) as saved:
        for state in states[1:]:
            saved.save(int(state.step), state, rows=dict(rows=int(state.step), sha256=""))
    shardings = jax.tree.map(lambda x: x.sharding, states[0])
    return states[0], shardings


def flip(folder, number):
    """Flip bits in the middle of a checkpoint's largest file, which holds its numbers."""
    files = [path for path in (folder / str(number)).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    # A library may find it by itself where it is compressed; both are wanted.
    for place in range(len(data) // 2, len(data) // 2 + 8):
        data[place] ^= 0x40
    path.write_bytes(bytes(data))


def test_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    shapes, shardings = save_three(tmp_path)
    flip(tmp_path, 3)
    with Checkpoints(tmp_path, keep=3) as saved:
        restored = saved.restore_latest(shapes, shardings)
        assert restored.step == 2 and restored.rows["rows"] == 2
        assert (restored.state.params["w"] == 2).all()
        assert saved.latest() == 2
        # The step can be saved again.
        saved.save(3, step.TrainState(jnp.int32(3), {"w": jnp.full(2000, 3.0)}, ()))
    out, err = capsys.readouterr()
    assert out.startswith(f"warning: {tmp_path / '3'} ") and out.count("\n") == 1 and not err
    assert out.endswith("; resuming from step 2. It is kept as 3.damaged.\n")
    assert (tmp_path / "3.damaged").is_dir() and saved_steps(tmp_path) == [1, 2, 3]


def test_all_damaged_checkpoints_are_refused(tmp_path):
    shapes, shardings = save_three(tmp_path)
    for number in (1, 2, 3):
        flip(tmp_path, number)
    with Checkpoints(tmp_path, keep=3) as saved, pytest.raises(DamagedCheckpoint) as error:
        saved.restore_latest(shapes, shardings)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path} has no checkpoint that can be resumed from:"
    assert len(lines) == 5 and f"or remove {tmp_path}: the stage then begins again." in lines[-1]
    assert saved_steps(tmp_path) == [1, 2, 3]  # nothing is set aside


def test_checkpoint_without_sums_is_passed_over(tmp_path, capsys):
    shapes, shardings = save_three(tmp_path)
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"] = {}
    path.write_text(json.dumps(metadata))
    with Checkpoints(tmp_path, keep=3) as saved:
        assert saved.restore_latest(shapes, shardings).step == 2
    assert "3 has no sums to check it by" in capsys.readouterr().out


def test_rows_of_a_checkpoint_that_were_changed_pass_it_over(tmp_path, capsys):
    """A row that waits for its evaluation would be written with another loss."""
    shapes, shardings = save_three(tmp_path)
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"rows": 3', '"rows": 2'))
    with Checkpoints(tmp_path, keep=3) as saved:
        assert saved.restore_latest(shapes, shardings).step == 2
    assert "3 no longer says what was saved in it; resuming from step" in capsys.readouterr().out


def test_verify(tmp_path):
    save_three(tmp_path)
    flip(tmp_path, 2)
    assert verify(tmp_path, 3)["rows"] == 3
    with pytest.raises(DamagedCheckpoint):
        verify(tmp_path, 2)


def test_damaged_again_keeps_both(tmp_path, capsys):
    """What was set aside before stays there."""
    (tmp_path / "3.damaged").mkdir()
    shapes, shardings = save_three(tmp_path)
    flip(tmp_path, 3)
    with Checkpoints(tmp_path, keep=3) as saved:
        assert saved.restore_latest(shapes, shardings).step == 2
    assert capsys.readouterr().out.endswith("It is kept as 3.damaged2.\n")
    assert (tmp_path / "3.damaged").is_dir() and (tmp_path / "3.damaged2").is_dir()


def test_damaged_best_says_what_to_do(tmp_path):
    folder = tmp_path / "dpo" / "checkpoints"
    shapes, shardings = save_three(folder)
    flip(folder, 2)
    remedy = f"Put it back from a copy, or remove {folder.parent} to train the stage again"
    with Checkpoints(folder, keep=3) as saved, pytest.raises(DamagedCheckpoint, match=remedy):
        saved.restore_best(2, shapes, shardings)


def fail(error):
    raise error


def test_what_one_of_several_processes_cannot_read_is_damaged_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.processes, "gathered", lambda mine: [mine, b"cut short"])
    with pytest.raises(DamagedCheckpoint, match=r"3 cannot be read \(cut short\)"):
        checkpoint._attempt(tmp_path / "3", lambda: "read")


def test_error_of_a_disk_is_no_damage(tmp_path):
    failing = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError) as error:
        checkpoint._attempt(tmp_path / "3", lambda: fail(failing))
    assert error.value is failing
    with pytest.raises(DamagedCheckpoint):
        checkpoint._attempt(tmp_path / "3", lambda: fail(FileNotFoundError(errno.ENOENT, "gone")))


def test_reads_that_end_late_say_nothing(monkeypatch):
    """Reads beside one that failed find a closed event loop, or fail in a coroutine of orbax's."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    checkpoint._ignore_late_reads.cache_clear()
    checkpoint._ignore_late_reads()
    of_orbax = types.SimpleNamespace(
        cr_code=types.SimpleNamespace(co_filename="/lib/orbax/checkpoint/serialization.py")
    )
    raised = (("Event loop is closed", None), ("no data", of_orbax), ("another one", "object"))
    for message, place in raised:
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message), object=place))
    assert [str(one.exc_value) for one in said] == ["another one"]

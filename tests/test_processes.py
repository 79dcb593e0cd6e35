"""Several processes make the run that one makes: two of two fake devices each, joined by gloo."""

import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_runs import dpo_config, environment, free_port, on_devices, rows_without_timings, run, weights

from dpo_jax import config as configs
from dpo_jax import runtime

STEPS = 6


def start(workdir, model, pairs, processes: int, **fields) -> list[subprocess.Popen]:
    """The processes of one run, which wait for each other; `fields` as of dpo_config."""
    config, flags = dpo_config(model, pairs, mesh__data=2, mesh__fsdp=2, **fields), []
    for name in ("model", "data", "mesh", "dpo"):
        usual = configs.default(("dpo",))[name]
        flags += [f"--config.{name}.{field}={value}" for field, value in config[name].items() if value != usual[field]]
    port = free_port()
    return [subprocess.Popen(
        [sys.executable, "-m", "dpo_jax.train", "--config=configs/dpo.py", *flags, f"--workdir={workdir}",
         f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={index}"],
        cwd=ROOT, env=environment(4 // processes), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for index in range(processes)]


def alone(workdir, model, pairs, **fields):
    with on_devices(4):
        run(dpo_config(model, pairs, mesh__data=2, mesh__fsdp=2, **fields), workdir)
    return workdir / "dpo"


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    """One process's run."""
    return alone(tmp_path_factory.mktemp("alone") / "run", model, pairs, steps=STEPS)


def assert_same(found, expected):
    rows, wanted = rows_without_timings(found), rows_without_timings(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys()
        np.testing.assert_allclose(list(row.values()), list(want.values()), rtol=1e-5, atol=1e-6)
    for name, expected_weight in weights(expected).items():
        np.testing.assert_allclose(weights(found)[name], expected_weight, atol=1e-6, err_msg=name)


def test_two_processes_make_the_run_of_one(whole, model, pairs, tmp_path):
    both = start(tmp_path / "run", model, pairs, 2, steps=STEPS)
    (out, errors), (other_out, _) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], errors
    assert "self-check passed" in out
    assert all(line.startswith("[Gloo]") for line in other_out.splitlines())  # only the first speaks
    assert_same(tmp_path / "run" / "dpo", whole)


def test_one_that_is_killed_ends_the_others_and_a_process_alone_takes_over(whole, model, pairs, tmp_path):
    fields = dict(steps=STEPS, save_every=1)
    first, second = start(tmp_path / "run", model, pairs, 2, **fields)
    checkpoints, deadline = tmp_path / "run" / "dpo" / "checkpoints", time.monotonic() + 300
    while not (checkpoints / "2").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = first.communicate(timeout=runtime.SILENCE + 60)
    assert first.returncode != 0 and time.monotonic() - began < runtime.SILENCE + 30
    assert "process 0 of 2" in errors or "another task died" in errors
    assert not (tmp_path / "run" / "dpo" / "done.json").exists()
    assert_same(alone(tmp_path / "run", model, pairs, **fields), whole)


def test_a_preempted_run_saves_at_one_step_and_goes_on(model, pairs, tmp_path):
    """SIGTERM comes to one process; both save, and end with the shell's code for it."""
    fields = dict(steps=400, save_every=1000, eval_every=1000, log_every=1)
    both = start(tmp_path / "run", model, pairs, 2, **fields)
    rows, deadline = tmp_path / "run" / "dpo" / "metrics.jsonl", time.monotonic() + 300
    while not rows.exists() or not rows.read_text():
        assert both[0].poll() is None and time.monotonic() < deadline, both[0].communicate()
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outs
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", outs[0][0])[1])
    assert 0 < stopped < 400
    ended = alone(tmp_path / "run", model, pairs, **fields)
    assert [row["step"] for row in rows_without_timings(ended)] == list(range(401))


def test_flags_come_together(monkeypatch):
    with pytest.raises(ValueError, match="--coordinator, --num_processes and --process_id go together"):
        runtime.join("localhost:1", None, 0)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    runtime.join()  # alone, without waiting for anybody
    assert jax.process_count() == 1


def test_a_process_alone_raises_its_own_errors():
    with pytest.raises(KeyError), runtime.together():
        raise KeyError("mine")

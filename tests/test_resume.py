"""A run that is interrupted, and started again by the same command, is the run that was not."""

import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from tiny_runs import environment, rows_without_timings, weights

from dpo_jax.metrics import read_rows


def start(config_flags, workdir, devices=1):
    """The train command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_jax.train", "--config=configs/dpo.py", f"--workdir={workdir}", *config_flags],
        cwd=ROOT, env=environment(devices), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def long_run(model, pairs):
    return [f"--config.model.path={model}", f"--config.data.path={pairs}", "--config.data.eval_fraction=0.2",
            "--config.dpo.batch_size=8", "--config.dpo.steps=40", "--config.dpo.lr=3e-5", "--config.dpo.eval_every=15",
            "--config.dpo.save_every=4", "--config.dpo.warmup_steps=2", "--config.dpo.schedule=cosine"]


def wait_for_step(folder, step, process):
    path = folder / "metrics.jsonl"
    for _ in range(15_000):
        if path.exists() and any(row["step"] >= step for row in read_rows(path)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def uninterrupted(model, pairs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = start(long_run(model, pairs), workdir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return workdir / "dpo"


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_interrupted_equals_uninterrupted_bit_for_bit(model, pairs, tmp_path, uninterrupted, signum, code):
    flags = long_run(model, pairs)
    process = start(flags, tmp_path)
    wait_for_step(tmp_path / "dpo", 13, process)
    process.send_signal(signum)
    output, _ = process.communicate()
    assert process.returncode == code, output
    assert not (tmp_path / "dpo" / "done.json").exists()
    if signum != signal.SIGKILL:
        assert re.search(r"stopped by SIG\w+ after step \d+, which is saved", output)
    process = start(flags, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert rows_without_timings(tmp_path / "dpo") == rows_without_timings(uninterrupted)
    for name, value in weights(uninterrupted).items():
        np.testing.assert_array_equal(weights(tmp_path / "dpo")[name], value)


def test_resuming_on_another_mesh(model, pairs, tmp_path, uninterrupted):
    flags = long_run(model, pairs)
    process = start([*flags, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"], tmp_path, devices=4)
    wait_for_step(tmp_path / "dpo", 9, process)
    process.kill()
    process.communicate()
    process = start(flags, tmp_path, devices=2)
    output, _ = process.communicate()
    assert process.returncode == 0 and "resuming after step" in output, output
    for name, value in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(tmp_path / "dpo")[name], value, atol=1e-5)
    last, expected = rows_without_timings(tmp_path / "dpo")[-1], rows_without_timings(uninterrupted)[-1]
    np.testing.assert_allclose(last["loss/eval"], expected["loss/eval"], atol=1e-5)

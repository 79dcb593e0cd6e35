"""A run that is interrupted, and started again by the same command, is the run that was not."""

import functools
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_runs import environment, rows_without_timings, run, weights

from configs import dpo
from dpo_jax import sharding, train
from dpo_jax.metrics import read_rows

MAKE_MESH = sharding.make_mesh
FIELDS = {"data.eval_fraction": 0.2, "dpo.batch_size": 8, "dpo.steps": 40, "dpo.lr": 3e-5, "dpo.eval_every": 15,
          "dpo.save_every": 4, "dpo.warmup_steps": 2, "dpo.schedule": "cosine"}


@pytest.fixture(scope="module")
def fields(model, pairs):
    """The run's overrides."""
    return FIELDS | {"model.path": str(model), "data.path": str(pairs)}


def start(fields, workdir, devices=1):
    """The train command in a process of its own, to be killed."""
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_jax.train", "--config=configs/dpo.py", f"--workdir={workdir}", *flags],
        cwd=ROOT, env=environment(devices), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_to_the_end(fields, workdir, devices=1):
    """The same run in this process; its folder."""
    config = dpo.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.sharding, "make_mesh", functools.partial(MAKE_MESH, devices=jax.devices()[:devices]))
        return run(config, workdir)


def wait_for_step(folder, step, process):
    path = folder / "metrics.jsonl"
    for _ in range(15_000):
        if path.exists() and any(row["step"] >= step for row in read_rows(path)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def uninterrupted(fields, tmp_path_factory):
    return run_to_the_end(fields, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_interrupted_equals_uninterrupted_bit_for_bit(fields, tmp_path, uninterrupted, capsys, signum, code):
    process = start(fields, tmp_path)
    wait_for_step(tmp_path / "dpo", 13, process)
    process.send_signal(signum)
    output, _ = process.communicate()
    assert process.returncode == code, output
    assert not (tmp_path / "dpo" / "done.json").exists()
    if signum != signal.SIGKILL:
        assert re.search(r"stopped by SIG\w+ after step \d+, which is saved", output)
    run_to_the_end(fields, tmp_path)
    assert "resuming after step" in capsys.readouterr().out
    assert rows_without_timings(tmp_path / "dpo") == rows_without_timings(uninterrupted)
    for name, value in weights(uninterrupted).items():
        np.testing.assert_array_equal(weights(tmp_path / "dpo")[name], value)


def test_resuming_on_another_mesh(fields, tmp_path, uninterrupted, capsys):
    process = start(fields | {"mesh.fsdp": 2, "mesh.tensor": 2}, tmp_path, devices=4)
    wait_for_step(tmp_path / "dpo", 9, process)
    process.kill()
    process.communicate()
    run_to_the_end(fields, tmp_path, devices=2)
    assert "resuming after step" in capsys.readouterr().out
    for name, value in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(tmp_path / "dpo")[name], value, atol=1e-5)
    last, expected = rows_without_timings(tmp_path / "dpo")[-1], rows_without_timings(uninterrupted)[-1]
    np.testing.assert_allclose(last["loss/eval"], expected["loss/eval"], atol=1e-5)

"""An interrupted run that is started again equals the uninterrupted one, bit for bit."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import dpo
from dpo_jax import costs, runs, stopping
from dpo_jax.training import data_feed
from dpo_jax.training.loop import Interrupted
from dpo_jax.training.metrics import read_rows
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import (
    environment,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
    write_groups,
)

FIELDS = {
    "data.eval_fraction": 0.2,
    "dpo.batch_size": 8,
    "dpo.steps": 40,
    "dpo.lr": 3e-5,
    "dpo.eval_every": 15,
    "dpo.save_every": 4,
    "dpo.warmup_steps": 2,
    "dpo.schedule": "cosine",
}


@pytest.fixture(scope="module")
def fields(model, pairs):
    """The run's overrides."""
    return FIELDS | {"model.path": str(model), "data.path": str(pairs)}


def run_here(fields, workdir, devices=1):
    """The run in this process; its folder."""
    config = dpo.get_config()
    config.update_from_flattened_dict(fields)
    with on_devices(devices):
        return run(config, workdir)


def run_until_sigterm(step, fields, workdir, devices=1):
    """The same, asked to stop while a step is logged; its exit code."""
    with sigterm_at(step) as stopped:
        run_here(fields, workdir, devices)
    assert not (workdir / "dpo" / "done.json").exists()
    return stopped.value.code


@pytest.fixture(scope="module")
def uninterrupted(fields, tmp_path_factory):
    return run_here(fields, tmp_path_factory.mktemp("uninterrupted"))


def assert_equal(folder, uninterrupted):
    assert rows_without_timings(folder) == rows_without_timings(uninterrupted)
    for name, value in weights(uninterrupted).items():
        np.testing.assert_array_equal(weights(folder)[name], value)


def test_killed_run_resumes_exactly(fields, tmp_path, uninterrupted, capsys):
    """kill -9 of the command, which can tidy up nothing."""
    fields = fields | {"run": "killed"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dpo_jax.train",
            "--config=configs/dpo.py",
            f"--workdir={tmp_path}",
            *flags,
        ],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    path = tmp_path / "killed" / "metrics.jsonl"
    while not path.exists() or not any(row["step"] >= 13 for row in read_rows(path)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not (tmp_path / "killed" / "done.json").exists()
    run_here(fields, tmp_path)
    assert "resuming after step" in capsys.readouterr().out
    assert_equal(tmp_path / "killed", uninterrupted)


def test_signalled_run_resumes_exactly(fields, tmp_path, uninterrupted, capsys):
    assert run_until_sigterm(13, fields, tmp_path) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 14, which is saved" in capsys.readouterr().out
    run_here(fields, tmp_path)
    assert "resuming after step 14" in capsys.readouterr().out
    assert_equal(tmp_path / "dpo", uninterrupted)
    # It has read no more than the uninterrupted one, in two attempts.
    cost, expected = costs.read(tmp_path / "dpo"), costs.read(uninterrupted)
    for name in ("steps", "examples", "read_tokens", "flops", "samples"):
        assert cost[name] == expected[name], name
    assert (cost["attempts"], expected["attempts"]) == (2, 1)
    assert cost["steps"] == 40 and cost["examples"] == 320 and cost["flops"] > 0
    assert 0 < cost["step_seconds"] < cost["seconds"]


@pytest.mark.parametrize("keep_best", ["", "loss/eval"])
def test_run_stopped_in_an_evaluation_evaluates_again(fields, tmp_path, capsys, keep_best):
    """The step before the evaluation is saved, at once; its row gets the evaluation later."""
    fields = fields | {"dpo.steps": 20, "dpo.keep_best": keep_best, "dpo.save_every": 15}
    whole = run_here(fields, tmp_path / "whole")
    measure = data_feed.evaluate
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:  # at step 0, and at step 15
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(data_feed, "evaluate", stop)
        run_here(fields, tmp_path / "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 15, which is saved" in capsys.readouterr().out
    last = read_rows(tmp_path / "stopped" / "dpo" / "metrics.jsonl")[-1]
    assert last["step"] == 14  # that of step 15 is kept with the checkpoint until it is whole
    assert_equal(run_here(fields, tmp_path / "stopped"), whole)
    assert "resuming after step 15" in capsys.readouterr().out


def test_a_signal_before_the_first_step_ends_at_once(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(
        data_feed, "self_check", lambda *_: signal.raise_signal(signal.SIGTERM) or "done"
    )
    with pytest.raises(stopping.Stopped) as stopped:
        run_here(fields, tmp_path)
    assert stopped.value.signum == signal.SIGTERM
    assert not (tmp_path / "dpo" / "metrics.jsonl").exists()


def test_run_resumes_within_group(fields, tmp_path, capsys):
    """Whole prompts are shuffled, and a batch's end cuts a prompt's pairs: still bit for bit."""
    path = write_groups(tmp_path / "groups.jsonl", fields["data.path"])
    fields = fields | {"data.path": str(path), "data.order": "prompts", "dpo.steps": 12}

    whole = run_here(fields, tmp_path / "whole")
    run_until_sigterm(6, fields, tmp_path / "killed")
    killed = run_here(fields, tmp_path / "killed")
    assert "resuming after step 7" in capsys.readouterr().out
    assert_equal(killed, whole)
    alone = run_here(fields | {"data.order": "pairs"}, tmp_path / "alone")
    assert rows_without_timings(alone) != rows_without_timings(whole)


@pytest.mark.slow
def test_run_resumes_on_another_mesh(fields, tmp_path, uninterrupted, capsys):
    run_until_sigterm(9, fields | {"mesh.fsdp": 2, "mesh.tensor": 2}, tmp_path, devices=4)
    run_here(fields, tmp_path, devices=2)
    assert "resuming after step" in capsys.readouterr().out
    for name, value in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(tmp_path / "dpo")[name], value, atol=1e-5)
    for row, expected in zip(
        rows_without_timings(tmp_path / "dpo"), rows_without_timings(uninterrupted), strict=True
    ):
        np.testing.assert_allclose(
            row["loss/train" if row["step"] else "loss/eval"],
            expected["loss/train" if row["step"] else "loss/eval"],
            atol=1e-5,
        )


def test_run_that_loses_patience_ends_early_and_resumes_exactly(fields, tmp_path, capsys):
    """The rejected reward falls, and high is good: step 4 is the best, and two more are waited."""
    fields = fields | {
        "dpo.keep_best": "rewards_eval/rejected",
        "dpo.patience": 2,
        "dpo.eval_every": 4,
        "dpo.save_every": 5,
        "dpo.lr": 1e-3,
        "dpo.schedule": "linear",
    }
    whole = run_here(fields, tmp_path / "whole")
    assert (
        "dpo: ended early, at step 12 of 40: 2 evaluations since step 4" in capsys.readouterr().out
    )
    rows = read_rows(whole / "metrics.jsonl")
    assert rows[-1]["step"] == 12
    measured = {row["step"]: row.get("rewards_eval/rejected") for row in rows}
    assert measured[4] > max(measured[8], measured[12])
    done = json.loads((whole / "done.json").read_text())
    expected = dict(step=12, steps=40, metric="rewards_eval/rejected", best_step=4)
    assert done["early_stop"] == expected
    assert done["evaluation"]["rewards_eval/rejected"] == measured[4]

    # What was waited before the signal counts.
    run_until_sigterm(9, fields, tmp_path / "killed")
    assert_equal(run_here(fields, tmp_path / "killed"), whole)
    assert "resuming after step 10" in capsys.readouterr().out

    # A run that was killed after its last step trains no further.
    (whole / "done.json").rename(tmp_path / "done.json")
    before = rows_without_timings(whole)
    run_here(fields, tmp_path / "whole")
    assert "resuming after step 12" in capsys.readouterr().out
    assert rows_without_timings(whole) == before
    assert json.loads((whole / "done.json").read_text())["early_stop"] == expected
    assert ", early at step 12 of 40" in runs.status(runs.read_stage(whole, whole.parent))

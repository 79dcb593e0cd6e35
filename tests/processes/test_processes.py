"""Runs in two or four processes, joined by gloo, equal runs in one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import sweep
from dpo_jax.parallel import processes
from dpo_jax.workdir import read_lines
from tests.helpers import poor
from tests.helpers.paths import ROOT, python_path
from tests.helpers.tiny_runs import (
    command,
    dpo_config,
    environment,
    free_port,
    on_devices,
    rows_without_timings,
    run,
    weights,
    write_groups,
)

STEPS = 6
NAME = "trained"  # of every run, so that its folder does not follow from the fields


# Before a module is run, a function of another one gets a signal sent after one of its calls.
AT_A_CALL = """
import importlib, itertools, os, runpy, signal, sys, time

module, name, signum, number = sys.argv[1:5]
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
function = getattr(owner, name)
count = itertools.count(1)

def then(*arguments, **named):
    result = function(*arguments, **named)
    if next(count) == int(number):
        os.kill(os.getpid(), int(signum))
        time.sleep(3)  # until jax has told the other processes
    return result

setattr(owner, name, then)
program = sys.argv[5]
del sys.argv[1:6]
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def start(
    module: str,
    *flags: str,
    processes: int = 2,
    own=lambda index: (),
    doomed: tuple = (),
    folder=lambda index: ROOT,
    env: dict | None = None,
) -> list[subprocess.Popen]:
    """The processes of one command, which wait for each other.

    own: index -> flags of that process alone. doomed: a module, a function of it, the signal
    that the last process gets, and after which call. folder: index -> where that process works.
    """
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                *(
                    ["-c", AT_A_CALL, *map(str, doomed)]
                    if doomed and index == processes - 1
                    else ["-m"]
                ),
                module,
                *map(str, flags),
                *own(index),
                f"--coordinator=localhost:{port}",
                f"--num_processes={processes}",
                f"--process_id={index}",
            ],
            cwd=folder(index),
            env=env or environment(2) | dict(PYTHONPATH=python_path(ROOT)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(processes)
    ]


def ended(processes: list[subprocess.Popen]) -> str:
    """What the first said, once all are done; the others say nothing."""
    outs = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), outs
    for out, _ in outs[1:]:
        assert not re.search("dpo|sample|reference", out)  # "[Gloo] Rank 1 is connected ..." alone
    return outs[0][0]


def run_config(model, pairs, mesh=(2, 2, 1), **fields):
    config = dpo_config(
        model,
        pairs,
        **{
            f"mesh__{axis}": size
            for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
        },
        **fields,
    )
    config.run = NAME
    return config


def run_flags(model, pairs, **fields) -> list[str]:
    """The command line of that config."""
    config = run_config(model, pairs, **fields)
    flags = ["--config=dpo", f"--config.run={NAME}"]
    for name in ("model", "data", "mesh", "dpo"):
        usual = configs.default(("dpo",))[name]
        flags += [
            f"--config.{name}.{field}={value}"
            for field, value in config[name].items()
            if value != usual[field]
        ]
    return flags


def start_run(
    workdir, model, pairs, processes: int = 2, doomed: tuple = (), env=None, **fields
) -> list[subprocess.Popen]:
    return start(
        "dpo_jax.train",
        *run_flags(model, pairs, **fields),
        f"--workdir={workdir}",
        processes=processes,
        doomed=doomed,
        env=env,
    )


def alone(workdir, model, pairs, devices: int = 4, **fields):
    with on_devices(devices):
        run(run_config(model, pairs, **fields), workdir)
    return workdir / NAME


def assert_same(found, expected):
    rows, wanted = rows_without_timings(found), rows_without_timings(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys()
        np.testing.assert_allclose(list(row.values()), list(want.values()), rtol=1e-5, atol=1e-6)
    for name, expected_weight in weights(expected).items():
        np.testing.assert_allclose(weights(found)[name], expected_weight, atol=1e-6, err_msg=name)


def test_train_in_four_processes(model, pairs, tmp_path):
    """With pairs that share prompts, whole prompts shuffled."""
    pairs = write_groups(tmp_path / "groups.jsonl", pairs)
    fields = dict(mesh=(2, 2, 2), steps=STEPS, data__order="prompts")
    assert "self-check passed" in ended(
        start_run(tmp_path / "run", model, pairs, processes=4, **fields)
    )
    assert_same(
        tmp_path / "run" / NAME, alone(tmp_path / "alone", model, pairs, devices=8, **fields)
    )


def test_sweep_in_two_processes(model, pairs, tmp_path):
    """With the reference's log-probs kept."""
    text = "dpo.beta=0.1,1"
    out = ended(
        start(
            "dpo_jax.sweep",
            *run_flags(model, pairs, steps=2),
            f"--workdir={tmp_path / 'both'}",
            f"--sweep={text}",
        )
    )
    assert out.count("train rows to compute") == 1
    with on_devices(4):
        config, base = run_config(model, pairs, steps=2), configs.default(("dpo",))
        sweep.run(config, str(tmp_path / "one"), [text], base=base)
    names = {path.parent.name for path in (tmp_path / "one").glob("*/done.json")}
    assert len(names) == 2
    for name in names:
        assert_same(tmp_path / "both" / name, tmp_path / "one" / name)
    assert (tmp_path / "both" / "sweep_dpo.beta.png").exists()


def test_sample_in_two_processes(model, pairs, tmp_path):
    flags = [
        f"--model={model}",
        f"--prompts={pairs}",
        "--n=2",
        "--max_new_tokens=6",
        "--batch_size=64",
    ]
    ended(start("dpo_jax.sample", *flags, "--fsdp=2", f"--out={tmp_path / 'both'}"))
    made = command("sample", *flags, f"--out={tmp_path / 'one'}")
    assert made.returncode == 0, made.stderr
    rows, wanted = (read_lines(tmp_path / name) for name in ("both", "one"))
    assert len(rows) == len(wanted) == 60
    for row, want in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row.pop("logp"), want.pop("logp"), rtol=1e-5, atol=1e-5)
        assert row == want


def test_error_in_one_ends_all(model, pairs, tmp_path):
    """Of the second process, which finds no data; and of both, which do not see the same folder."""
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        host.mkdir()
    shutil.copy(pairs, hosts[0] / "rows.jsonl")
    second = start(
        "dpo_jax.train",
        *run_flags(model, "rows.jsonl"),
        f"--workdir={tmp_path / 'run'}",
        folder=hosts.__getitem__,
    )
    began = time.monotonic()
    outs = [process.communicate(timeout=processes.SILENCE + 60) for process in second]
    assert time.monotonic() - began < processes.SILENCE + 45
    assert [process.returncode for process in second] == [2, 2]
    for _, errors in outs:
        assert "rows.jsonl" in errors and "Traceback" not in errors
        assert re.search(r"process 1 of 2 on \S+ stops, and so do the others", errors)
    flags = run_flags(model, pairs)
    apart = start("dpo_jax.train", *flags, own=lambda index: [f"--workdir={tmp_path / str(index)}"])
    outs = [process.communicate(timeout=processes.SILENCE + 60) for process in apart]
    assert all(process.returncode for process in apart)
    assert (
        "is not the same folder on all hosts: process 1 does not see what process 0 writes there"
        in outs[0][1]
    )


KILLS = {  # where the last of several processes is killed: after some call of a function
    "step": ("dpo_jax.training.data_feed", "DataFeed.run"),
    "evaluation": ("dpo_jax.training.data_feed", "stopping.may_stop"),
    "save": ("dpo_jax.training.checkpoint", "Checkpoints.save"),
}


def kill_one(place: str, call: int, workdir, model, pairs, count: int, **fields) -> None:
    """Start a run in several processes, and kill the last one: the others end soon, and say why."""
    doomed = (*KILLS[place], int(signal.SIGKILL), call)
    *others, killed = start_run(workdir, model, pairs, processes=count, doomed=doomed, **fields)
    assert killed.wait(timeout=200) == -signal.SIGKILL, others[0].communicate()
    began = time.monotonic()
    for process in others:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75 and time.monotonic() - began < 30, said
        expected = rf"error: process {count - 1} of {count} on \S+ was killed, or its host is lost"
        assert re.search(expected, said)
        assert "Traceback" not in said
    assert not (workdir / NAME / "done.json").exists()


def test_kill_of_one_ends_all_and_a_damaged_checkpoint_is_passed_over(model, pairs, tmp_path):
    """They go on without a home, an entry in passwd and locks."""
    fields = dict(steps=STEPS, save_every=1, eval_every=2)
    kill_one("save", 4, tmp_path / "run", model, pairs, 2, **fields)
    checkpoints = tmp_path / "run" / NAME / "checkpoints"
    *_, good, newest = sorted(int(path.name) for path in checkpoints.glob("[0-9]"))
    # Not in ocdbt.process_*, whose data is copied here when a save ends.
    files = (checkpoints / str(newest) / "state" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    env = poor.environment(tmp_path, devices=2)
    both = start_run(tmp_path / "run", model, pairs, env=env, **fields)
    said = ended(both)
    assert f"resuming from step {good}. It is kept as {newest}.damaged" in said
    assert "cannot be locked (No locks available)" in said
    whole = alone(tmp_path / "whole", model, pairs, **fields)
    assert_same(tmp_path / "run" / NAME, whole)


@pytest.mark.slow
def test_kill_of_one_in_four_ends_all(model, pairs, tmp_path):
    """In a step, in an evaluation and in a save, one after another; then they end as if never."""
    fields = dict(mesh=(2, 2, 2), steps=STEPS, save_every=1, eval_every=2)
    ended(start_run(tmp_path / "whole", model, pairs, processes=4, **fields))
    for place in KILLS:
        kill_one(place, 2, tmp_path / "run", model, pairs, 4, **fields)
    ended(start_run(tmp_path / "run", model, pairs, processes=4, **fields))
    found, whole = (tmp_path / name / NAME for name in ("run", "whole"))
    assert rows_without_timings(found) == rows_without_timings(whole)
    for name, weight in weights(whole).items():
        np.testing.assert_array_equal(weights(found)[name], weight, err_msg=name)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_preempted_run_resumes(model, pairs, tmp_path, times):
    """SIGTERM comes to one process; both save, and end with the shell's code for it. So they do
    when they have gone on from there, and save often, so that orbax asks for preemptions as
    well.
    """
    fields = dict(steps=400, save_every=1000 if times == 1 else 3, eval_every=1000, log_every=1)
    rows, stopped = tmp_path / "run" / NAME / "metrics.jsonl", 0
    for _ in range(times):
        both, deadline = start_run(tmp_path / "run", model, pairs, **fields), time.monotonic() + 300
        while not rows.exists() or len(rows.read_text().splitlines()) < stopped + 4:
            assert both[0].poll() is None and time.monotonic() < deadline, both[0].communicate()
            time.sleep(0.01)
        both[1].send_signal(signal.SIGTERM)
        outs = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outs
        before, stopped = (
            stopped,
            int(re.search(r"stopped by SIGTERM after step (\d+)", outs[0][0])[1]),
        )
        assert before < stopped < 400
    finished = alone(tmp_path / "run", model, pairs, **fields)
    assert [row["step"] for row in rows_without_timings(finished)] == list(range(401))


def test_sigterm_in_an_evaluation_is_saved_before_its_end(model, pairs, tmp_path):
    """In both, after the step that is evaluated; the evaluation is then made by the resumed run."""
    # Evaluations of three batches: at the start, and after every second step.
    fields = dict(steps=4, eval_every=2, save_every=100, microbatch_size=4)
    fields["data__eval_fraction"] = 0.5
    doomed = ("dpo_jax.training.data_feed", "metrics_lib.add", int(signal.SIGTERM), 5)
    both = start_run(tmp_path / "run", model, pairs, doomed=doomed, **fields)
    outs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outs
    assert "stopped by SIGTERM after step 2, which is saved" in outs[0][0]
    assert "dpo 2/4" not in outs[0][0]  # the evaluation has not ended
    found = alone(tmp_path / "run", model, pairs, **fields)
    assert_same(found, alone(tmp_path / "alone", model, pairs, **fields))


def test_process_flags_come_together(monkeypatch):
    with pytest.raises(
        ValueError, match="--coordinator, --num_processes and --process_id go together"
    ):
        processes.join("localhost:1", None, 0)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    processes.join()  # alone, without waiting for anybody
    assert jax.process_count() == 1


def test_single_process_raises_own_errors():
    with pytest.raises(KeyError), processes.together(lambda error: ("", 1)):
        raise KeyError("mine")

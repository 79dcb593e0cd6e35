"""Small commands that faults are tried on: what they run, how they end, and what they leave."""

import concurrent.futures
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.helpers import goldens
from tests.helpers.paths import ROOT, STORIES, python_path
from tests.helpers.quick_compiles import QUICK_COMPILES
from tests.helpers.rows import write_jsonl

RUN = "run"  # folder of what a command leaves, in the folder of a try
HANGING = 240.0  # seconds; every command here takes about 10 on two idle cores
PAGE = 4096  # bytes, the least that a file takes of a disk
# The judge's file: its lines come as the answers do, with the times of day.
JUDGEMENTS = "judgements.jsonl"
JUDGE_TIMES = ("asked_from", "asked_to", "written")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, in one process or several.

    flags: what it is started with; its paths into RUN are relative to the folder of the try.
    processes: how many. prepared: a folder that RUN is a copy of at the start.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    processes: int = 1
    prepared: pathlib.Path | None = None
    environment: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run of a job: what it left, and what it took.

    cpu_seconds: of its first process. Moments are shares of them, as a busy machine stretches the
    time on the clock and not these.
    """

    job: Job
    result: dict
    seconds: float
    cpu_seconds: float
    cache: pathlib.Path  # the programs that it compiled
    kilobytes: int  # on the disk


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the processes of a command ended."""

    statuses: tuple[int | None, ...]  # None: it had to be killed, as it did not end
    text: str  # all that they printed, on stdout and stderr
    seconds: float

    @property
    def hanging(self) -> bool:
        return None in self.statuses


def write_inputs(folder: pathlib.Path) -> None:
    """Write the model, the pairs and the posts that the jobs read."""
    from experiments import tiny_tldr
    from tests.helpers.tiny_runs import write_model, write_pairs

    folder.mkdir(parents=True)
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    tiny_tldr.write(folder / "tldr")
    # Text that is not ASCII, for terminals that cannot show it.
    words = ["Élodie sourit", "das Mädchen", "naïve café", "große Straße", "日本の朝"]
    rows = [
        dict(prompt=f"{word} {i}", chosen=f" w{20 + i} {word}", rejected=f" w{i} {word}")
        for i in range(6)
        for word in words
    ]
    write_jsonl(folder / "accents.jsonl", rows)


def make_jobs(inputs: pathlib.Path) -> dict[str, Job]:
    """Return the jobs by name, all but the judge's, which needs a server."""
    jobs = [
        Job("toy dpo", "dpo_jax.train", ("--config=toy", *toy_flags("sft", "dpo"))),
        Job(
            "rounds",
            "dpo_jax.train",
            ("--config=toy", "--config.rounds=3", *toy_flags("sft", "dpo")),
        ),
        Job("toy ppo", "dpo_jax.train", ("--config=toy:ppo", *toy_flags("sft", "rm", "ppo"))),
        Job("dpo", "dpo_jax.train", dpo_flags(inputs)),
        Job("lora", "dpo_jax.train", (*dpo_flags(inputs), "--config.model.lora.rank=4")),
        Job("sample", "dpo_jax.sample", sample_flags(inputs)),
        Job("dpo, 2 processes", "dpo_jax.train", (*dpo_flags(inputs), "--config.mesh.fsdp=2"), 2),
        Job("sample, 2 processes", "dpo_jax.sample", (*sample_flags(inputs), "--fsdp=2"), 2),
    ]
    shown = dpo_flags(inputs, "accents.jsonl", "--config.data.show=2", "--config.dpo.steps=4")
    jobs.append(Job("accents", "dpo_jax.train", shown))
    return {job.name: job for job in jobs}


def toy_flags(*stages: str) -> tuple[str, ...]:
    """Return the flags of a short toy run that saves often in these stages."""
    flags = [f"--workdir={RUN}", "--config.pairs.prompts=400"]
    for stage in stages:
        steps, every = (6, 2) if stage == "ppo" else (30, 10)
        flags.append(f"--config.{stage}.steps={steps}")
        flags.append(f"--config.{stage}.save_every={every}")
        flags.append(f"--config.{stage}.eval_every={every}")
    return tuple(flags)


def dpo_flags(inputs: pathlib.Path, pairs: str = "pairs.jsonl", *more: str) -> tuple[str, ...]:
    """Return the flags of a short DPO run of the tiny model, which saves every third step."""
    fields = {
        "model.path": inputs / "model",
        "data.path": inputs / pairs,
        "data.eval_fraction": 0.2,
        "dpo.batch_size": 8,
        "dpo.steps": 20,
        "dpo.lr": 1e-3,
        "dpo.eval_every": 5,
        "dpo.save_every": 3,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ("--config=dpo", f"--workdir={RUN}", *flags, *more)


def sample_flags(inputs: pathlib.Path) -> tuple[str, ...]:
    """Return the flags of two samples for each of sixty prompts, in many batches."""
    return (
        f"--model={STORIES}",
        f"--prompts={inputs / 'pairs.jsonl'}",
        f"--out={RUN}/sampled.jsonl",
        "--n=2",
        "--max_new_tokens=16",
        "--batch_size=8",
    )


def judge_job(inputs: pathlib.Path, prepared: pathlib.Path, variables: dict) -> Job:
    """Return the job that samples summaries of a random model and has them judged.

    prepared: where its WORKDIR is made, with the stages done. variables: that name the server.
    """
    from dpo_jax.parallel import sharding
    from dpo_jax.pipeline.run import Run
    from tests.helpers.tiny_runs import experiment_configs, plant

    paths = {
        "data.path": "comparisons",
        "data.sft_path": "posts",
        "model.tokenizer": "tokenizer",
    }
    flags = [f"--config.{field}={inputs / 'tldr' / name}" for field, name in paths.items()]
    make_config = experiment_configs(str(ROOT / "configs/tldr.py:tiny"), flags)
    trained = Run(make_config("dpo"), prepared, sharding.make_mesh())
    plant(trained, "sft")
    plant(trained, "dpo")
    asked = (
        f"--config={ROOT / 'configs/tldr.py'}:tiny",
        f"--workdir={RUN}",
        "--judge_model=loopback",
        "--method=dpo",
        "--temperatures=0,1",
        "--prompts=8",
        "--concurrency=2",
    )
    module = "experiments.tldr_winrate"
    return Job("judge", module, (*asked, *flags), prepared=prepared, environment=variables)


def prepare(job: Job, folder: pathlib.Path, cache: pathlib.Path | None = None) -> pathlib.Path:
    """Make the folder of a try: RUN, and a compile cache of its own, a copy of `cache`."""
    folder.mkdir(parents=True)
    if job.prepared:
        shutil.copytree(job.prepared, folder / RUN)
    else:
        (folder / RUN).mkdir()
    if cache:
        shutil.copytree(cache, folder / "cache")
    else:
        (folder / "cache").mkdir()
    return folder


def environment(job: Job, folder: pathlib.Path, **changes: str | None) -> dict[str, str]:
    """Return a command's environment; a change to None takes a variable out."""
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": QUICK_COMPILES,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": python_path(ROOT),
    }
    variables |= job.environment | changes
    return {name: value for name, value in variables.items() if value is not None}


def start(
    job: Job,
    folder: pathlib.Path,
    *,
    wrapped: Sequence[str] = (),
    log: str = "out",
    variables: dict | None = None,
    **options,
) -> list[subprocess.Popen]:
    """Start a job's processes; what they print goes to log.N files in the folder.

    wrapped: a command that the job's own is the arguments of. options: of subprocess.Popen.
    """
    joined = []
    if job.processes > 1:
        from tests.helpers.tiny_runs import free_port

        joined = [f"--coordinator=localhost:{free_port()}", f"--num_processes={job.processes}"]
    started = []
    for index in range(job.processes):
        own = [*joined, f"--process_id={index}"] if joined else []
        command = [*wrapped, sys.executable, "-m", job.module, *job.flags, *own]
        with (folder / f"{log}.{index}.log").open("wb") as file:
            given = dict(cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file) | options
            given.setdefault("env", environment(job, folder, **variables or {}))
            # A session of its own, so that what it started can be ended with it.
            started.append(subprocess.Popen(command, start_new_session=True, **given))
    return started


def wait(
    processes: list[subprocess.Popen],
    folder: pathlib.Path,
    log: str = "out",
    limit: float = HANGING,
) -> Ended:
    """Wait until all processes have ended; kill those that take longer than `limit` seconds."""
    began = time.monotonic()
    statuses = []
    for process in processes:
        left = limit - (time.monotonic() - began)
        try:
            statuses.append(process.wait(max(left, 0.01)))
        except subprocess.TimeoutExpired:
            end_session(process)
            statuses.append(None)
    seconds = time.monotonic() - began
    texts = [
        (folder / f"{log}.{index}.log").read_text(errors="replace")
        for index in range(len(processes))
    ]
    return Ended(tuple(statuses), "".join(texts), seconds)


def cpu_seconds(process: subprocess.Popen) -> float:
    """Return the processor time that a process has taken so far; 0 once it has ended."""
    try:
        # The name, in parentheses, may have spaces; user and system time are fields 14 and 15.
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _most_cpu_seconds(process: subprocess.Popen) -> float:
    """Wait for a process; return the processor time that it took."""
    most = 0.0
    while process.poll() is None:
        most = max(most, cpu_seconds(process))
        time.sleep(0.05)
    return most


def end_session(process: subprocess.Popen) -> None:
    """Kill a process, and those that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(job: Job, folder: pathlib.Path, **options) -> Ended:
    """Run a job to its end."""
    log = options.get("log", "out")
    return wait(start(job, folder, **options), folder, log)


def result(folder: pathlib.Path) -> dict:
    """Return what a job left, comparable: no times, checkpoints, sums or drafts of a kill."""
    found = {}
    for path in goldens.made_by_commands(folder / RUN):
        name = str(path.relative_to(folder / RUN))
        if path.suffix in (".draft", ".sums") or "partial" in name:
            continue
        if path.name == JUDGEMENTS:
            found[name] = _judgements(path)
        elif path.name == "README.md":
            found[name] = _card(path)
        else:
            try:
                found[name] = _without_times(goldens.content(path))
            except ValueError:  # of JSON that is cut
                found[name] = "damaged"
    return found


def _without_times(value):
    """Return what a file of JSON holds without the times at which a judge was asked."""
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in JUDGE_TIMES}
    return value


def _card(path: pathlib.Path) -> list[str]:
    """Return a model's card without the day on which its stage was started."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("| date ")]


def _judgements(path: pathlib.Path) -> list:
    """Return the answers that are kept, in an order that does not depend on time."""
    from tests.helpers.comparisons import kept

    rows = kept(path.parent)
    return sorted((row["prompt"], row["answer"]) for row in rows)


def run_whole(job: Job, folder: pathlib.Path) -> Whole:
    """Run a job twice without interruption: to fill the compile cache, and to take its time."""
    first = prepare(job, folder / "first")
    ended = run(job, first)
    if any(ended.statuses):
        raise RuntimeError(f"{job.name} fails by itself:\n{ended.text[-3000:]}")
    second = prepare(job, folder / "second", first / "cache")
    started = start(job, second)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        measured = pool.submit(_most_cpu_seconds, started[0])
        again = wait(started, second)
    if any(again.statuses) or result(second) != result(first):
        differing = goldens.differences(result(first), result(second))
        raise RuntimeError(f"{job.name} is not the same twice:\n" + "\n".join(differing))
    files = (path for path in (second / RUN).rglob("*") if path.is_file())
    kilobytes = sum(-(-path.stat().st_size // PAGE) for path in files) * PAGE // 1024
    return Whole(job, result(first), again.seconds, measured.result(), second / "cache", kilobytes)

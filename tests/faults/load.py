"""Load: a long run, many judged items, many rows and many runs, each measured by one command.

    steps     20,000 steps of the toy, evaluated, saved, with TensorBoard
    judged    100,000 judged items, of which three are asked again
    rows      1,000,000 rows of a ledger, beside `datasets` alone
    runs      200 finished runs in one WORKDIR, listed

`python -m tests.faults --parts=load` measures all four. The functions return a Result each, and
take smaller numbers as well: the tests do so in seconds.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

from tests.helpers.paths import ROOT, STORIES

PART = "load"
# What may grow while a run goes on: allocators keep some of what is freed.
MEMORY_GROWTH_MIB = 100
OPEN_FILES_GROWTH = 20  # a save under way has a dozen open
LISTING_SECONDS = 1.0
BATCH = 1000  # rows


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured, in words, its limit, and whether it is within that."""

    what: str
    measured: str
    limit: str
    is_good: bool

    @staticmethod
    def table(results: list["Result"]) -> list[str]:
        """Return the lines of a Markdown table."""
        lines = ["| what | measured | limit | within it |", "|---|---|---|---|"]
        for one in results:
            verdict = "yes" if one.is_good else "NO"
            lines.append(f"| {one.what} | {one.measured} | {one.limit} | {verdict} |")
        return lines


@dataclasses.dataclass(frozen=True)
class Sample:
    """A process and its WORKDIR at one moment."""

    step: int
    memory_mib: int
    open_files: int
    files: int  # in WORKDIR


def steps(folder: pathlib.Path, count: int = 20_000) -> Result:
    """Train the toy for so many steps, with an evaluation every 40 and a save every 80."""
    workdir = folder / "toy"
    command = [
        *(sys.executable, "-m", "dpo_jax.train", "--config=toy", f"--workdir={workdir}"),
        *(f"--config.dpo.steps={count}", "--config.dpo.eval_every=40"),
        *("--config.dpo.save_every=80", "--config.log.tensorboard=True"),
    ]
    began = time.monotonic()
    with (folder / "steps.log").open("w") as log:
        env = os.environ | dict(JAX_PLATFORMS="cpu")
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            samples = list(_watch(process, workdir))
        finally:
            process.kill()  # of no effect once it has ended
            process.wait()
    seconds = time.monotonic() - began
    return result_of_steps(count, samples, seconds, status=process.returncode)


def _watch(process: subprocess.Popen, workdir: pathlib.Path) -> Iterator[Sample]:
    """Yield a Sample of a run every second, from the first step of its DPO stage to its end."""
    metrics = workdir / "dpo" / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(1)
        # Files come and go while they are counted, and the process may end.
        with contextlib.suppress(OSError, LookupError, ValueError):
            step = _last_step(metrics)
            opened = len(os.listdir(f"/proc/{process.pid}/fd"))
            files = sum(len(names) for _, _, names in os.walk(workdir))
            yield Sample(step, memory_mib(process.pid), opened, files)


def _last_step(metrics: pathlib.Path) -> int:
    """Return the step of the last whole row of a metrics.jsonl."""
    with metrics.open("rb") as file:
        file.seek(max(file.seek(0, 2) - 8192, 0))
        whole = file.read().split(b"\n")[-2]
    return json.loads(whole)["step"]


def result_of_steps(count: int, samples: list[Sample], seconds: float, status: int) -> Result:
    """Compare the second tenth of a run with its last: what was allocated once is there by then."""
    early = [sample for sample in samples if 0.1 * count <= sample.step < 0.2 * count]
    late = [sample for sample in samples if 0.9 * count <= sample.step < count]
    what = f"{count:,} steps of the toy, evaluated every 40, saved every 80, TensorBoard"
    limit = (
        f"from early to late: {MEMORY_GROWTH_MIB} MiB more memory, {OPEN_FILES_GROWTH} more open "
        f"files, {OPEN_FILES_GROWTH} more files in WORKDIR"
    )
    if status or not early or not late:
        ended = f"ended with status {status} after {len(samples)} samples"
        return Result(what, ended, limit, False)

    def range_of(chosen: list[Sample], field: str) -> tuple[int, int]:
        values = [getattr(sample, field) for sample in chosen]
        return min(values), max(values)

    parts = []
    growth = {}
    names = dict(memory_mib="memory, MiB", open_files="open files", files="files in WORKDIR")
    for field, name in names.items():
        before, after = range_of(early, field), range_of(late, field)
        # The lowest of each: a save or an evaluation under way adds to it for a moment.
        growth[field] = after[0] - before[0]
        parts.append(f"{name}: {before[0]} to {before[1]} early, {after[0]} to {after[1]} late")
    is_good = (
        growth["memory_mib"] <= MEMORY_GROWTH_MIB
        and growth["open_files"] <= OPEN_FILES_GROWTH
        and growth["files"] <= OPEN_FILES_GROWTH
    )
    return Result(what, "; ".join([*parts, f"{seconds:.0f} s"]), limit, is_good)


def memory_mib(pid: int | str = "self") -> int:
    """Return the memory of a process that is not on disk alone (VmRSS)."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmRSS"].split()[0]) // 1024  # in KiB there


def judged(folder: pathlib.Path, count: int = 100_000) -> Result:
    """Judge so many items, take three answers away, and judge again: three are asked."""
    from dpo_jax.evaluation import chat_api, judge
    from tests.helpers.comparisons import a_judge, comparisons, quiet
    from tests.helpers.judge_server import JudgeServer, answer, longer, prefers

    rows = comparisons(count)

    async def answer_at_once(calls, prompt):
        usage = dict(prompt_tokens=200, completion_tokens=5)
        return dict(answer=answer("A"), served_by="judge-0001", usage=usage)

    # The first time without a server, which would take minutes.
    with mock.patch.object(chat_api.Calls, "_send", answer_at_once):
        judge.compare(a_judge(), rows, folder, quiet)
    path = folder / judge.JUDGEMENTS
    lines = path.read_bytes().splitlines(keepends=True)
    taken = {1, count // 2, count - 1}
    path.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in taken))
    size = path.stat().st_size / 2**20
    del lines

    before = memory_mib()
    began = time.monotonic()
    with JudgeServer(prefers(longer)) as server, server.environment():
        verdicts = judge.compare(a_judge(), rows, folder, quiet)
    seconds = time.monotonic() - began
    grown = memory_mib() - before
    asked = len(server.requests)
    allowed = MEMORY_GROWTH_MIB + 5 * size
    return Result(
        f"{count:,} judged items resumed ({size:.0f} MiB of judgements)",
        f"{asked} asked, {len(verdicts):,} verdicts in {seconds:.1f} s; {grown} MiB more memory",
        f"{len(taken)} asked; {allowed:.0f} MiB more memory",
        asked == len(taken) and len(verdicts) == count and grown < allowed,
    )


@dataclasses.dataclass(frozen=True)
class Read:
    """What reading a data set took."""

    counted: int  # rows of the ledger
    seconds: float
    early_mib: int  # of memory, at a fifth of the rows
    late_mib: int  # near the last one


def rows(folder: pathlib.Path, count: int = 1_000_000) -> Result:
    """Read, check and tokenise so many pairs as a run does, and as `datasets` does."""
    import transformers

    data = folder / "pairs.jsonl"
    with data.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in _pairs(count))
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    ours = _ours(data, tokenizer, count)
    their_seconds = _theirs(data, tokenizer, folder / "cache")
    parts = [
        f"{count / ours.seconds:,.0f} rows/s read, checked and tokenised",
        f"memory {ours.early_mib} MiB at a fifth, {ours.late_mib} MiB at the end",
        f"`datasets` with the same tokenizer: {count / their_seconds:,.0f} rows/s",
    ]
    # Of each example a few numbers stay in memory, about 200 bytes with the room to grow.
    allowed = MEMORY_GROWTH_MIB + count * 200 // 2**20
    is_flat = ours.late_mib - ours.early_mib <= allowed
    what = f"a ledger of {count:,} rows ({data.stat().st_size / 2**20:.0f} MiB)"
    limit = f"every row counted; {allowed} MiB more memory from a fifth to the end"
    return Result(what, "; ".join(parts), limit, is_flat and ours.counted == count)


def _pairs(count: int) -> Iterator[dict]:
    """Yield pairs of some dozen tokens, all different."""
    for number in range(count):
        yield dict(
            prompt=f"Tom had ball number {number}. He said",
            chosen=f" that he liked all {number} of them.",
            rejected=f" no {number % 7}.",
        )


def _ours(data: pathlib.Path, tokenizer, count: int) -> Read:
    """Read the pairs as a training stage does, and account for them."""
    from dpo_jax import config as configs
    from dpo_jax.data import dataset

    config = configs.default(("dpo",))
    config.data.path = str(data)
    memory = []
    numbers = itertools.count(1)

    def watch(split, example):
        if next(numbers) % (count // 10) == 0:
            memory.append(memory_mib())

    began = time.monotonic()
    _, parts = dataset.load_parts(config.data, tokenizer, "pairs", watch=watch)
    seconds = time.monotonic() - began
    ledger = next(iter(parts.values())).ledger
    return Read(ledger.train.read, seconds, memory[1], memory[-1])


def _theirs(data: pathlib.Path, tokenizer, cache: pathlib.Path) -> float:
    """Return the seconds in which `datasets` reads and tokenises the pairs, in this process."""
    import datasets

    def tokenised(batch: dict) -> dict:
        found = {}
        for name in ("prompt", "chosen", "rejected"):
            found[name] = tokenizer(batch[name], add_special_tokens=False).input_ids
        return found

    datasets.disable_progress_bars()
    began = time.monotonic()
    loaded = datasets.load_dataset(
        "json", data_files=str(data), split="train", cache_dir=str(cache)
    )
    loaded.map(tokenised, batched=True, batch_size=BATCH)
    return time.monotonic() - began


def runs(folder: pathlib.Path, count: int = 200) -> Result:
    """List so many finished runs in one WORKDIR, each with 2,000 rows of metrics."""
    workdir = folder / "toy"
    _write_runs(workdir, count)
    command = [sys.executable, "-m", "dpo_jax.runs"]
    began = time.monotonic()
    subprocess.run([*command, "--help"], cwd=ROOT, check=True, capture_output=True)
    importing = time.monotonic() - began
    began = time.monotonic()
    listed = subprocess.run(
        [*command, str(workdir)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    lines = [line for line in listed.stdout.splitlines() if line.startswith("dpo-beta")]
    return Result(
        f"{count} finished runs in one WORKDIR, listed by `dpo-jax runs`",
        f"{len(lines)} lines in {seconds:.2f} s, of which {importing:.2f} s are imports",
        f"{LISTING_SECONDS:g} s without the imports",
        len(lines) == count and seconds - importing < LISTING_SECONDS,
    )


def _write_runs(workdir: pathlib.Path, count: int) -> None:
    """Write the files of finished DPO runs, which differ in beta."""
    from dpo_jax import config as configs
    from dpo_jax import config_files

    config = config_files.load("toy")
    config.unlock()
    names = [f"rewards_train/metric_{number}" for number in range(25)]
    row = dict.fromkeys(("loss/train", "grad_norm", *names), 0.123456789)
    metrics = "".join(json.dumps(dict(step=step, **row)) + "\n" for step in range(2000))
    done = dict(evaluation={"loss/eval": 0.5}, finished="2026-01-02 03:04:05")
    for number in range(count):
        config.dpo.beta = number / 10
        run = workdir / f"dpo-beta{config.dpo.beta:g}"
        run.mkdir(parents=True)
        depends_on = configs.dependencies(config, "dpo")
        record = dict(stage="dpo", depends_on=depends_on, config=json.loads(config.to_json()))
        (run / "config.json").write_text(json.dumps(record))
        (run / "metrics.jsonl").write_text(metrics)
        (run / "done.json").write_text(json.dumps(done))


MEASUREMENTS = {function.__name__: function for function in (steps, judged, rows, runs)}


def measure_all(folder: pathlib.Path) -> Iterator[Result]:
    """Yield the Result of each measurement, which has a process of its own for its memory."""
    context = multiprocessing.get_context("spawn")
    for name, measure in MEASUREMENTS.items():
        here = folder / name
        here.mkdir(parents=True)
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            yield pool.submit(measure, here).result()

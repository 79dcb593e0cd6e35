"""Hostile input given to real commands, a process each: a sample of every kind."""

import dataclasses
import functools
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from tests.faults import jobs, outcomes
from tests.helpers.rows import write_jsonl
from tests.hostile import data, models, typed
from tests.hostile.judging import MOST_MEMORY, SECONDS

WAIT = 180.0  # seconds on the clock, after which a command is killed
PAIRS = "pairs.jsonl"
MODEL = "model"
DPO = (
    *("--config=dpo", "--workdir=run", f"--config.model.path={MODEL}"),
    *(f"--config.data.path={PAIRS}", "--config.dpo.steps=1", "--config.dpo.batch_size=4"),
)
SCORE = (f"--model={MODEL}", f"--data={PAIRS}", "--out=out.jsonl")
SAMPLE = (f"--model={MODEL}", f"--prompts={PAIRS}", "--out=out.jsonl", "--max_new_tokens=4")
# A row that is dropped or refused by its number.
TWICE = '{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}'


@dataclasses.dataclass(frozen=True)
class Command:
    """A command in a folder with a usual model and usual pairs, and what is wrong there.

    module: of dpo_jax. damage: is called with the folder. words: that a refusal must have; "": the
    command is to end with status 0, and is_right says of the folder whether its result is right.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    damage: Callable[[pathlib.Path], None] = lambda folder: None
    words: str = ""
    is_right: Callable[[pathlib.Path], bool] = lambda folder: True


def plan() -> Iterator[tuple[str, Callable[[pathlib.Path], tuple[str, str]]]]:
    """Yield (row of the table, function of a try's folder) for each command."""
    for command in COMMANDS:
        yield f"real commands: {command.module}", functools.partial(run, command)


def run(command: Command, folder: pathlib.Path) -> tuple[str, str]:
    """Run a command in a folder that is made for it; return its outcome, and what was said."""
    folder.mkdir(parents=True)
    models.write(folder / MODEL)
    write_jsonl(folder / PAIRS, data.good_rows())
    command.damage(folder)
    variables = jobs.environment(jobs.Job("", "", ()), folder)
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"dpo_jax.{command.module}", *command.arguments],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    usage = _wait(process)
    text = (folder / "said").read_text(errors="replace")
    outcome, wrong = judge(command, folder, process.returncode, text, usage)
    return outcome, f"{command.name}: {wrong or outcomes.last_lines(text)}"


def _wait(process: subprocess.Popen):
    """Wait for a process; return what it used, or None where it had to be killed."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        time.sleep(0.05)
    jobs.end_session(process)
    return None


def judge(command: Command, folder: pathlib.Path, status: int, text: str, usage) -> tuple[str, str]:
    """Return the outcome of a command, and what is wrong with it.

    usage: its resource.struct_rusage; None where it did not end.
    """
    if usage is None:
        return outcomes.HANGING, f"no end in {WAIT:.0f} s"
    # Not the time on the clock: the machine may do other work too.
    seconds = usage.ru_utime + usage.ru_stime
    if seconds > SECONDS or usage.ru_maxrss * 1024 > MOST_MEMORY:
        return outcomes.HANGING, f"{seconds:.0f} s of a processor, {usage.ru_maxrss >> 10} MiB"
    if outcomes.has_traceback(text):
        return outcomes.DEEP, ""
    if status == 0:
        is_right = not command.words and command.is_right(folder)
        return (outcomes.SAME if is_right else outcomes.SILENT), ""
    if status != outcomes.REFUSED or not command.words:
        return outcomes.SILENT, f"status {status}: {outcomes.last_lines(text)}"
    is_clear = outcomes.is_paragraph(text) and command.words in text
    return (outcomes.CLEAR if is_clear else outcomes.DEEP), ""


# ---- what is wrong


def _pairs(content: bytes | str, name: str = PAIRS) -> Callable[[pathlib.Path], None]:
    """Return what puts other bytes in the place of the pairs."""
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def write(folder):
        (folder / name).write_bytes(content)

    return write


def _with_row(row: str) -> Callable[[pathlib.Path], None]:
    """Return what adds a row to the pairs."""
    return _pairs(data.FORMATS[".jsonl"]([*data.good_rows(), row]))


def _of_model(damage: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], None]:
    """Return what damages the model."""

    def apply(folder):
        damage(folder / MODEL)

    return apply


def _not_finite(model: pathlib.Path) -> None:
    name = "model.norm.weight"
    models.rewrite(model, **{name: np.full_like(models.WEIGHTS[name], np.nan)})


def _cut_config(model: pathlib.Path) -> None:
    models.DAMAGES["cut"](model / "config.json")


def _endless_template(model: pathlib.Path) -> None:
    fields = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    fields["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(fields))


def _chats(folder: pathlib.Path) -> None:
    turns = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": " upon"}]
    other = [turns[0], {"role": "assistant", "content": " a"}]
    write_jsonl(folder / PAIRS, [{"chosen": turns, "rejected": other}] * 4)
    _endless_template(folder / MODEL)


def _config_file(folder: pathlib.Path) -> None:
    (folder / "hostile.py").write_text(typed.CONFIG_FILES["get_config raises"])


# ---- what is right


def _rows_of_out(count: int) -> Callable[[pathlib.Path], bool]:
    def is_right(folder):
        return len((folder / "out.jsonl").read_text().splitlines()) == count

    return is_right


def _ledger(file: str, read: int, dropped: int) -> Callable[[pathlib.Path], bool]:
    """Return what compares the counts of a ledger, of which one row is held out."""

    def is_right(folder):
        written = json.loads(next(folder.glob(file)).read_text())
        train = written.get("ledger", written)["train"]
        counts = (train["read"], sum(train["dropped"].values()), train["held_out"], train["kept"])
        return counts == (read, dropped, 1, read - dropped - 1)

    return is_right


DROP = ("--config.data.on_bad_row=drop", "--config.data.max_dropped=1")
BAD_LINE = "\u00e9\n".encode("latin-1")
CUT_GZIP = gzip.compress(data.FORMATS[".jsonl"](data.good_rows()))[:-40]
CUT_PARQUET = data.FORMATS[".parquet"](data.good_rows())[:-200]
COMMANDS = (
    Command("a key twice", "train", DPO, _with_row(TWICE), "pairs.jsonl row 13"),
    Command("beta nan", "train", (*DPO, "--config.dpo.beta=nan"), words="config.dpo.beta = nan"),
    Command("no dashes", "train", (*DPO, "config.seed=3"), words="Write --config.seed=3"),
    Command("steps", "train", (*DPO, "--config.dpo.steps=" + "9" * 30), words="config.dpo.steps"),
    Command("a config that raises", "train", ("--config=hostile.py",), _config_file, "hostile.py"),
    Command("config.json cut", "train", DPO, _of_model(_cut_config), "model/config.json"),
    Command("weights nan", "train", DPO, _of_model(_not_finite), "the tensor model.norm.weight"),
    Command("an endless template", "train", DPO, _chats, "template"),
    Command(
        "a bad row dropped",
        "train",
        (*DPO, *DROP),
        _with_row(TWICE),
        "",
        _ledger("run/*/ledger.json", 13, 1),
    ),
    Command("a sweep of inf", "sweep", (*DPO, "--sweep=dpo.beta=0.1,inf"), words="dpo.beta = inf"),
    Command(
        "an index that leads out",
        "score",
        SCORE,
        _of_model(functools.partial(models.lead_out, path="../evil.safetensors")),
        "model",
    ),
    Command("nesting", "score", SCORE, _with_row(data.JSON_ROWS["nesting"]), "pairs.jsonl row 13"),
    Command("batch size", "score", (*SCORE, "--batch_size=nan"), words="--batch_size=nan"),
    Command(
        "cut Parquet",
        "score",
        (*SCORE, "--data=p.parquet"),
        _pairs(CUT_PARQUET, "p.parquet"),
        "p.parquet",
    ),
    Command(
        "ragged CSV", "score", (*SCORE, "--data=p.csv"), _pairs(data.ragged(","), "p.csv"), "p.csv"
    ),
    Command(
        "a mark at the start",
        "score",
        SCORE,
        _pairs(b"\xef\xbb\xbf" + data.FORMATS[".jsonl"](data.good_rows())),
        "",
        _rows_of_out(data.ROWS),
    ),
    Command("not UTF-8", "sample", SAMPLE, _pairs(BAD_LINE), "pairs.jsonl"),
    Command("temperature", "sample", (*SAMPLE, "--temperature=inf"), words="--temperature=inf"),
    Command("no prompts", "sample", SAMPLE, lambda folder: (folder / PAIRS).unlink(), PAIRS),
    Command(
        "line ends of Windows",
        "sample",
        SAMPLE,
        _pairs(data.FORMATS[".jsonl"](data.good_rows()).replace(b"\n", b"\r\n")),
        "",
        _rows_of_out(data.ROWS),
    ),
    Command(
        "a cut gzip file",
        "data_report",
        ("p.jsonl.gz",),
        _pairs(CUT_GZIP, "p.jsonl.gz"),
        "p.jsonl.gz",
    ),
    Command("a web page", "data_report", (PAIRS,), _pairs("<!doctype html><html></html>\n"), PAIRS),
    Command(
        "a long line",  # which this command counts, and trains on nothing
        "data_report",
        (PAIRS, "--json=out.json"),
        _with_row(data.JSON_ROWS["a long line"]),
        "",
        _ledger("out.json", 13, 1),
    ),
    Command("no run there", "check", (MODEL,), words="holds nothing that a run has left"),
    Command("a file for a folder", "check", (PAIRS,), words="there is no such folder"),
)

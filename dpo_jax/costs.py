"""Costs of a stage: what it sampled and read, how long it took, and how much memory, in cost.json.

    WORKDIR/NAME/cost.json
      attempts, seconds                 starts of the stage, and how long they took together
      peak_memory, memory               bytes, of the attempt that took most; "process" or "device"
      steps, step_seconds               of training, without evaluations and checkpoints
      samples, sampled_tokens           completions drawn, and their tokens
      examples, read_tokens             rows or pairs trained on, each time, and their tokens
      flops                             of matrix products, by the sizes of the models

Counts are of what the result took, so they are the same however often the stage was stopped and
resumed. Seconds are of all attempts. One that was killed without a signal counts in `step_seconds`,
up to the checkpoint that the next one resumed from, and not in `seconds`.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax

from dpo_jax.console import warn
from dpo_jax.whole_file import read_record
from dpo_jax.workdir import COST, write_record

NUMBER = int | float
FIELDS = dict(attempts=int, seconds=NUMBER, peak_memory=int, memory=str)
FIELDS |= dict(steps=int, step_seconds=NUMBER, samples=int, sampled_tokens=int)
FIELDS |= dict(examples=int, read_tokens=int, flops=int)
STATUS = pathlib.Path("/proc/self/status")
# Writing 5 there makes the process's peak what it holds now (Linux).
RESET = pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part of a stage sampled, read and computed."""

    samples: int = 0
    sampled_tokens: int = 0
    examples: int = 0
    read_tokens: int = 0
    flops: int = 0

    def plus(self, other: "Work") -> "Work":
        """Return the work of both."""
        totals = {}
        for field in dataclasses.fields(self):
            totals[field.name] = getattr(self, field.name) + getattr(other, field.name)
        return Work(**totals)


@dataclasses.dataclass(frozen=True)
class Spent:
    """What training has taken up to a step, as a checkpoint keeps it."""

    steps: int = 0
    step_seconds: float = 0.0
    work: Work = Work()

    def plus(self, seconds: float, work: Work) -> "Spent":
        """Return what is spent after one more step."""
        return Spent(self.steps + 1, self.step_seconds + seconds, self.work.plus(work))

    def to_dict(self) -> dict:
        """Return it as plain numbers."""
        times = dict(steps=self.steps, step_seconds=self.step_seconds)
        return times | dataclasses.asdict(self.work)

    @classmethod
    def of_dict(cls, kept: dict) -> "Spent":
        """Return what `to_dict` gave; nothing is spent where a checkpoint of old kept none."""
        if not kept:
            return cls()
        names = [field.name for field in dataclasses.fields(Work)]
        work = Work(**{name: kept[name] for name in names})
        return cls(kept["steps"], kept["step_seconds"], work)


@contextlib.contextmanager
def measured(folder: pathlib.Path) -> Iterator[None]:
    """Add the time and the memory of what is done within to a stage's cost.json, however it ends.

    The peak of a process is that of the attempt where the system can forget an earlier one, and
    that of a device is of the process so far. Process 0 writes, of itself.
    """
    _reset_peak()
    began = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - began
        # A full disk is told by what it stopped.
        with contextlib.suppress(OSError):
            _add_attempt(folder, seconds)


def _add_attempt(folder: pathlib.Path, seconds: float) -> None:
    found = _read_to_add(folder)
    peak, of = peak_memory()
    write(
        folder,
        attempts=found.get("attempts", 0) + 1,
        seconds=found.get("seconds", 0.0) + seconds,
        peak_memory=max(found.get("peak_memory", 0), peak),
        memory=of,
    )


def write(folder: pathlib.Path, **values) -> None:
    """Put values into a stage's cost.json, in place of those of these names."""
    if jax.process_index() == 0:
        write_record(folder / COST, _read_to_add(folder) | values)


def write_work(folder: pathlib.Path, work: Work) -> None:
    """Put what a stage sampled, read and computed into its cost.json."""
    write(folder, **dataclasses.asdict(work))


def read(folder: pathlib.Path) -> dict:
    """Return the record in a stage's cost.json, {} where there is none; ValueError if damaged."""
    path = folder / COST
    if not path.exists():
        return {}
    return read_record(path, "Remove it: what the stage took is then not known.", **FIELDS)


def _read_to_add(folder: pathlib.Path) -> dict:
    """Return the record to add to; one that is damaged begins anew, as no result depends on it."""
    try:
        return read(folder)
    except ValueError as error:
        warn(f"{error} It is written anew, without what was counted before.")
        return {}


def peak_memory() -> tuple[int, str]:
    """Return the most memory in bytes, and whose: of a device if it has its own, or "process"."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats:
        return stats.get("peak_bytes_in_use", 0), "device"
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1]), "process"
    return 0, "process"


def _reset_peak() -> None:
    # Where the system does not allow it, the peak is of the process so far.
    with contextlib.suppress(OSError):
        if RESET.exists():
            RESET.write_text("5")

"""Damage to every file of a WORKDIR in turn: each is cut, emptied, flipped and removed.

    python -m tests.faults.files [dpo] [ppo] [lora]      prints the counts of each; minutes each

After each, the same command is run again in this process. It must end with the same bits, or stop
with one paragraph that names the file or its folder and what to do. Files are taken from the
folder, so none is forgotten when a new one is written.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator

import pytest

from configs import toy
from dpo_jax import check, command_line
from dpo_jax import config as configs
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.training import metrics
from dpo_jax.training.loop import Interrupted
from tests.helpers import goldens
from tests.helpers.tiny_runs import on_devices

OUTCOMES = ("same bits", "told", "clear", "silent", "deep", "hanging")
BAD = ("silent", "deep", "hanging")
WORK = "work"  # the folder of every run: some files hold its path
SECONDS = 60  # after which a run counts as hanging
# A reader needs nothing of these, or orbax nothing of what they hold.
NOT_CHECKED = (".lock", "commit_success.txt", "_sharding", "array_metadatas", "ocdbt.process_0/m")


@dataclasses.dataclass
class Counts:
    """How the runs after all damages ended."""

    tried: int = 0
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: list[str] = dataclasses.field(default_factory=list)  # a line each
    unseen: list[str] = dataclasses.field(default_factory=list)  # damages that check takes for none

    def row(self, name: str) -> str:
        """Return a row of a Markdown table."""
        numbers = [self.tried, *(self.outcomes[outcome] for outcome in OUTCOMES)]
        return f"| {name} | " + " | ".join(map(str, numbers)) + " |"


def small_config(method: str = "dpo", **changes):
    """Return the config of a run of seconds on the toy, through all stages of a method."""
    config = toy.get_config(method)
    config.sampling.batch_size = 32
    small = dict(
        sft=dict(steps=4, batch_size=16, eval_every=2, save_every=2),
        rm=dict(steps=4, batch_size=8, eval_every=2, save_every=2),
        pairs=dict(prompts=24),
        dpo=dict(steps=4, batch_size=8, eval_every=2, save_every=2),
        ppo=dict(steps=3, batch_size=16, minibatch_size=8, eval_every=2, save_every=1),
    )
    for block, fields in small.items():
        if block in config:
            config[block].update(fields)
    config.update_from_flattened_dict(changes)
    return config


def run(config, workdir: pathlib.Path) -> str:
    """Run all stages; return what was shown."""
    shown = io.StringIO()
    with on_devices(1), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        run_stages(config, str(workdir))
    return shown.getvalue()


def run_until(config, workdir: pathlib.Path, stage: str, step: int) -> None:
    """Run all stages up to a step, after which the process is told to stop."""
    write = metrics.Writer.write
    folder = configs.folder_names(config)[stage]

    def stop(self, now, values):
        write(self, now, values)
        if now == step and self._path.parent.name == folder:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(metrics.Writer, "write", stop)
        run(config, workdir)


def try_all(
    config,
    source: pathlib.Path,
    wanted: dict,
    *,
    is_tried: Callable[[str], bool] = lambda name: True,
    with_check: bool = True,
) -> Counts:
    """Damage each file of a WORKDIR in each way, run the command again, and count the outcomes.

    wanted: the `result` of an undamaged run. is_tried: chooses by a damage's name, "FILE cut".
    with_check: whether `dpo-jax check` must see each damage too.
    """
    counts = Counts()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        for how, data in damages(path.read_bytes()):
            if not is_tried(f"{name} {how}"):
                continue
            workdir = source.parent / WORK
            shutil.copytree(source, workdir)
            if data is None:
                (workdir / name).unlink()
            else:
                (workdir / name).write_bytes(data)
            # Whether a file should be there only a finished stage or a checkpoint knows.
            is_read = how != "removed" and not any(part in name for part in NOT_CHECKED)
            if with_check and is_read and not _is_seen(workdir):
                counts.unseen.append(f"{name} {how}")
            outcome, said = _outcome(config, workdir, wanted, name)
            shutil.rmtree(workdir)
            counts.tried += 1
            counts.outcomes[outcome] += 1
            if outcome in BAD:
                counts.bad.append(f"{name} {how}: {outcome}: {said}")
    return counts


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Yield the ways to damage a file, and what is then in it; None: it is removed."""
    if data:
        yield "cut", data[: len(data) // 2]
        yield "emptied", b""
        third = len(data) * 2 // 3
        flipped = bytes(byte ^ 0x40 for byte in data[third : third + 8])
        yield "flipped", data[:third] + flipped + data[third + 8 :]
    yield "removed", None


def _is_seen(workdir: pathlib.Path) -> bool:
    return any(problem for _, problem in check.check(workdir))


def _outcome(config, workdir: pathlib.Path, wanted: dict, name: str) -> tuple[str, str]:
    """Run the command again; return its outcome, and what was said."""
    try:
        with _at_most(SECONDS):
            shown = run(config, workdir)
    except TimeoutError as error:
        return "hanging", str(error)
    except Exception as error:  # noqa: BLE001 - any other one is what is looked for
        text = str(error)
        folder = name.partition("/")[0]
        is_clear = command_line.is_for_people(error) and "\n\n" not in text
        names_it = str(workdir / folder) in text and ("emove" in text or "back" in text)
        return ("clear" if is_clear and names_it else "deep"), repr(error)
    if result(workdir) == wanted:
        return "same bits", shown
    # Of rows of metrics that cannot be computed again a line tells; everything else is the same.
    if "no longer holds" in shown and name.endswith("metrics.jsonl"):
        return ("told" if _but_metrics(result(workdir)) == _but_metrics(wanted) else "silent"), ""
    found = result(workdir)
    differing = [
        file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file)
    ]
    return "silent", ", ".join(differing)


def result(workdir: pathlib.Path) -> dict:
    """Return all that a run's result consists of, but for times, by file."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        # The reference's log-probs are verified where they are read, which a finished run does not.
        is_other = "checkpoints" in name.parts or name.parts[0] == "reference"
        is_note = path.name == ".lock" or ".damaged" in path.name or path.suffix == ".sums"
        if path.is_file() and not is_other and not is_note:
            found[str(name)] = goldens.content(path)
    return found


def _but_metrics(found: dict) -> dict:
    # The card of a model and the trajectory of the toy are made from them.
    return {name: value for name, value in found.items() if not name.endswith("metrics.jsonl")}


@contextlib.contextmanager
def _at_most(seconds: int):
    """Raise TimeoutError in what takes longer."""

    def stop(*_):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


KINDS = {
    "dpo": (small_config, "dpo", 3),
    "ppo": (lambda: small_config("ppo"), "ppo", 2),
    "lora": (lambda: small_config("dpo", **{"model.lora.rank": 2}), "dpo", 3),
}


def count(kind: str, folder: pathlib.Path, **options) -> dict[str, Counts]:
    """Try all files of a finished run and of one that was stopped; return the Counts of each."""
    make, stage, step = KINDS[kind]
    config = make()
    work = folder / WORK
    run(config, work)
    wanted = result(work)
    work.rename(folder / "finished")
    run_until(config, work, stage, step)
    work.rename(folder / "stopped")
    return {
        f"{kind}, {state}": try_all(config, folder / state, wanted, **options)
        for state in ("finished", "stopped")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    bad = []
    print("| every file of | tried | " + " | ".join(OUTCOMES) + " |")
    print("|---|" + "---|" * (len(OUTCOMES) + 1))
    for kind in parser.parse_args().kinds:
        with tempfile.TemporaryDirectory() as folder:
            for name, counts in count(kind, pathlib.Path(folder)).items():
                print(counts.row(name), flush=True)
                bad += [*counts.bad, *(f"check does not see {line}" for line in counts.unseen)]
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

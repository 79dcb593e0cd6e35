"""Damage to every file of a WORKDIR in turn: each is cut, emptied, flipped and removed.

After each, the same command is run again in this process. It must end with the same bits, or stop
with one paragraph that names the file (of a part of a checkpoint: the folder of its step) and what
to do. Files are taken from the folder, so none is forgotten when a new one is written.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from configs import toy
from dpo_jax import check, command_line
from dpo_jax import config as configs
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.training import metrics
from dpo_jax.training.loop import Interrupted
from tests.faults.outcomes import BAD, CLEAR, DEEP, HANGING, SAME, SILENT, TOLD, Try
from tests.helpers import goldens, tiny_runs
from tests.helpers.quick_compiles import QUICK_COMPILES

PART = "files"
WORK = "work"  # the folder of every run: some files hold its path
SECONDS = 60  # after which a run counts as hanging
REMEDY = re.compile(r"\b([Rr]emove|[Rr]ename|[Pp]ut (it|one of them) back)\b")
# A reader needs nothing of these, or orbax nothing of what they hold.
NOT_READ = (".lock", "commit_success.txt", "_sharding", "array_metadatas", "ocdbt.process_0/m")
# Orbax copies arrays as small as adapters into state/d, and then reads nothing of the others.
NOT_READ_OF_SMALL = (*NOT_READ, "ocdbt.process_0/d")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A run whose files are damaged: when it is finished, and when it was stopped.

    make_config: is given a folder, for what the run reads. stage, step: where it is stopped.
    folders: whose files are damaged; (): all. Stages that another kind has as well are damaged
    there. not_read: parts of names of files that say nothing to a reader.
    """

    make_config: Callable
    stage: str
    step: int
    folders: tuple[str, ...] = ()
    not_read: tuple[str, ...] = NOT_READ


# Block of a small run -> its fields.
SMALL = dict(
    sampling=dict(batch_size=32),
    sft=dict(steps=4, batch_size=16, eval_every=2, save_every=2),
    rm=dict(steps=4, batch_size=8, eval_every=2, save_every=2),
    pairs=dict(prompts=24),
    dpo=dict(steps=4, batch_size=8, eval_every=2, save_every=2),
    ppo=dict(steps=3, batch_size=16, minibatch_size=8, eval_every=2, save_every=1),
)


def small_config(method: str):
    """Return the config of a run of seconds on the toy, through all stages of a method."""
    config = toy.get_config(method)
    for block, fields in SMALL.items():
        if block in config:
            config[block].update(fields)
    return config


def run(config, workdir: pathlib.Path, devices: int = 1) -> str:
    """Run all stages; return what was shown."""
    shown = io.StringIO()
    with (
        tiny_runs.on_devices(devices),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
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
    what: str,
    is_tried: Callable[[str], bool] = lambda name: True,
    with_check: bool = True,
    not_read: tuple[str, ...] = NOT_READ,
) -> list[Try]:
    """Damage each file of a WORKDIR in each way, run the command again, and judge each end.

    wanted: the `result` of an undamaged run. what: the row of the table. is_tried: chooses by a
    damage's name, "FILE cut". with_check: whether `dpo-jax check` must see each damage too, but
    for those of not_read.
    """
    tries = []
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
            is_read = how != "removed" and not any(part in name for part in not_read)
            is_unseen = with_check and is_read and not _is_seen(workdir, name)
            began = time.monotonic()
            outcome, said = _outcome(config, workdir, wanted, name)
            seconds = round(time.monotonic() - began, 1)
            if is_unseen and outcome in (SAME, TOLD, CLEAR):
                outcome, said = SILENT, f"`dpo-jax check` takes it for whole; the run: {outcome}"
            shutil.rmtree(workdir)
            tries.append(Try(PART, what, outcome, seconds, f"{name} {how}: {said}"))
            if outcome in BAD or len(tries) % 50 == 0:
                print(f"{what}: {len(tries)} tried, {name} {how}: {outcome}", flush=True)
    return tries


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Yield the ways to damage a file, and what is then in it; None: it is removed."""
    if data:
        yield "cut", data[: len(data) // 2]
        yield "emptied", b""
        third = len(data) * 2 // 3
        flipped = bytes(byte ^ 0x40 for byte in data[third : third + 8])
        yield "flipped", data[:third] + flipped + data[third + 8 :]
    yield "removed", None


def _is_seen(workdir: pathlib.Path, name: str) -> bool:
    """Return whether `dpo-jax check` finds the damage in the folder of a file."""
    # The other folders are whole, and reading all of their checkpoints again takes seconds.
    alone = workdir.parent / "alone"
    alone.mkdir()
    stage = pathlib.PurePath(name).parts[0]
    (alone / stage).symlink_to(workdir / stage)
    found = any(finding.problem for finding in check.check(alone))
    shutil.rmtree(alone)
    return found


def _outcome(config, workdir: pathlib.Path, wanted: dict, name: str) -> tuple[str, str]:
    """Run the command again; return its outcome, and what was said."""
    try:
        with _at_most(SECONDS):
            shown = run(config, workdir)
    except TimeoutError as error:
        return HANGING, str(error)
    except Exception as error:  # noqa: BLE001 - any other one is what is looked for
        is_clear = command_line.is_for_people(error) and names_damage(str(error), workdir, name)
        return (CLEAR if is_clear else DEEP), repr(error)
    if "Traceback" in shown:
        return DEEP, shown[-500:]
    found = result(workdir)
    if found == wanted:
        return SAME, ""
    # Of rows of metrics that cannot be computed again a line tells; everything else is the same.
    is_told = "no longer holds" in shown and name.endswith("metrics.jsonl")
    if is_told and _but_metrics(found) == _but_metrics(wanted):
        return TOLD, ""
    differing = [
        file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file)
    ]
    return SILENT, ", ".join(sorted(differing))


def names_damage(refusal: str, workdir: pathlib.Path, name: str) -> bool:
    """Return whether a refusal is one paragraph that names a damaged file and what to do."""
    path = workdir / name
    parts = pathlib.PurePath(name).parts
    if "checkpoints" in parts:
        step = pathlib.Path(*parts[: parts.index("checkpoints") + 2])
        # Not "checkpoints/20" for "checkpoints/2".
        is_named = bool(re.search(re.escape(str(workdir / step)) + r"(?!\w)", refusal))
    else:
        # "FOLDER has no config.json" names the file as well.
        is_named = str(path.parent) in refusal and path.name in refusal
    return is_named and bool(REMEDY.search(refusal)) and "\n\n" not in refusal


def result(workdir: pathlib.Path) -> dict:
    """Return all that a run's result consists of, but for times, by file."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        # The reference's log-probs are verified where they are read, which a finished run does not.
        is_other = "checkpoints" in name.parts or name.parts[0] == "reference"
        # The report and the costs tell times, which are of an attempt.
        is_note = path.name in (".lock", "report.html", "cost.json") or path.suffix == ".sums"
        is_note = is_note or ".damaged" in path.name
        if path.is_file() and not is_other and not is_note:
            found[str(name)] = goldens.content(path)
    return found


def result_without_paths(workdir: pathlib.Path) -> dict:
    """Return the result of a run, but for the paths of the models that it read."""
    found = result(workdir)
    for name, weights in found.items():
        if name.endswith("weights.json"):
            found[name] = {role: value["fingerprint"] for role, value in weights.items()}
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


def lora_config(folder: pathlib.Path):
    """Return the config of a DPO run of adapters, which need a model to start from."""
    model = tiny_runs.write_model(folder / "model")
    pairs = tiny_runs.write_pairs(folder / "pairs.jsonl")
    config = tiny_runs.dpo_config(model, pairs)
    config.model.lora.rank = 2
    return config


def best_config(_folder: pathlib.Path):
    """Return the config of a DPO run that keeps its best checkpoint, which is not its latest."""
    config = small_config("dpo")
    config.dpo.update(steps=6, save_every=1, keep=1, keep_best="logps_eval/chosen")
    return config


KINDS = {
    "ppo": Kind(lambda _: small_config("ppo"), "ppo", 2, ("rm", "ppo", "evaluate")),
    "dpo": Kind(lambda _: small_config("dpo"), "dpo", 3),
    "lora": Kind(lora_config, "dpo", 3, not_read=NOT_READ_OF_SMALL),
    "keep_best": Kind(best_config, "dpo", 5, ("dpo",)),
}


def count(name: str, folder: pathlib.Path, **options) -> list[Try]:
    """Try the files of a finished run of a kind, and of one that was stopped."""
    kind = KINDS[name]
    is_chosen = options.pop("is_tried", lambda damage: True)

    def is_tried(damage: str) -> bool:
        is_mine = not kind.folders or damage.startswith(tuple(f"{one}/" for one in kind.folders))
        return is_mine and is_chosen(damage)

    options["not_read"] = kind.not_read
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    config = kind.make_config(inputs)
    work = folder / WORK
    run(config, work)
    wanted = result(work)
    finished = folder / "finished"
    work.rename(finished)
    what = f"{name}: a finished run"
    tries = try_all(config, finished, wanted, what=what, is_tried=is_tried, **options)

    # The last stage only draws, which takes longer than the rest.
    config.stages = tuple(stage for stage in config.stages if stage != "evaluate")
    run(config, work)
    wanted = result(work)
    shutil.rmtree(work)
    run_until(config, work, kind.stage, kind.step)
    stopped = folder / "stopped"
    work.rename(stopped)
    what = f"{name}: a run that was stopped"
    return tries + try_all(config, stopped, wanted, what=what, is_tried=is_tried, **options)


def count_all(folder: pathlib.Path, workers: int) -> Iterator[list[Try]]:
    """Yield the tries of each kind as they are through; each kind has a process of its own."""
    folder.mkdir(parents=True)
    os.environ["XLA_FLAGS"] = QUICK_COMPILES
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    context = multiprocessing.get_context("spawn")  # a copy of this process would share its jax
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(count, name, folder / name): name for name in KINDS}
        for future in concurrent.futures.as_completed(waiting):
            try:
                yield future.result()
            except Exception as error:  # of the harness itself: the other kinds go on
                said = f"it could not be tried: {error!r}"
                yield [Try(PART, waiting[future], SILENT, 0.0, said)]

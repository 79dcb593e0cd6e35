"""Stage folders and their files: which stage is done, resumed, or refused as its config changed.

    WORKDIR/NAME/  config.json  what the stage was started with     done.json  it is complete

A stage whose config has changed is never trained over, resumed or mixed once it is done or has a
checkpoint or completions: `start_stage` names the fields that differ and stops. Files are written
whole or not at all.
"""

import contextlib
import datetime
import fcntl
import json
import pathlib
import time

import jax

from dpo_jax import config as configs
from dpo_jax import run_name, stage_table
from dpo_jax.whole_file import whole_file

COMPLETIONS = "completions.jsonl"  # what a stage has sampled so far
PATIENCE = 3  # seconds to wait for a stage's folder


def make_workdir(workdir: pathlib.Path) -> None:
    """Make WORKDIR if it is not there; OSError names the flag where that cannot be done."""
    try:
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"--workdir={workdir}: expected a folder, and there is a file of this name, or in the "
            "place of a folder above it. Give another --workdir."
        ) from None
    except OSError as error:
        raise OSError(
            f"--workdir={workdir}: this folder cannot be made ({error.strerror}). Give one that "
            "you may write to."
        ) from error


class StageChanged(ValueError):
    """A stage's folder was made with another config, other data, other weights or other code."""


def start_stage(
    workdir: pathlib.Path, config, stage: str, versions: dict[str, int]
) -> tuple[pathlib.Path, str]:
    """Return the stage's folder and its status: "new", "unfinished" or "done". For one process.

    A new folder gets its config.json. versions: of the code that a resumed stage must find as it
    was, {name: version}. Raises StageChanged where the folder was made with a config that differs
    in what the stage depends on, or is unfinished and of other versions; both are named.
    """
    folder = pathlib.Path(workdir) / configs.folder_names(config)[stage]
    path = folder / "config.json"
    is_done = (folder / "done.json").exists()
    # Only then is there something that another config would spoil.
    if path.exists() and (is_done or _has_progress(folder)):
        record = json.loads(path.read_text())
        _check_config(folder, config, stage, record["depends_on"])
        if is_done:
            return folder, "done"  # of whatever versions: it is used as it is
        _check_versions(folder, stage, record.get("versions", {}), versions)
        return folder, "unfinished"

    # The lock is taken before, and a kill may leave a draft.
    strange = [
        item for item in folder.glob("*") if item.suffix != ".draft" and item.name != ".lock"
    ]
    if strange and not path.exists():
        raise StageChanged(
            f"{folder} has files but no config.json, so it is not a stage of a run. Give another "
            "--workdir, or remove the folder."
        )
    # An attempt that failed before its first checkpoint binds nobody: nothing is lost.
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ledger.json", "weights.json"):
        (folder / name).unlink(missing_ok=True)
    # Written before the stage writes anything, so that all that is there is of a known config.
    record = dict(
        stage=stage,
        date=_date_of_others(folder, stage) or datetime.date.today().isoformat(),
        depends_on=_dependencies(config, stage),
        versions=versions,
        config=json.loads(config.to_json()),
    )
    write_json(path, record)
    return folder, "new"


def start_date(folder: pathlib.Path) -> datetime.date:
    """Return the day that chat templates take for today in a stage, whenever it is resumed.

    It is the day on which the stage was started, or that of the first run of this stage in the same
    WORKDIR: runs that are compared read the same tokens, and share kept reference log-probs.
    """
    record = json.loads((folder / "config.json").read_text())
    # Stages from before the date was written.
    return datetime.date.fromisoformat(record.get("date") or datetime.date.today().isoformat())


def _date_of_others(folder: pathlib.Path, stage: str) -> str:
    """Return the date of the first run of a stage beside this folder; "" if there is none."""
    dates = []
    for path in folder.parent.glob("*/config.json"):
        other = path.parent
        if other == folder or not ((other / "done.json").exists() or _has_progress(other)):
            continue
        try:
            record = json.loads(path.read_text())
        except ValueError:  # a folder that somebody put there
            continue
        if isinstance(record, dict) and record.get("stage") == stage:
            dates.append(record.get("date", ""))
    return min(filter(None, dates), default="")


def _check_config(folder: pathlib.Path, config, stage: str, depends_on: dict) -> None:
    """Raise StageChanged if a stage was started with a config that differs where it matters."""
    # Fields that are newer than the folder have their defaults; others no longer matter.
    defaults = _dependencies(configs.default(tuple(config.stages)), stage)
    there = {
        name: value
        for name, value in (defaults | depends_on).items()
        if configs.may_matter(config, stage, name)
    }
    now = _dependencies(config, stage)
    if there == now:
        return
    advice = "Use the old values, or give another --workdir"
    name = _other_name(folder, config, stage, there, now)
    if name:
        advice += f" or another name, such as --config.run={name}"
    raise StageChanged(
        f"{folder} holds the {stage} stage of another config:\n"
        f"{differences(there, now, 'config.')}\n"
        f"{advice}. Or remove the folder, if it is not needed."
    )


def _other_name(folder: pathlib.Path, config, stage: str, there: dict, now: dict) -> str:
    """Return a name with which the run would have a folder of its own; "" if none would help.

    config.run renames the last training stage and those after it.
    """
    trained = stage_table.training_stages(config)
    # An earlier stage's folder would not be renamed by config.run.
    if not trained or config.stages.index(stage) < config.stages.index(trained[-1]):
        return ""
    stem = config.run or trained[-1]
    differing = [name for name in now if name not in there or there[name] != now[name]]
    # A name that says what differs tells more than a number.
    if differing and all(name.startswith(f"{trained[-1]}.") for name in differing):
        return run_name.name_of(stem, {name: now[name] for name in differing})
    number = 2
    while (folder.parent / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def _check_versions(folder, stage: str, there: dict[str, int], now: dict[str, int]) -> None:
    """Raise StageChanged if code of other versions began the stage."""
    differing = []
    for name, version in now.items():
        begun_with = there.get(name, 1)  # stages from before versions were written
        if begun_with != version:
            differing.append(f"{name} {begun_with} in the folder, {version} now")
    if differing:
        raise StageChanged(
            f"{folder} holds an unfinished {stage} stage that another version of dpo_jax began: "
            f"{'; '.join(differing)}. Resumed, it would mix the two. Finish it with the version "
            "that began it, or give another --workdir, or remove the folder to begin again."
        )


def _dependencies(config, stage: str) -> dict:
    """Return what a stage depends on, as it comes back from a file."""
    # Tuples become lists, or they would differ from what was read.
    return json.loads(json.dumps(configs.dependencies(config, stage)))


def _has_progress(folder: pathlib.Path) -> bool:
    """Return whether there is something to resume from: completions, or a whole checkpoint."""
    if (folder / COMPLETIONS).exists():
        return True
    # A checkpoint has a number for a name once it is complete.
    return any(item.name.isdigit() for item in (folder / "checkpoints").glob("*"))


def finish_stage(folder: pathlib.Path, **result) -> None:
    """Mark a stage as complete, with what is worth knowing of its result."""
    write_json(folder / "done.json", result | dict(finished=time.strftime("%Y-%m-%d %H:%M:%S")))


def write_json(path: pathlib.Path, value) -> None:
    """Write JSON in one piece."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Write JSON lines in one piece."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Append JSON lines. Process 0 only."""
    if jax.process_index() == 0:
        # Appending may be cut short by a kill; `read_lines` copes with that.
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: pathlib.Path) -> list[dict]:
    """Return the JSON lines appended so far, none if there is no file.

    A last line that a kill cut short is removed from the file.
    """
    if not path.exists():
        return []
    # Each whole line ends in a newline, so what follows the last newline was cut.
    *whole, cut = path.read_text().split("\n")
    rows = [json.loads(line) for line in whole]
    if cut:
        write_lines(path, rows)
    return rows


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one piece: a kill leaves the old one or the new one. Process 0 only."""
    if jax.process_index() == 0:
        with whole_file(path) as draft:
            draft.write_text(text)


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path):
    """Hold a stage's folder for this process; the system lets go of it however that ends.

    Raises RuntimeError if another process holds it for longer than PATIENCE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        # One process takes the lock for all: the others would be refused.
        if jax.process_index() == 0:
            _take(file, folder)
        yield


def _take(file, folder: pathlib.Path) -> None:
    """Lock an open file, after a wait if need be."""
    # A run that only finds the stage done holds it for a moment; one that works in it, for long.
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"another process is at work in {folder}: wait for it, or give another "
                    "--workdir or --config.run."
                ) from None
            time.sleep(0.1)


def differences(found: dict, wanted: dict, prefix: str = "", place: str = "the folder") -> str:
    """Return a line for each setting that differs, for a person; "" if none does.

    place: where the found settings are.
    """
    missing = "(absent)"
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        there, now = found.get(name, missing), wanted.get(name, missing)
        if there != now:
            lines.append(f"  {prefix}{name}: {there!r} in {place}, {now!r} now")
    return "\n".join(lines)

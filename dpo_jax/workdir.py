"""Stage folders: which stage is done, which goes on, and which is refused because its config has
changed.

    WORKDIR/NAME/  config.json  (what the stage was started with)   done.json  (it is complete)

A changed stage that is done, or has a checkpoint or completions, is never retrained over, resumed
or mixed: `start_stage` names the fields that differ and stops.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time

import jax

from dpo_jax import config as configs

COMPLETIONS = "completions.jsonl"  # what a stage has sampled so far
PATIENCE = 3  # seconds to wait for a stage's folder


class StageChanged(ValueError):
    """A stage's folder was made with another config."""


def start_stage(
    workdir: pathlib.Path, config, stage: str, versions: dict[str, int]
) -> tuple[pathlib.Path, str]:
    """Return the stage's folder and its status, "new", "unfinished" or "done". For one process.

    A new folder gets its config.json. versions: of the code that a resumed stage must find as it
    was, {name: version}. Raises StageChanged where the folder was made with a config that differs
    in what the stage depends on, or is unfinished and of other versions; both are named.
    """
    folder = pathlib.Path(workdir) / configs.folder_names(config)[stage]
    wanted = _dependencies(config, stage)
    path = folder / "config.json"
    if path.exists() and ((folder / "done.json").exists() or _has_progress(folder)):
        defaults = _dependencies(
            configs.default(tuple(config.stages)), stage
        )  # of fields that are newer than the run
        record = json.loads(path.read_text())
        found = defaults | record["depends_on"]
        # A folder may be from before a field was let free.
        found = {name: value for name, value in found.items() if not configs.is_free(name)}
        if found != wanted:
            raise StageChanged(_difference(folder, stage, found, wanted))
        if (folder / "done.json").exists():
            return folder, "done"  # of whatever versions: it is used as it is
        _check_versions(folder, stage, record.get("versions", {}), versions)
        return folder, "unfinished"
    if not path.exists() and any(
        item.suffix != ".draft" and item.name != ".lock" for item in folder.glob("*")
    ):
        raise StageChanged(
            f"{folder} has files but no config.json, so it is not this program's: "
            "give another --workdir, or remove it."
        )
    # Nothing is lost by beginning anew: an attempt that failed before its first checkpoint binds
    # nobody.
    folder.mkdir(parents=True, exist_ok=True)
    for record in ("ledger.json", "weights.json"):
        (folder / record).unlink(missing_ok=True)
    record = dict(
        stage=stage, depends_on=wanted, versions=versions, config=json.loads(config.to_json())
    )
    write_json(path, record)
    return folder, "new"


def _check_versions(folder, stage: str, there: dict[str, int], now: dict[str, int]) -> None:
    """Raise StageChanged where a stage was begun by code of other versions."""
    differing = []
    for name, version in now.items():
        begun_with = there.get(name, 1)  # stages from before versions were written
        if begun_with != version:
            differing.append(f"{name} {begun_with} there, {version} now")
    if differing:
        raise StageChanged(
            f"{folder} holds an unfinished {stage} stage that another version of dpo_jax began: "
            f"{'; '.join(differing)}. Resumed, it would mix the two. Finish it with the version "
            "that began it, or give another --workdir, or remove the folder to begin again."
        )


def _dependencies(config, stage: str) -> dict:
    """As they come back from a file."""
    return json.loads(json.dumps(configs.dependencies(config, stage)))


def _has_progress(folder: pathlib.Path) -> bool:
    """Whether there is something to go on from: completions, or a checkpoint, which has a number
    for a name once it is complete.
    """
    return (folder / COMPLETIONS).exists() or any(
        item.name.isdigit() for item in (folder / "checkpoints").glob("*")
    )


def finish_stage(folder: pathlib.Path, **result) -> None:
    """Marks a stage as complete, with what is worth knowing of its result."""
    write_json(folder / "done.json", result | dict(finished=time.strftime("%Y-%m-%d %H:%M:%S")))


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON in one piece."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes JSON lines in one piece."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Appends JSON lines. Process 0 only."""
    if jax.process_index() == 0:
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: pathlib.Path) -> list[dict]:
    """The JSON lines appended so far, none where there is no file; a last line that a kill cut
    short is cut off.
    """
    if not path.exists():
        return []
    *whole, cut = path.read_text().split("\n")
    if cut:
        write_lines(path, [json.loads(line) for line in whole])
    return [json.loads(line) for line in whole]


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in one piece: a kill leaves the old one or the new one. Process 0 only."""
    if jax.process_index() == 0:
        draft = path.with_suffix(".draft")
        draft.write_text(text)
        os.replace(draft, path)


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path):
    """Holds a stage's folder for this process; the system lets go of it however the process
    ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if jax.process_index() == 0:
            _take(file, folder)
        yield


def _take(file, folder: pathlib.Path) -> None:
    """Another run that shares a finished stage holds it for a moment; one that works in it, for
    long.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"another process is at work in {folder}: wait for it, "
                    "or give another --workdir or --config.run."
                ) from None
            time.sleep(0.1)


def differences(found: dict, wanted: dict, prefix: str = "") -> str:
    """A line for each setting that is not what it was, for a person; "" where all are."""
    missing = "(absent)"
    return "\n".join(
        f"  {prefix}{name}: {found.get(name, missing)!r} there, {wanted.get(name, missing)!r} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name, missing) != wanted.get(name, missing)
    )


def _difference(folder, stage, found, wanted) -> str:
    return (
        f"{folder} holds the {stage} stage of another config:\n"
        + differences(found, wanted, "config.")
        + "\nTake the old values, or give another --workdir (or --config.run=NAME where only the last training "
        "stage differs), or remove the folder to lose it."
    )

"""Stage folders and their files: which stage is done, resumed, or refused as its config changed.

    WORKDIR/NAME/  config.json  what the stage was started with     done.json  it is complete

A stage whose config has changed is never trained over, resumed or mixed once it is done or has a
checkpoint or completions, but for the changes that `changes.py` takes: `start_stage` names the
fields that differ and stops. Files are written whole or not at all. done.json has the rows and the
sha256 of all that the stage left, and a finished stage is used only while its files are those.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
import typing
from collections.abc import Iterable, Iterator

import jax

from dpo_jax import changes as config_changes
from dpo_jax import config as configs
from dpo_jax import run_name, stage_table
from dpo_jax.changes import Change, Started
from dpo_jax.console import say, warn
from dpo_jax.contents import contents_of, file_hashes
from dpo_jax.parallel import processes
from dpo_jax.storage import lease, shadow
from dpo_jax.whole_file import (
    IsoDate,
    Kind,
    append,
    parse_object,
    read_record,
    set_aside,
    whole_file,
    with_sha256,
)

COMPLETIONS = "completions.jsonl"  # what a stage has sampled so far
REFERENCE_COMPLETIONS = "reference_completions.jsonl"  # beside them, of an evaluate stage
COST = "cost.json"  # what a stage took: see costs.py
STOPPED = "stopped.json"  # what was said as a number was not finite, of the last attempt
SUMS = "completions.sums"  # after each write to it: the number of its rows, and their sha256
RESULTS = "results"  # folder of what a stage left at earlier ends: results/STEP
EXPORTS = ("hf", "adapter")  # folders of a stage's model
FILES = "files"  # keys in done.json: of the result's files, and of how its hf/ is stored
EXPORT = "export"
EARLY_STOP = "early_stop"  # of a stage that its patience ended
# Parts of a stage's folder that done.json says nothing of: they may change when the stage is done,
# or have a sha256 of their own.
_NO_RESULT = (
    *("checkpoints", RESULTS, "config.json", "done.json", ".lock", COST),
    *("wandb", "wandb_id", "profile"),
)
_NO_RESULT_SUFFIXES = (".draft", ".damaged")
# What the fields of the records are that are read again.
CONFIG_FIELDS = dict(
    stage=str,
    date=IsoDate,
    depends_on=dict,
    versions=dict,
    config=dict,
    contents=dict,
    changes=list,
)
DONE_FIELDS = {
    FILES: dict,
    EXPORT: dict(asked=str, dtype=str, source=str),
    EARLY_STOP: dict(step=int, steps=int, metric=str, best_step=int),
}
LEDGER_FIELDS = dict(train=dict, eval=dict, prompts=int, fingerprint=str | list)
WEIGHTS_FIELDS = dict.fromkeys(
    ("policy", "base", "start", "reference", "reward", "true"), dict(path=str, fingerprint=str)
)
PATIENCE = 3  # seconds to wait for a stage's folder


def make_workdir(workdir: pathlib.Path) -> None:
    """Make WORKDIR if it is not there; OSError names the flag where that cannot be done."""
    try:
        shadow.make_folder(pathlib.Path(workdir))
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"--workdir={workdir}: expected a folder, and there is a file of this name, or in the "
            "place of a folder above it. Give another --workdir."
        ) from None
    except OSError as error:
        if error.errno is None:  # of a bucket, which says what to do
            raise
        raise OSError(
            f"--workdir={workdir}: this folder cannot be made ({error.strerror}). Give one that "
            "you may write to."
        ) from error
    _check_renames(pathlib.Path(workdir))


def _check_renames(workdir: pathlib.Path) -> None:
    """Raise OSError where a folder that holds files cannot be renamed, as in some mounted buckets.

    Checkpoints and exports get their names in this way, hours later.
    """
    probe = workdir / f".probe-{os.getpid()}"
    renamed = probe.with_suffix(".renamed")
    try:
        probe.mkdir()
        (probe / "file").touch()
    except OSError:  # a finished run may be read where nothing can be written
        return
    try:
        probe.rename(renamed)
    except OSError as error:
        raise OSError(
            f"--workdir={workdir}: a folder with files in it cannot be renamed here "
            f"({error.strerror}), as checkpoints and exports need. If this is a mounted bucket, "
            "give its address instead, such as --workdir=gs://BUCKET/run."
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield the folder of this machine that is WORKDIR, and make it first.

    For a bucket it is a copy, on each host. Process 0 pulls what stages there say of themselves and
    what is in no stage's folder; what a command leaves is pushed while it works, and in the end.
    """
    folder = shadow.place(workdir)
    processes.check_shared(folder)
    processes.from_first(lambda: make_workdir(folder))
    if jax.process_index() or not shadow.is_copy(folder) or shadow.is_pushed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    shadow.pull(folder, shadow.is_outside_stages)
    with shadow.pushed(folder, warn):
        yield folder


class StageChanged(ValueError):
    """A stage's folder was made with another config, other data, other weights or other code."""

    @classmethod
    def with_other_rows(cls, folder: pathlib.Path) -> "StageChanged":
        """Return the error about a stage that an earlier version began, with rows of its own."""
        return cls(
            f"{folder} was begun by an earlier version, which read other rows, unless the data "
            "itself has changed: held-out rows and those of config.data.max_rows were the first "
            "ones of the files, and are drawn by a hash of their prompts now, with those to test "
            "on apart (docs/data.md). Let the version that began the stage finish it, or give "
            "another --workdir."
        )


def start_stage(
    workdir: pathlib.Path,
    config,
    stage: str,
    versions: dict[str, int],
    allowed: frozenset[str] = frozenset(),
) -> tuple[pathlib.Path, str]:
    """Return the stage's folder and its status: "new", "unfinished" or "done". For one process.

    A new folder gets its config.json. Changes that an unfinished stage takes are said, and written
    there; a stage that was done, and is to be trained on, is unfinished again, and what it left is
    set aside. versions, allowed, and what is raised: as for `stage_status`.
    """
    status, changes = stage_status(workdir, config, stage, versions, allowed)
    folder = pathlib.Path(workdir) / configs.folder_names(config)[stage]
    if status == "new":
        _make_stage(folder, config, stage, versions, _date_of_round_1(workdir, config, stage))
    elif status == "unfinished" and changes:
        _take_changes(folder, config, stage, changes)
    return folder, status


def stage_status(
    workdir: pathlib.Path,
    config,
    stage: str,
    versions: dict[str, int],
    allowed: frozenset[str] = frozenset(),
) -> tuple[str, list[Change]]:
    """Return whether a stage is "new", "unfinished" or "done", and its config's changes.

    versions: of the code that a resumed stage must find as it was, {name: version}. allowed: dotted
    names of fields that the user lets a resumed stage change. Raises StageChanged where the folder
    was made with a config whose changes it does not take, or is unfinished and of other versions;
    both are named. Raises ValueError where config.json is damaged.
    """
    folder = pathlib.Path(workdir) / configs.folder_names(config)[stage]
    path = folder / "config.json"
    is_done = (folder / "done.json").exists()
    # Only then is there something that another config would spoil.
    if path.exists() and (is_done or _has_progress(folder)):
        record = read_config(folder)
        changes = _accepted_changes(folder, config, stage, record, allowed)
        if is_done and not config_changes.moves_end(stage, changes):
            return "done", changes  # of whatever versions: it is used as it is
        _check_versions(folder, stage, record.get("versions", {}), versions)
        return "unfinished", changes

    # The lock is taken before, and a kill may leave a draft.
    strange = [
        item for item in folder.glob("*") if item.suffix != ".draft" and item.name != ".lock"
    ]
    if strange and not path.exists():
        raise StageChanged(
            f"{folder} has files but no config.json, which says what they were made with. Put it "
            "back from a copy, or give another --workdir, or remove the folder."
        )
    if allowed:
        _check_is_meant(folder, config, stage, allowed)
    return "new", []


def _make_stage(
    folder: pathlib.Path, config, stage: str, versions: dict[str, int], date: str
) -> None:
    """Make the folder of a stage that begins, with its config.json.

    date: of the stage; "": that of the first run of this stage beside it, or today.
    """
    # An attempt that failed before its first checkpoint binds nobody: nothing is lost.
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ledger.json", "weights.json", COST):
        (folder / name).unlink(missing_ok=True)
    fields = _dependencies(config, stage)
    contents = {name: contents_of(name, fields.get(name, "")) for name in config_changes.PATHS}
    # Written before the stage writes anything, so that all that is there is of a known config.
    record = dict(
        stage=stage,
        date=date or _date_of_others(folder, stage) or datetime.date.today().isoformat(),
        depends_on=fields,
        contents={name: sha256 for name, sha256 in contents.items() if sha256},
        versions=versions,
        config=json.loads(config.to_json()),
    )
    write_record(folder / "config.json", record)


def _take_changes(folder: pathlib.Path, config, stage: str, changes: list[Change]) -> None:
    """Say which changes an unfinished stage takes, and write them to its config.json."""
    step = max(saved_steps(folder / "checkpoints"), default=None)
    told = "; ".join(change.told() for change in changes)
    # A stage without checkpoints has sampled completions, or it would begin anew.
    start = "its completions" if step is None else f"step {step}"
    say(f"{stage}: {told}. It goes on from {start}.")
    # First: a kill in between leaves a stage that is unfinished, of the config that it had.
    if (folder / "done.json").exists():
        _set_result_aside(folder, step)
    record = read_config(folder)
    record["depends_on"] = _dependencies(config, stage)
    record["config"] = json.loads(config.to_json())
    today = datetime.date.today().isoformat()
    rows = config_changes.rows(changes, step, today)
    record["changes"] = record.get("changes", []) + rows
    write_record(folder / "config.json", record)


def _set_result_aside(folder: pathlib.Path, step: int) -> None:
    """Move what a stage left at an earlier end to results/STEP, done.json last."""
    kept = folder / RESULTS / str(step)
    kept.mkdir(parents=True, exist_ok=True)
    for name in (*EXPORTS, "done.json"):
        if not (folder / name).exists():
            continue
        # Of the same step, if its end was moved back and forth.
        if (kept / name).is_dir():
            shutil.rmtree(kept / name)
        (folder / name).replace(kept / name)
    say(f"the result of step {step} is kept in {kept}")


def read_config(folder: pathlib.Path) -> dict:
    """Return the record in a stage's config.json; ValueError where it is damaged."""
    remedy = f"Put it back from a copy, or remove {folder} to make the stage again."
    return read_record(folder / "config.json", remedy, **CONFIG_FIELDS)


def is_of_other_rows(folder: pathlib.Path) -> bool:
    """Return whether a version that drew other rows of the data started a stage.

    False for a folder of no stage. Those versions had no data.on_leak.
    """
    if not (folder / "config.json").exists():
        return False
    data = read_config(folder).get("config", {}).get("data", {})
    return bool(data) and "on_leak" not in data


def runs_of_other_rows(folder: pathlib.Path, stage: str) -> list[str]:
    """Return the names of a stage's other runs beside a folder for which that is so."""
    return [other.name for other, _ in _others(folder, stage) if is_of_other_rows(other)]


def start_date(folder: pathlib.Path) -> datetime.date:
    """Return the day that chat templates take for today in a stage, whenever it is resumed.

    It is the day on which the stage was started, or that of the first run of this stage in the same
    WORKDIR: runs that are compared read the same tokens, and share kept reference log-probs. In a
    later round it is the day of round 1.
    """
    record = read_config(folder)
    # Stages from before the date was written.
    return datetime.date.fromisoformat(record.get("date") or datetime.date.today().isoformat())


def _date_of_others(folder: pathlib.Path, stage: str) -> str:
    """Return the date of the first run of a stage beside this folder; "" if there is none."""
    dates = [record.get("date", "") for _, record in _others(folder, stage)]
    return min(filter(None, dates), default="")


def _date_of_round_1(workdir: pathlib.Path, config, stage: str) -> str:
    """Return the date of a stage in round 1; "" where this is round 1."""
    names = configs.folder_names(config)
    first = configs.folder_names(configs.of_round(config, 1))
    if names[stage] == first[stage]:
        return ""
    return start_date(pathlib.Path(workdir) / first[stage]).isoformat()


def _others(folder: pathlib.Path, stage: str) -> Iterator[tuple[pathlib.Path, dict]]:
    """Yield the folders of other runs of a stage in the same WORKDIR, with their config.json."""
    for path in sorted(folder.parent.glob("*/config.json")):
        other = path.parent
        if other == folder or not ((other / "done.json").exists() or _has_progress(other)):
            continue
        remedy = f"Put it back from a copy, or move {other} out of {other.parent}."
        try:
            record = read_record(path, remedy, **CONFIG_FIELDS)
        except ValueError:
            if (other / ".lock").exists():
                raise
            continue  # a folder that somebody put there
        if record.get("stage") == stage:
            yield other, record


def _accepted_changes(
    folder: pathlib.Path, config, stage: str, record: dict, allowed: frozenset[str]
) -> list[Change]:
    """Return the changes of its config that a stage takes; StageChanged names those it refuses."""
    started = _started(folder, config, stage, record)
    now = _dependencies(config, stage)
    changes, refused = config_changes.compare(started, now, allowed, contents_of)
    if not refused:
        return changes
    there = {name: started.fields[name] for name in refused if name in started.fields}
    wanted = {name: now[name] for name in refused if name in now}
    advice = "Use the old values, or give another --workdir"
    name = _other_name(folder, config, stage, there, wanted)
    if name:
        advice += f" or another name, such as --config.run={name}"
    advice += ". Or remove the folder, if it is not needed."
    if there == wanted:
        advice = f"Put the old files back{advice.removeprefix('Use the old values')}"
    if _is_of_earlier_end(stage, list(refused)):
        advice = (
            "It was made from what an earlier stage had become by its old end. Move the folder "
            f"away, to be made again from the new one; or {advice[0].lower()}{advice[1:]}"
        )
    raise StageChanged(
        f"{folder} holds the {stage} stage of another config:\n"
        f"{differences(there, wanted, 'config.', reasons=refused)}\n"
        f"{advice}"
    )


def _started(folder: pathlib.Path, config, stage: str, record: dict) -> Started:
    """Return what a stage's folder says of it. record: that of its config.json."""
    # Fields that are newer than the folder have their defaults; others no longer matter.
    default = configs.of_round(configs.default(tuple(config.stages)), config.rounds)
    defaults = _dependencies(default, stage)
    fields = {
        name: value
        for name, value in (defaults | record.get("depends_on", {})).items()
        if configs.may_matter(config, stage, name)
    }
    last_step = max(saved_steps(folder / "checkpoints"), default=None)
    is_done = (folder / "done.json").exists()
    is_evaluated = last_step is not None and _is_evaluated(
        folder, last_step, fields.get(f"{stage}.keep_best", "")
    )
    contents = record.get("contents", {})
    return Started(stage, fields, contents, last_step, is_done, is_evaluated)


def _is_evaluated(folder: pathlib.Path, step: int, metric: str) -> bool:
    """Return whether the row of a step in metrics.jsonl has a metric of evaluations."""
    path = folder / "metrics.jsonl"
    if not metric or not path.exists():
        return False
    rows = [parse_object(line) for line in path.read_bytes().splitlines()]
    return any(row.get("step") == step and metric in row for row in rows if row)


def _is_of_earlier_end(stage: str, names: list[str]) -> bool:
    """Return whether all of some fields are ends of training, of stages before this one."""
    ends = [name.rpartition(".") for name in names]
    return all(last in config_changes.END and block != stage for block, _, last in ends)


def _check_is_meant(folder: pathlib.Path, config, stage: str, allowed: frozenset[str]) -> None:
    """Raise StageChanged where a stage would begin, and a run beside it is the one to go on."""
    for other, changes in _takers_beside(folder, config, stage, allowed):
        fields = ", ".join(change.field for change in changes)
        held = f"a run that differs in {fields} alone" if fields else "the run of this config"
        raise StageChanged(
            f"--allow_change: {folder} holds nothing to go on from, and {other} holds {held}. Give "
            f"--config.run={other.name} to go on with that one, or leave out --allow_change to "
            "begin a run of its own."
        )


def check_is_only_taker(
    folder: pathlib.Path, config, stage: str, changes: list[Change], allowed: frozenset[str]
) -> None:
    """Raise StageChanged where the user allows changes that a run beside a stage takes too.

    changes: those that the stage takes. For a run whose name the user has not given: it has that of
    the fields that are not allowed to change, as all runs that differ in those that are.
    """
    if all(change.reason != config_changes.BY_FLAG for change in changes):
        return
    others = [other for other, _ in _takers_beside(folder, config, stage, allowed)]
    if others:
        names = [path.name for path in (folder, *others)]
        raise StageChanged(
            f"--allow_change: several runs in {folder.parent} can go on with this config: "
            f"{', '.join(names)}. Say which one, such as --config.run={names[-1]}."
        )


def _takers_beside(
    folder: pathlib.Path, config, stage: str, allowed: frozenset[str]
) -> Iterator[tuple[pathlib.Path, list[Change]]]:
    """Yield the folders of other runs that take this config, with the changes that they take.

    config.run names the last training stage alone: other stages have none beside them.
    """
    if stage not in stage_table.training_stages(config)[-1:]:
        return
    now = _dependencies(config, stage)
    for other, record in _others(folder, stage):
        started = _started(other, config, stage, record)
        changes, refused = config_changes.compare(started, now, allowed, contents_of)
        if not refused:
            yield other, changes


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
    return bool(saved_steps(folder / "checkpoints"))


def saved_steps(checkpoints: pathlib.Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, which have a number for a name."""
    in_bucket = shadow.checkpoint_steps(checkpoints)
    if in_bucket is not None:
        return in_bucket
    return sorted(int(item.name) for item in checkpoints.glob("*") if item.name.isdigit())


def finish_stage(folder: pathlib.Path, **result) -> None:
    """Mark a stage as complete, with what is worth knowing of its result. Process 0 only."""
    if jax.process_index():
        return
    finished = time.strftime("%Y-%m-%d %H:%M:%S")
    files = {name: _measure(folder / name) for name in result_files(folder)}
    write_record(folder / "done.json", result | {"finished": finished, FILES: files})


def read_done(folder: pathlib.Path, remedy: str = "") -> dict:
    """Return the record in a stage's done.json; ValueError where it is damaged.

    remedy: what to do then, where the stage's command does not write the record again.
    """
    if not remedy:
        remedy = f"Remove it and run the stage's command again: {_how_made_again(folder)}."
    return read_record(folder / "done.json", remedy, **DONE_FIELDS)


def read_ledger(folder: pathlib.Path, **fields: Kind) -> dict:
    """Return the record in a stage's ledger.json; ValueError where it is damaged.

    fields: as for `read_record`, of those that are used beside what all ledgers have.
    """
    remedy = _without("the data is then not compared")
    return read_record(folder / "ledger.json", remedy, **LEDGER_FIELDS | fields)


def read_weights(folder: pathlib.Path) -> dict:
    """Return the record in a stage's weights.json; ValueError where it is damaged."""
    remedy = _without("the weights are then not compared")
    return read_record(folder / "weights.json", remedy, **WEIGHTS_FIELDS)


def _without(what: str) -> str:
    """Return the remedy for a record that an unfinished stage compares with, and writes again."""
    return (
        f"Put it back from a copy, or remove it and run the stage's command again: {what} with "
        "those that the stage began with."
    )


def check_files(folder: pathlib.Path) -> None:
    """Raise ValueError with the first file of a finished stage that is not what was written."""
    for problem in problems_of(folder).values():
        if problem:
            raise ValueError(problem)


def problems_of(folder: pathlib.Path, remedy: str = "") -> dict[str, str]:
    """Return what is wrong with each file of a finished stage, by its name; "" if it is whole.

    remedy: what to do then, where the stage's command does not write its files again.
    """
    recorded = read_done(folder).get(FILES, {})
    # All at once, before they are compared one by one.
    file_hashes([folder / name for name in recorded if _is_within(name)])
    return {name: _problem_of(folder, name, value, remedy) for name, value in recorded.items()}


def _is_within(name: str) -> bool:
    """Return whether a file's name in done.json leads to a place in the stage's folder."""
    inside = pathlib.PurePosixPath(name)
    return not inside.is_absolute() and ".." not in inside.parts


def _problem_of(folder: pathlib.Path, name: str, recorded: dict, remedy: str) -> str:
    """Return what is wrong with a file of a finished stage, and what to do; "" for nothing.

    remedy: as for `problems_of`.
    """
    path = folder / name
    if not _is_within(name):
        return _changed(folder, f"names {name!r}, which is not in its folder", remedy)
    # What was written has its sha256 in done.json; what somebody changed may lack anything.
    if not _is_measure(recorded):
        return _changed(folder, f"does not say the bytes and the sha256 of {name}", remedy)
    if not path.is_file():
        found = f"{path} is no file" if path.exists() else f"{path} is gone"
    elif path.stat().st_size != recorded["bytes"] or file_hashes([path]) != [recorded["sha256"]]:
        found = f"{path} is not what was written there: {_difference(recorded, _measure(path))}"
    else:
        return ""
    if remedy:
        return f"{found}. {remedy}"
    # An export is written as a whole.
    part = folder / pathlib.PurePath(name).parts[0]
    done = folder / "done.json"
    removed = f"{part} and {done}" if part.exists() else done
    return (
        f"{found}. Put it back from a copy; or remove {removed} and run the stage's command again: "
        f"{_how_made_again(folder)}."
    )


def _is_measure(recorded) -> bool:
    """Return whether a value is what `_measure` returns."""
    if not isinstance(recorded, dict) or not isinstance(recorded.get("sha256"), str):
        return False
    counts = [recorded.get("bytes"), recorded.get("rows", 0)]
    return all(type(count) is int for count in counts)


def _changed(folder: pathlib.Path, found: str, remedy: str) -> str:
    """Say that somebody has changed a stage's done.json, and what to do."""
    again = f"Remove done.json and run the stage's command again: {_how_made_again(folder)}."
    return f"{folder / 'done.json'} {found}: it was changed. {remedy or again}"


def _difference(recorded: dict, found: dict) -> str:
    """Say in which way a file differs from what is recorded of it."""
    for unit in ("rows", "bytes"):
        if unit in recorded and unit in found and recorded[unit] != found[unit]:
            return f"it has {found[unit]:,} {unit}, and {recorded[unit]:,} were written"
    return "its sha256 is not that of what was written"


def _how_made_again(folder: pathlib.Path) -> str:
    """Say what a stage does that is no longer marked as complete."""
    if (folder / "checkpoints").exists() and _has_progress(folder):
        return "it writes its result again from its last checkpoint"
    if _has_progress(folder):
        return "it writes its result again from its completions"
    return "the stage is made again"


def result_files(folder: pathlib.Path) -> list[str]:
    """Return the names of the files that a stage's result consists of."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_other = name.parts[0] in _NO_RESULT or "tfevents" in name.name
        if path.is_file() and not is_other and not name.suffix.startswith(_NO_RESULT_SUFFIXES):
            names.append(name.as_posix())
    return names


def _measure(path: pathlib.Path) -> dict:
    """Return what is recorded of a file: bytes, sha256, and rows of one that has rows."""
    (sha256,) = file_hashes([path])
    found = dict(bytes=path.stat().st_size, sha256=sha256)
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            found["rows"] = sum(1 for _ in file)
    return found


def write_record(path: pathlib.Path, record: dict) -> None:
    """Write a JSON object that `read_record` knows again. Process 0 only."""
    write_json(path, with_sha256(record))


def write_json(path: pathlib.Path, value) -> None:
    """Write JSON in one piece."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Write JSON lines in one piece."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: pathlib.Path) -> list[dict]:
    """Return the JSON lines appended so far, none if there is no file.

    A last line that a kill cut short is removed from the file. Raises ValueError that names any
    other line that is not a JSON object.
    """
    if not path.exists():
        return []
    # Each whole line ends in a newline, so what follows the last newline was cut.
    *whole, cut = path.read_bytes().split(b"\n")
    rows = [parse_object(line) for line in whole]
    if None in rows:
        raise ValueError(
            f"{path} line {rows.index(None) + 1} is not the JSON object that was written there: "
            "the file has been damaged. Put it back from a copy, or remove this line and all after "
            "it, which are then made again."
        )
    if cut:
        write_lines(path, rows)
    return rows


class _Compared(typing.NamedTuple):
    """Rows of a file as their sums know them."""

    counts: list[int]  # how many there were after each write, up to the last that is whole
    problem: str = ""  # what is wrong with the others
    torn: bytes = b""  # what a kill left of the last line of the sums

    @property
    def whole(self) -> int:
        return self.counts[-1] if self.counts else 0


class SealedRows:
    """Rows that are appended to a file as they are made, and sums by which they are known again.

    Each write adds a line to the sums: the number of all rows so far, and their sha256. Rows that
    are not what was written are set aside with a line that says so, and are made again; so are
    those that the sums do not count, if they are more than a kill leaves. For process 0.
    """

    def __init__(self, path: pathlib.Path, sums: pathlib.Path, at_once: int = 0):
        """Open the file of the rows and that of the sums; neither need be there.

        at_once: the most rows that are appended at once; 0: as many as the sums tell of.
        """
        self._path = path
        self._sums = sums
        self._at_once = at_once
        self._digest = hashlib.sha256()
        self._count = 0

    def read(self) -> list[dict]:
        """Return the rows that are whole; the files are cut to them."""
        lines, torn = self._lines()
        if self._sums.exists():
            compared = self._compare(lines)
        else:  # of an earlier version, or lost: rows are all that is known
            rows = [parse_object(line) for line in lines]
            whole = rows.index(None) if None in rows else len(rows)
            compared = _Compared([whole], "" if whole == len(lines) else self._changed_from(whole))
        whole = compared.whole
        problem = compared.problem
        if self._sums.exists() and not self._path.exists():
            problem = self._changed_from(0)
        if problem:
            kept_as = f", and is now {set_aside(self._path).name}" if self._path.exists() else ""
            warn(f"{problem}{kept_as}. Those rows are made again.")
        # Also where a kill cut the sums: the next line would be added to the torn one.
        is_cut = torn or compared.torn or whole < len(lines)
        if problem or is_cut or not compared.counts or not self._sums.exists():
            self._rewrite(lines[:whole], compared.counts)
        else:
            self._digest = hashlib.sha256(self._path.read_bytes())
            self._count = whole
        return [json.loads(line) for line in lines[:whole]]

    def problem(self) -> str:
        """Return what is wrong with the rows by their sums; "" if nothing is. Only reads."""
        lines, _ = self._lines()
        return self._compare(lines).problem

    def append(self, rows: list[dict]) -> None:
        """Append rows, and then the sums: rows that these do not count yet are made again."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        append(self._path, data)
        self._digest.update(data)
        self._count += len(rows)
        append(self._sums, _sum(self._count, self._digest).encode())

    def _lines(self) -> tuple[list[bytes], bytes]:
        """Return the whole lines of the file, and what a kill left of the one after them."""
        if not self._path.exists():
            return [], b""
        *lines, torn = self._path.read_bytes().split(b"\n")
        return lines, torn

    def _compare(self, lines: list[bytes]) -> _Compared:
        """Compare the lines of the file with the sums."""
        digest = hashlib.sha256()
        counts = []
        count = 0
        *entries, torn = self._sums.read_bytes().split(b"\n")
        for entry in entries:
            try:
                number, _, expected = entry.decode().partition(" ")
                upto = int(number)
            except ValueError:
                return _Compared(counts, self._changed_from(count), torn)
            part = lines[count:upto]
            for line in part:
                digest.update(line + b"\n")
            if upto != count + len(part) or digest.hexdigest() != expected:
                return _Compared(counts, self._changed_from(count), torn)
            count = upto
            counts.append(count)
        uncounted = len(lines) - count
        problem = ""
        if uncounted and not self._may_be_one_write(uncounted, counts):
            rows = "1 row" if uncounted == 1 else f"{uncounted:,} rows"
            problem = f"{self._path} has {rows} that {self._sums.name} does not count"
        return _Compared(counts, problem, torn)

    def _changed_from(self, count: int) -> str:
        return f"{self._path} is not what was written there from row {count + 1} on"

    def _may_be_one_write(self, uncounted: int, counts: list[int]) -> bool:
        """Return whether so many rows may be of one write, whose sum a kill prevented.

        Else lines of the sums have been lost.
        """
        # Sums begin with a line of the first write, or of no rows.
        if not counts:
            return False
        sizes = [after - before for before, after in zip([0, *counts], counts, strict=False)]
        most = max(self._at_once, *sizes)
        # Without any, this may be the first write.
        return not most or uncounted <= most

    def forget(self) -> None:
        """Forget the sums of rows that the user has removed."""
        self._sums.unlink(missing_ok=True)

    def cut(self, count: int) -> None:
        """Keep the first rows of those that were read, so that the others are made again."""
        lines, _ = self._lines()
        self._rewrite(lines[:count], self._compare(lines).counts)

    def _rewrite(self, lines: list[bytes], counts: list[int]) -> None:
        """Write the files anew with these rows; counts: the writes that they were made by."""
        digest = hashlib.sha256()
        done = 0
        sums = []
        # The sums go on telling how many rows are appended at once.
        for count in [*(count for count in counts if count < len(lines)), len(lines)]:
            for line in lines[done:count]:
                digest.update(line + b"\n")
            done = count
            sums.append(_sum(count, digest))
        self._digest = digest
        self._count = len(lines)
        # A kill in between leaves sums of more rows than there are.
        self._sums.unlink(missing_ok=True)
        with whole_file(self._path) as draft:
            draft.write_bytes(b"".join(line + b"\n" for line in lines))
        with whole_file(self._sums) as draft:
            draft.write_text("".join(sums))


def _sum(count: int, digest) -> str:
    """Return the line of the sums for so many rows; digest: hashlib's, of them."""
    return f"{count} {digest.hexdigest()}\n"


def completions(folder: pathlib.Path, at_once: int = 0) -> SealedRows:
    """Return the rows that a stage samples, in its folder; at_once: as for SealedRows."""
    return SealedRows(folder / COMPLETIONS, folder / SUMS, at_once)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one piece: a kill leaves the old one or the new one. Process 0 only."""
    if jax.process_index() == 0:
        with whole_file(path) as draft:
            draft.write_text(text)


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path):
    """Hold a stage's folder for this process; the system lets go of it however that ends.

    One that is a copy of a bucket's is pulled before, pushed within, and in the end the same for
    all processes. Raises RuntimeError if another process holds it for longer than PATIENCE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file, contextlib.ExitStack() as held:
        # One process takes the lock for all: the others would be refused.
        if jax.process_index() == 0:
            flags = "--workdir or --config.run"
            _take(file, folder, flags)
            held.enter_context(lease.held(folder, flags, warn))
            shadow.pull(folder, exactly=True)
            held.callback(shadow.push, folder)
        yield
    if shadow.is_copy(folder):
        processes.wait_for_all("pushed")
        if jax.process_index():
            shadow.pull(folder)


@contextlib.contextmanager
def lock_output(path: pathlib.Path, beside: Iterable[pathlib.Path] = ()):
    """Hold a file that rows are added to for this process, by the file .NAME.lock beside it.

    beside: the files that go with it, those it cannot do without before it. What is a copy of a
    bucket's is pulled before, and pushed within. Raises RuntimeError if another process holds it
    for longer than PATIENCE.
    """
    with (
        path.with_name(f".{path.name}.lock").open("w") as file,
        contextlib.ExitStack() as held,
    ):
        if jax.process_index() == 0:
            _take(file, path, "--out")
            names = [*(other.name for other in beside), path.name]
            held.enter_context(lease.held(path, "--out", warn, is_file=True))
            shadow.pull(path.parent, names=names, exactly=True)
            held.enter_context(shadow.pushed(path.parent, warn, names))
        yield


def _take(file, place: pathlib.Path, flags: str) -> None:
    """Lock an open file for work in a place, after a wait if need be; flags: that name it."""
    # A run that only finds the stage done holds it for a moment; one that works in it, for long.
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"another process is at work in {place}: wait for it, or give another {flags}."
                ) from None
            time.sleep(0.1)
        except OSError as error:
            # Some network file systems, and folders mounted from a bucket, have no locks.
            _say_unlocked(place.parent, error.strerror)
            return None


@functools.cache
def _say_unlocked(workdir: pathlib.Path, reason: str) -> None:
    """Warn once that two runs at once would not notice each other."""
    warn(f"{workdir} cannot be locked ({reason}): start no second run there while this one works.")


def differences(
    found: dict,
    wanted: dict,
    prefix: str = "",
    place: str = "the folder",
    reasons: dict[str, str] | None = None,
) -> str:
    """Return a line for each setting that differs, for a person; "" if none does.

    place: where the found settings are. reasons: why one may not differ, by its name.
    """
    missing = "(absent)"
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        there, now = found.get(name, missing), wanted.get(name, missing)
        reason = (reasons or {}).get(name, "")
        if there == now and not reason:
            continue
        # A path may be refused for what it leads to.
        values = f"{now!r}" if there == now else f"{there!r} in {place}, {now!r} now"
        line = f"  {prefix}{name}: {values}"
        lines.append(f"{line} ({reason})" if reason else line)
    return "\n".join(lines)

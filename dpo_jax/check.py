"""Verify what runs have left: dpo-jax check WORKDIR

Prints a line for each part of each stage in WORKDIR: its records, the files of its result, its
checkpoints, its completions, its metrics, and the reference's log-probs; and for each file that
`sample` or a judge has written there. "whole" means that it is what was written: rows and sha256
are those that were recorded, and the sums of a checkpoint's bits are those of its save. "not
recorded" means that nothing is known of it, as an earlier version wrote it. Reads only. It reads
everything, so it takes as long as reading the files does, and memory for the largest part of a
checkpoint, the optimiser's state.

Exit status: 0 if nothing is damaged, 1 if something is.
"""

import collections
import functools
import os
import pathlib
import sys
import typing
from collections.abc import Iterator

from dpo_jax import command_line
from dpo_jax import config as configs
from dpo_jax.storage import shadow


class Finding(typing.NamedTuple):
    """A part of a WORKDIR by its path, and what is known of it."""

    path: pathlib.Path
    problem: str = ""  # what is wrong with it
    note: str = ""  # why nothing is known to be wrong, where it cannot be compared


FINISHED_EARLIER = "not recorded (finished by an earlier version)"


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each part of what runs have left in WORKDIR."""
    yield from _stages(workdir)
    yield from _outputs(workdir)


def _stages(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each part of the stages in a folder, later rounds among them."""
    for folder in sorted(path for path in workdir.iterdir() if path.is_dir()):
        if folder.name == "reference":
            yield from _reference(folder)
        elif _is_stage(folder):
            yield from _stage(folder)
        elif configs.is_round_folder(folder.name):
            yield from _stages(folder)


def _is_stage(folder: pathlib.Path) -> bool:
    """Return whether a folder is a stage's, of which config.json may be gone."""
    return any(
        (folder / name).exists() for name in (".lock", "checkpoints", "config.json", "done.json")
    )


def _stage(folder: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each part of a stage's folder."""
    from dpo_jax import costs, workdir
    from dpo_jax.evaluation import chat_api, judge

    if not any(path.name != ".lock" for path in folder.iterdir()):
        return  # an attempt that ended before it began
    readers = {
        "config.json": workdir.read_config,
        "done.json": workdir.read_done,
        "ledger.json": workdir.read_ledger,
        "weights.json": workdir.read_weights,
        "cost.json": costs.read,
    }
    for name, read in readers.items():
        # Only the first is there in every stage.
        if name == "config.json" or (folder / name).exists():
            yield Finding(folder / name, _problem(read, folder))

    is_done = (folder / "done.json").exists()
    is_readable = is_done and not _problem(workdir.read_done, folder)
    if is_readable and workdir.FILES in workdir.read_done(folder):
        yield from _result(folder)
    elif is_readable:
        parts = {pathlib.PurePath(name).parts[0] for name in workdir.result_files(folder)}
        for part in sorted(parts - {"ledger.json", "weights.json"}):
            yield Finding(folder / part, note=FINISHED_EARLIER)
    else:
        if (folder / workdir.COMPLETIONS).exists():
            yield _rows(folder / workdir.COMPLETIONS, folder / workdir.SUMS)
        if (folder / judge.JUDGEMENTS).exists():
            yield Finding(
                folder / judge.JUDGEMENTS, _problem(chat_api.read, folder / judge.JUDGEMENTS)
            )
    for kept in sorted((folder / workdir.RESULTS).glob("*")):
        yield from _earlier_result(kept)
    yield from _checkpoints(folder, is_done)


def _earlier_result(kept: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each model that a stage left at an earlier end."""
    from dpo_jax import workdir

    # The stage has gone on from there: it writes no earlier result again.
    remedy = f"Put it back from a copy, or remove {kept}: no stage reads it."
    record = kept / "done.json"
    problem = f"{record} is gone. {remedy}"
    if record.exists():
        problem = _problem(functools.partial(workdir.read_done, remedy=remedy), kept)
    yield Finding(record, problem)
    if problem:
        return
    for finding in _result(kept, remedy):
        # Its other files went on with the stage.
        if finding.path.relative_to(kept).parts[0] in workdir.EXPORTS:
            yield finding


def _problem(read, path: pathlib.Path) -> str:
    """Return the message with which a reader refuses what is at a path; "" if it reads it."""
    try:
        read(path)
    except FileNotFoundError as error:
        folder = pathlib.Path(error.filename).parent
        return (
            f"{error.filename} is gone. Put it back from a copy, or remove {folder}, which is then "
            "made again"
        )
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _result(folder: pathlib.Path, remedy: str = "") -> Iterator[Finding]:
    """Yield a Finding for each file of a finished stage, and one for a whole subfolder.

    remedy: what to do about a damaged one, where the stage does not write it again.
    """
    from dpo_jax import workdir

    by_part = collections.defaultdict(dict)
    for name, problem in workdir.problems_of(folder, remedy).items():
        by_part[pathlib.PurePath(name).parts[0]][name] = problem
    for part, problems in by_part.items():
        damaged = {name: problem for name, problem in problems.items() if problem}
        for name, problem in damaged.items():
            yield Finding(folder / name, problem)
        if not damaged and part not in ("ledger.json", "weights.json"):
            yield Finding(folder / part)


def _checkpoints(folder: pathlib.Path, is_done: bool) -> Iterator[Finding]:
    """Yield a Finding for each checkpoint, and for the metrics of an unfinished stage."""
    from dpo_jax import workdir
    from dpo_jax.training import checkpoint, metrics

    checkpoints = folder / "checkpoints"
    newest = None  # that is whole
    rows = {}
    passed_over = []  # damaged ones that are newer
    for step in reversed(workdir.saved_steps(checkpoints)):
        path = checkpoints / str(step)
        try:
            rows_then = checkpoint.verify(checkpoints, step)
        except checkpoint.DamagedCheckpoint as error:
            if is_done and isinstance(error, checkpoint.NoSums):
                yield Finding(path, note=FINISHED_EARLIER)
            elif is_done:
                yield Finding(path, f"{error}. {_USE_WHEN_DONE}")
            elif newest is None:
                passed_over.append((path, error))
            else:
                yield Finding(path, f"{error}. {_USE_WHEN_OLDER.format(newest=newest)}")
            continue
        if newest is None:
            newest, rows = step, rows_then
            for damaged, error in passed_over:
                yield Finding(damaged, f"{error}. A resumed run passes it over for step {newest}")
        yield Finding(path)
    if newest is None:
        for damaged, error in passed_over:
            remedy = f"Put it back from a copy, or remove {checkpoints} to begin the stage again"
            yield Finding(damaged, f"{error}. None is whole, so a resumed run stops. {remedy}")
    elif not is_done:
        path = folder / "metrics.jsonl"
        is_whole = metrics.holds(path, rows)
        found = f"{path} does not hold the {rows.get('rows', 0)} rows of its save. A resumed run "
        found += "keeps those that can be read, and the file as it is under another name"
        yield Finding(path, "" if is_whole else found)


# What a damaged checkpoint means for the run.
_USE_WHEN_DONE = (
    "The stage is finished: it is read only if its hf/ has to be written again, or to train on"
)
_USE_WHEN_OLDER = (
    "A resumed run begins at step {newest}; it is read only if it is the best one by keep_best"
)


def _outputs(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each file that `sample` or a judge has written, in no stage's folder."""
    from dpo_jax.evaluation import chat_api, judge
    from dpo_jax.workdir import COMPLETIONS, SUMS

    for here, folders, names in os.walk(workdir):
        parent = pathlib.Path(here)
        # A stage's folder, also of another WORKDIR inside this one, or a model's.
        is_other = "checkpoints" in folders or not {"config.json", "done.json"}.isdisjoint(names)
        if is_other or parent.name in ("reference", "wandb"):
            folders.clear()
            continue
        folders.sort()
        for name in sorted(names):
            path = parent / name
            if name == COMPLETIONS:
                yield _rows(path, parent / SUMS)
            elif name == judge.JUDGEMENTS:
                yield Finding(path, _problem(chat_api.read, path))
            elif name == "settings.json" and COMPLETIONS in names:
                yield Finding(path, _problem(_read_settings, path))
            elif name.endswith(".settings.json"):
                rows = parent / name.removesuffix(".settings.json")
                yield Finding(path, _problem(_read_settings, path))
                if rows.exists():
                    yield _rows(rows, parent / f"{rows.name}.sums")


def _read_settings(path: pathlib.Path) -> None:
    """Read what rows beside a file were made with; ValueError where it is damaged."""
    from dpo_jax.whole_file import read_record

    read_record(path, "Put it back from a copy, or remove it and the rows beside it.")


def _rows(path: pathlib.Path, sums: pathlib.Path) -> Finding:
    """Return the Finding for rows that were appended to a file as they were made."""
    from dpo_jax.workdir import SealedRows

    if not sums.exists():
        return Finding(path, note=f"not recorded ({sums.name} is not there)")
    problem = SealedRows(path, sums).problem()
    return Finding(path, problem and f"{problem}. The command that makes them makes them again")


def _reference(folder: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each file of kept log-probs."""
    from dpo_jax.training import reference_cache

    for path in sorted(folder.glob("*/*.npy")):
        _, problem = reference_cache.inspect(path)
        remedy = f"Remove {path.parent}, and the log-probs are computed again."
        yield Finding(path, f"{path}: {problem}. {remedy}" if problem else "")
    for seal in sorted(folder.glob("*/*.sha256")):
        path = seal.with_suffix(".npy")
        if not path.exists():
            remedy = f"Remove {seal}, and the log-probs are computed again."
            yield Finding(path, f"{path} is gone. {remedy}")


def report(workdir: pathlib.Path) -> int:
    """Print a line for each part of WORKDIR as it is checked; return how many are not whole.

    Raises ValueError where no run has left anything.
    """
    checked = damaged = unknown = 0
    for path, problem, note in check(workdir):
        print(f"{path.relative_to(workdir)!s:<40}  {problem or note or 'whole'}", flush=True)
        checked += 1
        damaged += bool(problem)
        unknown += bool(note)
    if not checked:
        raise ValueError(
            f"{workdir} holds nothing that a run has left. Give the WORKDIR of a run, the folder "
            "that holds its stages."
        )
    aside = []
    for stages in ("*", "round_*/*"):
        for place in ("", "checkpoints/"):
            aside += sorted(workdir.glob(f"{stages}/{place}*.damaged*"))
    if aside:
        names = ", ".join(str(path.relative_to(workdir)) for path in aside)
        print(f"set aside by a run that found them damaged: {names}")
    rest = f", {unknown} not recorded" if unknown else ""
    print(f"{checked - damaged - unknown} of {checked} are whole{rest}")
    return damaged


def main():
    # No accelerator is needed, and another run may have it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    def check_workdir(workdir: str):
        if not workdir:
            raise ValueError("dpo-jax check WORKDIR: give the WORKDIR of a run.")
        folder = shadow.place(workdir)
        shadow.pull(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder. Give the WORKDIR of a run."
            )
        if report(folder):
            sys.exit(1)

    command_line.run(check_workdir, __doc__, positional="WORKDIR")


if __name__ == "__main__":
    main()

"""Verify what runs have left: dpo-jax check WORKDIR

Prints a line for each part of each stage in WORKDIR: its records, the files of its result, its
checkpoints, its completions, its metrics, and the reference's log-probs. "whole" means that it is
what was written there: rows and sha256 are those that were recorded, and the sums of a checkpoint's
bits are those of its save. Reads only. It reads everything, so it takes as long as reading the
files does, and memory for the largest part of a checkpoint, the optimiser's state.

Exit status: 0 if all is whole, 1 if something is not.
"""

import collections
import os
import pathlib
import sys
from collections.abc import Iterator

from dpo_jax import command_line
from dpo_jax.storage import shadow

# A Finding: a part of a WORKDIR by its path, and what is wrong with it; "" if it is whole.
Finding = tuple[pathlib.Path, str]


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each part of what runs have left in WORKDIR."""
    for folder in sorted(path for path in workdir.iterdir() if path.is_dir()):
        if folder.name == "reference":
            yield from _reference(folder)
        elif _is_stage(folder):
            yield from _stage(folder)


def _is_stage(folder: pathlib.Path) -> bool:
    """Return whether a folder is a stage's, of which config.json may be gone."""
    return any(
        (folder / name).exists() for name in (".lock", "checkpoints", "config.json", "done.json")
    )


def _stage(folder: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each part of a stage's folder."""
    from dpo_jax import workdir

    if not any(path.name != ".lock" for path in folder.iterdir()):
        return  # an attempt that ended before it began
    readers = {
        "config.json": workdir.read_config,
        "done.json": workdir.read_done,
        "ledger.json": workdir.read_ledger,
        "weights.json": workdir.read_weights,
    }
    for name, read in readers.items():
        # Only the first is there in every stage.
        if name == "config.json" or (folder / name).exists():
            yield folder / name, _problem(read, folder)

    is_done = (folder / "done.json").exists()
    if is_done and not _problem(workdir.read_done, folder):
        yield from _result(folder)
    elif (folder / workdir.COMPLETIONS).exists():
        yield folder / workdir.COMPLETIONS, workdir.completions(folder).problem()
    yield from _checkpoints(folder, is_done)


def _problem(read, folder: pathlib.Path) -> str:
    """Return the message with which a reader refuses a stage's file; "" if it reads it."""
    try:
        read(folder)
    except FileNotFoundError as error:
        return f"{error.filename} is gone"
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _result(folder: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each file of a finished stage, and one for a whole subfolder."""
    from dpo_jax import workdir

    by_part = collections.defaultdict(dict)
    for name, problem in workdir.problems_of(folder).items():
        by_part[pathlib.PurePath(name).parts[0]][name] = problem
    for part, problems in by_part.items():
        damaged = {name: problem for name, problem in problems.items() if problem}
        for name, problem in damaged.items():
            yield folder / name, problem
        if not damaged and part not in ("ledger.json", "weights.json"):
            yield folder / part, ""


def _checkpoints(folder: pathlib.Path, is_done: bool) -> Iterator[Finding]:
    """Yield a Finding for each checkpoint, and for the metrics of an unfinished stage."""
    from dpo_jax import workdir
    from dpo_jax.training import checkpoint, metrics

    rows = None
    for step in workdir.saved_steps(folder / "checkpoints"):
        path = folder / "checkpoints" / str(step)
        try:
            rows = checkpoint.verify(folder / "checkpoints", step)
        except checkpoint.DamagedCheckpoint as error:
            yield path, f"{error}. A resumed run passes it over"
        else:
            yield path, ""
    if rows is not None and not is_done:
        path = folder / "metrics.jsonl"
        is_whole = metrics.holds(path, rows)
        yield path, "" if is_whole else f"{path} does not hold the {rows['rows']} rows of its save"


def _reference(folder: pathlib.Path) -> Iterator[Finding]:
    """Yield a Finding for each file of kept log-probs."""
    from dpo_jax.training import reference_cache

    for path in sorted(folder.glob("*/*.npy")):
        _, problem = reference_cache.inspect(path)
        remedy = f"Remove {path.parent}, and the log-probs are computed again."
        yield path, f"{path}: {problem}. {remedy}" if problem else ""
    for seal in sorted(folder.glob("*/*.sha256")):
        path = seal.with_suffix(".npy")
        if not path.exists():
            yield path, f"{path} is gone. Remove {seal}, and the log-probs are computed again."


def report(workdir: pathlib.Path) -> int:
    """Print a line for each part of WORKDIR as it is checked; return how many are not whole.

    Raises ValueError where no run has left anything.
    """
    checked = damaged = 0
    for path, problem in check(workdir):
        print(f"{path.relative_to(workdir)!s:<40}  {problem or 'whole'}", flush=True)
        checked += 1
        damaged += bool(problem)
    if not checked:
        raise ValueError(
            f"{workdir} holds nothing that a run has left. Give the WORKDIR of a run, the folder "
            "that holds its stages."
        )
    aside = sorted([*workdir.glob("*/*.damaged*"), *workdir.glob("*/checkpoints/*.damaged*")])
    if aside:
        names = ", ".join(str(path.relative_to(workdir)) for path in aside)
        print(f"set aside by a run that found them damaged: {names}")
    print(f"{checked - damaged} of {checked} are whole")
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

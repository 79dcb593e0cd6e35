"""Show what runs did, on one page: dpo-jax report WORKDIR [WORKDIR ...] [--out=FILE.html]

Writes WORKDIR/report.html, which `train` and `sweep` also write when they end: curves of training
and evaluation, what they point to, the data's ledger, completions of policy and reference, and what
differs from the config's defaults. Runs of the same stage, also those in the folders of a sweep,
are drawn one over the other. A run that is still going is shown as far as it is. The page is one
file that loads nothing from elsewhere.

With several WORKDIRs, --out says where the page goes. Reads only, apart from the page, and needs no
device.
"""

import contextlib
import datetime
import functools
import os
import pathlib
import urllib.parse
from collections.abc import Iterator

import jax
from absl import flags

from dpo_jax import command_line, runs
from dpo_jax.console import say, warn
from dpo_jax.reporting.page import page
from dpo_jax.reporting.records import LARGEST, Completion, Record, Sample, can_be_drawn
from dpo_jax.runs import StageRun
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import address_of, is_address, shown
from dpo_jax.whole_file import parse_object, whole_file
from dpo_jax.workdir import COMPLETIONS, REFERENCE_COMPLETIONS, STOPPED

PAGE = "report.html"  # in WORKDIR
DOCS = pathlib.Path(__file__).parents[1] / "docs"  # beside the package, in a copy of the repository


def records_of(workdir: pathlib.Path, prefix: str = "") -> list[Record]:
    """Return the stages in a WORKDIR, in the order in which they ran.

    prefix: what their names begin with. A folder that is none is left out, and one whose
    config.json cannot be read has a record that says so.
    """
    found = []
    damaged = []
    for folder in sorted(runs.folders(workdir)):
        if not (folder / "config.json").exists():
            continue
        try:
            found.append(runs.read_stage(folder, workdir))
        except (ValueError, OSError) as error:
            damaged.append(_unreadable(f"{prefix}{folder.relative_to(workdir)}", error))
    found.sort(key=runs.order)
    return [_record(run, workdir, prefix) for run in found] + damaged


def _unreadable(name: str, error: Exception) -> Record:
    return Record(
        name=name,
        stage="",
        status="cannot be read",
        is_finished=False,
        config={},
        differs=None,
        changes=[],
        rows=[],
        problems=[f"{name}: cannot be read: {error}"],
        ledger={},
        result={},
        stopped="",
        samples=[],
    )


def _record(run: StageRun, workdir: pathlib.Path, prefix: str) -> Record:
    """Return what the files of a stage tell; what cannot be read is a line of `problems`."""
    name = prefix + run.name
    problems = []
    rows = _rows(run.folder / "metrics.jsonl", name, problems)
    ledger = _ledger(run.folder / "ledger.json", name, problems)
    samples = _samples(run.folder, name, problems) if run.stage == "evaluate" else []
    result = {key: value for key, value in run.evaluation.items() if can_be_drawn(value)}
    return Record(
        name=name,
        stage=run.stage,
        status=runs.status(run),
        is_finished=bool(run.finished),
        config=run.config.to_dict(),
        differs=_differs(run, workdir),
        changes=[runs.as_change(run, row) for row in run.history],
        rows=rows,
        problems=problems,
        ledger=ledger,
        result=result,
        stopped=_stopped(run, name, problems),
        samples=samples,
    )


def _differs(run: StageRun, workdir: pathlib.Path) -> dict | None:
    """Return a stage's own fields that differ from the defaults, name -> (value, default)."""
    try:
        defaults = runs.defaults_of(run, workdir)
    except (ValueError, KeyError):
        return None
    own = runs.of_its_row(runs.changes(run, defaults), run.stage)
    return {name: (value, defaults.get(name, "")) for name, value in own.items()}


def _rows(path: pathlib.Path, name: str, problems: list[str]) -> list[dict]:
    """Return the rows of a metrics.jsonl that can be read, by step."""
    if not path.exists():
        return []
    rows = {}
    damaged = 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        problems.append(f"{name}: metrics.jsonl cannot be read: {error}")
        return []
    # What follows the last newline is being written, or was cut by a kill.
    for line in lines[:-1]:
        row = parse_object(line)
        if row is None or not _is_count(row.get("step")):
            damaged += 1
            continue
        rows[row["step"]] = {key: value for key, value in row.items() if can_be_drawn(value)}
    if damaged:
        problems.append(
            f"{name}: {damaged} of {len(lines) - 1} lines of metrics.jsonl are damaged and left "
            f"out. dpo-jax check {path.parents[1]} says more."
        )
    elif not rows:
        problems.append(f"{name}: metrics.jsonl has no row yet.")
    return [rows[step] for step in sorted(rows)]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _object(path: pathlib.Path, name: str, problems: list[str]) -> dict:
    """Return the object in a JSON file; {} where there is none."""
    if not path.exists():
        return {}
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(f"{name}: {path.name} cannot be read: {error}")
        return {}
    found = parse_object(data)
    if found is None:
        problems.append(f"{name}: {path.name} is not a JSON object, and left out.")
        return {}
    return found


def _ledger(path: pathlib.Path, name: str, problems: list[str]) -> dict:
    """Return a ledger without numbers that are none of a ledger."""
    odd = []
    ledger = _without_odd_numbers(_object(path, name, problems), "", odd)
    if odd:
        problems.append(f"{name}: {path.name} has numbers that are no counts, left out: {odd[0]}.")
    return ledger


def _without_odd_numbers(tree: dict, prefix: str, odd: list[str]) -> dict:
    """Return nested dicts without numbers that are negative or too large; odd: takes their names.

    A list is not looked into: it is shown as it is.
    """
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            kept[key] = _without_odd_numbers(value, f"{prefix}{key}.", odd)
        elif isinstance(value, int | float) and not (can_be_drawn(value) and value >= 0):
            odd.append(f"{prefix}{key}")
        else:
            kept[key] = value
    return kept


def _stopped(run: StageRun, name: str, problems: list[str]) -> str:
    """Return what a stage's last attempt said as a number was not finite; "" if none did so."""
    reason = _object(run.folder / STOPPED, name, problems).get("reason")
    return reason if isinstance(reason, str) else ""


def _samples(folder: pathlib.Path, name: str, problems: list[str]) -> list[Sample]:
    """Return all completions that an evaluate stage has kept."""
    policy = _completions(folder / COMPLETIONS, name, problems)
    references = _completions(folder / REFERENCE_COMPLETIONS, name, problems)
    samples = []
    for index, row in policy.items():
        other = references.get(index)
        # Rows are of the same prompts, unless a file was changed.
        is_same = other is not None and other["prompt"] == row["prompt"]
        reference = _completion(other) if is_same else None
        samples.append(Sample(str(row["prompt"]), _completion(row), reference))
    return samples


def _completion(row: dict) -> Completion:
    reward = row.get("reward")
    return Completion(str(row["completion"]), reward if can_be_drawn(reward) else None)


def _completions(path: pathlib.Path, name: str, problems: list[str]) -> dict[int, dict]:
    """Return the rows of a file of completions that can be read, by their number."""
    if not path.exists():
        return {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{name}: {path.name} cannot be read: {error}")
        return {}
    rows = {}
    damaged = []
    odd = []
    for number, line in enumerate(lines, 1):
        row = parse_object(line)
        if row is None or "prompt" not in row or "completion" not in row:
            damaged.append(number)
            continue
        rows[number] = row
        if row.get("reward") is not None and not can_be_drawn(row["reward"]):
            odd.append(number)
    for numbers, words in (
        (damaged, "have no prompt or completion and are left out"),
        (odd, "have a reward that is no finite number and is left out"),
    ):
        if numbers:
            problems.append(
                f"{name}: {len(numbers)} of {len(lines)} rows of {path.name} {words}; the first is "
                f"row {numbers[0]}."
            )
    return rows


def text_of(workdirs: list[pathlib.Path], out: pathlib.Path) -> str:
    """Return the page about the runs of some WORKDIRs, to be written to `out`.

    Raises ValueError where they hold no run.
    """
    records = []
    for workdir in workdirs:
        prefix = f"{_name(workdir)}/" if len(workdirs) > 1 else ""
        records += records_of(workdir, prefix)
    if not records:
        names = ", ".join(str(workdir) for workdir in workdirs)
        raise ValueError(
            f"{names}: no run has left anything there. Give the WORKDIR of a run, the folder that "
            "holds its stages."
        )
    title = ", ".join(_name(workdir) for workdir in workdirs)
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    return page(title, records, made, functools.partial(_link, out))


def _name(workdir: pathlib.Path) -> str:
    return address_of(workdir) or workdir.absolute().name


def _link(out: pathlib.Path, target: str) -> str:
    """Return where a page of docs/ is, seen from `out`; "" where it is not known."""
    # In an installed package there are none, and a page in a bucket is read from anywhere.
    if not DOCS.is_dir() or shadow.is_copy(out):
        return ""
    file, _, heading = target.partition("#")
    path = pathlib.PurePath(os.path.relpath(DOCS / file, out.absolute().parent)).as_posix()
    path = urllib.parse.quote(os.fsencode(path))
    return f"{path}#{heading}" if heading else path


def write(workdirs: list[pathlib.Path], out: pathlib.Path) -> None:
    """Write the page about the runs of some WORKDIRs of this machine to a file."""
    # Names of folders and texts of models may hold halves of characters, which no file takes.
    text = text_of(workdirs, out).encode("utf-8", "replace")
    with whole_file(out) as draft:
        draft.write_bytes(text)
    shadow.push(out.parent, [out.name])


@contextlib.contextmanager
def at_end(workdir: str | os.PathLike) -> Iterator[None]:
    """Write WORKDIR/report.html when the run within has ended, also by a loss that is not finite.

    By process 0. A page that cannot be written is told of, and fails no run.
    """
    try:
        yield
    except FloatingPointError:
        _write_at_end(workdir)
        raise
    _write_at_end(workdir)


def _write_at_end(workdir: str | os.PathLike) -> None:
    if jax.process_index():
        return
    folder = shadow.place(workdir)
    out = folder / PAGE
    try:
        write([folder], out)
    except Exception as error:  # noqa: BLE001 - all that the run was for is done and kept
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warn(f"{shown(str(out))} was not written ({reason}). dpo-jax report {workdir} tries again.")
        return
    say(f"report: {shown(str(out))}")


def _pulled(workdir: str) -> pathlib.Path:
    """Return the folder of a WORKDIR, with what a page needs if it is a bucket's."""
    folder = shadow.place(workdir)
    shadow.pull(folder, shadow.is_outside_stages)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder. Give the WORKDIR of a run.")
    return folder


def main():
    # No accelerator is needed, and another run may have it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    out = flags.DEFINE_string(
        "out", "", f"FILE.html for the page. Default: WORKDIR/{PAGE}; needed with several WORKDIRs."
    )

    def report(*workdirs: str):
        if not any(workdirs):
            raise ValueError("dpo-jax report WORKDIR: give the WORKDIR of a run.")
        if len(workdirs) > 1 and not out.value:
            raise ValueError(
                "dpo-jax report with several WORKDIRs: say where the page goes, --out=FILE.html."
            )
        folders = [_pulled(workdir) for workdir in workdirs]
        path = shadow.place(out.value) if out.value else folders[0] / PAGE
        if is_address(out.value):
            shadow.make_folder(path.parent)
        elif not path.parent.is_dir():
            raise FileNotFoundError(
                f"--out={path}: there is no folder {path.parent}. Make it first."
            )
        write(folders, path)
        print(shown(str(path)))

    command_line.run(report, __doc__, positional="WORKDIR", several=True)


if __name__ == "__main__":
    main()

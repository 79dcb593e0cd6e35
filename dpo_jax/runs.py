"""List runs: dpo-jax runs [WORKDIR]

Without WORKDIR, lists the folders under runs/ that hold runs. With it, prints a line for each
stage that has run there, also in the folders of a sweep: the folder, the last loss and accuracy,
reward and KL where they were measured, whether it finished or at which step it stopped, and which
of its fields differ from the config's defaults. Reads only, and needs no device.

Loss and accuracy are of the last evaluation on held-out examples; a star marks those of a training
batch. Defaults are those of the config that comes with dpo_jax if WORKDIR bears its name
(runs/imdb), and otherwise those of the fields themselves.
"""

import dataclasses
import fcntl
import functools
import json
import pathlib
import re
import time
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from dpo_jax import command_line, config_files
from dpo_jax import config as configs
from dpo_jax.stage_table import STAGES
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import shown
from dpo_jax.training.metric_names import is_evaluation
from dpo_jax.whole_file import parse_object

ROOT = "runs"  # where a WORKDIR is by default
TAIL_BYTES = 1 << 20  # of a metrics.jsonl, enough for its last evaluation
BLOCK_BYTES = 1 << 14  # read of it at a time, enough for its last row
HEADINGS = ("folder", "stage", "loss", "accuracy", "reward", "KL", "status", "changed")
MISSING = "-"


@dataclasses.dataclass
class StageRun:
    """A stage in a WORKDIR, as its files tell."""

    folder: pathlib.Path
    name: str  # the folder under WORKDIR: dpo, round_2/dpo, pairs.prompts1000/dpo
    stage: str
    config: ConfigDict  # the whole config that the stage was started with
    depends_on: dict  # dotted field -> value, of what the result depends on
    evaluation: dict[str, float]  # the last one, or {}
    last_row: dict[str, float]  # of metrics.jsonl, or {}
    finished: str  # date and time, or ""
    history: list[dict]  # changes of the config since the start, as `changes.rows` has them
    early_stop: str = ""  # "at step 120 of 240", where the stage's patience ended it

    @property
    def round(self) -> int:
        return self.depends_on.get("rounds", 1)


def read_stage(folder: pathlib.Path, workdir: pathlib.Path) -> StageRun:
    """Read the files of a stage's folder; ValueError or OSError if they are not a stage's."""
    started = _read_object(folder / "config.json")
    for name, kind in (("stage", str), ("depends_on", dict), ("config", dict)):
        if not isinstance(started.get(name), kind):
            raise ValueError(f"config.json has no {name!r} of a run")
    if type(started["depends_on"].get("rounds", 1)) is not int:
        raise ValueError("config.json has 'rounds' that are none of a run")
    if not isinstance(started["config"].get("stages"), list):
        raise ValueError("config.json has no 'stages' of a run")
    done = folder / "done.json"
    result = _read_object(done) if done.exists() else {}
    metrics = folder / "metrics.jsonl"
    return StageRun(
        folder=folder,
        name=folder.relative_to(workdir).as_posix(),
        stage=started["stage"],
        config=ConfigDict(started["config"]),
        depends_on=started["depends_on"],
        evaluation=_evaluation(result, _rows_from_end(metrics)),
        last_row=next(_rows_from_end(metrics), {}),
        finished=str(result.get("finished", "")) if done.exists() else "",
        history=_history(started),
        early_stop=_early_stop(result),
    )


def _early_stop(result: dict) -> str:
    """Return where the stage's patience ended it, by its done.json; "" where it did not."""
    found = result.get("early_stop")
    if not isinstance(found, dict) or not {"step", "steps"} <= found.keys():
        return ""
    return f"at step {found['step']} of {found['steps']}"


def _history(started: dict) -> list[dict]:
    rows = started.get("changes", [])
    expected = {"field", "step", "old", "new"}
    are_changes = isinstance(rows, list) and all(
        isinstance(row, dict) and expected <= row.keys() for row in rows
    )
    if not are_changes:
        raise ValueError("config.json has 'changes' that are none of a run")
    return rows


def _read_object(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path.name} is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _rows_from_end(path: pathlib.Path) -> Iterator[dict]:
    """Yield the rows of a metrics.jsonl, the last one first, without halves of rows.

    A long run's file has many megabytes, so no more is read than is asked for.
    """
    if not path.exists():
        return
    for line in _lines_from_end(path):
        row = parse_object(line)
        if row is not None and isinstance(row.get("step"), int):
            yield row


def _lines_from_end(path: pathlib.Path) -> Iterator[bytes]:
    """Yield the lines in the last TAIL_BYTES of a file, the last one first."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        first = max(end - TAIL_BYTES, 0)
        cut = b""  # the end of a line whose start is in the next block
        while end > first:
            start = max(end - BLOCK_BYTES, first)
            file.seek(start)
            cut, *lines = (file.read(end - start) + cut).split(b"\n")
            yield from reversed(lines)
            end = start
        yield cut


def _evaluation(result: dict, rows: Iterable[dict]) -> dict[str, float]:
    """Return the metrics of the last evaluation: what done.json keeps, or else the last such row.

    An evaluate stage has reward and KL in done.json itself. rows: of metrics.jsonl, the last one
    first.
    """
    evaluation = result.get("evaluation")
    if isinstance(evaluation, dict):
        return evaluation

    reward = result.get("reward")
    kl = result.get("kl")
    if isinstance(reward, float) and isinstance(kl, float):
        return {"frontier/reward": reward, "frontier/kl": kl}

    # A stage that is not done yet has no done.json; its rows tell how it is getting on.
    for row in rows:
        if any(is_evaluation(name) for name in row):
            return row
    return {}


def changes(run: StageRun, defaults: dict) -> dict[str, object]:
    """Return the fields (dotted name -> value) in which a run differs from the defaults."""
    return {
        name: value
        for name, value in run.depends_on.items()
        # A folder's name says its round.
        if name not in ("stages", "rounds") and (name not in defaults or defaults[name] != value)
    }


def defaults_of(run: StageRun, workdir: pathlib.Path) -> dict:
    """Return the values that a run's fields have without overrides, dotted name -> value."""
    name = workdir.absolute().name
    return _defaults(name, tuple(run.config.stages), run.stage, run.round)


@functools.cache
def _defaults(name: str, stages: tuple[str, ...], stage: str, number: int) -> dict:
    """Return the defaults of a stage's fields in a WORKDIR of this name; the same for all runs.

    number: of the round.
    """
    for config in _configs(name):
        if tuple(config.stages) == stages:
            break
    else:
        config = configs.default(stages)
    config = configs.of_round(config, number)
    # As they come back from a file: a tuple as a list.
    return json.loads(json.dumps(configs.dependencies(config, stage)))


@functools.cache
def _configs(name: str) -> list[ConfigDict]:
    """Return what --config may have been for a WORKDIR of this name: NAME with each method."""
    shipped = [known for known in config_files.shipped_names() if re.match(rf"{known}\b", name)]
    if not shipped:
        return []
    # The longest, as imdb_small is no method of imdb.
    config = max(shipped, key=len)
    module = config_files.load_module(config_files.find(config))
    methods = [f"{config}:{method}" for method in getattr(module, "METHODS", {})]
    suffix = name.removeprefix(config).strip("-").replace("-", ",")
    given = [f"{config}:{suffix}"] if suffix and methods else []
    found = []
    for choice in [*given, config, *methods]:
        try:
            found.append(config_files.load(choice))
        except ValueError:
            continue
    return found


def status(run: StageRun) -> str:
    """Say whether a stage finished, is running, or at which step it stopped."""
    if run.finished:
        early = f", early {run.early_stop}" if run.early_stop else ""
        return f"finished {run.finished[:16]}{early}"
    step = run.last_row.get("step")
    block = run.config.get(run.stage)
    total = block.get("steps", 0) if isinstance(block, ConfigDict) else 0
    at = f" at step {step}" if step is not None else ""
    of = f" of {total}" if at and total else ""
    if _is_locked(run.folder / ".lock"):
        return f"running{at}{of}"
    saved = _last_checkpoint(run.folder)
    resumes = f", saved at {saved}" if saved is not None and saved != step else ""
    return f"stopped{at}{of}{resumes}" if at else "started, no step yet"


def _is_locked(path: pathlib.Path) -> bool:
    """Return True if a process of this machine holds a stage's folder."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks cannot tell
            return False
    return False


def _last_checkpoint(folder: pathlib.Path) -> int | None:
    steps = shadow.checkpoint_steps(folder / "checkpoints")
    if steps is None:
        found = (folder / "checkpoints").glob("*")
        steps = [int(path.name) for path in found if path.name.isdigit()]
    return max(steps, default=None)


def table(workdir: pathlib.Path) -> str:
    """Return the table of the runs in a WORKDIR, and a line for each folder that is none."""
    runs = []
    problems = []
    others = []
    for folder in sorted(folders(workdir)):
        name = str(folder.relative_to(workdir))
        if not (folder / "config.json").exists():
            others.append(name)
            continue
        try:
            runs.append(read_stage(folder, workdir))
        except (ValueError, OSError) as error:
            problems.append(f"{name}: cannot be read: {error}")
    runs.sort(key=order)
    changed = [_changes_or_none(run, workdir) for run in runs]
    common = _common(changed)
    rows = [HEADINGS]
    for run, differing in zip(runs, changed, strict=True):
        own = None if differing is None else of_its_row(differing, run.stage)
        rows.append([*_cells(run), _as_text(own, common)])

    lines = [str(workdir)]
    if common:
        lines.append(f"all: {_as_text(common, {})}")
    lines += _aligned(rows) if runs else ["no runs"]
    for run in runs:
        lines += [as_change(run, row) for row in run.history]
    lines += problems
    if others:
        lines.append(f"other folders: {', '.join(others)}")
    return "\n".join(lines)


def folders(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the folders in a WORKDIR, in those of its later rounds, and in the WORKDIRs within.

    A sweep leaves such WORKDIRs. What one of them shares by a link is not yielded again.
    """
    for folder in workdir.iterdir():
        if not folder.is_dir():
            continue
        is_stage = (folder / "config.json").exists()
        if configs.is_round_folder(folder.name) and not is_stage:
            yield from (inner for inner in folder.iterdir() if inner.is_dir())
        elif not (is_stage or folder.is_symlink()) and any(map(_is_stage, folder.iterdir())):
            yield from (inner for inner in folders(folder) if not inner.is_symlink())
        else:
            yield folder


def _is_stage(folder: pathlib.Path) -> bool:
    """Return whether a folder is a stage's; that of a model has a config.json, too."""
    try:
        return "stage" in _read_object(folder / "config.json")
    except (ValueError, OSError):
        return False


def order(run: StageRun) -> tuple:
    """Order stages as they run, and names by the numbers in them: dpo-beta0.5 before dpo-beta5."""
    stages = list(STAGES)
    place = stages.index(run.stage) if run.stage in stages else len(stages)
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", run.name)
    numbered = [(float(part), "") if part[:1].isdigit() else (-1.0, part) for part in parts]
    return run.round, place, numbered


def _changes_or_none(run: StageRun, workdir: pathlib.Path) -> dict | None:
    """Return a run's changes, or None if its config is of another version of the program."""
    try:
        return changes(run, defaults_of(run, workdir))
    except (ValueError, KeyError):
        return None


def _common(changed: list[dict | None]) -> dict:
    """Return the changes that all of several runs share."""
    known = [own for own in changed if own is not None]
    if len(known) < 2:
        return {}
    first, *rest = known
    return {
        name: value
        for name, value in first.items()
        if all(name in own and own[name] == value for own in rest)
    }


def of_its_row(changed: dict, stage: str) -> dict:
    """Return a stage's changes, less those of the fields of other stages, which have own rows."""
    kept = {}
    for name, value in changed.items():
        block = name.partition(".")[0]
        if block == stage or block not in STAGES:
            kept[name] = value
    return kept


def _as_text(own: dict | None, common: dict) -> str:
    if own is None:
        return "a config of another version"
    return ", ".join(f"{name}={_short(own[name])}" for name in own if name not in common)


def as_change(run: StageRun, row: dict) -> str:
    """Return a line for a change that a resumed run has taken."""
    at = "" if row["step"] is None else f" at step {row['step']}"
    return f"{run.name}: {row['field']}={_short(row['new'])}{at}, {_short(row['old'])} before"


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(run: StageRun) -> list[str]:
    """Return a run's line, without what it changed."""
    measured = {
        "loss": ("loss/eval", "loss/train"),
        "accuracy": ("rewards_eval/accuracies", "rewards_train/accuracies"),
        "reward": ("frontier/reward", "ppo_train/reward"),
        "KL": ("frontier/kl", "ppo_train/kl"),
    }
    cells = [run.name, run.stage]
    for held_out, training in measured.values():
        if held_out in run.evaluation:
            cells.append(_number(run.evaluation[held_out]))
        elif training in run.last_row:
            cells.append(_number(run.last_row[training]) + "*")
        else:
            cells.append(MISSING)
    return [*cells, status(run)]


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return lines whose columns are aligned; the last column is as wide as it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def overview(root: pathlib.Path) -> str:
    """Return a line for each WORKDIR under a folder: its name, its runs, the last change."""
    rows = [["workdir", "runs", "finished", "last change"]]
    for workdir in sorted(path for path in root.iterdir() if path.is_dir()):
        started = [
            folder / "config.json"
            for folder in folders(workdir)
            if (folder / "config.json").exists()
        ]
        if not started:
            continue
        finished = [path for path in started if (path.parent / "done.json").exists()]
        newest = max(path.parent.stat().st_mtime for path in started)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))
        rows.append([str(workdir), str(len(started)), str(len(finished)), when])
    if len(rows) == 1:
        return f"no runs in {root}/"
    return "\n".join([*_aligned(rows), "", "dpo-jax runs WORKDIR lists the runs of one."])


def main():
    def list_runs(workdir: str):
        folder = shadow.place(workdir or ROOT)
        shadow.pull(folder, shadow.is_outside_stages)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder. Give the WORKDIR of a run; without one, the "
                f"folders under {ROOT}/ here are listed."
            )
        print(shown(table(folder) if workdir else overview(folder)))

    command_line.run(list_runs, __doc__, positional="WORKDIR")


if __name__ == "__main__":
    main()

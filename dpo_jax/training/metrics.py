"""Metrics: from a batch's sums to the rows of metrics.jsonl, and the files they go to.

While it is computed, every metric is a (sum, count): both add up over microbatches, shards and
evaluation batches before they are divided. `metric_names.py` says what each name means.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import queue
import threading
import uuid
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax.console import warn
from dpo_jax.data.grouping import clustered_error
from dpo_jax.training.metric_names import OF_UPDATE, WITH_SUBSETS, of_subset
from dpo_jax.whole_file import append, parse_object, set_aside, whole_file

# Seconds in which Weights & Biases may take the last rows at the end of a stage: less than the
# other processes wait for this one.
SENDING = 40


def named(metrics: dict, split: str) -> dict[str, float]:
    """Return means by their names in metrics.jsonl, from {name: (sum, count)} of a step.

    "rewards/chosen" becomes "rewards_train/chosen", and "loss" becomes "loss/train". The mean over
    examples whose weights are all 0 is 0. A batch of unpaired rows may have none of a kind: then it
    has no such mean, and no margin.
    """
    means = {}
    for name, (total, count) in jax.device_get(metrics).items():
        full_name = name_of(name, split)
        # Of a batch that has other examples.
        if not count and metrics["loss"][1]:
            continue
        means[full_name] = float(total) / float(count) if count else 0.0
    chosen, rejected, margins = (
        f"rewards_{split}/{part}" for part in ("chosen", "rejected", "margins")
    )
    # Of pairs it is a mean of its own; of unpaired rows the difference of the two.
    if chosen in means and rejected in means:
        means.setdefault(margins, means[chosen] - means[rejected])
    return means


def detailed(
    of_each: dict[str, tuple[np.ndarray, np.ndarray]],
    subsets: tuple[list[str], np.ndarray],
    prompts_P: np.ndarray,
) -> dict[str, float]:
    """Return what an evaluation has beside its means: errors of accuracies, and means by subset.

    of_each: {name: (value, count)} of each example, [P], that a metric is the sum of. subsets: the
    names of the subsets, and the number of each example's. prompts_P: the number of its prompt.
    """
    names, subset_P = subsets
    found = {}
    for metric, (value_P, count_P) in of_each.items():
        for number, subset in enumerate(["", *names], -1):
            is_counted_P = count_P > 0
            if subset:
                is_counted_P &= subset_P == number
            weights_N = count_P[is_counted_P]
            if not len(weights_N):
                continue
            values_N = value_P[is_counted_P] / weights_N
            end = f"/{subset}" if subset else ""
            total = value_P[is_counted_P].sum()
            name = name_of(metric, "eval")
            if subset:
                found[name + end] = float(total / weights_N.sum())
            if metric == "rewards/accuracies":
                error = clustered_error(values_N, prompts_P[is_counted_P], weights_N)
                if error is not None:
                    found[f"{name}_se{end}"] = error
    return found


def table_by_subset(evaluation: dict[str, float]) -> str:
    """Return an evaluation's means by subset as a table; "" where there are no subsets."""
    rows = {}  # subset -> {metric: value}
    for name, value in evaluation.items():
        whole, subset = of_subset(name)
        if subset:
            rows.setdefault(subset, {})[whole] = value
    if not rows:
        return ""
    rows = {"all": evaluation} | rows
    width = max(len("held out, by subset"), *map(len, rows))
    columns = [name for name in WITH_SUBSETS if name in evaluation and not name.endswith("_se")]
    lines = ["  ".join([f"{'held out, by subset':<{width}}", *(f"{name:>24}" for name in columns)])]
    for subset, values in rows.items():
        cells = []
        for name in columns:
            cell = f"{values[name]:.4g}" if name in values else ""
            if f"{name}_se" in values:
                cell += f" ±{values[f'{name}_se']:.2g}"
            cells.append(f"{cell:>24}")
        lines.append("  ".join([f"{subset:<{width}}", *cells]))
    return "\n".join(lines)


def name_of(name: str, split: str) -> str:
    """Return the name in metrics.jsonl of what an objective calls so."""
    group, _, rest = name.partition("/")
    if name in OF_UPDATE:
        return name
    return f"{group}_{split}/{rest}" if rest else f"{name}/{split}"


def add(total: dict | None, metrics: dict) -> dict:
    """Return the sums and counts of two batches together."""
    if total is None:
        return metrics
    return jax.tree.map(lambda a, b: a + b, total, metrics)


class Writer(contextlib.ExitStack):
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases where asked for.

    A context: on leaving it, what the latter two still hold is sent. Process 0 only.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        tensorboard: bool = False,
        wandb: str = "",
        config: dict | None = None,
    ):
        """Open the files in a stage's folder.

        wandb: the name of a project; "": none. config: what is shown there beside the run. Raises
        ImportError with the package to install.
        """
        super().__init__()
        self._path = pathlib.Path(folder) / "metrics.jsonl"
        self._count = 0  # rows in the file
        self._digest = hashlib.sha256()  # of its bytes
        self._sinks: list[_TensorBoard | _RemoteRun] = []
        self._active = jax.process_index() == 0
        if self._active and tensorboard:
            self._sinks.append(_TensorBoard(folder))
            self.callback(self._sinks[-1].close)
        if self._active and wandb:
            self._sinks.append(self._wandb(wandb, folder, config or {}))

    @property
    def written(self) -> dict:
        """The number of rows so far and their sha256, which a checkpoint keeps."""
        return dict(rows=self._count, sha256=self._digest.hexdigest())

    def rewind(self, step: int, written: dict) -> None:
        """Drop the rows after a step, which a resumed run writes again, and a torn last line.

        written: what was known of the rows at that step. Where the file no longer has them, it is
        kept under another name, rows that can be read go on in a new one, and a line says so.
        """
        if not self._active:
            return
        lines = _lines(self._path)
        kept = _rows_written(lines, written)
        if kept is None:
            rows = [row for row in map(_parse, lines) if row and row["step"] <= step]
            kept = [json.dumps(row).encode() + b"\n" for row in rows]
            self._say_damaged(step, written["rows"], len(kept))
        self._rewrite(kept)

    def _rewrite(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        self._count = len(lines)
        self._digest = hashlib.sha256(data)
        with whole_file(self._path) as draft:
            draft.write_bytes(data)

    def _say_damaged(self, step: int, count: int, readable: int) -> None:
        found = "The file is gone."
        if self._path.exists():
            aside = set_aside(self._path)
            found = (
                f"{readable} rows of the file can be read and are kept; the file as it was is now "
                f"{aside.name}."
            )
        warn(
            f"{self._path} no longer holds the {count} rows that were written up to step {step}, "
            f"and these are not computed again. {found} Training goes on as it would have."
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the row of a step."""
        if not self._active:
            return
        line = json.dumps(dict(step=step, **values)).encode() + b"\n"
        # Opened again for each row, so that all rows are on disk whenever the process ends.
        append(self._path, line)
        self._count += 1
        self._digest.update(line)
        self._send(step, values)

    def _send(self, step: int, values: dict[str, float]) -> None:
        """Send a row's values to the sinks, without those by subset, of which there are many."""
        whole = {name: value for name, value in values.items() if not of_subset(name)[1]}
        for sink in self._sinks:
            sink.write(step, whole)

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of an earlier step, or write it in its place if it is lost."""
        if not self._active:
            return
        rows = {row["step"]: row for row in read_rows(self._path)}
        rows[step] = rows.get(step, dict(step=step)) | values
        self._rewrite([json.dumps(rows[key]).encode() + b"\n" for key in sorted(rows)])
        self._send(step, values)

    def show(self, step: int, completions: list[dict]) -> None:
        """Send completions of an evaluation to TensorBoard and Weights & Biases, and to no file.

        completions: rows with prompt, completion and perhaps reward.
        """
        if not self._active:
            return
        for sink in self._sinks:
            sink.show(step, completions)

    def _wandb(self, project: str, folder, config: dict) -> "_RemoteRun":
        try:
            import wandb
        except ImportError as error:
            raise ImportError("config.log.wandb needs wandb: pip install wandb") from error
        folder = pathlib.Path(folder).absolute()
        # Of WORKDIR and the stage, and of the round between them.
        in_round = configs.is_round_folder(folder.parent.name)
        # The id is kept with the run, so that a resumed run continues its own curve.
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        start = functools.partial(
            wandb.init,
            project=project,
            name="/".join(folder.parts[-3 if in_round else -2 :]),
            dir=str(folder),
            config=config,
            resume="allow",
            id=id_file.read_text(),
        )
        run = _RemoteRun(start)
        self.callback(run.close)
        return run


class _TensorBoard:
    """Event files for TensorBoard in a stage's folder, from the first row on."""

    def __init__(self, folder: pathlib.Path):
        # Imported here: few runs write to it, and it is no dependency.
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "config.log.tensorboard needs tensorboardX: pip install tensorboardX"
            ) from error
        self._open = functools.partial(SummaryWriter, str(folder))
        self._writer = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a row."""
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def show(self, step: int, completions: list[dict]) -> None:
        """Write completions as text."""
        lines = completions_text(completions).splitlines()
        # It renders Markdown, in which an indented line stands as it is.
        self._at(step).add_text("completions", "\n".join(f"    {line}" for line in lines), step)

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int):
        if self._writer is None:
            # A resumed run writes some steps again: TensorBoard drops what it has from here on.
            self._writer = self._open(purge_step=step)
        return self._writer


class _RemoteRun:
    """A run at Weights & Biases, whose answers no step waits for.

    Their server may need minutes, or never answer, and other processes would wait for this one.
    """

    def __init__(self, start: Callable):
        """start: returns wandb's run; it is called in another thread."""
        self._start = start
        # (step, values or rows of completions), and None at the end
        self._rows = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take a row, which is sent later."""
        self._rows.put((step, values))

    def show(self, step: int, completions: list[dict]) -> None:
        """Take completions, which are sent later as a table."""
        self._rows.put((step, completions))

    def close(self) -> None:
        """Wait a little until all rows are sent, and say so where they are not."""
        self._rows.put(None)
        self._thread.join(SENDING)
        if self._thread.is_alive():
            warn(
                f"Weights & Biases has not taken all rows {SENDING} s after the last one; they are "
                "in metrics.jsonl. `wandb sync` may send what is in the stage's folder wandb/."
            )

    def _work(self) -> None:
        try:
            run = self._start()
            for step, values in iter(self._rows.get, None):
                if isinstance(values, list):
                    values = {"completions": _wandb_table(values)}
                run.log(values, step=step)
            run.finish()
        except Exception as error:  # noqa: BLE001 - their client raises many, and no run needs it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(
                f"Weights & Biases takes nothing more ({type(error).__name__}: {reason}). Training "
                "goes on without it; all rows are in metrics.jsonl."
            )


def _wandb_table(completions: list[dict]):
    """Return completions as a table of Weights & Biases."""
    import wandb

    columns = list(completions[0])
    return wandb.Table(columns=columns, data=[list(row.values()) for row in completions])


def completions_text(completions: list[dict]) -> str:
    """Return completions for a person: each with its prompt, and its reward if it has one."""
    lines = []
    for row in completions:
        reward = f"({row['reward']:.3f}) " if "reward" in row else ""
        lines += [f"--- {row['prompt']!r}", f"{reward}{row['completion']!r}"]
    return "\n".join(lines)


def holds(path: pathlib.Path, written: dict) -> bool:
    """Return whether a metrics.jsonl begins with the rows of a `Writer.written`."""
    return _rows_written(_lines(path), written) is not None


def _lines(path: pathlib.Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.exists() else []


def _rows_written(lines: list[bytes], written: dict) -> list[bytes] | None:
    """Return the first rows, with their newlines; None where they are not those of `written`."""
    if not written:  # at the start of a run
        return []
    kept = [line + b"\n" for line in lines[: written["rows"]]]
    is_same = hashlib.sha256(b"".join(kept)).hexdigest() == written["sha256"]
    return kept if is_same else None


def read_rows(path) -> list[dict]:
    """Return the rows of a metrics.jsonl, less a last line that a kill left half written.

    Raises ValueError that names any other line that is not a row.
    """
    rows = []
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # what follows the last newline was cut
            raise ValueError(
                f'{path} line {number} is not a row of metrics, {{"step": ...}}: the file has been '
                "damaged since it was written. Put it back from a copy, or remove done.json beside "
                "it and run the stage's command again, which keeps the rows that can be read."
            )
    return rows


def _parse(line: bytes) -> dict | None:
    """Return a line's row; None where it is not one."""
    row = parse_object(line)
    is_row = row is not None and isinstance(row.get("step"), int)
    return row if is_row and all(isinstance(value, int | float) for value in row.values()) else None

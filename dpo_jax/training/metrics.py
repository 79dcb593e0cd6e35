"""Metrics: from a batch's sums to the rows of metrics.jsonl, and the files they go to.

While it is computed, every metric is a (sum, count): both add up over microbatches, shards and
evaluation batches before they are divided. `metric_names.py` says what each name means.
"""

import contextlib
import json
import pathlib
import uuid

import jax

from dpo_jax.training.metric_names import OF_UPDATE
from dpo_jax.whole_file import whole_file


def named(metrics: dict, split: str) -> dict[str, float]:
    """Return means by their names in metrics.jsonl, from {name: (sum, count)} of a step.

    "rewards/chosen" becomes "rewards_train/chosen", and "loss" becomes "loss/train".
    """
    means = {}
    for name, (total, count) in jax.device_get(metrics).items():
        group, _, rest = name.partition("/")
        if name in OF_UPDATE:
            full_name = name
        elif rest:
            full_name = f"{group}_{split}/{rest}"
        else:
            full_name = f"{name}/{split}"
        means[full_name] = float(total) / float(count)
    return means


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
        self._sinks = []  # (step, values) -> None
        self._active = jax.process_index() == 0
        if self._active and tensorboard:
            self._sinks.append(self._tensorboard(folder))
        if self._active and wandb:
            self._sinks.append(self._wandb(wandb, folder, config or {}))

    def rewind(self, step: int) -> None:
        """Drop the rows after a step, which a resumed run writes again, and a torn last line."""
        if not self._active or not self._path.exists():
            return
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        with whole_file(self._path) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the row of a step."""
        if not self._active:
            return
        # Opened again for each row, so that all rows are on disk whenever the process ends.
        with self._path.open("a") as file:
            file.write(json.dumps(dict(step=step, **values)) + "\n")
        for sink in self._sinks:
            sink(step, values)

    def _tensorboard(self, folder):
        # Imported here: few runs write to it, and it is no dependency.
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "config.log.tensorboard needs tensorboardX: pip install tensorboardX"
            ) from error
        writer = SummaryWriter(str(folder))
        self.callback(writer.close)

        def write(step, values):
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return write

    def _wandb(self, project: str, folder, config: dict):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("config.log.wandb needs wandb: pip install wandb") from error
        folder = pathlib.Path(folder).absolute()
        # The id is kept with the run, so that a resumed run continues its own curve.
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=project,
            name=f"{folder.parent.name}/{folder.name}",
            dir=str(folder),
            config=config,
            resume="allow",
            id=id_file.read_text(),
        )
        self.callback(run.finish)

        def write(step, values):
            run.log(values, step=step)

        return write


def read_rows(path) -> list[dict]:
    """Return the rows of a metrics.jsonl, less a last line that a kill left half written."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

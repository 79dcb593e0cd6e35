"""Metrics: names, and the files they go to.

Every metric is a (sum, count); values add up over microbatches, shards and evaluation batches
before they are divided. Names are the reference code's: loss/train, rewards_train/margins,
logps_eval/chosen, ...
"""

import contextlib
import json
import os
import pathlib
import re
import uuid

import jax

TIMINGS = (  # what differs between two equal runs
    "examples_per_second",
    "tokens_per_second",
    "step_time",
    "model_flops_utilization",
)


_OF_EVALUATION = re.compile(r"_eval/|/eval$|^frontier/")


def is_evaluation(name: str) -> bool:
    """Return whether a metric is measured at an evaluation, rather than of a training step."""
    return _OF_EVALUATION.search(name) is not None


def named(metrics: dict, split: str) -> dict[str, float]:
    """{name: (sum, count)} -> {reference's name: mean}: `rewards/chosen` is
    rewards_train/chosen.
    """
    means = {}
    for name, (total, count) in jax.device_get(metrics).items():
        group, _, rest = name.partition("/")
        if name not in ("grad_norm", "param_norm", "update_norm", "lr"):
            name = f"{group}_{split}/{rest}" if rest else f"{name}/{split}"
        means[name] = float(total) / float(count)
    return means


def add(total: dict | None, metrics: dict) -> dict:
    """The sums and counts of two batches together."""
    return metrics if total is None else jax.tree.map(lambda a, b: a + b, total, metrics)


class Writer(contextlib.ExitStack):
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases where asked for.
    Process 0 only.

    A context: on leaving it, what the latter two still hold is sent.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        tensorboard: bool = False,
        wandb: str = "",
        config: dict | None = None,
    ):
        super().__init__()
        self._path, self._sinks = pathlib.Path(folder) / "metrics.jsonl", []
        self._active = jax.process_index() == 0
        if self._active and tensorboard:
            self._sinks.append(self._tensorboard(folder))
        if self._active and wandb:
            self._sinks.append(self._wandb(wandb, folder, config or {}))

    def rewind(self, step: int) -> None:
        """Drops the rows after a step, so that a resumed run writes each row once; a torn last line
        goes too.
        """
        if not self._active or not self._path.exists():
            return
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        draft = self._path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(draft, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(dict(step=step, **values)) + "\n")
        for sink in self._sinks:
            sink(step, values)

    def _tensorboard(self, folder):
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

    def _wandb(self, project, folder, config):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("config.log.wandb needs wandb: pip install wandb") from error
        folder = pathlib.Path(folder).absolute()
        name = (
            folder / "wandb_id"
        )  # so that a resumed run goes on in its own curve, and no other does
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=project,
            name=f"{folder.parent.name}/{folder.name}",
            dir=str(folder),
            config=config,
            resume="allow",
            id=name.read_text(),
        )
        self.callback(run.finish)
        return lambda step, values: run.log(values, step=step)


def read_rows(path) -> list[dict]:
    """The rows of a metrics.jsonl, less a last line that a kill left half written."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

"""The training loop of every stage: resume, check, step, log, evaluate, save, stop cleanly.

What a step learns from comes from a feed: `DataFeed` here, rows of a data set, or
`ppo.RolloutFeed`, the policy's own completions.

A run is a pure function of its config: interrupted at any step and started again, it writes the
same rows and ends with the same weights as one that was not.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import signal
import time
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import Progress, say
from dpo_jax.data.batches import Batches, evaluation_order, prefetch, training_order
from dpo_jax.data.dataset import Dataset
from dpo_jax.models import flops, transformer
from dpo_jax.models import lora as lora_lib
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import hardware, sharding
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training import optim
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.metrics import Writer
from dpo_jax.training.objectives import OBJECTIVES, numbers
from dpo_jax.training.self_check import self_check
from dpo_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
    whole,
)

EVALUATED = re.compile(r"_eval/|/eval$|^frontier/")  # names of what an evaluation measures


class Interrupted(SystemExit):
    """The run was asked to stop (SIGTERM or Ctrl-C); its checkpoint is saved."""


@dataclasses.dataclass
class Job:
    """What a training stage is made of, whatever it learns from."""

    name: str  # the stage, and so the objective
    folder: pathlib.Path
    block: object  # the stage's config block
    model: TransformerConfig
    mesh: jax.sharding.Mesh
    load_init: Callable  # () -> what is trained, on the mesh: weights, or adapters
    load_reference: Callable  # () -> the reference's likewise, or None
    log: object  # the config's log block
    config: dict  # the whole config, for W&B
    probe: Callable | None = None  # params -> {name: value}, at each evaluation
    lora: Lora | None = None  # which adapters are trained; None: all weights are
    load_base: Callable = lambda: None  # () -> the weights under the adapters, on the mesh


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of a stage, and the layout of its state."""

    optimizer: object
    trained: dict  # the abstract weights or adapters
    shardings: TrainState
    train_step: Callable
    eval_step: Callable


def programs(job: Job) -> Programs:
    """Stages that differ in numbers alone (beta, lr, alpha) share them, so a sweep in one process
    compiles once.
    """
    block = job.block
    lora = job.lora and Lora(job.lora.rank, targets=job.lora.targets)  # the rest of it is numbers
    return _programs(
        job.name,
        block.get("loss", ""),
        job.model,
        block.optimizer,
        block.weight_decay,
        block.schedule,
        job.mesh,
        lora,
    )


@functools.cache
def _programs(name, loss, model, optimizer, weight_decay, schedule, mesh, lora) -> Programs:
    optimizer = optim.make(optimizer, weight_decay)
    trained = lora_lib.abstract(model, lora) if lora else transformer.abstract(model)
    shardings = state_shardings(mesh, optimizer, trained)
    objective = functools.partial(OBJECTIVES[name], model, loss)
    return Programs(
        optimizer,
        trained,
        shardings,
        make_train_step(objective, optimizer, schedule, shardings),
        make_eval_step(objective),
    )


def fit(job: Job, feed) -> tuple[dict, dict[str, float]]:
    """Trains the stage, from its latest checkpoint if there is one; returns what was trained and
    the last evaluation.

    feed: where steps come from, as DataFeed:
        total: steps;  updates: optimiser updates in them all;  controls: scalars that the state
        starts with check(params, reference, hyper) -> a line to show, before the first step
        steps(start, reference, hyper, base) -> (step, update) in turn, where update(state) ->
        (state, metrics); under
            adapters the reference and the state's weights are such over `base`, elsewhere they are
            whole
        evaluate(params, reference, hyper) -> {name: value}, on what is held out tokens(step) -> how
        many real tokens it reads, or samples;  rows(step) -> their names, for an error flops(step)
        -> what its update needs on these tokens, or None where that is not all of the step's work
    """
    made = programs(job)
    optimizer, shardings = made.optimizer, made.shardings
    hyper = numbers(job.block, feed.updates) | (
        {"lora_scale": np.float32(job.lora.scale)} if job.lora else {}
    )
    hyper = jax.device_put(hyper, sharding.replicated(job.mesh))
    shapes = abstract_state(optimizer, made.trained, feed.controls)

    def evaluate(trained):
        params = whole(base, trained, hyper)
        return feed.evaluate(params, whole(base, reference, hyper), hyper) | (
            job.probe(params) if job.probe else {}
        )

    with (
        jax.set_mesh(job.mesh),
        _catch_signals() as signals,
        Writer(
            job.folder, tensorboard=job.log.tensorboard, wandb=job.log.wandb, config=job.config
        ) as writer,
        Checkpoints(
            job.folder / "checkpoints", keep=job.block.keep, best_metric=job.block.keep_best
        ) as saved,
    ):
        base, reference = job.load_base(), job.load_reference()
        start = saved.latest() or 0
        if start:
            say(f"{job.name}: resuming after step {start}")
            state = saved.restore(start, shapes, shardings)
        else:
            state = init_state(optimizer, job.load_init(), feed.controls, shardings)
            checked = feed.check(
                whole(base, state.params, hyper), whole(base, reference, hyper), hyper
            )
            say(f"{job.name}: {checked}")
        loop = _Loop(job, feed, saved, writer, evaluate, start)
        if not start:
            loop.report(state, 0, None)
        for step, update in feed.steps(start, reference, hyper, base):
            state, metrics = update(state)
            loop.report(state, step + 1, metrics)
            if signum := _asked_to_stop(signals):
                loop.interrupt(state, step + 1, signum)
        loop.close()
        if job.block.keep_best and saved.best():
            best, value = saved.best()
            say(f"{job.name}: best {job.block.keep_best} {value:.4g} at step {best}")
            state = saved.restore(best, shapes, shardings)
            loop.evaluated = _evaluation_rows(job.folder)[best]
    return state.params, loop.evaluated


class DataFeed:
    """Steps on the rows of a data set: each is one update on one batch."""

    controls: dict = {}

    def __init__(
        self,
        job: Job,
        data: Dataset,
        *,
        seed: int | None,
        eos_id: int | None,
        reference_is_init: bool,
        show_row: Callable,
        reference_logps: Callable | None = None,
    ):
        """seed: of the data order, None for the data's own; eos_id: what responses end in, or None;
        show_row: index of a training row -> its text, scored tokens marked; reference_logps:
        (split, examples, rows) -> the reference's log-probs, where they are kept.
        """
        self._job, self._data, self._programs = job, data, programs(job)
        self._eos_id, self._reference_is_init, self._show_row = eos_id, reference_is_init, show_row

        def kept(*rows):
            return {"reference_logps": reference_logps(*rows)} if reference_logps else {}

        self._batches = _training_batches(job, data, seed, kept)
        self._held_out = _evaluation_batches(job, data, kept)
        self.total = self.updates = len(self._batches)

    def check(self, params, reference, hyper) -> str:
        first = sharding.shard_batch(
            self._job.mesh, jax.tree.map(lambda x: x[:1], self._batches[0]), axis=1
        )
        measured = metrics_lib.named(
            self._programs.eval_step(params, reference, hyper, first), "train"
        )
        return self_check(
            self._job.model,
            self._job.block,
            self._job.mesh,
            params,
            reference,
            self._data.train,
            self._batches.order[0],
            measured,
            eos_id=self._eos_id,
            exact=self._reference_is_init,
            show_row=self._show_row,
            reference_logps=self._batches.per_response.get("reference_logps"),
        )

    def steps(self, start: int, reference, hyper, base):
        self._live_reference = reference is not None

        def load(step):
            return sharding.shard_batch(self._job.mesh, self._batches[step], axis=1)

        for step, batch in prefetch(load, range(start, self.total)):
            yield (
                step,
                lambda state, batch=batch: self._programs.train_step(
                    state, reference, hyper, batch, base
                ),
            )

    def evaluate(self, params, reference, hyper) -> dict[str, float]:
        """Metrics over all held-out rows, each row weighted alike."""
        total = None
        for step in range(len(self._held_out) if self._held_out else 0):
            batch = sharding.shard_batch(self._job.mesh, self._held_out[step], axis=1)
            total = metrics_lib.add(
                total, self._programs.eval_step(params, reference, hyper, batch)
            )
        return metrics_lib.named(total, "eval") if total else {}

    def tokens(self, step: int) -> int:
        return self._batches.tokens(step)

    def flops(self, step: int) -> int:
        return flops.of_step(
            self._job.model,
            self._batches.needed(step),
            reference=self._live_reference,
            frozen=self._job.lora is not None,
        )

    def rows(self, step: int) -> list[str]:
        return [self._data.train.where[row] for row in self._batches.order[step]]


class _Loop:
    """What happens around the steps: rows, the progress line, evaluations and checkpoints.

    A step's metrics are fetched when the next step has been dispatched, so the device never waits
    for the host, except where they are needed at once: before an evaluation or a checkpoint.
    """

    def __init__(self, job, feed, saved, writer, evaluate, start):
        self._job, self._feed, self._saved, self._writer, self._evaluate = (
            job,
            feed,
            saved,
            writer,
            evaluate,
        )
        self._peak = hardware.flops_per_second(job.mesh, job.model.dtype)
        self._pending, self._clock = None, time.monotonic()
        writer.rewind(start if start else -1)
        self._progress = Progress(job.name, start, feed.total)
        self.evaluated = next(reversed(_evaluation_rows(job.folder).values()), {})

    def report(self, state, step: int, metrics: dict | None) -> None:
        """Takes the metrics of update `step`, and evaluates and saves where it is time to."""
        block = self._job.block
        self._flush()
        self._pending = None if metrics is None else (step, metrics)
        evaluates = step % block.eval_every == 0 or step == self._feed.total
        saves = step > 0 and (step % block.save_every == 0 or step == self._feed.total)
        if evaluates or saves:
            values = self._take()
            better = False
            if evaluates:
                self.evaluated = self._evaluate(state.params)
                self._check_finite(step, self.evaluated)
                self._check_keep_best()
                values |= self.evaluated
                better = (
                    step > 0
                    and block.keep_best
                    and self._saved.is_better(self.evaluated[block.keep_best])
                )
            self._write(step, values, always=evaluates)
            if saves or better:
                self._saved.save(step, state, self.evaluated if evaluates else None)
            self._clock = time.monotonic()

    def interrupt(self, state, step: int, signum: int) -> None:
        """Saves, and ends the run with the shell's code for the signal."""
        self._flush()
        self._saved.save(step, state)
        self._progress.close()
        say(
            f"{self._job.name}: stopped by {signal.Signals(signum).name} after step {step}, which is saved; "
            "the same command goes on from here."
        )
        raise Interrupted(128 + signum)

    def close(self) -> None:
        self._flush()
        self._progress.close()

    def _flush(self):
        if self._pending is not None:
            step = self._pending[0]
            self._write(step, self._take())

    def _take(self) -> dict[str, float]:
        """The pending step's values; raises at the first loss or gradient that is not finite."""
        if self._pending is None:
            return {}
        (step, metrics), self._pending = self._pending, None
        values = metrics_lib.named(metrics, "train")
        self._check_finite(
            step, {name: values[name] for name in ("loss/train", "grad_norm", "param_norm")}
        )
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        batch_size, needed = self._job.block.batch_size, self._feed.flops(step - 1)
        tokens = self._feed.tokens(step - 1)
        values |= {
            "counters/examples": step * batch_size,
            "step_time": seconds,
            "counters/updates": step * self._feed.updates // self._feed.total,
            "examples_per_second": batch_size / seconds,
            "tokens_per_second": tokens / seconds,
        }
        return values | (
            {"model_flops_utilization": needed / seconds / self._peak} if needed else {}
        )

    def _write(self, step, values, always=False):
        if always or step % self._job.block.log_every == 0:
            self._writer.write(step, values)
        self._progress.update(step, values, always=always)

    def _check_keep_best(self):
        name = self._job.block.keep_best
        if name and name not in self.evaluated:
            found = ", ".join(sorted(self.evaluated)) or "none, as no row is held out"
            raise ValueError(
                f"config.{self._job.name}.keep_best = {name!r}: expected an evaluation metric; there are: "
                + found
            )

    def _check_finite(self, step, values):
        for name, value in values.items():
            if not math.isfinite(value):
                self._fail(step, name, value)

    def _fail(self, step, name, value):
        read = (
            "on the held-out rows"
            if EVALUATED.search(name)
            else f"on the batch of {', '.join(self._feed.rows(max(step - 1, 0)))}"
        )
        latest = self._saved.latest()
        good = (
            f"The last good checkpoint, step {latest}, is kept."
            if latest
            else "No checkpoint was saved yet."
        )
        raise FloatingPointError(
            f"{self._job.name} stopped at step {step}: {name} is {value}, {read}. {good} A lower lr or max_grad_norm "
            "may help, or leaving out a bad row."
        )


def _evaluation_rows(folder) -> dict[int, dict[str, float]]:
    """Step -> evaluation metrics, from the rows written so far; a resumed run may have no more to
    make.
    """
    path = folder / "metrics.jsonl"
    rows = metrics_lib.read_rows(path) if path.exists() else []
    found = {
        row["step"]: {name: value for name, value in row.items() if EVALUATED.search(name)}
        for row in rows
    }
    return {step: values for step, values in found.items() if values}


def _training_batches(job: Job, data: Dataset, seed: int | None, per_response: Callable) -> Batches:
    block, size = job.block, len(data.train)
    steps = block.steps or int(block.epochs * size / block.batch_size)
    if not steps or not size:
        raise ValueError(
            f"{job.name}: {size} training rows make no step of config.{job.name}.batch_size = "
            f"{block.batch_size} in {block.epochs} epochs; lower it, or set config.{job.name}.steps."
        )
    order = training_order(size, block.batch_size, steps, seed)
    batches = Batches(
        data.train,
        order,
        microbatches=block.batch_size // (block.microbatch_size or block.batch_size),
        shards=sharding.batch_shards(job.mesh),
        per_response=per_response("train", data.train, order),
    )
    padding = batches.padding()
    say(
        f"{job.name}: {steps} steps of {block.batch_size} from {size} rows, {len(batches.shapes)} shapes, "
        f"padding {padding['dense']:.1%} of tokens, {padding['attention']:.1%} of attention"
    )
    if block.warmup_steps >= steps:
        say(
            f"{job.name}: the run is over before its warm-up is (config.{job.name}.warmup_steps = "
            f"{block.warmup_steps}): its learning rate comes to {steps / (block.warmup_steps + 1):.0%} of "
            f"{block.lr:g}. Lower it, unless that is meant."
        )
    return batches


def _evaluation_batches(job: Job, data: Dataset, per_response: Callable) -> Batches | None:
    size = job.block.microbatch_size or job.block.batch_size
    if not len(data.eval):
        return None
    order = evaluation_order(len(data.eval), size)
    return Batches(
        data.eval,
        order,
        shards=sharding.batch_shards(job.mesh),
        per_response=per_response("eval", data.eval, order),
    )


@contextlib.contextmanager
def _catch_signals():
    """A list that SIGTERM and the first Ctrl-C are put into; a second Ctrl-C stops at once. Several
    processes leave SIGTERM to jax, which tells all of them, and Ctrl-C ends them.
    """
    caught = []
    if jax.process_count() > 1:
        yield caught
        return

    def catch(signum, _frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {signum: signal.signal(signum, catch) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


_ASKED = itertools.count(
    1
)  # through all stages: the processes agree on one number, the next that none has asked with


def _asked_to_stop(signals: list[int]) -> int | None:
    """The signal after which to save and stop, in every process at the same step."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return (
            signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(_ASKED)) else None
        )
    return signals[0] if signals else None

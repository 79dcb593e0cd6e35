"""The training loop of every stage: resume, check, step, log, evaluate, save, stop cleanly.

A run is a pure function of its config: interrupted at any step and started again, it writes the same rows and
ends with the same weights as one that was not.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import metrics as metrics_lib
from dpo_jax import optim, sharding
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data.batches import Batches, evaluation_order, prefetch, training_order
from dpo_jax.data.dataset import Dataset
from dpo_jax.metrics import Progress, Writer, say
from dpo_jax.objectives import OBJECTIVES
from dpo_jax.selfcheck import self_check
from dpo_jax.step import TrainState, init_state, make_eval_step, make_train_step, state_shardings


class Interrupted(SystemExit):
    """The run was asked to stop (SIGTERM or Ctrl-C); its checkpoint is saved."""


@dataclasses.dataclass
class Job:
    """What a training stage is made of."""
    name: str  # the stage, and so the objective
    folder: pathlib.Path
    block: object  # the stage's config block
    seed: int | None  # of the data order; None: the data's own order
    model: object  # TransformerConfig
    mesh: jax.sharding.Mesh
    shapes: dict  # abstract weights
    load_init: Callable  # () -> weights on the mesh
    load_reference: Callable  # () -> the reference's weights on the mesh, or None
    reference_is_init: bool
    data: Dataset
    show_row: Callable  # index of a training row -> its text, scored tokens marked
    eos_id: int | None  # what responses end in, or None where they do not
    log: object  # the config's log block
    config: dict  # the whole config, for W&B
    probe: Callable | None = None  # params -> {name: value}, at each evaluation


def fit(job: Job) -> tuple[dict, dict[str, float]]:
    """Trains the stage, from its latest checkpoint if there is one; returns weights and the last evaluation."""
    batches, evaluation = _training_batches(job), _evaluation_batches(job)
    total = len(batches)
    optimizer = optim.make(job.block.optimizer, job.block.weight_decay)
    shardings = state_shardings(job.mesh, optimizer, job.shapes)
    objective = _bind(OBJECTIVES[job.name], job.model, job.block)
    train_step = make_train_step(objective, optimizer, job.block.schedule, shardings)
    eval_step = make_eval_step(objective)
    hyper = _hyper(job.block, total)
    with (jax.set_mesh(job.mesh), _catch_signals() as signals,
          Writer(job.folder, tensorboard=job.log.tensorboard, wandb=job.log.wandb, config=job.config) as writer,
          Checkpoints(job.folder / "checkpoints", keep=job.block.keep, best_metric=job.block.keep_best) as saved):
        reference = job.load_reference()
        start = saved.latest() or 0
        if start:
            say(f"{job.name}: resuming after step {start}")
            state = saved.restore(start, jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)),
                                                        job.shapes), shardings)
        else:
            state = init_state(job.mesh, optimizer, job.load_init())
            first = sharding.shard_batch(job.mesh, jax.tree.map(lambda x: x[:1], batches[0]), axis=1)
            measured = metrics_lib.named(eval_step(state.params, reference, hyper, first), "train")
            say(f"{job.name}: " + self_check(
                job.model, job.block, job.mesh, state.params, reference, job.data.train, batches.order[0], measured,
                eos_id=job.eos_id, exact=job.reference_is_init, show_row=job.show_row))
        loop = _Loop(job, saved, writer, lambda params: _evaluate(job, eval_step, params, reference, hyper, evaluation),
                     start, total, batches)
        if not start:
            loop.report(state, 0, None)

        def load(step):
            return sharding.shard_batch(job.mesh, batches[step], axis=1)

        for step, batch in prefetch(load, range(start, total)):
            state, metrics = train_step(state, reference, hyper, batch)
            loop.report(state, step + 1, metrics)
            if signals and step + 1 < total:
                loop.interrupt(state, step + 1, signals[0])
        loop.close()
        if job.block.keep_best and saved.best():
            best, value = saved.best()
            say(f"{job.name}: best {job.block.keep_best} {value:.4g} at step {best}")
            state = saved.restore(best, jax.eval_shape(lambda x: x, state), shardings)
            loop.evaluated = _evaluation_rows(job.folder)[best]
    return state.params, loop.evaluated


class _Loop:
    """What happens around the steps: rows, the progress line, evaluations and checkpoints.

    A step's metrics are fetched when the next step has been dispatched, so the device never waits for the host,
    except where they are needed at once: before an evaluation or a checkpoint.
    """

    def __init__(self, job, saved, writer, evaluate, start, total, batches):
        self._job, self._saved, self._writer, self._evaluate, self._batches = job, saved, writer, evaluate, batches
        self._total, self._pending, self._clock = total, None, time.monotonic()
        writer.rewind(start if start else -1)
        self._progress = Progress(job.name, start, total)
        self.evaluated = next(reversed(_evaluation_rows(job.folder).values()), {})

    def report(self, state, step: int, metrics: dict | None) -> None:
        """Takes the metrics of update `step`, and evaluates and saves where it is time to."""
        block = self._job.block
        self._flush()
        self._pending = None if metrics is None else (step, metrics)
        evaluates = step % block.eval_every == 0 or step == self._total
        saves = step > 0 and (step % block.save_every == 0 or step == self._total)
        if evaluates or saves:
            values = self._take()
            better = False
            if evaluates:
                self.evaluated = self._evaluate(state.params)
                self._check_finite(step, self.evaluated)
                self._check_keep_best()
                values |= self.evaluated
                better = step > 0 and block.keep_best and self._saved.is_better(self.evaluated[block.keep_best])
            self._write(step, values, always=evaluates)
            if saves or better:
                self._saved.save(step, state, self.evaluated if evaluates else None)
            self._clock = time.monotonic()

    def interrupt(self, state, step: int, signum: int) -> None:
        """Saves, and ends the run with the shell's code for the signal."""
        self._flush()
        self._saved.save(step, state)
        self._progress.close()
        say(f"{self._job.name}: stopped by {signal.Signals(signum).name} after step {step}, which is saved; "
            "the same command goes on from here.")
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
        self._check_finite(step, {name: values[name] for name in ("loss/train", "grad_norm", "param_norm")})
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        batch_size = self._job.block.batch_size
        tokens = self._batches.tokens(step - 1)
        return values | {"counters/examples": step * batch_size, "counters/updates": step, "step_time": seconds,
                         "examples_per_second": batch_size / seconds, "tokens_per_second": tokens / seconds}

    def _write(self, step, values, always=False):
        if always or step % self._job.block.log_every == 0:
            self._writer.write(step, values)
        self._progress.update(step, values, always=always)

    def _check_keep_best(self):
        name = self._job.block.keep_best
        if name and name not in self.evaluated:
            found = ", ".join(sorted(self.evaluated)) or "none, as no row is held out"
            raise ValueError(f"config.{self._job.name}.keep_best = {name!r}: expected an evaluation metric; there are: "
                             + found)

    def _check_finite(self, step, values):
        for name, value in values.items():
            if not math.isfinite(value):
                self._fail(step, name, value)

    def _fail(self, step, name, value):
        rows = [self._job.data.train.where[row] for row in self._batches.order[max(step - 1, 0)]]
        latest = self._saved.latest()
        good = f"The last good checkpoint, step {latest}, is kept." if latest else "No checkpoint was saved yet."
        raise FloatingPointError(
            f"{self._job.name} stopped at step {step}: {name} is {value}. {good} A lower lr or max_grad_norm may "
            f"help, or a bad row; the batch was {', '.join(rows)}.")


def _evaluation_rows(folder) -> dict[int, dict[str, float]]:
    """Step -> evaluation metrics, from the rows written so far; a resumed run may have no more to make."""
    path = folder / "metrics.jsonl"
    rows = metrics_lib.read_rows(path) if path.exists() else []
    found = {row["step"]: {name: value for name, value in row.items()
                           if "_eval/" in name or name.endswith("/eval") or name.startswith("toy/")} for row in rows}
    return {step: values for step, values in found.items() if values}


def _training_batches(job: Job) -> Batches:
    block, size = job.block, len(job.data.train)
    steps = block.steps or int(block.epochs * size / block.batch_size)
    if not steps or not size:
        raise ValueError(f"{job.name}: {size} training rows make no step of config.{job.name}.batch_size = "
                         f"{block.batch_size} in {block.epochs} epochs; lower it, or set config.{job.name}.steps.")
    batches = Batches(_examples(job.data.train), training_order(size, block.batch_size, steps, job.seed),
                      microbatches=block.batch_size // (block.microbatch_size or block.batch_size),
                      shards=sharding.batch_shards(job.mesh))
    padding = batches.padding()
    say(f"{job.name}: {steps} steps of {block.batch_size} from {size} rows, {len(batches.shapes)} shapes, "
        f"padding {padding['dense']:.1%} of tokens, {padding['attention']:.1%} of attention")
    return batches


def _evaluation_batches(job: Job) -> Batches | None:
    size = job.block.microbatch_size or job.block.batch_size
    if not len(job.data.eval):
        return None
    return Batches(_examples(job.data.eval), evaluation_order(len(job.data.eval), size),
                   shards=sharding.batch_shards(job.mesh))


def _examples(data) -> list:
    return list(zip(data.prompts, data.responses, strict=True))


def _evaluate(job, eval_step, params, reference, hyper, batches) -> dict[str, float]:
    """Metrics over all held-out rows, each row weighted alike, and the probe's."""
    total = None
    for step in range(len(batches) if batches else 0):
        batch = sharding.shard_batch(job.mesh, batches[step], axis=1)
        total = metrics_lib.add(total, eval_step(params, reference, hyper, batch))
    values = metrics_lib.named(total, "eval") if total else {}
    return values | (job.probe(params) if job.probe else {})


def _bind(objective, model, block):
    return lambda params, reference, hyper, batch: objective(model, block, params, reference, hyper, batch)


def _hyper(block, steps: int) -> dict:
    """The numbers of a stage that are traced, not compiled in."""
    numbers = dict(lr=block.lr, warmup_steps=block.warmup_steps, steps=steps, max_grad_norm=block.max_grad_norm)
    numbers |= {name: block[name] for name in ("beta", "label_smoothing") if name in block}
    return {name: np.float32(value) for name, value in numbers.items()}


@contextlib.contextmanager
def _catch_signals():
    """A list that SIGTERM and the first Ctrl-C are put into; a second Ctrl-C stops at once."""
    caught = []

    def catch(signum, _frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
    before = {signum: signal.signal(signum, catch) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

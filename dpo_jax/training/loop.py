"""The training loop of every stage: resume, check, step, log, evaluate, save, stop.

`train(job, feed)` is the whole of it. What a step learns from comes from a `Feed`:
`data_feed.DataFeed`, the examples of a data set, or `ppo.RolloutFeed`, the policy's own
completions.

A run is a pure function of its config: interrupted after any step and started again, it writes the
same rows and ends with the same weights as one that ran through.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import time
import typing
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import costs, loss_table, stage_table, stopping
from dpo_jax.console import Progress, say
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import hardware, processes, sharding
from dpo_jax.training import losses, objectives
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, Restored
from dpo_jax.training.metric_names import is_evaluation
from dpo_jax.training.metrics import Writer
from dpo_jax.training.profile import Profile
from dpo_jax.training.step import Frozen, Programs, TrainState, make_programs
from dpo_jax.workdir import STOPPED, write_json

NAMED = 3  # examples of a batch that an error message names


class Interrupted(SystemExit):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has saved a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A training stage: what is trained, from what, with which settings, and where it is kept.

    The weights come as functions, so that each is loaded when it is needed and no earlier.
    """

    name: str  # the stage, a key of OBJECTIVES
    folder: pathlib.Path  # for metrics.jsonl and checkpoints/
    block: object  # the stage's config block
    model: TransformerConfig
    mesh: jax.sharding.Mesh
    load_init: Callable  # () -> what is trained, on the mesh: weights, or adapters
    # () -> the reference's weights or adapters, or None; where it moves, in arrays of its own
    load_reference: Callable
    log: object  # the config's log block
    config: dict  # the whole config, for Weights & Biases
    # At each evaluation, full weights -> ({name: value}, rows of completions to show): prompt,
    # completion, reward.
    probe: Callable | None = None
    lora: Lora | None = None  # the adapters that are trained; None: all weights are
    load_base: Callable = lambda: None  # () -> the frozen weights under the adapters, on the mesh
    loss: Callable | None = None  # of pairs, instead of the one that block.loss names

    @property
    def programs(self) -> Programs:
        """The stage's compiled functions."""
        return stage_programs(
            self.name, self.block, self.model, self.mesh, lora=self.lora, loss=self.loss
        )


def stage_programs(
    name: str,
    block,
    model: TransformerConfig,
    mesh: jax.sharding.Mesh,
    *,
    lora: Lora | None = None,
    loss: Callable | None = None,
) -> Programs:
    """Return the compiled functions of a stage, a key of OBJECTIVES, with its config block.

    loss: of pairs, a function in place of the one that block.loss names. Stages that differ in
    numbers alone (beta, lr, alpha, the weights of a mixture) share their functions, so that a sweep
    in one process compiles once.
    """
    objectives.check_balance(name, block, model)
    named = block.get("loss", "")
    if loss_table.is_mixture(named):
        named = tuple(loss_table.names(named))
    # The adapters' scale is one of the numbers, so it is left out here.
    adapters = Lora(lora.rank, targets=lora.targets) if lora else None
    return _programs(
        name,
        loss or named,
        losses.choices_of(block),
        model,
        mesh,
        block.optimizer,
        block.weight_decay,
        block.schedule,
        adapters,
        stage_table.moves_reference(block),
    )


@functools.cache
def _programs(
    name, loss, choices, model, mesh, optimizer, weight_decay, schedule, lora, moves_reference
) -> Programs:
    objective = objectives.make(name, model, loss, choices)
    return make_programs(
        objective,
        model,
        mesh,
        first_pass=objectives.make_first_pass(name, model),
        routing_pass=objectives.make_routing_pass(name, model, loss),
        optimizer=optimizer,
        weight_decay=weight_decay,
        schedule=schedule,
        lora=lora,
        moves_reference=moves_reference,
    )


class Feed(typing.Protocol):
    """The source of a stage's steps.

    `train` calls `start`, then `check` if the run is new, then `run` for each step in turn with
    `evaluate` in between, and `close` at the end, also after an error.
    """

    total: int  # steps
    updates_per_step: int  # optimiser updates in a step
    waits: bool  # for the device in each step, so that metrics fetched late would save no time
    controls: dict[str, float]  # scalars that the state starts with

    def start(self, frozen: Frozen, first_step: int) -> None:
        """Take what updates read and never change, and get ready to run from `first_step` on."""

    def check(self, state: TrainState) -> str:
        """Check the first batch under what training starts from; return a line to show.

        Raises SelfCheckFailed.
        """

    def run(self, state: TrainState, step: int) -> tuple[TrainState, dict]:
        """Make step `step`, counted from 0: the next state, and metrics {name: (sum, count)}.

        Deletes `state`. Steps come in order, without a gap.
        """

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return metrics of what is trained on what is held out, {name: value}."""

    def tokens(self, step: int) -> int:
        """Return how many real tokens the step read, or sampled."""

    def flops(self, step: int) -> int | None:
        """Return FLOPs that the step's real tokens need; None where that is not all its work."""

    def work(self, step: int) -> costs.Work:
        """Return what the method needs for the step, wherever it was done.

        The reference's log-probs count that were computed before training.
        """

    def examples(self, step: int) -> list[str]:
        """Return names of the step's examples, for an error message."""

    def close(self) -> None:
        """Let go of threads and files."""


@dataclasses.dataclass
class Patience:
    """How long a stage has waited for a better value of its keep_best metric."""

    limit: int  # evaluations; 0: it never ends for this
    is_worse: Callable  # (value, other value) -> whether the first is worse
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best one

    @property
    def is_over(self) -> bool:
        return 0 < self.limit <= self.waited

    @property
    def kept(self) -> dict:
        """What a checkpoint keeps of it; {} where no patience is set."""
        if not self.limit:
            return {}
        return dict(best=self.best, best_step=self.best_step, waited=self.waited)

    def resume(self, kept: dict) -> None:
        """Go on from what a checkpoint kept."""
        for name, value in kept.items():
            setattr(self, name, value)

    def add(self, step: int, value: float) -> None:
        """Count an evaluation. An equal value is no better one."""
        if self.best is None or self.is_worse(self.best, value):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1


class Diverged(FloatingPointError):
    """The loss or gradient of a stage is not finite, nor would it be at another attempt."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage = stage


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a stage: its last state, or with keep_best that of the best checkpoint."""

    params: dict  # weights, or adapters
    evaluation: dict[str, float]
    early_stop: dict  # where its patience ended it: step, of how many, and why; else {}


def train(job: Job, feed: Feed) -> Trained:
    """Train a stage, from its latest checkpoint if it has one.

    Raises Interrupted after a signal, and Diverged at the first loss or gradient that is not
    finite.
    """
    programs = job.programs
    # What a checkpoint holds is known before anything is loaded.
    shapes = programs.abstract_state(feed.controls)
    with (
        jax.set_mesh(job.mesh),
        # Of several processes the signal may reach one only, and all have to stop at one step.
        stopping.delayed(note=processes.give_notice) as signals,
        Writer(
            job.folder, tensorboard=job.log.tensorboard, wandb=job.log.wandb, config=job.config
        ) as writer,
        Checkpoints(
            job.folder / "checkpoints", keep=job.block.keep, best_metric=job.block.keep_best
        ) as checkpoints,
        Profile(job.folder / "profile", job.log.profile) as profile,
        contextlib.closing(feed),
    ):
        # What ended an earlier attempt need not end this one.
        if jax.process_index() == 0:
            (job.folder / STOPPED).unlink(missing_ok=True)
        # Before the first step there is nothing to save.
        with signals.at_once(saves=False):
            # What no step changes: adapters' base, reference, numbers.
            base = job.load_base()
            moves_reference = stage_table.moves_reference(job.block)
            reference = None if moves_reference else job.load_reference()
            frozen = Frozen(_hyper(job, feed), reference, base)
            # Restored first, as a damaged checkpoint makes the run begin at an earlier step.
            restored = checkpoints.restore_latest(shapes, programs.shardings)
            first_step = restored.step if restored else 0
            profile.check(job.name, first_step + 1, feed.total)
            feed.start(frozen, first_step)

            # Resume, or begin and check the first batch.
            if restored:
                say(f"{job.name}: resuming after step {first_step}")
                state = restored.state
            else:
                moved = job.load_reference() if moves_reference else None
                state = programs.init_state(job.load_init(), feed.controls, moved)
                say(f"{job.name}: {feed.check(state)}")
            recorder = _Recorder(job, feed, frozen, checkpoints, writer, first_step)
            recorder.signals = signals
            if restored:
                recorder.resume(state, restored)
            else:
                recorder.before_first(state)

        # Step, log, evaluate, save.
        for step in range(first_step, feed.total):
            # Asked before the step: a resumed run may have ended at its last checkpoint.
            if recorder.patience.is_over:
                break
            # The first one is compiled, which may take minutes, and is soon made again.
            is_first = step == first_step
            with signals.at_once(saves=False) if is_first else contextlib.nullcontext():
                profile.before(step + 1, state)
                state, metrics = feed.run(state, step)
                profile.after(step + 1, state)
            recorder.after(step + 1, state, metrics)
            # Asked after the last step too: a run that was told to stop exports nothing.
            signum = _asked_to_stop(signals)
            if signum:
                recorder.interrupt(step + 1, state, signum)
        recorder.close()

        # The result is the last state, or the best one that was saved.
        early_stop = recorder.early_stop()
        best = recorder.best()
        if best is None:
            recorder.say_by_subset(recorder.evaluation)
            return Trained(state.params, recorder.evaluation, early_stop)
        best_step, value = best
        say(f"{job.name}: best {job.block.keep_best} {value:.4g} at step {best_step}")
        state = checkpoints.restore_best(best_step, shapes, programs.shardings)
        evaluation = recorder.evaluation_of(best_step, state)
        recorder.say_by_subset(evaluation)
        return Trained(state.params, evaluation, early_stop)


def _hyper(job: Job, feed: Feed) -> dict:
    """Return the stage's traced numbers, on the mesh."""
    hyper = objectives.numbers(job.block, feed.total, feed.updates_per_step)
    # Traced as the others, so that a sweep over alpha shares a program.
    if job.lora:
        hyper["lora_scale"] = np.float32(job.lora.scale)
    # Placed once: numbers on the host would be sent again with every step.
    return jax.device_put(hyper, sharding.replicated(job.mesh))


class _Recorder:
    """Follows each step up with a row of metrics, progress, evaluations and checkpoints.

    A step's metrics are fetched once the next step has been dispatched, so that the device never
    waits for the host; only before an evaluation or a checkpoint are they needed at once. Those of
    a feed that waits for the device are fetched at once, as there is nothing to gain.
    """

    def __init__(
        self,
        job: Job,
        feed: Feed,
        frozen: Frozen,
        checkpoints: Checkpoints,
        writer: Writer,
        first_step: int,
    ):
        self._job = job
        self._feed = feed
        self._frozen = frozen
        self._checkpoints = checkpoints
        self._writer = writer
        self._peak_flops = hardware.flops_per_second(job.mesh, job.model.dtype)
        # The last step and its metrics, which are still on the device.
        self._pending: tuple[int, dict] | None = None
        self.signals = stopping.Signals()  # those that stop the run
        self._progress = Progress(job.name, first_step, feed.total)
        self.evaluation = {}
        self.patience = Patience(job.block.patience, checkpoints.is_worse)
        self._step = first_step  # the last one
        self._spent = costs.Spent()
        self._clock = time.monotonic()

    def resume(self, state: TrainState, restored: Restored) -> None:
        """Go on with the rows of a checkpoint."""
        step = restored.step
        self._spent = costs.Spent.of_dict(restored.spent)
        self._writer.rewind(step, restored.rows)
        self.patience.resume(restored.patience)
        if restored.row:
            # The run was stopped in this evaluation.
            self.evaluation = self._evaluate(step, state)
            self._write(step, restored.row | self.evaluation, always=True)
            if self.evaluation:
                self._checkpoints.rate(step, self.evaluation)
                self._wait(step)
        elif step >= self._feed.total:
            # A run that is resumed after its last step has no other evaluation to return.
            self.evaluation = self.evaluation_of(step, state)
            # One that has been made shorter saved its last step without it.
            if self.evaluation and not self._checkpoints.is_rated(step):
                self._checkpoints.rate(step, self.evaluation)
        self._clock = time.monotonic()

    def before_first(self, state: TrainState) -> None:
        """Evaluate what training starts from, and write it as row 0."""
        # An attempt before its first checkpoint may have left rows, which are written again.
        self._writer.rewind(-1, {})
        self.evaluation = self._evaluate(0, state)
        name, keep_best = self._job.name, self._job.block.keep_best
        if keep_best and not self.evaluation:
            patience = self.patience.limit
            ends = f", and config.{name}.patience = {patience} never ends the stage"
            say(
                f"{name}: no example is held out, so the last step is kept, not the best by "
                f"config.{name}.keep_best = {keep_best!r}{ends if patience else ''}"
            )
        self._write(0, self.evaluation, always=True)
        self._clock = time.monotonic()

    def after(self, step: int, state: TrainState, metrics: dict) -> None:
        """Log step `step`, counted from 1, and evaluate and save where it is time to."""
        # This step is under way on the device, so fetching the one before holds nothing up.
        self._write_pending()
        self._pending = (step, metrics)
        self._step = step
        block = self._job.block
        is_last = step == self._feed.total
        evaluates = step % block.eval_every == 0 or is_last
        saves = step % block.save_every == 0 or is_last
        if not evaluates and not saves:
            # Fetched with the next step, a step's time would be that of the next one's samples.
            if self._feed.waits:
                self._write_pending()
            return

        # Fetched first: a step that is not finite stops the run here, before it could be saved.
        row = self._fetch_pending()
        is_best = False
        if evaluates:
            try:
                # It may take long, and changes nothing: a signal need not wait for its end.
                with self._stopped_within():
                    self.evaluation = self._evaluate(step, state)
            except stopping.Stopped as stop:
                is_alone = jax.process_count() == 1
                # After a second Ctrl-C to one process the others still evaluate: none can save.
                if not is_alone and not isinstance(stop, stopping.StoppedTogether):
                    raise
                self.interrupt(step, state, stop.signum, row)
            row |= self.evaluation
            # The best one is saved even where no save is due.
            if block.keep_best and self.evaluation:
                is_best = self._checkpoints.is_better(self.evaluation[block.keep_best])
                self._wait(step)
        self._write(step, row, always=evaluates)
        # The last step is saved too, so that a run which is resumed there trains no further.
        if saves or is_best or self.patience.is_over:
            # Without held-out examples there is nothing to compare checkpoints by.
            measured = self.evaluation if evaluates and self.evaluation else None
            self._checkpoints.save(
                step,
                state,
                measured,
                self._writer.written,
                patience=self.patience.kept,
                spent=self._spent.to_dict(),
            )
        # Evaluations and checkpoints are no part of the next step's time.
        self._clock = time.monotonic()

    def interrupt(
        self, step: int, state: TrainState, signum: int, row: dict | None = None
    ) -> typing.NoReturn:
        """Save, and end the run with the shell's exit code for the signal.

        row: the step's metrics, where it still lacks its evaluation.
        """
        self._write_pending()
        self._checkpoints.save(
            step,
            state,
            rows=self._writer.written,
            row=row,
            patience=self.patience.kept,
            spent=self._spent.to_dict(),
        )
        self._progress.close()
        say(
            f"{self._job.name}: stopped by {signal.Signals(signum).name} after step {step}, which "
            "is saved. Run the same command again to resume."
        )
        stopping.said()
        raise Interrupted(128 + signum)

    def early_stop(self) -> dict:
        """Say that the stage's patience ended it, and return what is kept of that; {} if not."""
        step, steps = self._step, self._feed.total
        if step == steps or not self.patience.is_over:
            return {}
        metric = self._job.block.keep_best
        patience = self.patience
        evaluations = "1 evaluation" if patience.waited == 1 else f"{patience.waited} evaluations"
        say(
            f"{self._job.name}: ended early, at step {step} of {steps}: {evaluations} "
            f"since step {patience.best_step} brought no better {metric} than "
            f"{patience.best:.4g} (config.{self._job.name}.patience = {patience.limit})"
        )
        return dict(step=step, steps=steps, metric=metric, best_step=patience.best_step)

    def _wait(self, step: int) -> None:
        """Count an evaluation for the stage's patience, the same in every process."""
        if self.patience.limit:
            value = self.evaluation[self._job.block.keep_best]
            # A process that went on alone would wait for the others for ever.
            self.patience.add(step, processes.from_first(lambda: value))

    def best(self) -> tuple[int, float] | None:
        """Return step and metric of the best checkpoint; None where the last one is the result.

        Raises DamagedCheckpoint where the best by metrics.jsonl is not among the checkpoints.
        """
        metric = self._job.block.keep_best
        found = self._checkpoints.best() if metric else None
        if found is None:
            return None
        step, value = found
        written = self._written_evaluations()
        checkpoints = self._job.folder / "checkpoints"
        remedy = f"Put it back from a copy, or remove {self._job.folder} to train the stage again."
        if written.get(step, {}).get(metric, value) != value:
            raise DamagedCheckpoint(
                f"the best checkpoint, {checkpoints / str(step)}, has {metric} {value:.6g}, and "
                f"metrics.jsonl has {written[step][metric]:.6g}: one of the two has been changed. "
                f"{remedy}"
            )
        best_step, best_value = step, value
        for other, evaluation in written.items():
            other_value = evaluation.get(metric, value)
            # Row 0 is of what training started from, which is no result of it.
            if other and self._checkpoints.is_worse(best_value, other_value):
                best_step, best_value = other, other_value
        if best_step != step:
            raise DamagedCheckpoint(
                f"the best {metric} in metrics.jsonl is {best_value:.6g}, of step {best_step}, and "
                f"{checkpoints / str(best_step)} is not there or is set aside: the best one that "
                f"is there is of step {step}, with {value:.6g}. {remedy}"
            )
        return found

    def evaluation_of(self, step: int, state: TrainState) -> dict[str, float]:
        """Return the evaluation of a step, from its row, or anew where the row has been lost."""
        written = self._written_evaluations()
        if step in written:
            return written[step]
        evaluation = self._evaluate(step, state)
        if evaluation:
            # Later rows may be there, and one of this step that has lost its evaluation alone.
            self._writer.amend(step, evaluation)
        return evaluation

    def _written_evaluations(self) -> dict[int, dict[str, float]]:
        """Return the evaluations in metrics.jsonl, by step, the same in every process."""
        found = processes.from_first(lambda: list(_evaluations(self._job.folder).items()))
        return dict(map(tuple, found))

    def say_by_subset(self, evaluation: dict[str, float]) -> None:
        """Show an evaluation's means by subset, where the data has subsets."""
        table = metrics_lib.table_by_subset(evaluation)
        if table:
            say(f"{self._job.name}: {table}")

    def close(self) -> None:
        """Write the last row, and what training took."""
        self._write_pending()
        costs.write(self._job.folder, **self._spent.to_dict())
        self._progress.close()

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        values = self._feed.evaluate(state)
        completions = []
        if self._job.probe:
            measured, completions = self._job.probe(self._frozen.full(state.params))
            values = values | measured
        self._check_finite(step, values)
        self._check_keep_best(values)
        if completions:
            text = metrics_lib.completions_text(completions)
            say(f"{self._job.name}: completions at step {step}\n{text}")
            self._writer.show(step, completions)
        return values

    def _stopped_within(self):
        """Return a context in which a signal raises Stopped, in every process at the same place."""
        if jax.process_count() == 1:
            return self.signals.at_once(saves=True)
        return stopping.asked_between(functools.partial(_asked_to_stop, self.signals))

    def _write_pending(self) -> None:
        if self._pending is not None:
            step, _ = self._pending
            self._write(step, self._fetch_pending())

    def _fetch_pending(self) -> dict[str, float]:
        """Return the row of the pending step; raise where loss, gradient or weights are not finite.

        Fetching waits for the device, so the time since the last fetch is a step's.
        """
        step, metrics = self._pending
        self._pending = None
        row = metrics_lib.named(metrics, "train")
        # A finite loss may still have a gradient, or weights after the update, that are not.
        watched = {name: row[name] for name in ("loss/train", "grad_norm", "param_norm")}
        self._check_finite(step, watched)

        now = time.monotonic()
        seconds = now - self._clock
        self._clock = now
        self._spent = self._spent.plus(seconds, self._feed.work(step - 1))
        batch_size = self._job.block.batch_size
        tokens = self._feed.tokens(step - 1)
        needed_flops = self._feed.flops(step - 1)
        row |= {
            "counters/examples": step * batch_size,
            "step_time": seconds,
            "counters/updates": step * self._feed.updates_per_step,
            "examples_per_second": batch_size / seconds,
            "tokens_per_second": tokens / seconds,
        }
        # FLOPs that the tokens need, not those that were done: padding and recomputation lower it.
        if needed_flops:
            row["model_flops_utilization"] = needed_flops / seconds / self._peak_flops
        return row

    def _write(self, step: int, row: dict[str, float], always: bool = False) -> None:
        # The row of an evaluation is written whatever log_every says.
        if always or step % self._job.block.log_every == 0:
            self._writer.write(step, row)
        self._progress.update(step, row, always=always)

    def _check_keep_best(self, evaluation: dict[str, float]) -> None:
        name = self._job.block.keep_best
        if name and evaluation and name not in evaluation:
            known = ", ".join(sorted(evaluation))
            raise ValueError(
                f"config.{self._job.name}.keep_best = {name!r}: expected a metric of the "
                f"evaluation; there are: {known}"
            )

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self._stop_at(step, name, value)

    def _stop_at(self, step: int, name: str, value: float) -> None:
        # An evaluation reads all that is held out, a step the examples of its batch.
        if is_evaluation(name):
            where = "on the held-out examples"
        else:
            examples = self._feed.examples(max(step - 1, 0))
            where = f"on the batch of {_first_few(examples)}"
        latest = self._checkpoints.latest()
        if latest:
            kept = f"The last good checkpoint, step {latest}, is kept."
            how = " (with --allow_change=lr, or max_grad_norm, to go on from that checkpoint)"
        else:
            kept = "No checkpoint was saved yet."
            how = ""
        reason = (
            f"{self._job.name} stopped at step {step}: {name} is {value}, {where}. {kept} "
            f"Try a lower lr or max_grad_norm{how}, or leave out a bad example."
        )
        # For the report. A disk that is full is not what stopped the run.
        with contextlib.suppress(OSError):
            write_json(self._job.folder / STOPPED, dict(reason=reason))
        raise Diverged(self._job.name, reason)


def _evaluations(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """Return the evaluations among the rows written so far, by step."""
    path = folder / "metrics.jsonl"
    rows = metrics_lib.read_rows(path) if path.exists() else []
    evaluations = {}
    for row in rows:
        values = {name: value for name, value in row.items() if is_evaluation(name)}
        if values:
            evaluations[row["step"]] = values
    return evaluations


def _first_few(examples: list[str]) -> str:
    """Return the first NAMED examples by name, and how many more there are."""
    text = ", ".join(examples[:NAMED])
    more = len(examples) - NAMED
    return f"{text} and {more} more" if more > 0 else text


def _asked_to_stop(signals: stopping.Signals) -> int | None:
    """Return the signal after which to save and stop, the same in every process and step."""
    if jax.process_count() == 1:
        return signals.caught
    return processes.asked_to_stop(signals.caught)

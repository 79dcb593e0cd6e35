"""Checkpoints by orbax. Its v1 API is still named experimental, and is used in this file alone.

Saves are asynchronous and atomic: a kill in the middle of one leaves the checkpoint before it as
the latest. Orbax checks nothing of what it reads, so sums of the state's bits are kept with each
checkpoint, and compared when it is restored.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import json
import logging
import pathlib
import re
import sys
import warnings
from collections.abc import Callable

import jax
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from dpo_jax.console import warn
from dpo_jax.parallel import processes
from dpo_jax.storage import shadow
from dpo_jax.training.checkpoint_sums import sums
from dpo_jax.training.metric_names import describe
from dpo_jax.training.step import TrainState
from dpo_jax.whole_file import set_aside, whole_file, with_sha256, without_sha256
from dpo_jax.workdir import saved_steps

# Unfinished stages of version 1 have checkpoints without sums.
CHECKPOINT_VERSION = 2
# tensorstore's messages begin with one, such as "RESOURCE_EXHAUSTED: Failed writing".
STATUS = re.compile("[A-Z_]+: ")
LONGEST_REASON = 150  # characters of a library's message that are shown


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved, or cannot be read."""


class NoSums(DamagedCheckpoint):
    """A checkpoint can be read, but an earlier version kept nothing to check it by."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as it was restored."""

    step: int
    state: TrainState
    rows: dict  # of metrics.jsonl at its save, as Writer.written
    row: dict  # of this step, where the run was stopped before its evaluation; else {}
    patience: dict = dataclasses.field(default_factory=dict)  # as Patience.kept; {}: none is set
    # What training had taken, as Spent.to_dict; {} of an earlier version.
    spent: dict = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: the latest ones, and also the best one.

    A context: on leaving it, a save under way is waited for.
    """

    def __init__(self, folder, *, keep: int, best_metric: str = ""):
        """Open the checkpoints in a folder, which is made with the first.

        keep: how many of the latest are kept. best_metric: the metric of an evaluation by which the
        best one is kept too; "": none is.
        """
        self._best_metric = best_metric
        self._here = pathlib.Path(folder)  # where they are, but for those in gs://
        self._folder = shadow.checkpoint_folder(self._here)
        policies = ocp.training.preservation_policies
        # A checkpoint goes when neither policy keeps it.
        kept = [policies.LatestN(keep)]
        if best_metric:
            # Checkpoints between two evaluations have no metric, and are no candidates.
            best = policies.BestN(
                get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        processes.from_first(self._make_ready)
        # orbax logs what it raises, several times, from the threads that save.
        absl_logging.get_absl_logger().addFilter(_is_not_orbax_error)
        # It reads what is there, damaged or not: that is told when one is restored.
        with _quiet():
            self._checkpointer = ocp.training.Checkpointer(
                str(self._folder),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                # When to save is the loop's decision.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            )
        # At each save orbax asks jax for preemptions too, with the step. Processes agree on a
        # number to stop at, which the loop counts up to through all stages (loop._ASKED): a lower
        # number in between would let it pass the one they agreed on.
        self._checkpointer._manager.reached_preemption = lambda step: False
        self._last_save = None  # orbax's handle of it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._end_last_save()
        finally:
            # A save that failed would be told again.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    def latest(self) -> int | None:
        """Return the step of the latest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best(self) -> tuple[int, float] | None:
        """Return step and metric of the best checkpoint; of equals the latest, as orbax does."""
        # Only checkpoints that were saved with an evaluation have metrics.
        rated = [saved for saved in self._checkpointer.checkpoints if saved.metrics is not None]
        if not rated:
            return None
        best = max(rated, key=lambda saved: (self._rank(saved.metrics), saved.step))
        return best.step, best.metrics[self._best_metric]

    def is_rated(self, step: int) -> bool:
        """Return whether a step was saved with its evaluation, or has been given it since."""
        rated = [saved for saved in self._checkpointer.checkpoints if saved.metrics is not None]
        return any(saved.step == step for saved in rated)

    def is_better(self, value: float) -> bool:
        """Return whether a checkpoint saved now, with this value, would be the best."""
        best = self.best()
        if best is None:
            return True
        _, best_value = best
        # Equal is better too, since `best` takes the latest of equals.
        return not self.is_worse(value, best_value)

    def is_worse(self, value: float, other: float) -> bool:
        """Return whether a value of the metric is worse than another one."""
        return self._rank({self._best_metric: value}) < self._rank({self._best_metric: other})

    def save(
        self,
        step: int,
        state: TrainState,
        evaluation: dict | None = None,
        rows: dict | None = None,
        *,
        row: dict | None = None,
        patience: dict | None = None,
        spent: dict | None = None,
    ) -> None:
        """Save in the background, unless the step is saved already.

        The state may be donated right after. evaluation: its metrics, where it was evaluated. rows:
        what is known of metrics.jsonl up to this step. row: the step's own, where it still lacks
        its evaluation, which is added later by `rate`. patience: as `Patience.kept`. spent: what
        training took up to this step.
        """
        # A signal may come at a step that was saved as it is.
        if step == self.latest():
            return
        metrics = self._kept_metrics(evaluation) if evaluation else None
        tree = _as_dict(state)
        # Of what is on the device: damage on the way to the disk shows too.
        kept = {"sums": sums(tree), "rows": rows or {}, "row": row or {}, "spent": spent or {}}
        if patience:
            kept["patience"] = patience
        kept = with_sha256(kept)
        self._end_last_save()
        # In a bucket, a checkpoint counts only with the rows that it says were written.
        if jax.process_index() == 0:
            shadow.push(self._here.parent)
        with self._told_once():
            self._last_save = self._checkpointer.save_async(
                step, tree, metrics=metrics, custom_metadata=kept, force=True
            )

    def rate(self, step: int, evaluation: dict) -> None:
        """Add the evaluation of a step that was saved without it, so that it may be the best.

        To save the step once more, orbax would first remove the one that is there.
        """
        metrics = self._kept_metrics(evaluation)
        if metrics is None:
            return

        def write():
            file = _metrics_file(self._folder / str(step))
            file.parent.mkdir(exist_ok=True)
            _write_whole(file, json.dumps(metrics))

        processes.from_first(write)
        with _quiet():
            self._checkpointer.reload()

    def _kept_metrics(self, evaluation: dict) -> dict | None:
        """Return the part of an evaluation that is kept with a checkpoint; None where none is."""
        name = self._best_metric
        return {name: evaluation[name]} if name else None

    def _end_last_save(self) -> None:
        """Wait for the last save, as the next one would, and let go of its thread and three files.

        orbax keeps them until somebody asks for the result: a long run would be out of open files.
        """
        last, self._last_save = self._last_save, None
        if last is not None:
            with self._told_once():
                last.result()

    @contextlib.contextmanager
    def _told_once(self):
        """Raise OSError for a checkpoint that cannot be written, as on a full disk."""
        outer = sys.exception()  # the run may be ending for another reason
        try:
            yield
        except (OSError, ValueError) as error:
            # tensorstore has ValueErrors for a disk's errors. Any other one is a bug.
            if isinstance(error, ValueError) and not STATUS.match(str(error)):
                raise
            raise OSError(
                f"{self._folder}: a checkpoint could not be written ({_root_of(error, outer)}). "
                "Mend that or make room, and run the same command again: it resumes from the "
                "checkpoint before it, or begins again where there is none."
            ) from error

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> Restored:
        """Return the state of a step, placed by `shardings`.

        Those may be of another mesh than the one it was saved from. Raises DamagedCheckpoint.
        """
        self._checkpointer.wait()  # the save of this step may still be under way
        # One sharding stands for all controls; orbax wants one for each.
        placed = jax.tree.broadcast(shardings, shapes)
        abstract = _as_dict(_abstract(shapes, placed))
        tree, kept = _load(self._checkpointer.directory / str(step), abstract)
        told = [kept.get(name, {}) for name in ("rows", "row", "patience", "spent")]
        return Restored(step, TrainState(**tree), *told)

    def restore_best(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """Return the state of the step that is the result; DamagedCheckpoint says what to do."""
        try:
            return self.restore(step, shapes, shardings).state
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(
                f"{error}, and it is the best one, which the stage's result is made of. Put it "
                f"back from a copy, or remove {self._folder.parent} to train the stage again."
            ) from error

    def restore_latest(self, shapes: TrainState, shardings: TrainState) -> Restored | None:
        """Return the newest checkpoint that is whole; None where there is none at all.

        Damaged ones that are newer are set aside, with a line that says so. Raises
        DamagedCheckpoint where all of them are damaged.
        """
        steps = sorted((saved.step for saved in self._checkpointer.checkpoints), reverse=True)
        damaged = {}
        for step in steps:
            try:
                restored = self.restore(step, shapes, shardings)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            if damaged:
                self._set_aside(damaged, step)
            return restored
        if not damaged:
            return None
        found = "\n".join(f"  {error}" for error in damaged.values())
        raise DamagedCheckpoint(
            f"{self._folder} has no checkpoint that can be resumed from:\n{found}\n"
            f"Put one of them back from a copy, or remove {self._folder}: the stage then begins "
            "again."
        )

    def _make_ready(self) -> None:
        """Take away what orbax would fail at, or remove while other processes look at it."""
        shadow.remove_partial_checkpoints(self._here)
        self._set_aside_unrated()

    def _set_aside_unrated(self) -> None:
        """Rename checkpoints whose metrics cannot be read, by which orbax would fail to open any.

        Raises DamagedCheckpoint where there is no other one.
        """
        steps = saved_steps(self._here)
        damaged = [step for step in steps if not _has_good_metrics(self._folder / str(step))]
        if damaged and len(damaged) == len(steps):
            raise DamagedCheckpoint(
                f"{_metrics_file(self._folder / str(damaged[-1]))} is not what was saved there, "
                "and there is no other checkpoint that can be resumed from. Put it back from a "
                f"copy, or remove {self._folder}: the stage then begins again."
            )
        for step in damaged:
            file = _metrics_file(self._folder / str(step))
            kept = set_aside(self._folder / str(step))
            warn(f"{file} is damaged; its checkpoint is passed over, and kept as {kept.name}.")

    def _set_aside(self, damaged: dict[int, DamagedCheckpoint], good: int) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again, and say so."""

        def rename():
            return [set_aside(self._folder / str(step)).name for step in damaged]

        for error, name in zip(damaged.values(), processes.from_first(rename), strict=True):
            warn(f"{error}; resuming from step {good}. It is kept as {name}.")
        with _quiet():
            self._checkpointer.reload()

    def _rank(self, metrics) -> float:
        """Return the metric so that higher is better."""
        value = metrics[self._best_metric]
        return -value if describe(self._best_metric).lower_is_better else value


def load_params(folder, step: int, shapes, shardings):
    """Return the weights alone of a checkpoint, placed by `shardings`; for use after the run.

    Raises DamagedCheckpoint.
    """
    # Moments may be twice as large as the weights, and need not be read.
    abstract = dict(params=_abstract(shapes, shardings))
    path = shadow.checkpoint_folder(pathlib.Path(folder)) / str(step)
    return _load(path, abstract, partial=True)[0]["params"]


def verify(folder, step: int) -> dict:
    """Read a checkpoint, on one device and in a few parts; return the `rows` of its save.

    Raises DamagedCheckpoint.
    """
    path = shadow.checkpoint_folder(pathlib.Path(folder)) / str(step)
    if not _has_good_metrics(path):
        raise DamagedCheckpoint(f"{_metrics_file(path)} is not what was saved there")
    stored, kept = _metadata(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    names = set()
    for part, tree in stored.items():
        if not jax.tree.leaves(tree):
            continue
        abstract = {part: jax.tree.map(lambda x: _placed(x, device), tree)}
        loaded, _ = _load(path, abstract, partial=True)
        names |= sums(loaded).keys()
    lacking = kept.get("sums", {}).keys() - names
    if lacking:
        raise DamagedCheckpoint(f"{path} lacks {min(lacking)}")
    return kept.get("rows", {})


def _placed(stored, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def _metadata(path: pathlib.Path) -> tuple[dict, dict]:
    """Return the tree of shapes in a checkpoint, and what was kept with it."""
    found = _attempt(path, lambda: ocp.metadata(path))
    kept = without_sha256(found.custom_metadata or {})
    # An earlier version kept nothing in orbax's record, but orbax wrote its own part.
    is_emptied = not kept and found.commit_timestamp_nsecs is None
    if not isinstance(found.metadata, dict) or kept is None or is_emptied:
        raise DamagedCheckpoint(f"{path} no longer says what was saved in it")
    return found.metadata, kept


def _load(path: pathlib.Path, abstract: dict, *, partial: bool = False) -> tuple[dict, dict]:
    """Return a tree of a checkpoint, once it is found to be what was saved, and its metadata.

    partial: the tree is only a part of what was saved. Raises DamagedCheckpoint.
    """
    _, kept = _metadata(path)
    context = _context_of_one()
    # Without it orbax wants a place for all that was saved.
    context.pytree.loading.partial_load = partial
    with context:
        tree = _attempt(path, lambda: ocp.load(path, abstract))
    if "sums" not in kept:
        raise NoSums(f"{path} has no sums to check it by")
    found = sums(tree)
    changed = [name for name, value in found.items() if kept["sums"].get(name) != value]
    if changed:
        more = f", and of {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DamagedCheckpoint(
            f"{path} is not what was saved: the sums of {changed[0]} differ{more}"
        )
    return tree, kept


def _context_of_one() -> ocp.Context:
    """Return a context in which orbax reads this process's part, and waits for no other process.

    One that cannot read its part would leave the others waiting in orbax.
    """
    context = ocp.Context()
    me = jax.process_index()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    return context


def _attempt(path: pathlib.Path, read: Callable):
    """Return what orbax reads of a checkpoint; DamagedCheckpoint, in one line, where it cannot.

    Of several processes all raise where one cannot.
    """
    reason = ""
    found = None
    with _quiet():
        try:
            found = read()
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # noqa: BLE001 - orbax, tensorstore and codecs have many
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise  # a disk's error, which may be over soon
            reason = _root_of(error)
        if reason:
            # Unfinished reads of other arrays complain when they are thrown away: here, or later.
            gc.collect()
    if jax.process_count() > 1:
        reasons = [text.decode() for text in processes.gathered(reason.encode())]
        reason = next(filter(None, reasons), "")
    if reason:
        raise DamagedCheckpoint(f"{path} cannot be read ({reason})")
    return found


@contextlib.contextmanager
def _quiet():
    """Keep libraries from telling what they raise: an error is told once, in our own words."""
    _ignore_late_reads()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _is_of_no_read(record: logging.LogRecord) -> bool:
    """Return False for what asyncio logs of a failed read that nobody waits for any more."""
    return "exception was never retrieved" not in record.getMessage()


@functools.cache  # once for the process
def _ignore_late_reads() -> None:
    """From here on, say nothing of reads that end after one beside them has failed."""
    logging.getLogger("asyncio").addFilter(_is_of_no_read)
    say = sys.unraisablehook

    def say_others(unraisable):
        if not _is_of_late_read(unraisable):
            say(unraisable)

    sys.unraisablehook = say_others


def _is_of_late_read(unraisable) -> bool:
    # It raises in a thread of tensorstore's, since orbax has closed its event loop by then.
    if str(unraisable.exc_value) == "Event loop is closed":
        return True
    # Or it failed as well, in a coroutine of orbax's that is thrown away.
    code = getattr(unraisable.object, "cr_code", None)
    return code is not None and "orbax" in code.co_filename


def _root_of(error: BaseException, outer: BaseException | None = None) -> str:
    """Return the message of the error that others were raised from, in one line and not too long.

    outer: an error that was being handled before; it is no cause of these.
    """
    while True:
        cause = error.__cause__ or error.__context__
        if cause is None or cause is outer:
            break
        error = cause
    message = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {message}"
    if len(reason) <= LONGEST_REASON:
        return reason
    # What it is stands first, and the system's words last; a specification may stand between.
    half = LONGEST_REASON // 2
    return f"{reason[:half]}...{reason[-half:]}"


def _metrics_file(checkpoint: pathlib.Path) -> pathlib.Path:
    """Return the file in which orbax keeps the metrics of a checkpoint, if it has some."""
    return checkpoint / "metrics" / "metrics"


def _has_good_metrics(checkpoint: pathlib.Path) -> bool:
    """Return whether a checkpoint's metrics, if it has some, are numbers."""
    file = _metrics_file(checkpoint)
    if not file.exists():
        return True
    try:
        metrics = json.loads(file.read_bytes())
    except ValueError:  # JSON's own error, and that of UTF-8
        return False
    values = metrics.values() if isinstance(metrics, dict) else [None]
    return all(isinstance(value, float | int) for value in values)


def _write_whole(file: epath.Path, text: str) -> None:
    if "://" in str(file):
        file.write_text(text)  # an object is written whole, or not at all
        return
    with whole_file(file) as draft:
        draft.write_text(text)


def _abstract(shapes, shardings):
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, shardings
    )


def _as_dict(state: TrainState) -> dict:
    """Return the state as it is saved, without entries for controls or a reference it has not."""
    parts = dict(step=state.step, params=state.params, opt_state=state.opt_state)
    if state.controls:
        parts["controls"] = state.controls
    if state.reference is not None:
        parts["reference"] = state.reference
    return parts

"""Checkpoints by orbax. Its v1 API is still named experimental, and is used in this file alone.

Saves are asynchronous and atomic: a kill in the middle of one leaves the checkpoint before it as
the latest.
"""

import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from dpo_jax.training.metric_names import describe
from dpo_jax.training.step import TrainState


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
        policies = ocp.training.preservation_policies
        # A checkpoint goes when neither policy keeps it.
        kept = [policies.LatestN(keep)]
        if best_metric:
            # Checkpoints between two evaluations have no metric, and are no candidates.
            best = policies.BestN(
                get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(folder),
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

    def is_better(self, value: float) -> bool:
        """Return whether a checkpoint saved now, with this value, would be the best."""
        best = self.best()
        if best is None:
            return True
        _, best_value = best
        # Equal is better too, since `best` takes the latest of equals.
        return self._rank({self._best_metric: value}) >= self._rank({self._best_metric: best_value})

    def save(self, step: int, state: TrainState, evaluation: dict | None = None) -> None:
        """Save in the background, unless the step is saved already.

        The state may be donated right after. evaluation: its metrics, where it was evaluated.
        """
        # A signal may come at a step that was saved as it is.
        if step == self.latest():
            return
        metrics = None
        if evaluation and self._best_metric:
            metrics = {self._best_metric: evaluation[self._best_metric]}
        self._end_last_save()
        self._last_save = self._checkpointer.save_async(
            step, _as_dict(state), metrics=metrics, force=True
        )

    def _end_last_save(self) -> None:
        """Wait for the last save, as the next one would, and let go of its thread and three files.

        orbax keeps them until somebody asks for the result: a long run would be out of open files.
        """
        last, self._last_save = self._last_save, None
        if last is not None:
            last.result()

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """Return the state of a step, placed by `shardings`.

        Those may be of another mesh than the one it was saved from.
        """
        self._checkpointer.wait()  # the save of this step may still be under way
        # One sharding stands for all controls; orbax wants one for each.
        placed = jax.tree.broadcast(shardings, shapes)
        return TrainState(**self._checkpointer.load(step, _as_dict(_abstract(shapes, placed))))

    def _rank(self, metrics) -> float:
        """Return the metric so that higher is better."""
        value = metrics[self._best_metric]
        return -value if describe(self._best_metric).lower_is_better else value


def saved_steps(folder) -> list[int]:
    """Return the steps of a run's complete checkpoints, which have a number for a name."""
    return sorted(int(item.name) for item in pathlib.Path(folder).glob("*") if item.name.isdigit())


def load_params(folder, step: int, shapes, shardings):
    """Return the weights alone of a checkpoint, placed by `shardings`; for use after the run."""
    # Moments may be twice as large as the weights, and need not be read.
    abstract = _abstract(shapes, shardings)
    context = ocp.Context()
    # Without it orbax wants a place for all that was saved.
    context.pytree.loading.partial_load = True
    with ocp.training.Checkpointer(_absolute(folder)) as checkpointer, context:
        return checkpointer.load(step, dict(params=abstract))["params"]


def _absolute(folder) -> str:
    """Return the path as orbax takes it, which refuses a relative one."""
    return str(pathlib.Path(folder).absolute())


def _abstract(shapes, shardings):
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, shardings
    )


def _as_dict(state: TrainState) -> dict:
    """Return the state as it is saved; a stage without controls has no entry for them."""
    parts = dict(step=state.step, params=state.params, opt_state=state.opt_state)
    if state.controls:
        parts["controls"] = state.controls
    return parts

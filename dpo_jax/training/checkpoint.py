"""Checkpoints by orbax (v1 API, still named experimental inside orbax; used in this file alone).

Saves are asynchronous and atomic: a kill in the middle leaves the checkpoint before it as the
latest.
"""

import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from dpo_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run: the `keep` latest and, by `best_metric` where it is not "", the
    best one.
    """

    def __init__(self, folder, *, keep: int, best_metric: str = ""):
        self._best_metric = best_metric
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if best_metric:
            kept.append(
                policies.BestN(
                    get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._checkpointer = ocp.training.Checkpointer(
            str(pathlib.Path(folder).absolute()),  # orbax takes no other
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        )
        # At each save orbax asks jax for preemptions too, with the step. Processes agree on a number
        # to stop at, which the loop counts up to through all stages (`loop._ASKED`): a lower one in
        # between would let it pass that number.
        self._checkpointer._manager.reached_preemption = lambda step: False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._checkpointer.close()  # waits for a save under way

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best checkpoint, the latest of equals: orbax keeps that one
        too.
        """
        rated = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        best = max(rated, key=lambda c: (self._rank(c.metrics), c.step), default=None)
        return None if best is None else (best.step, best.metrics[self._best_metric])

    def is_better(self, value: float) -> bool:
        """Whether a later checkpoint with this value of the metric would be the best."""
        best = self.best()
        return best is None or self._rank({self._best_metric: value}) >= self._rank(
            {self._best_metric: best[1]}
        )

    def save(self, step: int, state: TrainState, metrics: dict | None = None) -> None:
        """Saves in the background, unless the step is saved already; the state may be donated right
        after.
        """
        metrics = (
            {self._best_metric: metrics[self._best_metric]}
            if metrics and self._best_metric
            else None
        )
        if step != self.latest():
            self._checkpointer.save_async(step, _as_dict(state), metrics=metrics, force=True)

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state of a step, placed by `shardings`, which may be another mesh's than it was saved
        from.
        """
        self._checkpointer.wait()  # its own save may still be under way
        placed = jax.tree.broadcast(shardings, shapes)
        return TrainState(**self._checkpointer.load(step, _as_dict(_abstract(shapes, placed))))

    def _rank(self, metrics) -> float:
        """Higher is better: losses and negative log-likelihoods count negatively."""
        value = metrics[self._best_metric]
        return -value if self._best_metric.startswith(("loss", "nll")) else value


def saved_steps(folder) -> list[int]:
    """The steps of a run's complete checkpoints, which have a number for a name."""
    return sorted(int(item.name) for item in pathlib.Path(folder).glob("*") if item.name.isdigit())


def load_params(folder, step: int, shapes, shardings):
    """The weights alone of a checkpoint, placed by `shardings`; for use when the run is over."""
    abstract = _abstract(shapes, shardings)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with ocp.training.Checkpointer(str(pathlib.Path(folder).absolute())) as checkpointer, context:
        return checkpointer.load(step, dict(params=abstract))["params"]


def _abstract(shapes, shardings):
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, shardings
    )


def _as_dict(state: TrainState) -> dict:
    parts = dict(step=state.step, params=state.params, opt_state=state.opt_state)
    return parts | (dict(controls=state.controls) if state.controls else {})

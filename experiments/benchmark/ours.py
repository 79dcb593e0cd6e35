"""Our side of the benchmark: the training loop's update and batches, on one device.

Metrics are fetched one step late, as in the loop. `plain.py` is the same with separate rows.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.data import dataset
from dpo_jax.data.batches import Batches, prefetch, training_order
from dpo_jax.models import attention, flops, loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.training import metrics, objectives, reference_cache
from dpo_jax.training.loop import stage_programs
from dpo_jax.training.step import Frozen
from experiments.benchmark import device, stages
from experiments.benchmark.work import Work
from experiments.benchmark.worker import Turns


class Trainer:
    """A DPO run that makes a few steps at a time."""

    def __init__(self, folder: pathlib.Path, work: Work, *, share: bool = True):
        """Load the model and the rows, and compile the step for each shape.

        share: whether the pairs of a batch share prompts and responses, as in `Batches`.
        """
        config = run_config(folder, work)
        self.work = work
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.model = loading.open_checkpoint(config.model.path, dtype=work.dtype)
        data = dataset.load(config.data, self.model.tokenizer, "pairs").train
        order = training_order(len(data), work.pairs, len(data) // work.pairs, None)
        # Each side keeps its own, as the sides start together.
        kept = folder / ("shared" if share else "plain")
        platform = sharding.platform_of(self.mesh)
        limits = attention.row_limits(self.model.config.narrowest_window, platform)
        self.batches = Batches(
            data,
            order,
            share=share,
            limits=limits,
            reference_log_probs=self._reference_log_probs(kept, data, order),
        )
        self.programs = stage_programs("dpo", config.dpo, self.model.config, self.mesh)
        numbers = objectives.numbers(config.dpo, work.steps)
        self.hyper = jax.device_put(numbers, sharding.replicated(self.mesh))
        self.state = self.reference = None
        self._warm_up()
        self._restart()

    def _reference_log_probs(self, kept: pathlib.Path, data, order) -> np.ndarray | None:
        """Return the reference's log-probs for the steps that will be made, if they are cached."""
        if not self.work.cached:
            return None
        cache = reference_cache.ReferenceCache(kept, self.model, self.mesh, self.work.pairs)
        return cache.log_probs("train", data, order[: self.work.steps])

    def _restart(self):
        """Begin the run again from the weights on disk."""
        # Free the old arrays first, so that peak memory holds one copy.
        self.state = self.reference = None
        with jax.set_mesh(self.mesh):
            self.reference = None if self.work.cached else self.model.load_params(self.mesh)
            self.state = self.programs.init_state(self.model.load_params(self.mesh))
        self._feed = prefetch(self.load, range(self.work.steps))

    def _warm_up(self):
        """Compile the step for each shape of the steps that will be made; the caller restarts."""
        self._restart()
        steps_by_shape = {}
        for step in range(self.work.steps):
            shape = str(jax.tree.map(np.shape, self.batches[step]))
            steps_by_shape[shape] = step
        for step in steps_by_shape.values():
            self._update(self.load(step))
        # Else the last update would still run in the first step that is timed.
        jax.block_until_ready(self.state)

    def load(self, step: int) -> dict:
        """Return a step's batch on the mesh."""
        return sharding.shard_batch(self.mesh, self.batches[step], axis=1)

    def _update(self, batch) -> dict:
        """Make one update; return its metrics, still on the device."""
        frozen = Frozen(self.hyper, self.reference)
        with jax.set_mesh(self.mesh):
            self.state, measured = self.programs.update(self.state, frozen, batch)
        return measured

    def steps(self, count: int) -> dict:
        """Make the next steps; return their seconds, losses, and needed tokens and FLOPs."""
        began = time.perf_counter()
        losses, done = [], []
        pending = None  # the metrics of the step before, fetched while the next one runs
        for _ in range(count):
            step, batch = next(self._feed)
            measured = self._update(batch)
            if pending is not None:
                losses.append(_loss(pending))
            pending = measured
            done.append(step)
        losses.append(_loss(pending))
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - began
        return dict(
            seconds=seconds,
            losses=losses,
            tokens=sum(map(self.batches.tokens, done)),
            flops=sum(map(self._needed, done)),
        )

    def _needed(self, step: int) -> int:
        """Return the FLOPs that the model needs for a step's real tokens."""
        contents = self.batches.contents(step)
        return flops.of_step(self.model.config, contents, reference=not self.work.cached)


def _loss(measured: dict) -> float:
    return metrics.named(measured, "train")["loss/train"]


def run_config(folder: pathlib.Path, work: Work):
    """Return the config of a DPO run on the benchmark's folder."""
    config = configs.default(("dpo",))
    config.model.update(path=str(folder / "model"), dtype=work.dtype)
    config.data.update(
        path=str(folder / "data"), shuffle=False, max_length=4096, max_prompt_length=4000
    )
    config.dpo.update(
        batch_size=work.pairs,
        lr=work.lr,
        beta=work.beta,
        max_grad_norm=work.max_grad_norm,
        warmup_steps=0,
        cache_reference=work.cached,
    )
    config_checks.validate(config)
    return config


def profile(trainer: Trainer, folder: str, count: int) -> dict:
    """Make the next steps under jax's profiler, which writes its trace to the folder."""
    with jax.profiler.trace(folder):
        return trainer.steps(count)


def main(*, share: bool = True):
    folder = pathlib.Path(sys.argv[1])
    processes.start()
    work = Work.read(folder)
    # Before the trainer, whose libraries may print to stdout.
    turns = Turns()
    trainer = Trainer(folder, work, share=share)

    def about():
        reading = trainer.batches.reading()
        steps = len(trainer.batches)
        return dict(
            version=f"dpo_jax, jax {jax.__version__}",
            device=jax.devices()[0].device_kind,
            shapes=len(trainer.batches.shapes),
            padding=trainer.batches.padding(),
            tokens_per_step=reading.tokens / steps,
            tokens_per_step_apart=reading.tokens_one_at_a_time / steps,
        )

    def ceiling():
        return dict(flops_per_second=device.ceiling(work.dtype))

    def peak():
        return dict(bytes=device.peak_bytes())

    def measure_stages():
        return stages.measure(trainer)

    def profile_steps(folder, count):
        return profile(trainer, folder, count)

    turns.answers = dict(
        about=about, ceiling=ceiling, peak=peak, stages=measure_stages, profile=profile_steps
    )
    while True:
        count = turns.wait()
        turns.answer(trainer.steps(count))


if __name__ == "__main__":
    main()

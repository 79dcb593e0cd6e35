"""Our side: the update and the batches of the training loop, on one device.

Metrics are fetched a step late, as in the loop.
"""

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.data import dataset
from dpo_jax.data.batches import Batches, prefetch, training_order
from dpo_jax.models import flops, loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.training import metrics, objectives, reference_cache
from dpo_jax.training.loop import stage_programs
from dpo_jax.training.step import Frozen
from experiments.benchmark import device, stages
from experiments.benchmark.work import Work
from experiments.benchmark.worker import Turns


class Trainer:
    """A DPO run that is made a few steps at a time."""

    def __init__(self, folder: pathlib.Path, work: Work):
        self.work, config = work, run_config(folder, work)
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.model = loading.open_checkpoint(config.model.path, dtype=work.dtype)
        if device.CPU:  # whose compiler gains by it
            self.model.config = dataclasses.replace(
                self.model.config, unroll=self.model.config.layers
            )
        data = dataset.load(config.data, self.model.tokenizer, "pairs").train
        order = training_order(len(data), work.pairs, len(data) // work.pairs, None)
        self.batches = Batches(data, order, reference_log_probs=self._kept(folder, data, order))
        self.programs = stage_programs("dpo", config.dpo, self.model.config, self.mesh)
        numbers = objectives.numbers(config.dpo, work.steps)
        self.hyper = jax.device_put(numbers, sharding.replicated(self.mesh))
        self.state = self.reference = None
        self._warm_up()
        self._restart()

    def _kept(self, folder, data, order) -> np.ndarray | None:
        """The reference's log-probs of the rows of the steps that will be made."""
        if not self.work.cached:
            return None
        cache = reference_cache.ReferenceCache(folder, self.model, self.mesh, self.work.pairs)
        return cache.log_probs("train", data, order[: self.work.steps])

    def _restart(self):
        self.state = self.reference = None
        with jax.set_mesh(self.mesh):
            self.reference = None if self.work.cached else self.model.load_params(self.mesh)
            self.state = self.programs.init_state(self.model.load_params(self.mesh))
        self._feed = prefetch(self.load, range(self.work.steps))

    def _warm_up(self):
        """Compiles for each shape of the steps that will be made; what it trains is thrown away."""
        self._restart()
        shapes = {
            str(jax.tree.map(np.shape, self.batches[step])): step for step in range(self.work.steps)
        }
        for step in shapes.values():
            self._update(self.load(step))
        jax.block_until_ready(self.state)  # or it would go on in the first step that is timed

    def load(self, step: int) -> dict:
        """A step's batch on the mesh."""
        return sharding.shard_batch(self.mesh, self.batches[step], axis=1)

    def _update(self, batch) -> dict:
        frozen = Frozen(self.hyper, self.reference)
        with jax.set_mesh(self.mesh):
            self.state, measured = self.programs.update(self.state, frozen, batch)
        return measured

    def steps(self, count: int) -> dict:
        """Makes the next steps: seconds, losses, and the tokens and FLOPs that they need."""
        losses, done, pending, began = [], [], None, time.perf_counter()
        for _ in range(count):
            step, batch = next(self._feed)
            measured = self._update(batch)
            losses += [] if pending is None else [metrics.named(pending, "train")["loss/train"]]
            pending = measured
            done.append(step)
        losses.append(metrics.named(pending, "train")["loss/train"])
        jax.block_until_ready(self.state)
        return dict(
            seconds=time.perf_counter() - began,
            losses=losses,
            tokens=sum(map(self.batches.tokens, done)),
            flops=sum(map(self._needed, done)),
        )

    def _needed(self, step: int) -> int:
        """FLOPs that the model needs for the step's real tokens."""
        return flops.of_step(
            self.model.config, self.batches.unpadded_shape(step), reference=not self.work.cached
        )


def run_config(folder: pathlib.Path, work: Work):
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
    """The next steps under jax's profiler, whose trace goes to the folder."""
    with jax.profiler.trace(folder):
        return trainer.steps(count)


def main():
    folder = pathlib.Path(sys.argv[1])
    processes.start()
    work = Work.read(folder)
    turns = Turns(
        about=lambda: dict(
            version=f"dpo_jax, jax {jax.__version__}",
            device=jax.devices()[0].device_kind,
            shapes=len(trainer.batches.shapes),
            padding=trainer.batches.padding(),
        ),
        ceiling=lambda: dict(flops_per_second=device.ceiling(work.dtype)),
        peak=lambda: dict(bytes=device.peak_bytes()),
        stages=lambda: stages.measure(trainer),
        profile=lambda folder, count: profile(trainer, folder, count),
    )
    trainer = Trainer(folder, work)
    while True:
        turns.answer(trainer.steps(turns.wait()))


if __name__ == "__main__":
    main()

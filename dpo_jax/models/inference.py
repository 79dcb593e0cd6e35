"""Log-probs of the examples of a data set under a model, outside of training.

Batches are laid out and log-probs computed by the code that trains.
"""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from dpo_jax.console import Progress
from dpo_jax.data.batches import Batches, evaluation_order, prefetch
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import response_log_probs
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding


def log_probs(name: str, model: Model, examples, batch_size: int) -> np.ndarray:
    """Return the summed log-probs of all responses, nats, float32 [examples, responses].

    batch_size: examples at a time, over all devices, rounded up to a multiple of the mesh's shards.
    """
    found = np.zeros((len(examples), len(examples.responses[0])), np.float32)
    order = evaluation_order(len(examples), sharding.whole_shards(batch_size, model.mesh))
    for indices, values in score_examples(name, model, examples, order):
        found[indices] = values
    return found


def score_examples(
    name: str, model: Model, examples, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices of examples, their summed log-probs [examples, responses], nats) by batch.

    name: what the progress line is called. examples: sequence of (prompt, responses). order:
    [steps, batch size] indices of examples, FILLER where there is none; the batch size is a
    multiple of the mesh's batch shards.
    """
    mesh = model.mesh
    batches = Batches(examples, order, shards=sharding.batch_shards(mesh))
    program = _program(model.config, mesh)
    progress = Progress(name, 0, len(batches))

    def load(step):
        batch = jax.tree.map(lambda x: x[0], batches[step])
        return sharding.shard_batch(mesh, batch, axis=0)

    with jax.set_mesh(mesh):
        for step, batch in prefetch(load, range(len(batches))):
            log_probs_SQ = np.asarray(program(model.params, batch))
            placed = batches.indices(step)
            real = placed >= 0
            yield placed[real], log_probs_SQ.reshape(len(placed), -1)[real]
            progress.update(step + 1, {})
    progress.close()


@functools.cache  # so that a second call compiles nothing
def _program(config: TransformerConfig, mesh: jax.sharding.Mesh):
    """Return the jitted (params, batch) -> log-probs [shards, responses]."""
    return jax.jit(
        functools.partial(response_log_probs, config), out_shardings=sharding.replicated(mesh)
    )

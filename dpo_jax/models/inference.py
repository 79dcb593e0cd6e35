"""Log-probs of the examples of a data set under a model, outside of training.

Batches are laid out and log-probs computed by the code that trains.
"""

from collections.abc import Iterator

import jax
import numpy as np

from dpo_jax.console import Progress
from dpo_jax.data.batches import Batches, prefetch
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import response_logprobs
from dpo_jax.parallel import sharding


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
    log_probs = jax.jit(
        lambda params, batch: response_logprobs(model.config, params, batch),
        out_shardings=sharding.replicated(mesh),
    )
    progress = Progress(name, 0, len(batches))

    def load(step):
        batch = jax.tree.map(lambda x: x[0], batches[step])
        return sharding.shard_batch(mesh, batch, axis=0)

    with jax.set_mesh(mesh):
        for step, batch in prefetch(load, range(len(batches))):
            log_probs_SQ = np.asarray(log_probs(model.params, batch))
            placed = batches.placed(step)
            real = placed >= 0
            yield placed[real], log_probs_SQ.reshape(len(placed), -1)[real]
            progress.update(step + 1, {})
    progress.close()

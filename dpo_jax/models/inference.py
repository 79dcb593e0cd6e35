"""Log-probs of rows of a data set under a model, outside training: by the layout and the code that
trains.
"""

from collections.abc import Iterator

import jax
import numpy as np

from dpo_jax.console import Progress
from dpo_jax.data.batches import Batches, prefetch
from dpo_jax.models.log_probs import response_logprobs
from dpo_jax.parallel import sharding


def score_rows(
    name: str, config, params, mesh, examples, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows, their summed log-probs [rows, responses], nats) batch by batch, with progress
    under `name`.

    examples: sequence of (prompt, responses). order: [steps, batch size] rows of it, FILLER where
    there is none; the batch size is a multiple of the mesh's batch shards.
    """
    batches = Batches(examples, order, shards=sharding.batch_shards(mesh))
    logprobs = jax.jit(
        lambda params, batch: response_logprobs(config, params, batch),
        out_shardings=sharding.replicated(mesh),
    )
    progress = Progress(name, 0, len(batches))

    def load(step):
        batch = jax.tree.map(lambda x: x[0], batches[step])
        return sharding.shard_batch(mesh, batch, axis=0)

    with jax.set_mesh(mesh):
        for step, batch in prefetch(load, range(len(batches))):
            logp_SQ = np.asarray(logprobs(params, batch))
            rows = batches.placed(step)
            real = rows >= 0
            yield rows[real], logp_SQ.reshape(len(rows), -1)[real]
            progress.update(step + 1, {})
    progress.close()

"""Batched forward passes outside of training: log-probs, rewards, values.

Everything that runs a model over many examples goes through `map_responses` or `map_tokens`, which
lay examples out as training does, or through `map_batches`, where the arrays are others.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dpo_jax.console import Progress
from dpo_jax.data.batches import FILLER, Batches, evaluation_order, prefetch
from dpo_jax.data.packing import Shape
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import by_example, response_log_probs
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import constrain


def log_probs(name: str, model: Model, examples, batch_size: int) -> np.ndarray:
    """Return the summed log-probs of all responses, nats, float32 [examples, responses].

    name: of the progress line. batch_size: examples at a time, over all devices.
    """
    found = np.zeros((len(examples), len(examples.responses[0])), np.float32)
    for indices, values in score_examples(name, model, examples, batch_size):
        found[indices] = values
    return found


def score_examples(
    name: str, model: Model, examples, batch_size: int, indices: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, summed log-probs [examples, responses], nats) batch by batch.

    name: of the progress line. batch_size, indices: as in `map_responses`.
    """
    function = functools.partial(_response_log_probs, model.config, model.params)
    return map_responses(
        function,
        examples,
        model.mesh,
        batch_size=batch_size,
        indices=indices,
        window=model.config.window,
        name=name,
    )


@functools.partial(jax.jit, static_argnums=0)
def _response_log_probs(config, params, batch):
    return constrain(by_example(response_log_probs(config, params, batch), batch))


def map_responses(
    function: Callable,
    examples,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    indices: np.ndarray | None = None,
    window: int | None = None,
    shape: Shape | None = None,
    name: str = "",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, values [examples, responses]) of a function of responses, batch by batch.

    function: batch -> values [S, P, K], whole on every device. examples: sequence of (prompt,
    responses). batch_size: examples at a time over all devices, rounded up to whole shards.
    indices: the examples to take, in this order; all, if not given. window: of the attention of the
    model that the function runs. shape: of every shard's part of
    a batch, if not chosen from the lengths. name: of the progress line; "" shows none.
    """
    # A shape that is given may not count on what is shared.
    batches = _lay_out(examples, mesh, batch_size, indices, shape, window, share=shape is None)
    for step, values_SPK in map_batches(function, _loader(batches), len(batches), mesh, name):
        # Cells hold unequal numbers of examples, which come first. What is padded has none.
        placed_SP = batches.indices(step).reshape(len(values_SPK), -1)
        held = min(placed_SP.shape[1], values_SPK.shape[1])
        placed_SP = placed_SP[:, :held]
        is_real_SP = placed_SP != FILLER
        yield placed_SP[is_real_SP], values_SPK[:, :held][is_real_SP]


def map_tokens(
    function: Callable,
    examples,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    shape: Shape | None = None,
) -> list[list[np.ndarray]]:
    """Return values of a function of completion tokens, for each example an array [tokens].

    function: batch -> a tuple of values [S, M], whole on every device; the result has a list of
    examples for each of them. Otherwise as `map_responses`.
    """
    batches = _lay_out(examples, mesh, batch_size, None, shape, None, share=False)
    of_outputs = {}
    for step, outputs in map_batches(function, _loader(batches), len(batches), mesh):
        for output, values_SM in enumerate(outputs):
            of_example = of_outputs.setdefault(output, {})
            of_example |= batches.per_example(step, values_SM[None])
    return [
        [of_example[index] for index in range(len(examples))] for of_example in of_outputs.values()
    ]


def map_batches(
    function: Callable, load: Callable, count: int, mesh: jax.sharding.Mesh, name: str = ""
) -> Iterator[tuple[int, object]]:
    """Yield (step, function(batch) on the host) for each of `count` batches, in order.

    load: step -> a batch, a tree of host arrays whose first axis is split over the mesh; a thread
    calls it ahead of time. function: returns a tree of arrays that are whole on every device. name:
    of the progress line; "" shows none.
    """
    progress = Progress(name, 0, count) if name else None

    def place(step):
        return sharding.shard_batch(mesh, load(step), axis=0)

    for step, batch in prefetch(place, range(count)):
        with jax.set_mesh(mesh):
            # np.asarray waits for the device. Meanwhile the thread packs the next batches.
            values = jax.tree.map(np.asarray, function(batch))
        yield step, values
        if progress:
            progress.update(step + 1, {})
    if progress:
        progress.close()


def _lay_out(
    examples,
    mesh,
    batch_size: int,
    indices,
    shape: Shape | None,
    window: int | None,
    *,
    share: bool,
) -> Batches:
    """Return the batches of the examples, each once and in order."""
    count = len(examples) if indices is None else len(indices)
    # The order counts within `indices`; then it is turned into indices of the examples.
    order = evaluation_order(count, sharding.whole_shards(batch_size, mesh))
    if indices is not None:
        order = np.where(order == FILLER, FILLER, indices[order])
    shards = sharding.batch_shards(mesh)
    return Batches(examples, order, shards=shards, share=share, window=window, shape=shape)


def _loader(batches: Batches) -> Callable:
    def load(step):
        # Without the axis of microbatches: there is one.
        return jax.tree.map(lambda x: x[0], batches[step])

    return load

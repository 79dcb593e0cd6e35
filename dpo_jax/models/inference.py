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
from dpo_jax.data.examples import IN_MEMORY, Examples, Run, SingleResponses
from dpo_jax.data.packing import ANY_ROWS, RowLimits, Shape
from dpo_jax.models.attention import row_limits
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import (
    by_example,
    by_response,
    likeliest_tokens,
    response_log_probs,
)
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import constrain


def log_probs(name: str, model: Model, examples: Examples, batch_size: int) -> np.ndarray:
    """Return the summed log-probs of all responses, nats, float32 [examples, responses].

    Equal responses of equal prompts have the same number. name: of the progress line. batch_size:
    examples at a time, over all devices.
    """
    found_PK = np.zeros((len(examples), len(examples.responses[0])), np.float32)
    responses = DistinctResponses(examples)
    for places, values in score_responses(name, model, responses, batch_size):
        found_PK.ravel()[places] = values
    return found_PK


class DistinctResponses:
    """The distinct responses of examples, each of which is computed once, and where they stand."""

    def __init__(self, examples: Examples, wanted_PK: np.ndarray | None = None):
        """Take the responses of all examples, or those wanted, bool [examples, responses]."""
        _, ids_PK = examples.identities()
        _, number_I = np.unique(ids_PK, return_inverse=True)
        number_I = number_I.ravel()
        # Every place that a response stands in, wanted or not, so that all get the same number.
        self._places = np.argsort(number_I, kind="stable")
        self._starts = np.searchsorted(
            number_I[self._places], np.arange(number_I.max(initial=0) + 2)
        )
        wanted = np.arange(ids_PK.size) if wanted_PK is None else np.flatnonzero(wanted_PK)
        _, first = np.unique(number_I[wanted], return_index=True)
        # In the order of the data, as an example's responses are laid down.
        first = wanted[np.sort(first)]
        self._numbers = number_I[first]
        self.responses_per_example = ids_PK.shape[1]
        self.alone = examples.single_responses(first)

    def __len__(self) -> int:
        return len(self.alone)

    def places(self, response: int) -> np.ndarray:
        """Return where a response stands: indices into a flat [examples, responses]."""
        number = self._numbers[response]
        return self._places[self._starts[number] : self._starts[number + 1]]


def score_responses(
    name: str, model: Model, responses: DistinctResponses, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (places, summed log-probs, nats) batch by batch, as in `DistinctResponses.places`.

    Responses to a prompt are computed together, and each once. name: of the progress line.
    batch_size: examples at a time, over all devices.
    """
    function = functools.partial(_response_log_probs, model.config, model.params)
    found = map_responses(
        function,
        responses.alone,
        model.mesh,
        batch_size=batch_size * responses.responses_per_example,
        limits=limits_of(model.config, model.mesh),
        name=name,
    )
    for indices, values_P1 in found:
        places = [responses.places(index) for index in indices.tolist()]
        counts = [len(of_response) for of_response in places]
        yield np.concatenate(places), np.repeat(values_P1[:, 0], counts)


@functools.partial(jax.jit, static_argnums=0)
def _response_log_probs(config, params, batch):
    return constrain(by_example(response_log_probs(config, params, batch), batch))


class TokenScores:
    """Log-probs of each response's completion tokens, and the likeliest tokens in their places.

    Responses are known by their place, an index into a flat [examples, responses]. Where there are
    many tokens, most numbers are in temporary files.
    """

    def __init__(self, responses: int, top: int):
        """Make room; responses: how many places. top: how many likeliest tokens for each token."""
        self._top = top
        self._number_I = np.full(responses, -1)  # of what stands in each place
        self._starts = Run(np.int64)
        self._starts.append(0)
        self._log_probs = Run(np.float32, IN_MEMORY)
        self._top_ids = Run(np.int32, IN_MEMORY)
        self._top_log_probs = Run(np.float32, IN_MEMORY)

    def append(self, places: np.ndarray, log_probs_T, top_ids_Tk, top_log_probs_Tk) -> None:
        """Add the values of a response, which stands in all of these places."""
        self._number_I[places] = self._starts.end - 1
        self._starts.append(self._starts[self._starts.end - 1] + len(log_probs_T))
        self._log_probs.extend(log_probs_T)
        self._top_ids.extend(top_ids_Tk.ravel())
        self._top_log_probs.extend(top_log_probs_Tk.ravel())

    def __getitem__(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the log-probs [T], and the likeliest tokens' ids and log-probs, [T, top] each."""
        number = self._number_I[place]
        start, stop = self._starts[number], self._starts[number + 1]
        of_top = (start * self._top, stop * self._top)
        shape = (stop - start, self._top)  # of no tokens at all where top is 0
        return (
            self._log_probs.take(start, stop),
            self._top_ids.take(*of_top).reshape(shape),
            self._top_log_probs.take(*of_top).reshape(shape),
        )


def token_scores(
    name: str, model: Model, examples: Examples, batch_size: int, top: int = 0
) -> tuple[np.ndarray, TokenScores]:
    """Return what `log_probs` does, and the log-probs of the single tokens.

    top: how many of the likeliest tokens in each token's place. The other arguments are those of
    `log_probs`.
    """
    responses = DistinctResponses(examples)
    summed_PK = np.zeros((len(examples), responses.responses_per_example), np.float32)
    tokens = TokenScores(summed_PK.size, top)
    batches = _response_batches(
        responses.alone,
        model.mesh,
        batch_size=batch_size * responses.responses_per_example,
        limits=limits_of(model.config, model.mesh),
    )
    packed = {}  # batches that are on their way, by step: they say whose the values are

    def load(step):
        packed[step] = _without_microbatches(batches[step])
        return packed[step]

    function = functools.partial(_token_scores, model.config, top, model.params)
    for step, found in map_batches(function, load, len(batches), model.mesh, name):
        summed_SP1, *of_tokens = found
        batch = packed.pop(step)
        indices, summed_I1 = _of_examples(batches, step, summed_SP1)
        parts = [batches.per_example(step, batch, values) for values in of_tokens]
        for index, (summed,) in zip(indices.tolist(), summed_I1, strict=True):
            places = responses.places(index)
            summed_PK.ravel()[places] = summed
            tokens.append(places, *(part[index] for part in parts))
    return summed_PK, tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_scores(config, top, params, batch):
    log_probs_SM, *likeliest = likeliest_tokens(config, params, batch, top)
    summed_SPK = by_example(by_response(log_probs_SM, batch), batch)
    return jax.tree.map(constrain, (summed_SPK, log_probs_SM, *likeliest))


def map_responses(
    function: Callable,
    examples: Examples | SingleResponses,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    limits: RowLimits = ANY_ROWS,
    shape_for: Callable[[int], Shape] | None = None,
    name: str = "",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, values [examples, responses]) of a function of responses, batch by batch.

    Examples of a prompt are in one batch where they fit, and share it. function: batch -> values
    [S, P, K], whole on every device. batch_size: examples at a time over all devices, rounded up to
    whole shards. limits: of attention's rows. shape_for: the most
    prompts of a shard's part of a batch -> the shape of all parts, if not chosen from the lengths.
    It must have room for as many examples as evenly dealt batches have, whatever they share. name:
    of the progress line; "" shows none.
    """
    batches = _response_batches(
        examples, mesh, batch_size=batch_size, limits=limits, shape_for=shape_for
    )

    def load(step):
        return _without_microbatches(batches[step])

    for step, values_SPK in map_batches(function, load, len(batches), mesh, name):
        yield _of_examples(batches, step, values_SPK)


def _response_batches(
    examples: Examples | SingleResponses,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    limits: RowLimits,
    shape_for: Callable[[int], Shape] | None = None,
) -> Batches:
    """Return the batches of `map_responses`, whose arguments these are."""
    batch_size = sharding.whole_shards(batch_size, mesh)
    prompt_ids, _ = examples.identities()
    order = evaluation_order(len(examples), batch_size, prompt_ids)
    shards = sharding.batch_shards(mesh)
    shape = None
    if shape_for:
        # How many prompts a shard has is known once the examples are dealt to them.
        roomy = shape_for(batch_size // shards)
        shape = shape_for(Batches(examples, order, shards=shards, shape=roomy).most_prompts())
    return Batches(examples, order, shards=shards, limits=limits, shape=shape)


def _of_examples(
    batches: Batches, step: int, values_SPK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of a batch's examples, [I], and their values, [I, K]."""
    # Cells hold unequal numbers of examples, which come first. What is padded has none.
    placed_SP = batches.indices(step).reshape(len(values_SPK), -1)
    held = min(placed_SP.shape[1], values_SPK.shape[1])
    placed_SP = placed_SP[:, :held]
    is_real_SP = placed_SP != FILLER
    return placed_SP[is_real_SP], values_SPK[:, :held][is_real_SP]


def map_tokens(
    function: Callable,
    examples,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    shape: Shape,
) -> list[list[np.ndarray]]:
    """Return values of a function of completion tokens, for each example an array [tokens].

    examples: a sequence of `Example`, taken in this order, which share nothing. function: batch ->
    a tuple of values [S, M], whole on every device; the result has a list of examples for each of
    them. batch_size: as in `map_responses`. shape: of every shard's part of a batch.
    """
    batches = Batches(
        examples,
        evaluation_order(len(examples), sharding.whole_shards(batch_size, mesh)),
        shards=sharding.batch_shards(mesh),
        share=False,
        shape=shape,
    )
    packed = {}  # batches that are on their way, by step: they say whose the values are

    def load(step):
        packed[step] = _without_microbatches(batches[step])
        return packed[step]

    of_outputs = {}
    for step, outputs in map_batches(function, load, len(batches), mesh):
        batch = packed.pop(step)
        for output, values_SM in enumerate(outputs):
            of_example = of_outputs.setdefault(output, {})
            of_example |= batches.per_example(step, batch, values_SM)
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


def _without_microbatches(batch):
    """Return a batch of one microbatch without the axis of microbatches."""
    return jax.tree.map(lambda x: x[0], batch)


def limits_of(config, mesh) -> RowLimits:
    """Return what a model asks of its rows on a mesh."""
    return row_limits(config.narrowest_window, sharding.platform_of(mesh), mesh.shape["context"])

"""Batches as a pure function of (seed, step), the same for any number of processes.

There is no iterator and no state: `Batches(...)[step]` is the batch of a step. Its arrays have two
leading axes, microbatches A (accumulated one after the other) and shards S (one for each device
that splits the batch). A microbatch on one shard is a cell; each is packed by itself.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.packing import Batch, RolloutTargets

# The version of which examples are in which batch, and where. Raise it with every change that gives
# another order for the same seed and step: an unfinished stage is then refused, not resumed.
DATA_ORDER_VERSION = 1

SHAPES = 6  # how many shapes, each a program to compile, a run may have
FILLER = -1  # in an order: no example, the place is only filled up


def steps_of(size: int, batch_size: int, *, steps: int, epochs: float) -> int:
    """Return how many steps a run makes of so many examples: `steps`, or those of its epochs.

    An epoch's last examples make no step where they are fewer than a batch.
    """
    return steps or int(epochs * size / batch_size)


def microbatch_size_of(block) -> int:
    """Return how many examples a forward and backward pass takes, over all devices.

    block: a training stage's config block.
    """
    return block.microbatch_size or _update_size(block)


def microbatches_of(block) -> int:
    """Return how many microbatches one optimiser update adds up."""
    return _update_size(block) // microbatch_size_of(block)


def _update_size(block) -> int:
    # PPO makes several updates of a batch, each on a minibatch.
    return block.get("minibatch_size", block.batch_size)


def training_order(size: int, batch_size: int, steps: int, seed: int | None) -> np.ndarray:
    """Return which example is where in each batch, [steps, batch_size].

    Epoch follows epoch, each in an order of its own; seed None keeps the order of the data. A
    step's examples do not depend on `steps`.
    """
    # Batches run on across epochs, so no example is dropped at an epoch's end.
    epochs = -(-steps * batch_size // size)
    orders = []
    for epoch in range(epochs):
        if seed is None:
            orders.append(np.arange(size))
        else:
            # Seeded by the epoch as well: a resumed run makes any epoch without those before it.
            orders.append(np.random.default_rng([seed, epoch]).permutation(size))
    return np.concatenate(orders)[: steps * batch_size].reshape(steps, batch_size)


def evaluation_order(size: int, batch_size: int) -> np.ndarray:
    """Return every example once, in order, [steps, batch_size]; the last batch is filled up."""
    steps = -(-size // batch_size)
    order = np.full(steps * batch_size, FILLER)
    order[:size] = np.arange(size)
    return order.reshape(steps, batch_size)


class Batches:
    """The batches of a run: `batches[step]` has one of at most SHAPES shapes.

    The shapes are chosen from the lengths of the whole run.
    """

    def __init__(
        self,
        examples,
        order: np.ndarray,
        *,
        microbatches: int = 1,
        shards: int = 1,
        shape: packing.Shape | None = None,
        reference_log_probs: np.ndarray | None = None,
        rollout: RolloutTargets | None = None,
    ):
        """Lay out the batches of all steps.

        examples: a sequence of `Example`. order: indices into it, or FILLER,
        [steps, batch_size]. shape: that of every batch, where the examples are not known when the
        program is compiled. reference_log_probs: [examples, responses]. rollout: its fields hold,
        for each example, an array of a value for each completion token.

        Raises ValueError where a batch cannot be split evenly, or does not fit into `shape`.
        """
        batch_size = order.shape[1]
        if batch_size % (microbatches * shards):
            raise ValueError(
                f"a batch of {batch_size} rows does not split evenly into {microbatches} "
                f"microbatches over {shards} data shards (mesh.data x mesh.fsdp): change "
                "batch_size, microbatch_size or the mesh."
            )
        self.order = order
        self.microbatches = microbatches
        self.shards = shards
        self.reference_log_probs = reference_log_probs
        self._rollout = rollout
        self._examples = examples
        # Lengths alone decide all shapes, so batches are packed only when they are asked for.
        self._lengths = packing.lengths_of(examples)
        self._sizes = self._lengths.prompt + self._lengths.response.sum(axis=1)
        self._shortest = int(np.argmin(self._sizes))  # it stands in for fillers
        self._cells_nCP = self._deal_to_cells()

        needs = self._needs()
        self.shapes = [shape] if shape else packing.choose_shapes(needs, SHAPES)
        # k: shapes, n: steps.
        fits_kn = np.array([needs.met_by(shape) for shape in self.shapes])
        fits_n = fits_kn.any(axis=0)
        if not fits_n.all():
            raise ValueError(
                f"the batch of step {fits_n.argmin()} is larger than {self.shapes[-1]}."
            )
        self._shape_n = fits_kn.argmax(axis=0)  # the smallest that fits, as they are ascending

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        shape = self.shapes[self._shape_n[step]]
        cells = [self._pack(cell, shape) for cell in self._cells_nCP[step]]
        return _stack(cells, (self.microbatches, self.shards))

    def indices(self, step: int) -> np.ndarray:
        """Return the index of the example (or FILLER) at each place of a batch, [A * S * P]."""
        return self._cells_nCP[step].ravel()

    def per_example(self, step: int, values_ASM: np.ndarray) -> dict[int, np.ndarray]:
        """Return each example's part of values of completion tokens, {index: [tokens]}."""
        found = {}
        values_CM = np.reshape(values_ASM, (-1, np.shape(values_ASM)[-1]))
        for cell, values_M in zip(self._cells_nCP[step], values_CM, strict=True):
            start = 0
            # A filler's part is that of the example which stands in for it.
            for index, stand_in in zip(cell.tolist(), self._filled(cell), strict=True):
                end = start + self._lengths.completion[stand_in].sum()
                found[index] = values_M[start:end]
                start = end
        return found

    def tokens(self, step: int) -> int:
        """Return how many real tokens the model reads in a batch, each prompt once."""
        return int(self._sizes[self._real(step)].sum())

    def unpadded_shape(self, step: int) -> packing.Shape:
        """Return a batch's real sizes: each sequence is a row of its own length."""
        real = self._real(step)
        needs = packing.needs_of_lengths(self._lengths[None, real])
        return packing.Shape(
            tokens=int(needs.tokens[0]),
            rows=tuple((1, int(length)) for length in needs.lengths[0]),
            completion_tokens=int(needs.completion_tokens[0]),
        )

    def padding(self) -> dict[str, float]:
        """Return the share of padding in the whole run, {"dense": ..., "attention": ...}.

        Dense work goes by tokens, attention by the squared lengths of rows.
        """
        cells_per_step = self._cells_nCP.shape[1]
        # How many cells have each shape.
        cells_k = np.bincount(self._shape_n, minlength=len(self.shapes)) * cells_per_step
        dense = np.dot(cells_k, [shape.tokens for shape in self.shapes])
        attention = np.dot(cells_k, [(shape.lengths**2).sum() for shape in self.shapes])

        times_used = np.bincount(self._filled(self._cells_nCP).ravel(), minlength=len(self._sizes))
        sequences = self._lengths.prompt[:, None] + self._lengths.response
        real_dense = times_used @ self._sizes
        real_attention = times_used @ (sequences**2).sum(axis=1)
        return dict(
            dense=float(1 - real_dense / dense),
            attention=float(1 - real_attention / attention),
        )

    def _deal_to_cells(self) -> np.ndarray:
        """Deal each batch's examples to its cells, so that each gets about as many tokens.

        Returns indices [steps, cells, examples of a cell], the first cells those of the first
        microbatch.
        """
        steps, batch_size = self.order.shape
        cells = self.microbatches * self.shards
        # Devices wait for the one with the most tokens, and a cell is padded to the largest of its
        # step. So examples are dealt like cards, the longest first.
        longest_first = np.argsort(-self._sizes[self._filled(self.order)], axis=1, kind="stable")
        rounds = longest_first.reshape(steps, -1, cells)
        # Back and forth, so that no cell always gets the longest of a round.
        rounds[:, 1::2] = rounds[:, 1::2, ::-1]
        places = rounds.transpose(0, 2, 1).reshape(steps, batch_size)
        return np.take_along_axis(self.order, places, axis=1).reshape(steps, cells, -1)

    def _needs(self) -> packing.Needs:
        """Return what the largest cell of each step requires."""
        steps, cells, _ = self._cells_nCP.shape
        indices = self._filled(self._cells_nCP).reshape(steps * cells, -1)
        needs = packing.needs_of_lengths(self._lengths[indices])
        return packing.Needs(
            # All cells of a step share one shape, for they are stacked into one array.
            tokens=needs.tokens.reshape(steps, cells).max(axis=1),
            lengths=needs.lengths.reshape(steps, cells, -1).max(axis=1),
            completion_tokens=needs.completion_tokens.reshape(steps, cells).max(axis=1),
        )

    def _real(self, step: int) -> np.ndarray:
        """Return the indices of a step's examples, without fillers."""
        indices = self.order[step]
        return indices[indices != FILLER]

    def _filled(self, indices: np.ndarray) -> np.ndarray:
        """Return the indices with the shortest example for each filler."""
        return np.where(indices == FILLER, self._shortest, indices)

    def _pack(self, cell: np.ndarray, shape: packing.Shape) -> Batch:
        """Return the arrays of one cell."""
        is_real = cell != FILLER
        indices = self._filled(cell)
        batch = packing.pack([self._examples[index] for index in indices], shape)
        # A filler is computed like the others, and counts nothing in losses and metrics.
        batch.weights = is_real.astype(np.float32)
        if self.reference_log_probs is not None:
            log_probs_PK = self.reference_log_probs[indices]
            batch.reference_log_probs = np.where(is_real[:, None], log_probs_PK, 0).ravel()
        if self._rollout is not None:
            batch.rollout = _gather(self._rollout, indices, shape.completion_tokens)
        return batch


def _gather(rollout: RolloutTargets, indices: np.ndarray, size: int) -> RolloutTargets:
    """Return the values of some examples as they stand in a batch, [size], padded with zeros."""
    gathered = {}
    for field in dataclasses.fields(rollout):
        of_examples = getattr(rollout, field.name)
        values = np.concatenate([of_examples[index] for index in indices])
        gathered[field.name] = np.pad(values, (0, size - len(values)))
    return RolloutTargets(**gathered)


def _stack(parts: list, leading: tuple[int, int]):
    """Stack the batches of cells, or their fields, into one with these leading axes."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, tuple):  # the buckets of rows
        return tuple(_stack(list(buckets), leading) for buckets in zip(*parts, strict=True))
    if dataclasses.is_dataclass(first):
        fields = {}
        for field in dataclasses.fields(first):
            fields[field.name] = _stack([getattr(part, field.name) for part in parts], leading)
        return type(first)(**fields)
    return np.stack(parts).reshape(*leading, *first.shape)


def prefetch(make: Callable, steps: Iterable[int], ahead: int = 2) -> Iterator[tuple]:
    """Yield (step, make(step)) in order, made by a thread `ahead` steps early.

    Its errors are raised here.
    """
    steps = list(steps)
    # A thread is enough: numpy packs while the device computes. One, so that the order is kept.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(make, step) for step in steps[:ahead]]
        for i, step in enumerate(steps):
            made = pending.pop(0).result()
            if i + ahead < len(steps):
                pending.append(pool.submit(make, steps[i + ahead]))
            yield step, made

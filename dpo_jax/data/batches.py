"""Batches as a pure function of (seed, step): no iterator, no state, the same for any number of
processes.

A batch is a dict of arrays with two leading axes: microbatches A (accumulated one after the other)
and shards S (one per device that splits the batch). The rest is as in `packing.pack`, and `weights`
[A, S, P] is 1 for a real example and 0 for one that only fills up the last evaluation batch.
"""

import concurrent.futures

import numpy as np

from dpo_jax.data import packing

# The version of which examples are in which batch, and where. Raise it with every change that gives
# another order for the same seed and step: an unfinished stage is then refused, not resumed.
DATA_ORDER_VERSION = 1

SHAPES = 6  # how many shapes, so compiled programs, a run may have
FILLER = -1  # in an order: no row, the batch is only filled up


def training_order(size: int, batch_size: int, steps: int, seed: int | None) -> np.ndarray:
    """Which row is where in each batch, [steps, batch_size]: epoch after epoch, each in an order of
    its own.

    A step's rows do not depend on `steps`. seed None keeps the data's own order.
    """
    epochs = -(-steps * batch_size // size)
    orders = [
        np.arange(size) if seed is None else np.random.default_rng([seed, epoch]).permutation(size)
        for epoch in range(epochs)
    ]
    return np.concatenate(orders)[: steps * batch_size].reshape(steps, batch_size)


def evaluation_order(size: int, batch_size: int) -> np.ndarray:
    """Every row once, in order; the last batch is filled up."""
    steps = -(-size // batch_size)
    order = np.full(steps * batch_size, FILLER)
    order[:size] = np.arange(size)
    return order.reshape(steps, batch_size)


class Batches:
    """`batches[step]`: the batch of a step, in one of at most SHAPES shapes chosen from the whole
    run's lengths.
    """

    def __init__(
        self,
        examples,
        order: np.ndarray,
        *,
        microbatches: int = 1,
        shards: int = 1,
        shape: packing.Shape | None = None,
        scored: dict[str, list[np.ndarray]] | None = None,
        per_response: dict[str, np.ndarray] | None = None,
    ):
        """examples: list of (prompt, responses) token ids; order: [steps, batch_size] rows of it.

        shape: that of every batch, where the rows are not known when the first batch is compiled.
        scored: name -> for each example the values [scored tokens] that go with its targets, as
        arrays of that name. per_response: name -> values [examples, responses] that go with the
        responses, likewise.
        """
        batch_size = order.shape[1]
        if batch_size % (microbatches * shards):
            raise ValueError(
                f"a batch of {batch_size} rows does not split evenly into {microbatches} microbatches "
                f"over {shards} data shards (mesh.data x mesh.fsdp): change batch_size, "
                "microbatch_size or the mesh."
            )
        self.order, self.microbatches, self.shards = order, microbatches, shards
        self._examples, self._scored, self.per_response = examples, scored or {}, per_response or {}
        self._lengths = packing.lengths_of(examples)
        self._sizes = self._lengths[0] + self._lengths[1].sum(axis=1)
        self._shortest = int(np.argmin(self._sizes))  # it stands in for fillers
        self._cells_nCP = self._dealt()
        needs = self._needs()
        self.shapes = [shape] if shape else packing.choose(needs, SHAPES)
        met_kn = np.array([needs.met_by(shape) for shape in self.shapes])
        if not met_kn.any(axis=0).all():
            raise ValueError(
                f"the batch of step {met_kn.any(axis=0).argmin()} is larger than {self.shapes[-1]}."
            )
        self._shape_n = met_kn.argmax(axis=0)  # the smallest

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> dict:
        cells = [
            self._pack(cell, self.shapes[self._shape_n[step]]) for cell in self._cells_nCP[step]
        ]
        return _stack(cells, (self.microbatches, self.shards))

    def placed(self, step: int) -> np.ndarray:
        """Which row (or FILLER) is at each place [A * S * P] of the batch's arrays."""
        return self._cells_nCP[step].ravel()

    def per_row(self, step: int, values_ASM) -> dict[int, np.ndarray]:
        """Row -> its part of an array over a batch's scored positions."""
        found = {}
        values_AM = np.reshape(values_ASM, (-1, np.shape(values_ASM)[-1]))
        for cell, values_M in zip(self._cells_nCP[step], values_AM, strict=True):
            ends = np.cumsum([sum(map(len, responses)) for _, responses in self._of(cell)])
            found |= dict(zip(cell.tolist(), np.split(values_M, ends)[:-1], strict=True))
        return found

    def tokens(self, step: int) -> int:
        """How many real tokens the model reads in a batch, each prompt once."""
        rows = self.order[step]
        return int(self._sizes[rows[rows != FILLER]].sum())

    def needed(self, step: int) -> packing.Shape:
        """A batch's real sizes: each sequence a row of its own length, no padding."""
        rows = self.order[step]
        needs = packing.needs_of_lengths(
            *(lengths[None, rows[rows != FILLER]] for lengths in self._lengths)
        )
        return packing.Shape(
            int(needs.tokens[0]),
            tuple((1, int(length)) for length in needs.lengths[0]),
            int(needs.scored[0]),
        )

    def padding(self) -> dict[str, float]:
        """The share of padding in the dense work (tokens) and in attention (squared row lengths),
        whole run.
        """
        steps_k = np.bincount(self._shape_n, minlength=len(self.shapes)) * self._cells_nCP.shape[1]
        dense, attention = (
            np.dot(steps_k, [size(shape) for shape in self.shapes])
            for size in (lambda shape: shape.tokens, lambda shape: (shape.lengths**2).sum())
        )
        count_r = np.bincount(self._filled(self._cells_nCP).ravel(), minlength=len(self._sizes))
        squares_r = ((self._lengths[0][:, None] + self._lengths[1]) ** 2).sum(axis=1)
        return dict(
            dense=float(1 - count_r @ self._sizes / dense),
            attention=float(1 - count_r @ squares_r / attention),
        )

    def _dealt(self) -> np.ndarray:
        """Each batch's rows, dealt to C cells, microbatches x shards, so that each gets about as
        many tokens.
        """
        steps, batch_size = self.order.shape
        by_size = np.argsort(-self._sizes[self._filled(self.order)], axis=1, kind="stable")
        by_size = by_size.reshape(steps, -1, self.microbatches * self.shards)
        by_size[:, 1::2] = by_size[
            :, 1::2, ::-1
        ]  # back and forth, so that no cell always gets the longer one
        dealt = np.take_along_axis(
            self.order, by_size.transpose(0, 2, 1).reshape(steps, batch_size), axis=1
        )
        return dealt.reshape(steps, self.microbatches * self.shards, -1)

    def _needs(self) -> packing.Needs:
        """What the largest cell of each step needs, in tokens, in each row, and in scored
        tokens.
        """
        steps, cells, _ = self._cells_nCP.shape
        rows = self._filled(self._cells_nCP).reshape(steps * cells, -1)
        needs = packing.needs_of_lengths(*(lengths[rows] for lengths in self._lengths))
        return packing.Needs(
            *(
                x.reshape(steps, cells, *x.shape[1:]).max(axis=1)
                for x in (needs.tokens, needs.lengths, needs.scored)
            )
        )

    def _of(self, cell: np.ndarray) -> list:
        return [self._examples[row] for row in self._filled(cell)]

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        return np.where(rows == FILLER, self._shortest, rows)

    def _pack(self, cell: np.ndarray, shape: packing.Shape) -> dict:
        scored = {
            name: np.pad(
                values := np.concatenate([rows[row] for row in cell]),
                (0, shape.scored - len(values)),
            )
            for name, rows in self._scored.items()
        }
        real = cell != FILLER
        per_response = {
            name: np.where(real[:, None], values[cell], 0).reshape(-1)
            for name, values in self.per_response.items()
        }
        return (
            packing.pack(self._of(cell), shape)
            | scored
            | per_response
            | dict(weights=real.astype(np.float32))
        )


def _stack(cells: list[dict], leading: tuple[int, int]) -> dict:
    """One dict of arrays with the leading axes, from a dict per cell."""

    def join(*leaves):
        return np.stack(leaves).reshape(*leading, *leaves[0].shape)

    stacked = {name: join(*(cell[name] for cell in cells)) for name in cells[0] if name != "rows"}
    rows = tuple(join(*buckets) for buckets in zip(*(cell["rows"] for cell in cells), strict=True))
    return stacked | dict(rows=rows)


def prefetch(make, steps, ahead: int = 2):
    """Yields (step, make(step)) in order, made by a thread `ahead` steps early; its errors surface
    here.
    """
    steps = list(steps)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(make, step) for step in steps[:ahead]]
        for i, step in enumerate(steps):
            batch = pending.pop(0).result()
            if i + ahead < len(steps):
                pending.append(pool.submit(make, steps[i + ahead]))
            yield step, batch

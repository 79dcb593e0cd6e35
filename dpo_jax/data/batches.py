"""Batches as a pure function of (seed, step), the same for any number of processes.

There is no iterator and no state: `Batches(...)[step]` is the batch of a step. Its arrays have two
leading axes, microbatches A (accumulated one after the other) and shards S (one for each device
that splits the batch). A microbatch on one shard is a cell; each is packed by itself.
"""

import collections
import concurrent.futures
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dpo_jax.data import grouping, packing
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Reading
from dpo_jax.data.mismatched import Mismatched
from dpo_jax.data.packing import FILLER, Batch, RolloutTargets

# The version of which examples are in which batch, and where. Raise it with every change that gives
# another order for the same seed and step: an unfinished stage is then refused, not resumed.
DATA_ORDER_VERSION = 4

MOST_READ = 10**8  # examples that a stage may read, one after the other
MOST_EPOCHS = 10**5  # times that it may read each of them
SHAPES = 6  # how many shapes, each a program to compile, a run may have
LOST_OF_SHARED = 0.1  # more than this share of what could be shared is reported as lost ...
LOST_OF_READ = 0.05  # ... if it is more than this share of the tokens that are read


def steps_of(size: int, batch_size: int, *, steps: int, epochs: float) -> int:
    """Return how many steps a run makes of so many examples: `steps`, or those of its epochs.

    An epoch's last examples make no step where they are fewer than a batch. Raises ValueError where
    the steps are more than could be meant: their order would not fit into memory.
    """
    found = steps or int(epochs * size / batch_size)
    read = found * batch_size
    if read > MOST_READ or read > MOST_EPOCHS * max(size, 1):
        raise ValueError(
            f"{found:,} steps of {batch_size:,} examples, of the {size:,} that there are: a stage "
            f"reads at most {MOST_READ:,} examples, and each at most {MOST_EPOCHS:,} times. Lower "
            "steps (or epochs) or batch_size."
        )
    return found


def microbatch_size_of(block) -> int:
    """Return how many examples a forward and backward pass takes, over all devices.

    block: a training stage's config block.
    """
    return block.microbatch_size or update_size_of(block)


def microbatches_of(block, shards: int = 1) -> int:
    """Return how many microbatches one optimiser update adds up.

    shards: that split each. Microbatches of fewer examples than that become fewer and larger ones:
    an example a shard is the least that there can be.
    """
    size = update_size_of(block)
    return min(size // microbatch_size_of(block), -(-size // shards))


def sizes_for_whole_groups(block, shards: int, pairs: int) -> dict[str, int]:
    """Return the fields of a stage to raise so that each cell holds whole groups: name -> size.

    block: a training stage's config block, which stays as it is. shards: that split a batch. pairs:
    examples of a group. Empty where cells do so already.
    """
    of_shards = shards * pairs
    microbatch_size = -(-microbatch_size_of(block) // of_shards) * of_shards
    batch_size = -(-block.batch_size // microbatch_size) * microbatch_size
    found = {}
    if batch_size != block.batch_size:
        found["batch_size"] = batch_size
    # 0 stands for the whole batch.
    if block.microbatch_size not in (0, microbatch_size):
        found["microbatch_size"] = microbatch_size
    return found


def is_sharing_lost(tokens: float, apart: float, whole: float) -> bool:
    """Return whether the cells of a layout read notably more than a single cell would.

    tokens: that they read. apart: that they would read if no example shared any. whole: that a
    single cell would read.
    """
    lost = tokens - whole
    # The first share says that much of what could be shared is lost; the second, that it matters.
    return lost > LOST_OF_SHARED * (apart - whole) and lost > LOST_OF_READ * tokens


def update_size_of(block) -> int:
    """Return how many examples one optimiser update learns from."""
    # PPO makes several updates of a batch, each on a minibatch.
    return block.get("minibatch_size", block.batch_size)


def training_order(
    size: int,
    batch_size: int,
    steps: int,
    seed: int | None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return which example is where in each batch, [steps, batch_size].

    Epoch follows epoch, each in an order of its own; seed None keeps the order of the data. groups:
    the number of each example's group, from 0: groups are shuffled, and the examples of a group
    stay together, in the data's order, as in the paper's reference code; None shuffles examples. A
    batch's end may cut a group. A step's examples do not depend on `steps`.
    """
    if groups is None:
        groups = np.arange(size)
    # Batches run on across epochs, so no example is dropped at an epoch's end.
    epochs = -(-steps * batch_size // size)
    orders = []
    for epoch in range(epochs):
        if seed is None:
            orders.append(np.arange(size))
            continue
        # Seeded by the epoch as well: a resumed run makes any epoch without those before it.
        shuffled = np.random.default_rng([seed, epoch]).permutation(groups.max() + 1)
        place_of_group = np.argsort(shuffled)
        orders.append(np.argsort(place_of_group[groups], kind="stable"))
    return np.concatenate(orders)[: steps * batch_size].reshape(steps, batch_size)


def evaluation_order(
    size: int, batch_size: int, prompt_ids: np.ndarray | None = None
) -> np.ndarray:
    """Return every example once, [steps, batch_size]; batches are filled up with FILLER.

    prompt_ids: of each example, as `Examples.identities` gives them. All batches but the last are
    full. Examples of a prompt are in one batch where it has room for them, so that the prompt is
    read once; a few prompts are cut to fill the room that is left. None keeps the data's order.
    """
    if prompt_ids is None:
        prompt_ids = np.arange(size)
    # Prompts, too, keep about the order of the data.
    prompt_P = grouping.numbered(prompt_ids)
    order_P = np.argsort(prompt_P, kind="stable")
    counts = np.bincount(prompt_P)
    starts = (np.cumsum(counts) - counts).tolist()
    waiting = _WaitingPrompts(counts.tolist())
    order = np.full((-(-size // batch_size), batch_size), FILLER)
    for batch in order:
        room = batch_size
        while room and waiting:
            prompt, count = waiting.take(room, is_empty=room == batch_size)
            start = starts[prompt]
            place = batch_size - room
            batch[place : place + count] = order_P[start : start + count]
            starts[prompt] += count
            room -= count
    return order


class _WaitingPrompts:
    """The prompts that no batch has yet, and how many examples are left of each."""

    def __init__(self, counts: list[int]):
        """Wait for prompts of so many examples."""
        # By number of examples, each the first one first: to find the first that a room is for.
        self._by_count = collections.defaultdict(list)
        for prompt, count in enumerate(counts):
            self._by_count[count].append(prompt)
        self._cut = (0, 0)  # a prompt that some batch has a part of, and what is left of it

    def __bool__(self) -> bool:
        return bool(self._by_count or self._cut[1])

    def take(self, room: int, *, is_empty: bool) -> tuple[int, int]:
        """Take up to `room` examples of a prompt; return its number and how many.

        is_empty: whether the batch has no example yet.
        """
        fitting = [count for count in self._by_count if count <= room]
        if is_empty:
            # Those that fill whole batches come first; what is left of them waits with the others.
            filling = [count for count in self._by_count if count >= room]
            fitting = filling or fitting
        if fitting:
            prompt, count = self._pop(fitting)
            if count > room:
                heapq.heappush(self._by_count[count - room], prompt)
            return prompt, min(count, room)
        # What is left of a cut prompt fills such rooms until nothing is, so that few are cut.
        if not self._cut[1]:
            self._cut = self._pop(list(self._by_count))
        prompt, left = self._cut
        taken = min(left, room)
        self._cut = (prompt, left - taken)
        return prompt, taken

    def _pop(self, counts: list[int]) -> tuple[int, int]:
        """Remove the first prompt of those with one of these counts; return it and its count."""
        prompt, count = min((self._by_count[count][0], count) for count in counts)
        heapq.heappop(self._by_count[count])
        if not self._by_count[count]:
            del self._by_count[count]
        return prompt, count


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
        share: bool = True,
        limits: packing.RowLimits = packing.ANY_ROWS,
        shape: packing.Shape | None = None,
        reference_log_probs: np.ndarray | None = None,
        rollout: RolloutTargets | None = None,
        mismatched: "Batches | None" = None,
        most_shapes: int = SHAPES,
    ):
        """Lay out the batches of all steps.

        examples: a sequence of `Example`. order: indices into it, or FILLER,
        [steps, batch_size]. share: whether examples of a cell share prompts and responses, as in
        `packing.pack`. limits: of attention's rows. shape: that of every batch, where the
        examples are not known when the program is compiled. reference_log_probs: [examples,
        responses]. rollout: its fields hold, for each example, an array of a value for each
        completion token; its examples are laid down apart, as each has values of its own.
        mismatched: as `unpaired` makes them. most_shapes: how many shapes there may be.

        Cells may have unequal numbers of examples, or none: what a cell lacks is padding of weight
        0. Raises ValueError where a batch does not fit into `shape`.
        """
        batch_size = order.shape[1]
        assert rollout is None or not share, "targets of a rollout are laid down apart"
        self.order = order
        self.microbatches = microbatches
        self.shards = shards
        self.reference_log_probs = reference_log_probs
        self.mismatched = mismatched
        self._rollout = rollout
        self.examples = examples
        # Columns of numbers and labels, which only data that is read from rows can have.
        has_numbers = isinstance(examples, Examples)
        self._weights = examples.weights if has_numbers else None
        self._target_margins = examples.target_margins if has_numbers else None
        self._labels = examples.labels if has_numbers else None
        # Lengths alone decide all shapes, so batches are packed only when they are asked for.
        self.limits = limits
        self._share = share
        self._sizes = packing.sizes_of(examples, share=share)
        self._cells_nCP = self._deal_to_cells(shape.examples if shape else batch_size)

        # What each cell requires: those of a step one after the other.
        self._needs_X = self._needs(self._cells_nCP)
        cells = self._cells_nCP.shape[1]
        if shape:
            self.shapes = [shape]
        else:
            self.shapes = packing.choose_shapes(
                self._needs_X, most_shapes, cells=cells, share=share, limits=limits
            )
        # k: shapes, n: steps, C: cells. A step's cells have one shape.
        fits_knC = np.array(
            [self._needs_X.met_by(shape).reshape(-1, cells) for shape in self.shapes]
        )
        fits_kn = fits_knC.all(axis=2)
        fits_n = fits_kn.any(axis=0)
        if not fits_n.all():
            raise ValueError(
                f"the batch of step {fits_n.argmin()} is larger than {self.shapes[-1]}."
            )
        self._shape_n = fits_kn.argmax(axis=0)  # the smallest that fits, as they are ascending

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        batch = self.without_mismatched(step)
        if self.mismatched is not None:
            batch.mismatched = self.mismatched[step]
        return batch

    def without_mismatched(self, step: int) -> Batch:
        """Return the batch of a step, without the mismatched rows of the same step."""
        shape = self.shapes[self._shape_n[step]]
        cells = [self._pack(cell, shape) for cell in self._cells_nCP[step]]
        return _stack(cells, (self.microbatches, self.shards))

    def indices(self, step: int) -> np.ndarray:
        """Return the index of the example (or FILLER) at each place of a batch, [A * S * P]."""
        return self._cells_nCP[step].ravel()

    def per_example(self, step: int, batch: Batch, values_ASM: np.ndarray) -> dict[int, np.ndarray]:
        """Return each example's part of values of completion tokens, {index: [tokens, ...]}.

        The values of a token may be an array. batch: that of the step, which says where each
        response's tokens are. A part has those of the example's responses, one after the other,
        whether other examples share them or not.
        """
        found = {}
        cells = len(self._cells_nCP[step])
        segment_ids_CM = np.reshape(batch.segment_ids, (cells, -1))
        of_token = np.shape(values_ASM)[np.ndim(batch.segment_ids) :]
        values_CM = np.reshape(values_ASM, (*segment_ids_CM.shape, *of_token))
        index_CPK = np.reshape(batch.response_index, (cells, *batch.response_index.shape[-2:]))
        for number, cell in enumerate(self._cells_nCP[step]):
            # A response's tokens stand together, and segments are in ascending order.
            segments = np.arange(batch.response_lengths.shape[-1] + 1)
            starts_Q = np.searchsorted(segment_ids_CM[number], segments)
            for place, index in enumerate(cell[cell != FILLER].tolist()):
                parts = []
                for response in index_CPK[number, place]:
                    parts.append(values_CM[number, starts_Q[response] : starts_Q[response + 1]])
                found[index] = np.concatenate(parts)
        return found

    def tokens(self, step: int) -> int:
        """Return how many real tokens the model reads in a batch."""
        return int(self._needs_of(step).tokens.sum())

    def reading(self) -> Reading:
        """Return how many real tokens all batches have, and how many if no example shared any."""
        real = self.order[self.order != FILLER]
        return Reading(
            examples=len(real),
            tokens=int(self._needs_X.tokens.sum()),
            tokens_one_at_a_time=int(self._sizes.apart[real].sum()),
        )

    def tokens_in_one_cell(self) -> int:
        """Return how many real tokens all batches would have if each were a single cell."""
        return int(self._needs(self.order[:, None]).tokens.sum())

    def contents(self, step: int) -> packing.Contents:
        """Return what the model reads in a batch, over all cells and without padding."""
        return self._needs_of(step).contents

    def most_prompts(self) -> int:
        """Return how many distinct prompts a cell has at most."""
        needs = self._needs_X
        is_first = (needs.siblings > 0) & (needs.number == 0)
        return int(is_first.sum(axis=1).max())

    def padding(self) -> dict[str, float]:
        """Return the share of padding in the whole run, {"dense": ..., "attention": ...}.

        Dense work goes by tokens, attention by scores, pairs of a query and a key.
        """
        needed = dict(dense=0, attention=0)
        computed = dict(dense=0, attention=0)
        cells_per_step = self._cells_nCP.shape[1]
        shape_X = np.repeat(self._shape_n, cells_per_step)
        for number, shape in enumerate(self.shapes):
            needs = self._needs_X[shape_X == number]
            needed["dense"] += int(needs.tokens.sum())
            needed["attention"] += needs.scores(shape.responses_per_row)
            cells = len(needs.tokens)
            computed["dense"] += cells * shape.tokens
            computed["attention"] += cells * shape.scores
        return {kind: 1 - needed[kind] / computed[kind] for kind in needed}

    def _deal_to_cells(self, most: int) -> np.ndarray:
        """Deal each batch's examples to its cells, so that each gets about as many tokens.

        Examples of a prompt stay together where that is no more than a cell's part. Returns indices
        [steps, cells, most examples of a cell], FILLER where a cell has fewer; the first cells are
        those of the first microbatch. most: examples that a cell may hold.
        """
        cells = self.microbatches * self.shards
        if cells == 1:
            return self.order[:, None]
        dealt = []
        for examples in self.order:
            dealt.append(_deal(examples[examples != FILLER], self._sizes, cells, most))
        held = max(len(cell) for of_step in dealt for cell in of_step)
        cells_nCP = np.full((len(self.order), cells, held), FILLER)
        for step, of_step in enumerate(dealt):
            for number, cell in enumerate(of_step):
                cells_nCP[step, number, : len(cell)] = cell
        return cells_nCP

    def _needs_of(self, step: int) -> packing.Needs:
        """Return what the cells of a step require."""
        cells = self._cells_nCP.shape[1]
        step = range(len(self))[step]
        return self._needs_X[step * cells : (step + 1) * cells]

    def _needs(self, cells_nCP: np.ndarray) -> packing.Needs:
        """Return what each cell requires, one after the other."""
        cells_XP = cells_nCP.reshape(-1, cells_nCP.shape[-1])
        return packing.needs_of_cells(self._sizes, cells_XP, share=self._share)

    def _pack(self, cell: np.ndarray, shape: packing.Shape) -> Batch:
        """Return the arrays of one cell."""
        indices = cell[cell != FILLER]
        batch = packing.pack(
            [self.examples[index] for index in indices],
            shape,
            share=self._share,
            responses_per_example=self._sizes.response.shape[1],
        )
        if self._weights is not None:
            batch.weights[: len(indices)] = self._weights[indices]
        if self._target_margins is not None:
            # Padding counts for nothing, whatever its margin.
            batch.target_margins = np.zeros(shape.examples, np.float32)
            batch.target_margins[: len(indices)] = self._target_margins[indices]
        if self.reference_log_probs is not None:
            log_probs_PK = np.zeros(batch.response_index.shape, np.float32)
            log_probs_PK[: len(indices)] = self.reference_log_probs[indices]
            batch.reference_log_probs = log_probs_PK
        if self._labels is not None:
            labels_P = np.zeros(batch.weights.shape, bool)
            labels_P[: len(indices)] = self._labels[indices]
            batch.labels = labels_P
        if self._rollout is not None:
            batch.rollout = _gather(self._rollout, indices, shape.completion_tokens)
        return batch


def unpaired(examples: Examples, order: np.ndarray, max_length: int, **layout) -> Batches:
    """Return batches of unpaired rows, each with the mismatched rows that KTO's KL is a mean over.

    examples: with labels. max_length: of a prompt and another row's completion together. layout:
    what `Batches` takes.
    """
    rows = Mismatched(examples, order, max_length)
    # Both have several shapes otherwise, and each two that meet in a step are a program.
    mismatched = Batches(rows, rows.order, **layout, most_shapes=1)
    return Batches(examples, order, **layout, mismatched=mismatched)


def unpaired_evaluation(examples: Examples, batch_size: int, max_length: int, **layout) -> Batches:
    """Return batches of all unpaired rows once, and mismatched rows of all of them together.

    How the rows are mismatched does not depend on the size of the batches.
    """
    prompt_ids, _ = examples.identities()
    order = evaluation_order(len(examples), batch_size, prompt_ids)
    rows = Mismatched(examples, np.arange(len(examples))[None], max_length)
    mismatched = Batches(rows, evaluation_order(len(rows), batch_size), **layout)
    return Batches(examples, order, **layout, mismatched=mismatched)


def _deal(indices: np.ndarray, sizes: packing.Sizes, cells: int, most: int) -> list[np.ndarray]:
    """Return the examples of each cell of one batch, at most `most` each.

    Devices wait for the cell with the most tokens, and all are padded to it. So the largest groups
    of examples that share a prompt are dealt first, each to the cell that has the least so far, and
    no cell is left empty where there is an example for it.
    """
    batch = sizes[indices]
    # Groups are numbered by their first example, so that equal sizes keep the order of the batch.
    group_P = grouping.numbered(batch.prompt_id)
    size_G = _tokens_of_groups(group_P, batch)
    # A group that is more than a cell's part of all would leave others waiting, so it is cut.
    part = size_G.sum() / cells
    count_G = np.bincount(group_P)
    pieces_G = np.minimum(np.ceil(size_G / part).astype(int), count_G)
    # No cell is left without an example while another has several: all are padded to that one.
    while pieces_G.sum() < min(cells, len(indices)):
        of_piece_G = np.where(pieces_G < count_G, size_G / pieces_G, 0)
        pieces_G[of_piece_G.argmax()] += 1
    if pieces_G.max(initial=1) > 1:
        group_P = _cut_groups(group_P, pieces_G)
        size_G = _tokens_of_groups(group_P, batch)

    may_be_full = len(indices) > most
    sorted_indices = indices[np.argsort(group_P, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(group_P)).tolist()
    sizes_of_groups = size_G.tolist()
    dealt = [[] for _ in range(cells)]
    # (tokens, number) of each cell: the one with the least comes first.
    loads = [(0, number) for number in range(cells)]
    for group in np.argsort(-size_G, kind="stable").tolist():
        start = ends[group - 1] if group else 0
        members = sorted_indices[start : ends[group]]
        parts = [members]
        if may_be_full and min(map(len, dealt)) + len(members) > most:
            # No cell has room for all of them, but there is room for each.
            parts = [[member] for member in members]
        for together in parts:
            # Cells without room for these are set aside until one with room has been found.
            full = []
            while may_be_full and len(loads) > 1:
                _, cell = loads[0]
                if len(dealt[cell]) + len(together) <= most:
                    break
                full.append(heapq.heappop(loads))
            load, cell = loads[0]
            dealt[cell] += together
            load += sizes_of_groups[group] * len(together) // len(members)
            heapq.heapreplace(loads, (load, cell))
            for waiting in full:
                heapq.heappush(loads, waiting)
    return [np.array(cell, int) for cell in dealt]


def _cut_groups(group_P: np.ndarray, pieces_G: np.ndarray) -> np.ndarray:
    """Return the number of each example's piece, where each group is cut into so many, evenly.

    Pieces come in the order of the groups. Examples of a group keep their order, and its first
    pieces have one more where they cannot all have as many.
    """
    count_G = np.bincount(group_P)
    place_P = grouping.places(group_P)
    in_piece_G, one_more_G = np.divmod(count_G, pieces_G)
    in_piece_P = in_piece_G[group_P]
    one_more_P = one_more_G[group_P]
    # Examples in the pieces that have one more; those after them are counted from there.
    in_larger_P = one_more_P * (in_piece_P + 1)
    piece_of_group_P = np.where(
        place_P < in_larger_P,
        place_P // (in_piece_P + 1),
        one_more_P + (place_P - in_larger_P) // in_piece_P,
    )
    first_piece_G = np.cumsum(pieces_G) - pieces_G
    return first_piece_G[group_P] + piece_of_group_P


def _tokens_of_groups(group_P: np.ndarray, sizes: packing.Sizes) -> np.ndarray:
    """Return the tokens of each group of examples of one prompt, what they share once."""
    group_PK = np.broadcast_to(group_P[:, None], sizes.response.shape)
    order = np.lexsort((sizes.response_id.ravel(), group_PK.ravel()))
    group_Q = group_PK.ravel()[order]
    id_Q = sizes.response_id.ravel()[order]
    is_new_Q = np.ones(len(order), bool)
    is_new_Q[1:] = (group_Q[1:] != group_Q[:-1]) | (id_Q[1:] != id_Q[:-1])
    tokens_Q = sizes.response.ravel()[order] * is_new_Q
    response_tokens_G = np.bincount(group_Q, weights=tokens_Q).astype(int)
    _, first = np.unique(group_P, return_index=True)
    return sizes.prompt[first] + response_tokens_G


def _gather(rollout: RolloutTargets, indices: np.ndarray, size: int) -> RolloutTargets:
    """Return the values of some examples as they stand in a batch, [size], padded with zeros."""
    gathered = {}
    for field in dataclasses.fields(rollout):
        of_examples = getattr(rollout, field.name)
        # A cell may have no example at all.
        of_cell = [np.zeros(0, np.float32), *(of_examples[index] for index in indices)]
        values = np.concatenate(of_cell)
        gathered[field.name] = np.pad(values, (0, size - len(values)))
    return RolloutTargets(**gathered)


def _stack(parts: list, leading: tuple[int, int]):
    """Stack the batches of cells, or their fields, into one with these leading axes."""
    first = parts[0]
    if first is None or isinstance(first, int):  # what all cells have alike
        return first
    if isinstance(first, packing.Rows):
        return packing.Rows(*[_stack(list(field), leading) for field in zip(*parts, strict=True)])
    if isinstance(first, tuple):  # the buckets of rows
        return tuple(_stack(list(bucket), leading) for bucket in zip(*parts, strict=True))
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

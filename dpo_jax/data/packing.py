"""Packing: examples as one flat run of tokens, and the indices to read it by.

An `Example` is a prompt and its responses: one for SFT, two for a pair. Examples of one prompt
share it, and often a response too: every prompt is laid down once, and every response once, whose
positions continue from the end of the prompt. Padding comes at the end of the run alone. Two pairs
of a prompt P0 P1 P2, whose chosen responses are C0 C1 and B0, and which share the rejected response
R0, become:

    index in the run  0      1      2      3      4      5      6
    tokens_N          P0     P1     P2     C0     C1     R0     B0
    positions_N       0      1      2      3      4      3      3

    response_index_PK 0, 1                                          the first pair: C and R
                      2, 1                                          the second pair: B and R

Only completion tokens are trained on: those of the responses, without what a mask leaves out, such
as a tool's turn within an answer. The logits that predict one are those of the token before it,
which for the first token of each response is the last of the prompt:

    targets_M                              C0     C1     R0     B0
    logit_positions_M                      2      3      2      2
    segment_ids_M                          0      0      1      2   the response it belongs to

Attention alone reads whole sequences, a prompt and one response, as right-padded rows. Places in
them are counted through all rows as slots. `rows` gathers tokens into slots, `gather_index` takes
the output of each token back from its first slot, and `token_slots` says all slots of a token (-1:
no more), which the backward pass needs: a token of the prompt is in the row of each response.

    rows_RT           P0     P1     P2     C0     C1            slots 0 to 4
                      P0     P1     P2     R0     padding       slots 5 to 9
                      P0     P1     P2     B0     padding       slots 10 to 14
    gather_index_N    0      1      2      3      4      8      13
    token_slots_NJ    0,5,10 1,6,11 2,7,12 3      4      8      13

Rows come in buckets of different lengths, so that a short sequence is not padded to the longest.

Letters: N tokens of the run, M completion tokens, P examples, K responses of an example, Q distinct
responses, R rows of T tokens, J rows that a token is in, n steps.
"""

import collections
import dataclasses

import numpy as np

from dpo_jax.data.examples import Examples

# Each bucket more shortens rows and lengthens compilation.
BUCKETS = 6  # at most this many
BUCKET_PRICE = 0.03  # a bucket must save this share of attention's work
PROGRAM_PRICE = 10  # a shape is a program to compile: it must save as much work as this many steps


@dataclasses.dataclass
class RolloutTargets:
    """PPO's inputs for each completion token [M], or a list of such arrays, one per example."""

    sampled_log_probs: np.ndarray  # under the policy that sampled the token
    sampled_values: np.ndarray  # of the value head at that time
    advantages: np.ndarray
    value_targets: np.ndarray


@dataclasses.dataclass
class Batch:
    """The arrays of one shard, or of microbatches and shards with two leading axes."""

    tokens: np.ndarray  # int32 [N]
    positions: np.ndarray  # int32 [N], restart with each sequence
    rows: tuple[np.ndarray, ...]  # int32 [R, T] for each bucket, indices into N
    gather_index: np.ndarray  # int32 [N], slots
    token_slots: np.ndarray  # int32 [N, J], slots, or -1
    logit_positions: np.ndarray  # int32 [M], indices into N
    targets: np.ndarray  # int32 [M], token ids
    segment_ids: np.ndarray  # int32 [M], indices into Q; padding has Q
    response_lengths: np.ndarray  # int32 [Q], in completion tokens; padding has 1
    last_token: np.ndarray  # int32 [Q], indices into N; where a reward is read
    response_index: np.ndarray  # int32 [P, K], indices into Q: the responses of each example
    weights: np.ndarray  # float32 [P], 0 where there is no example
    reference_log_probs: np.ndarray | None = None  # float32 [P, K], where they are kept
    rollout: RolloutTargets | None = None  # for PPO


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of one shard's arrays."""

    tokens: int  # N
    rows: tuple[tuple[int, int], ...]  # (R, T) of each bucket, longest first
    completion_tokens: int  # M
    examples: int  # P
    responses: int  # Q
    rows_per_prompt: int  # J

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of all rows, longest first."""
        return np.repeat([length for _, length in self.rows], [count for count, _ in self.rows])


@dataclasses.dataclass(frozen=True)
class Needs:
    """The sizes that each of n steps requires of a shape."""

    tokens: np.ndarray  # [n]
    lengths: np.ndarray  # of the rows, longest first, then zeros [n, Q]
    completion_tokens: np.ndarray  # [n]
    examples: np.ndarray  # [n]
    rows_per_prompt: np.ndarray  # [n]

    @property
    def responses(self) -> np.ndarray:
        """How many distinct responses there are, each with a row of its own [n]."""
        return (self.lengths > 0).sum(axis=1)

    def met_by(self, shape: Shape) -> np.ndarray:
        """Return which steps fit into the shape, bool [n]."""
        # Rows of the shape, or zeros where it has fewer.
        lengths = np.zeros(max(self.lengths.shape[1], len(shape.lengths)), int)
        lengths[: len(shape.lengths)] = shape.lengths
        return (
            (self.tokens <= shape.tokens)
            & (self.completion_tokens <= shape.completion_tokens)
            & (self.examples <= shape.examples)
            & (self.responses <= shape.responses)
            & (self.rows_per_prompt <= shape.rows_per_prompt)
            # Both are sorted, so it is enough that each fits into the row of its own rank.
            & (self.lengths <= lengths[: self.lengths.shape[1]]).all(axis=1)
        )

    def largest_of(self, cells: int) -> "Needs":
        """Return what the largest of every `cells` consecutive ones require, one after another."""

        def largest(x):
            return x.reshape(-1, cells, *x.shape[1:]).max(axis=1)

        return Needs(**{name: largest(values) for name, values in vars(self).items()})


def pack(
    examples, shape: Shape, *, share: bool = True, responses_per_example: int | None = None
) -> Batch:
    """Return one shard's arrays, as the module's docstring shows them.

    examples: a list of `Example`, all with equally many responses. share=False lays a prompt down
    once for each response, and every response of every example: the plain layout, against which the
    shared one is checked. responses_per_example: to be given where there may be no example.
    """
    if responses_per_example is None:
        responses_per_example = len(examples[0].responses)
    tokens_N = np.zeros(shape.tokens, np.int32)
    positions_N = np.zeros(shape.tokens, np.int32)
    targets_M = np.zeros(shape.completion_tokens, np.int32)
    logit_positions_M = np.zeros(shape.completion_tokens, np.int32)
    # Padding has a segment past the last response, so that no sum counts it.
    segment_ids_M = np.full(shape.completion_tokens, shape.responses, np.int32)
    # What padding has is multiplied by a weight of 0, so it must be finite: lengths divide.
    response_lengths_Q = np.ones(shape.responses, np.int32)
    last_token_Q = np.zeros(shape.responses, np.int32)
    response_index_PK = np.zeros((shape.examples, responses_per_example), np.int32)
    weights_P = np.zeros(shape.examples, np.float32)
    weights_P[: len(examples)] = 1
    sequences = []  # for each response, the indices of its prompt and of itself

    laid_down = 0  # tokens of the run so far
    trained_on = 0  # completion tokens so far
    prompt_indices = {}  # a prompt -> its indices
    segments = {}  # a prompt and a response -> the number of the response
    for number, example in enumerate(examples):
        prompt = example.prompt
        masks = example.completion_masks or (None,) * responses_per_example
        for side, (response, mask) in enumerate(zip(example.responses, masks, strict=True)):
            # What is shared is equal in all tokens. A number of its own makes a part unique.
            prompt_key = prompt.tobytes() if share else (number, side)
            mask_key = None if mask is None else mask.tobytes()
            key = (prompt_key, response.tobytes(), mask_key)
            if key in segments:
                response_index_PK[number, side] = segments[key]
                continue

            if prompt_key not in prompt_indices:
                prompt_index = np.arange(laid_down, laid_down + len(prompt))
                prompt_indices[prompt_key] = prompt_index
                tokens_N[laid_down : laid_down + len(prompt)] = prompt
                positions_N[laid_down : laid_down + len(prompt)] = np.arange(len(prompt))
                laid_down += len(prompt)
            prompt_index = prompt_indices[prompt_key]

            length = len(response)
            index = np.arange(laid_down, laid_down + length)
            tokens_N[laid_down : laid_down + length] = response
            positions_N[laid_down : laid_down + length] = len(prompt) + np.arange(length)
            laid_down += length

            # Each token is predicted by the one before it in its sequence, here its neighbour in
            # the run; another response may stand between the prompt and this one.
            predicted_from = index - 1
            predicted_from[:1] = prompt_index[-1:]
            if mask is None:
                mask = np.ones(length, bool)
            completion_length = int(mask.sum())
            completion = slice(trained_on, trained_on + completion_length)
            targets_M[completion] = response[mask]
            logit_positions_M[completion] = predicted_from[mask]
            segment = len(sequences)
            segment_ids_M[completion] = segment
            trained_on += completion_length

            response_lengths_Q[segment] = completion_length
            last_token_Q[segment] = laid_down - 1
            response_index_PK[number, side] = segments[key] = segment
            sequences.append((prompt_index, index))

    rows, token_slots_NJ = _attention_rows(sequences, shape)
    return Batch(
        tokens=tokens_N,
        positions=positions_N,
        rows=rows,
        # Any slot of a token has its output. Padding is in none, and may read any.
        gather_index=np.maximum(token_slots_NJ[:, 0], 0),
        token_slots=token_slots_NJ,
        logit_positions=logit_positions_M,
        targets=targets_M,
        segment_ids=segment_ids_M,
        response_lengths=response_lengths_Q,
        last_token=last_token_Q,
        response_index=response_index_PK,
        weights=weights_P,
    )


def _attention_rows(
    sequences: list[tuple[np.ndarray, np.ndarray]], shape: Shape
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return `rows` and `token_slots`: the sequences, longest first, dealt to the buckets.

    sequences: the indices of the prompt and of the response, for each response.
    """
    lengths_Q = np.array([len(prompt) + len(response) for prompt, response in sequences], int)
    # Buckets are ordered the same way. Stable, so that equal lengths keep their order everywhere.
    longest_first = np.argsort(-lengths_Q, kind="stable")

    rows = []
    token_slots_NJ = np.full((shape.tokens, shape.rows_per_prompt), -1, np.int32)
    rows_of_prompt = collections.Counter()  # by where a prompt starts: rows that it is in so far
    first_slot = 0
    dealt = 0
    for count, row_length in shape.rows:
        # Padding reads token 0, which is as good as any: causal attention never looks to the right.
        rows_RT = np.zeros((count, row_length), np.int32)
        segments = longest_first[dealt : dealt + count]
        for row, segment in zip(rows_RT, segments, strict=False):  # there may be rows to spare
            prompt, response = sequences[segment]
            length = len(prompt) + len(response)
            row[: len(prompt)] = prompt
            row[len(prompt) : length] = response

            slots = np.arange(first_slot, first_slot + length)
            # A prompt is in the row of each of its responses; a response in one row alone.
            if len(prompt):
                nth_row = rows_of_prompt[prompt[0]]
                token_slots_NJ[prompt, nth_row] = slots[: len(prompt)]
                rows_of_prompt[prompt[0]] += 1
            token_slots_NJ[response, 0] = slots[len(prompt) :]
            first_slot += row_length
        # Rows to spare have slots too.
        first_slot += (count - len(segments)) * row_length
        rows.append(rows_RT)
        dealt += count
    return tuple(rows), token_slots_NJ


def pad_right(rows, width: int, fill=0, dtype=np.int32) -> np.ndarray:
    """Return rows of different lengths as one array [B, width], filled up on the right."""
    padded_BT = np.full((len(rows), width), fill, dtype)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of examples, and what they share: all that shapes are chosen from."""

    prompt: np.ndarray  # tokens [P]
    response: np.ndarray  # tokens [P, K]
    completion: np.ndarray  # tokens of the responses that are trained on [P, K]
    prompt_id: np.ndarray  # int64 [P], equal for equal prompts
    response_id: np.ndarray  # int64 [P, K], equal for equal responses of equal prompts

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def apart(self) -> np.ndarray:
        """The tokens of each example alone, its prompt once [P]."""
        return self.prompt + self.response.sum(axis=1)

    def __getitem__(self, indices) -> "Sizes":
        return Sizes(**{name: values[indices] for name, values in vars(self).items()})


def sizes_of(examples, *, share: bool = True) -> Sizes:
    """Return the sizes of a sequence of `Example`; share as in `pack`."""
    if not isinstance(examples, Examples):
        collected = Examples()
        for example in examples:
            collected.append(example.prompt, example.responses, "", example.completion_masks)
        examples = collected
    prompt_id_P, response_id_PK = examples.identities()
    if not share:
        prompt_id_P = np.arange(len(examples))
        response_id_PK = np.arange(response_id_PK.size).reshape(response_id_PK.shape)
    return Sizes(*examples.lengths(), prompt_id_P, response_id_PK)


NOBODY = -1  # in cells: no example is there


def needs_of_cells(sizes: Sizes, cells_XP: np.ndarray, *, share: bool = True) -> Needs:
    """Return what cells of examples require of a shape.

    cells_XP: indices of the examples of each cell, or NOBODY. share: as in `pack`.
    """
    is_there_XP = cells_XP != NOBODY
    is_there_XPK = np.broadcast_to(
        is_there_XP[..., None], (*cells_XP.shape, sizes.response.shape[1])
    )
    of_cells = sizes[np.where(is_there_XP, cells_XP, 0)]
    if share:
        is_new_prompt_XP = _is_first(of_cells.prompt_id, is_there_XP)
        cells = len(cells_XP)
        flat_ids = of_cells.response_id.reshape(cells, -1)
        is_new_XPK = _is_first(flat_ids, is_there_XPK.reshape(cells, -1)).reshape(
            is_there_XPK.shape
        )
        prompt_tokens_X = (of_cells.prompt * is_new_prompt_XP).sum(axis=1)
    else:
        is_new_XPK = is_there_XPK
        prompt_tokens_X = (of_cells.prompt[..., None] * is_there_XPK).sum(axis=(1, 2))
    sequences_XPK = (of_cells.prompt[..., None] + of_cells.response) * is_new_XPK
    longest_first_XQ = -np.sort(-sequences_XPK.reshape(len(cells_XP), -1))
    most = int((longest_first_XQ > 0).sum(axis=1).max(initial=1))
    return Needs(
        tokens=prompt_tokens_X + (of_cells.response * is_new_XPK).sum(axis=(1, 2)),
        lengths=longest_first_XQ[:, :most],
        completion_tokens=(of_cells.completion * is_new_XPK).sum(axis=(1, 2)),
        examples=is_there_XP.sum(axis=1),
        rows_per_prompt=_most_alike(of_cells.prompt_id, is_new_XPK.sum(axis=-1), share),
    )


def _is_first(ids_XI: np.ndarray, is_there_XI: np.ndarray) -> np.ndarray:
    """Return which ids of each row are there, and in no place before."""
    order_XI = np.lexsort((ids_XI, ~is_there_XI), axis=1)  # those that are there first, by id
    sorted_XI = np.take_along_axis(ids_XI, order_XI, axis=1)
    is_new_XI = np.ones(ids_XI.shape, bool)
    is_new_XI[:, 1:] = sorted_XI[:, 1:] != sorted_XI[:, :-1]
    found_XI = np.zeros(ids_XI.shape, bool)
    np.put_along_axis(found_XI, order_XI, is_new_XI, axis=1)
    return found_XI & is_there_XI


def _most_alike(prompt_id_XP: np.ndarray, responses_XP: np.ndarray, share: bool) -> np.ndarray:
    """Return the most responses that a prompt of each cell has.

    responses_XP: distinct responses that each example brings.
    """
    if not share:
        return np.minimum(responses_XP.max(axis=1, initial=1), 1)
    order_XP = np.argsort(prompt_id_XP, axis=1, kind="stable")
    sorted_XP = np.take_along_axis(prompt_id_XP, order_XP, axis=1)
    upto_XP = np.cumsum(np.take_along_axis(responses_XP, order_XP, axis=1), axis=1)
    starts_XP = np.ones(sorted_XP.shape, bool)
    starts_XP[:, 1:] = sorted_XP[:, 1:] != sorted_XP[:, :-1]
    # What had been counted where the current prompt starts, carried along.
    before_XP = np.pad(upto_XP, ((0, 0), (1, 0)))[:, :-1]
    before_XP = np.maximum.accumulate(np.where(starts_XP, before_XP, 0), axis=1)
    return np.maximum((upto_XP - before_XP).max(axis=1, initial=1), 1)


def shape_of(examples, *, share: bool = True, buckets: int = BUCKETS) -> Shape:
    """Return a shape that holds the examples, rounded up; share as in `pack`."""
    one_cell = np.arange(len(examples))[None]
    needs = needs_of_cells(sizes_of(examples, share=share), one_cell, share=share)
    return _covering(needs, slice(None), buckets)


def choose_shapes(needs: Needs, limit: int) -> list[Shape]:
    """Return at most `limit` shapes, smallest first, so that each step fits into one of them.

    Steps are grouped by their tokens so that padding is least, where another shape must save the
    work of PROGRAM_PRICE steps: a short run has few shapes.
    """
    # Tokens stand for all work here; lengths and completion tokens grow with them.
    size_n = _round_up(needs.tokens)
    price = PROGRAM_PRICE * needs.tokens.mean()
    shapes = []
    above = -1
    for size in _partition(size_n, 1, price, limit):
        shapes.append(_covering(needs, (above < size_n) & (size_n <= size), BUCKETS))
        above = size
    return shapes


def _covering(needs: Needs, some, buckets: int) -> Shape:
    """Return the smallest shape, rounded up, that some of the steps fit into."""
    lengths_Q = needs.lengths[some].max(axis=0)
    lengths_Q = _round_up(lengths_Q[lengths_Q > 0])
    # Attention's work in a row is its length squared.
    price = BUCKET_PRICE * (lengths_Q.astype(float) ** 2).sum()
    row_lengths = _partition(lengths_Q, 2, price, buckets)
    bucket_Q = np.searchsorted(row_lengths, lengths_Q)
    rows = []
    for bucket in reversed(range(len(row_lengths))):
        rows.append((int((bucket_Q == bucket).sum()), row_lengths[bucket]))
    return Shape(
        tokens=int(_round_up(needs.tokens[some]).max()),
        rows=tuple(rows),
        completion_tokens=int(_round_up(needs.completion_tokens[some]).max()),
        examples=int(needs.examples[some].max()),
        responses=len(lengths_Q),
        rows_per_prompt=int(needs.rows_per_prompt[some].max()),
    )


def _partition(sizes: np.ndarray, power: int, price: float, limit: int) -> list[int]:
    """Return the sizes to round up to, ascending, at most `limit`, whose cost is least.

    The cost is the sum of all rounded sizes to a power, and `price` for each size to round up to.
    """
    # Rounded sizes are few, so the search below is short.
    size_m, count_m = np.unique(sizes, return_counts=True)
    smaller_m = np.concatenate([[0], np.cumsum(count_m)])  # how many sizes are below size_m[i]
    # Dynamic programming: best[i] is the least cost of the i smallest of size_m, and chosen[i] what
    # they are rounded up to, with as many choices as rounds so far.
    best = np.full(len(size_m) + 1, np.inf)
    best[0] = 0.0
    chosen = [[] for _ in best]
    for _ in range(min(limit, len(size_m))):
        next_best, next_chosen = best.copy(), list(chosen)
        for end in range(1, len(size_m) + 1):
            # size_m[start:end] are rounded up to the largest of them, for every start.
            rounded = float(size_m[end - 1]) ** power * (smaller_m[end] - smaller_m[:end])
            cost = best[:end] + rounded + price
            start = int(np.argmin(cost))
            if cost[start] < next_best[end]:
                next_best[end] = cost[start]
                next_chosen[end] = [*chosen[start], int(size_m[end - 1])]
        best, chosen = next_best, next_chosen
    return chosen[-1]


def _round_up(sizes):
    """Round up to multiples of about a thirtieth of the size: little waste, and few shapes."""
    # Steps are powers of 2 so that sizes of different batches meet at the same values.
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(sizes, 1) / 32)), 0).astype(int)
    return -(-sizes // step) * step

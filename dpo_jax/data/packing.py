"""Packing: examples as one flat run of tokens, and the indices to read it by.

An `Example` is a prompt and its responses: one for SFT, two for a pair. The prompt is laid down
once, then each response, whose positions continue from the end of the prompt. Examples follow each
other without padding; padding comes at the end of the run. One example of a prompt P0 P1 P2, the
chosen response C0 C1 and the rejected response R0 becomes:

    index in the run  0      1      2      3       4       5
    tokens_N          P0     P1     P2     C0      C1      R0
    positions_N       0      1      2      3       4       3

Only completion tokens are trained on: those of the responses, without what a mask leaves out, such
as a tool's turn within an answer. The logits that predict one are those of the token before it,
which for the first token of each response is the last of the prompt:

    targets_M                              C0      C1      R0
    logit_positions_M                      2       3       2
    segment_ids_M                          0       0       1     the response it belongs to

Attention alone reads whole sequences, a prompt and one response, as right-padded rows. Places in
them are counted through all rows as slots. `rows` gathers tokens into slots, `gather_index` takes
the output of each token back from its first slot, and `token_slots` says all slots of a token (-1:
no more), which the backward pass needs: a token of the prompt is in the row of each response.

    rows_RT           P0     P1     P2     C0      C1            slots 0 to 4
                      P0     P1     P2     R0      padding       slots 5 to 9
    gather_index_N    0      1      2      3       4       8
    token_slots_NK    0, 5   1, 6   2, 7   3, -1   4, -1   8, -1

Rows come in buckets of different lengths, so that a short sequence is not padded to the longest.

Letters: N tokens of the run, M completion tokens, P examples, Q responses, K responses of an
example, R rows of T tokens, n steps.
"""

import dataclasses

import numpy as np

from dpo_jax.data.examples import Example, Examples

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
    token_slots: np.ndarray  # int32 [N, K], slots, or -1
    logit_positions: np.ndarray  # int32 [M], indices into N
    targets: np.ndarray  # int32 [M], token ids
    segment_ids: np.ndarray  # int32 [M], indices into Q; padding has Q
    response_lengths: np.ndarray  # int32 [Q], in completion tokens
    last_token: np.ndarray  # int32 [Q], indices into N; where a reward is read
    weights: np.ndarray  # float32 [P], 0 for an example that only fills the batch up
    reference_log_probs: np.ndarray | None = None  # float32 [Q], where they are kept
    rollout: RolloutTargets | None = None  # for PPO


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of one shard's arrays."""

    tokens: int  # N
    rows: tuple[tuple[int, int], ...]  # (R, T) of each bucket, longest first
    completion_tokens: int  # M

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of all rows, longest first."""
        return np.repeat([length for _, length in self.rows], [count for count, _ in self.rows])


@dataclasses.dataclass(frozen=True)
class Needs:
    """The sizes that each of n steps requires of a shape."""

    tokens: np.ndarray  # [n]
    lengths: np.ndarray  # of the rows, longest first [n, Q]
    completion_tokens: np.ndarray  # [n]

    def met_by(self, shape: Shape) -> np.ndarray:
        """Return which steps fit into the shape, bool [n]."""
        return (
            (self.tokens <= shape.tokens)
            & (self.completion_tokens <= shape.completion_tokens)
            # Both are sorted, so it is enough that each fits into the row of its own rank.
            & (self.lengths <= shape.lengths).all(axis=1)
        )


def pack(examples, shape: Shape, *, share_prompt: bool = True) -> Batch:
    """Return one shard's arrays, as the module's docstring shows them.

    examples: a list of `Example`, all with equally many responses.
    share_prompt=False lays a prompt down once for each response, as examples of one response: the
    plain layout, against which the shared one is checked.
    """
    if not share_prompt:
        # Each response becomes an example of its own, with its own copy of the prompt.
        examples = [alone for example in examples for alone in _apart(example)]
    responses_per_example = len(examples[0].responses)
    responses_in_all = len(examples) * responses_per_example

    tokens_N = np.zeros(shape.tokens, np.int32)
    positions_N = np.zeros(shape.tokens, np.int32)
    targets_M = np.zeros(shape.completion_tokens, np.int32)
    logit_positions_M = np.zeros(shape.completion_tokens, np.int32)
    # Padding has a segment past the last response, so that no sum counts it.
    segment_ids_M = np.full(shape.completion_tokens, responses_in_all, np.int32)
    response_lengths = []
    last_tokens = []
    sequences = []  # for each response, the indices of its prompt and of itself

    laid_down = 0  # tokens of the run so far
    trained_on = 0  # completion tokens so far
    for example in examples:
        prompt = example.prompt
        prompt_index = np.arange(laid_down, laid_down + len(prompt))
        tokens_N[laid_down : laid_down + len(prompt)] = prompt
        positions_N[laid_down : laid_down + len(prompt)] = np.arange(len(prompt))
        laid_down += len(prompt)
        last_of_prompt = laid_down - 1

        masks = example.completion_masks or (None,) * responses_per_example
        for response, mask in zip(example.responses, masks, strict=True):
            length = len(response)
            index = np.arange(laid_down, laid_down + length)
            tokens_N[laid_down : laid_down + length] = response
            positions_N[laid_down : laid_down + length] = len(prompt) + np.arange(length)

            # Each token is predicted by the one before it in its sequence, here its neighbour in
            # the run.
            predicted_from = index - 1
            if length:  # another response may stand between the prompt and this one
                predicted_from[0] = last_of_prompt
            if mask is None:
                mask = np.ones(length, bool)
            completion_length = int(mask.sum())
            completion = slice(trained_on, trained_on + completion_length)
            targets_M[completion] = response[mask]
            logit_positions_M[completion] = predicted_from[mask]
            segment_ids_M[completion] = len(sequences)

            sequences.append((prompt_index, index))
            laid_down += length
            trained_on += completion_length
            response_lengths.append(completion_length)
            last_tokens.append(laid_down - 1)

    rows, token_slots_NK = _attention_rows(sequences, responses_per_example, shape)
    return Batch(
        tokens=tokens_N,
        positions=positions_N,
        rows=rows,
        # Any slot of a token has its output. Padding is in none, and may read any.
        gather_index=np.maximum(token_slots_NK[:, 0], 0),
        token_slots=token_slots_NK,
        logit_positions=logit_positions_M,
        targets=targets_M,
        segment_ids=segment_ids_M,
        response_lengths=np.array(response_lengths, np.int32),
        last_token=np.array(last_tokens, np.int32),
        weights=np.ones(len(examples), np.float32),
    )


def _apart(example: Example) -> list[Example]:
    """Return an example for each response, with the whole prompt."""
    masks = example.completion_masks
    apart = []
    for number, response in enumerate(example.responses):
        mask = None if masks is None else (masks[number],)
        apart.append(Example(example.prompt, (response,), mask))
    return apart


def _attention_rows(
    sequences: list[tuple[np.ndarray, np.ndarray]], responses_per_example: int, shape: Shape
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return `rows` and `token_slots`: the sequences, longest first, dealt to the buckets.

    sequences: the indices of the prompt and of the response, for each response.
    """
    lengths_Q = np.array([len(prompt) + len(response) for prompt, response in sequences])
    # Buckets are ordered the same way. Stable, so that equal lengths keep their order everywhere.
    longest_first = np.argsort(-lengths_Q, kind="stable")

    rows = []
    token_slots_NK = np.full((shape.tokens, responses_per_example), -1, np.int32)
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
            # The n-th response of an example fills column n of its prompt's slots, so none is
            # overwritten.
            nth_of_its_example = segment % responses_per_example
            token_slots_NK[prompt, nth_of_its_example] = slots[: len(prompt)]
            # A response's token is in one row alone.
            token_slots_NK[response, 0] = slots[len(prompt) :]
            first_slot += row_length
        # Rows to spare have slots too.
        first_slot += (count - len(segments)) * row_length
        rows.append(rows_RT)
        dealt += count
    return tuple(rows), token_slots_NK


def pad_right(rows, width: int, fill=0, dtype=np.int32) -> np.ndarray:
    """Return rows of different lengths as one array [B, width], filled up on the right."""
    padded_BT = np.full((len(rows), width), fill, dtype)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The tokens of examples [P], or of the examples of some steps [n, P], by part."""

    prompt: np.ndarray  # [P]
    response: np.ndarray  # [P, K]
    completion: np.ndarray  # [P, K], tokens of the responses that are trained on

    def __getitem__(self, indices) -> "Lengths":
        return Lengths(self.prompt[indices], self.response[indices], self.completion[indices])


def lengths_of(examples) -> Lengths:
    """Return the lengths of a sequence of `Example`."""
    if isinstance(examples, Examples):
        return Lengths(*examples.lengths())
    prompt, response, completion = [], [], []
    for example in examples:
        prompt.append(len(example.prompt))
        response.append([len(ids) for ids in example.responses])
        completion.append(example.completion_lengths())
    return Lengths(np.array(prompt), np.array(response), np.array(completion))


def needs_of_lengths(lengths: Lengths, *, share_prompt: bool = True) -> Needs:
    """Return what steps require, from the lengths of their examples [n, P]."""
    steps, _, responses_per_example = lengths.response.shape
    sequences_nPK = lengths.prompt[..., None] + lengths.response
    longest_first_nQ = -np.sort(-sequences_nPK.reshape(steps, -1))
    response_tokens_n = lengths.response.sum(axis=(1, 2))
    completion_tokens_n = lengths.completion.sum(axis=(1, 2))
    prompt_tokens_n = lengths.prompt.sum(axis=1)
    if not share_prompt:
        prompt_tokens_n = prompt_tokens_n * responses_per_example
    return Needs(prompt_tokens_n + response_tokens_n, longest_first_nQ, completion_tokens_n)


def shape_of(examples, *, share_prompt: bool = True, buckets: int = BUCKETS) -> Shape:
    """Return a shape that holds the examples, rounded up."""
    needs = needs_of_lengths(lengths_of(examples)[None], share_prompt=share_prompt)
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
    lengths_Q = _round_up(needs.lengths[some].max(axis=0))
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

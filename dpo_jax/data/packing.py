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

Attention alone reads rows. A row is a prompt and responses to it, each padded on the right: the
prompt attends to itself, and each response to the prompt and to itself (`models/attention.py`).
Places in rows are counted through all of them as slots, in each bucket its prompts first:

    prompts_RU        P0 P1 P2             slots 0 to 2
    responses_RAT     C0 C1                slots 3, 4
                      R0 padding           slots 5, 6
                      B0 padding           slots 7, 8

`token_slots` says where each token is, and -1 where there is nothing. A prompt of more than A
responses is in as many rows as they take, so its tokens are in J slots; attention's output is taken
from the first, and the backward pass needs them all.

    token_slots_NJ    0  1  2  3  4  5  7

Where prompts are short, or a model's window is shorter than a sequence, rows are whole instead:
each is one sequence, a prompt with one response, and stands as a response without a prompt (U = 0).

    responses_RAT     P0 P1 P2 C0 C1       slots 0 to 4
                      P0 P1 P2 R0 padding  slots 5 to 9
                      P0 P1 P2 B0 padding  slots 10 to 14
    token_slots_NJ    0,5,10 1,6,11 2,7,12 3 4 8 13

Rows come in buckets of different lengths, so that a short one is not padded to the longest.

Where several devices share the tokens of a shard (`stripes`), each holds an equal part of the run,
one after the other. Tokens go round them by their place in a row: with two, the first device has
P0 P2 C0, the second P1 C1. So each device holds the tokens whose outputs it computes, and all have
the same work, though later queries see more keys.

Letters: N tokens of the run, M completion tokens, P examples, K responses of an example, Q distinct
responses, R rows, U tokens of a row's prompt, A responses of a row, T tokens of each, J slots of a
token, X cells (the shards of the microbatches of all steps), I the responses of a cell's examples.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dpo_jax.data.examples import FILLER, LENGTH_LIMIT, Examples, SingleResponses
from dpo_jax.data.mismatched import Mismatched

# Each bucket more shortens rows and lengthens compilation.
BUCKETS = 6  # at most this many, where the device does not want fewer
BUCKET_PRICE = 0.03  # a bucket must save this share of attention's work
PROGRAM_PRICE = 10  # a shape is a program to compile: it must save as much work as this many steps
# Rows of less than whole sequences, and of fewer responses than a prompt has, must leave less than
# this share of the scores. Both parts took as long as whole rows where a fifth was saved (2 CPU
# cores): prompts of 16 tokens and responses of 64, at any number of them.
WORTH_IT = 0.8
MOST_RESPONSES = 32  # of a row
# Causal attention is computed in blocks of so many queries, and keys after a block are never
# touched. Work is counted in scores: pairs of a query and a key.
QUERY_BLOCK = 128
# Attention's backward pass gathers the gradients of a token's slots one after the other, or, where
# some token has more slots than this, adds up all slots. It then needs no more than to know so.
MOST_SLOTS = 8
# Lengths are below LENGTH_LIMIT and responses of a row below 64, so that one int64 holds a row.
RESPONSES_LIMIT = 64


@dataclasses.dataclass
class RolloutTargets:
    """PPO's inputs for each completion token [M], or a list of such arrays, one per example."""

    sampled_log_probs: np.ndarray  # under the policy that sampled the token
    sampled_values: np.ndarray  # of the value head at that time
    advantages: np.ndarray
    value_targets: np.ndarray


class Rows(NamedTuple):
    """The tokens of a bucket of attention's rows, as indices into N."""

    prompts: np.ndarray  # int32 [R, U]; U = 0 in whole rows
    prompt_lengths: np.ndarray  # int32 [R]
    responses: np.ndarray  # int32 [R, A, T]


@dataclasses.dataclass
class Batch:
    """The arrays of one shard, or of microbatches and shards with two leading axes."""

    tokens: np.ndarray  # int32 [N]
    positions: np.ndarray  # int32 [N], restart with each sequence
    rows: tuple[Rows, ...]  # of each bucket
    token_slots: np.ndarray  # int32 [N, J], slots, or -1
    token_counts: np.ndarray  # int32 [N], how many responses of examples read it; padding has 0
    logit_positions: np.ndarray  # int32 [M], indices into N
    targets: np.ndarray  # int32 [M], token ids
    segment_ids: np.ndarray  # int32 [M], indices into Q; padding has Q
    response_lengths: np.ndarray  # int32 [Q], in completion tokens; padding has 1
    last_token: np.ndarray  # int32 [Q], indices into N; where a reward is read
    response_index: np.ndarray  # int32 [P, K], indices into Q: the responses of each example
    # float32 [P], how often each example counts: 1, or what data.weight says; 0: as if not there
    weights: np.ndarray
    target_margins: np.ndarray | None = None  # float32 [P], where data.margin says them
    reference_log_probs: np.ndarray | None = None  # float32 [P, K], where they are kept
    rollout: RolloutTargets | None = None  # for PPO
    labels: np.ndarray | None = None  # bool [P], of unpaired rows: which are desirable
    # Devices that the tokens of a row go round. It is no array: a program is compiled for it.
    stripes: int = dataclasses.field(default=1, metadata=dict(static=True), kw_only=True)
    # For KTO's KL: rows of the same prompts, each with the completion of another one's. They have
    # sizes of their own, and the same leading axes.
    mismatched: "Batch | None" = None


class RowShape(NamedTuple):
    """The static sizes of a bucket of attention's rows."""

    rows: int  # R
    prompt: int  # U, tokens
    responses: int  # A
    response: int  # T, tokens of each

    @property
    def scores(self) -> int:
        """The scores that attention computes in the bucket."""
        return int(self.rows * _scores(self.prompt, self.responses, self.response))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of one shard's arrays."""

    tokens: int  # N
    rows: tuple[RowShape, ...]  # of each bucket, longest first
    responses_per_row: int  # most of any bucket; 0: rows are whole sequences
    completion_tokens: int  # M
    examples: int  # P
    responses: int  # Q
    slots_per_token: int  # J, at most MOST_SLOTS + 1
    stripes: int = 1  # devices that the tokens of a row go round; they divide N, U and T

    @property
    def scores(self) -> int:
        """The scores that attention computes."""
        return sum(bucket.scores for bucket in self.rows)

    @property
    def contents(self) -> "Contents":
        """What fills the shape."""
        rows, prompt, responses, response = np.array(self.rows).T
        return Contents(
            tokens=self.tokens,
            completion_tokens=self.completion_tokens,
            prompt=np.repeat(prompt, rows),
            context=np.repeat(prompt, rows * responses),
            response=np.repeat(response, rows * responses),
        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is read, whatever the layout: sizes in tokens."""

    tokens: int
    completion_tokens: int
    prompt: np.ndarray  # of each distinct prompt
    context: np.ndarray  # of each distinct response: its prompt
    response: np.ndarray  # of each distinct response


@dataclasses.dataclass(frozen=True)
class Needs:
    """The sizes that each of X cells requires of a shape.

    Responses of a cell come by prompt, the longest first, and zeros where there are no more.
    """

    tokens: np.ndarray  # [X]
    completion_tokens: np.ndarray  # [X]
    examples: np.ndarray  # [X]
    prompt: np.ndarray  # tokens of each response's prompt [X, I]
    response: np.ndarray  # tokens of each response [X, I]
    number: np.ndarray  # of the response among those to its prompt, from 0 [X, I]
    siblings: np.ndarray  # how many there are to its prompt, itself included; 0: no response [X, I]

    def __getitem__(self, cells) -> "Needs":
        return Needs(**{name: values[cells] for name, values in vars(self).items()})

    @property
    def responses(self) -> np.ndarray:
        """How many distinct responses there are [X]."""
        return (self.siblings > 0).sum(axis=1)

    @property
    def contents(self) -> Contents:
        """What all cells read together."""
        is_there = self.siblings > 0
        return Contents(
            tokens=int(self.tokens.sum()),
            completion_tokens=int(self.completion_tokens.sum()),
            prompt=self.prompt[is_there & (self.number == 0)],
            context=self.prompt[is_there],
            response=self.response[is_there],
        )

    def run(self, stripes: int) -> np.ndarray:
        """Return the tokens of the run that each cell is laid down in [X]."""
        if stripes == 1:
            return self.tokens
        # Every part starts at the same place of all stripes; what is missing at its end is padding.
        prompt = _round_up_to(self.prompt, stripes) * (self.number == 0)
        return (prompt + _round_up_to(self.response, stripes)).sum(axis=1)

    def rows(self, responses_per_row: int) -> np.ndarray:
        """Return the rows of each cell, longest first: U, A and T, or zeros [X, rows, 3]."""
        if not responses_per_row:  # whole
            is_row = self.siblings > 0
            prompt = np.zeros_like(self.prompt)
            responses = is_row.astype(int)
            response = self.prompt + self.response
        else:
            # A row starts with every so many responses to a prompt, and the first is its longest.
            is_row = (self.siblings > 0) & (self.number % responses_per_row == 0)
            prompt = self.prompt
            responses = np.minimum(self.siblings - self.number, responses_per_row)
            response = self.response
        # One key for all three sorts much faster than three.
        key = (prompt * LENGTH_LIMIT + response) * RESPONSES_LIMIT + responses
        key = -np.sort(-np.where(is_row, key, 0), axis=1)
        most = int((key > 0).sum(axis=1).max(initial=1))
        key = key[:, :most]
        prompt, response = np.divmod(key // RESPONSES_LIMIT, LENGTH_LIMIT)
        return np.stack([prompt, key % RESPONSES_LIMIT, response], axis=-1)

    def scores(self, responses_per_row: int) -> int:
        """Return the scores that attention would compute in rows without padding, in all cells."""
        return int(_scores(*np.moveaxis(self.rows(responses_per_row), -1, 0)).sum())

    def slots_per_token(self, responses_per_row: int) -> np.ndarray:
        """Return how many slots a token has at most [X]; MOST_SLOTS + 1 stands for any more."""
        most = self.siblings.max(axis=1, initial=1)
        return np.clip(-(-most // max(responses_per_row, 1)), 1, MOST_SLOTS + 1)

    def met_by(self, shape: Shape) -> np.ndarray:
        """Return which cells fit into the shape, bool [X]."""
        rows = self.rows(shape.responses_per_row)
        room = [[bucket[1:]] * bucket.rows for bucket in shape.rows]
        room = np.array(sum(room, [])).reshape(-1, 3)
        # Rows of the shape, or zeros where it has fewer.
        missing = max(rows.shape[1] - len(room), 0)
        room = np.pad(room, ((0, missing), (0, 0)))[: rows.shape[1]]
        return (
            (self.run(shape.stripes) <= shape.tokens)
            & (self.completion_tokens <= shape.completion_tokens)
            & (self.examples <= shape.examples)
            & (self.responses <= shape.responses)
            & (self.slots_per_token(shape.responses_per_row) <= shape.slots_per_token)
            # Both are sorted, and each row goes to that of its own rank.
            & (rows <= room).all(axis=(1, 2))
        )


def _scores(prompt, responses, response):
    """Return the scores of a row: its prompt over itself, its responses over it and themselves."""

    def causal(length):
        return length * (length + np.minimum(length, QUERY_BLOCK)) // 2

    return causal(prompt) + responses * (response * prompt + causal(response))


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
    responses, response_index = _distinct_responses(examples, share)
    tokens_N, positions_N, prompts_Q, responses_Q = _lay_down(responses, shape)
    completions = _completions(responses, prompts_Q, responses_Q, shape)
    if shape.responses_per_row:
        rows = _rows_in_two_parts(prompts_Q, responses_Q, shape.responses_per_row)
    else:
        rows = _whole_rows(prompts_Q, responses_Q)
    buckets, token_slots_NJ = _attention_rows(rows, shape)

    last_token_Q = np.zeros(shape.responses, np.int32)
    for number, (prompt, response) in enumerate(zip(prompts_Q, responses_Q, strict=True)):
        # A response without a token ends where its prompt does.
        last_token_Q[number] = response[-1] if len(response) else prompt[-1]
    token_counts_N = np.zeros(shape.tokens, np.int32)
    for number in itertools.chain(*response_index):
        token_counts_N[prompts_Q[number]] += 1
        token_counts_N[responses_Q[number]] += 1
    response_index_PK = np.zeros((shape.examples, responses_per_example), np.int32)
    weights_P = np.zeros(shape.examples, np.float32)
    if examples:
        response_index_PK[: len(examples)] = response_index
        weights_P[: len(examples)] = 1
    return Batch(
        tokens=tokens_N,
        positions=positions_N,
        rows=buckets,
        token_slots=token_slots_NJ,
        token_counts=token_counts_N,
        last_token=last_token_Q,
        response_index=response_index_PK,
        weights=weights_P,
        stripes=shape.stripes,
        **completions,
    )


class _Response(NamedTuple):
    """A distinct response, with its prompt."""

    prompt_key: object  # equal for responses that share their prompt
    prompt: np.ndarray  # token ids
    ids: np.ndarray
    mask: np.ndarray | None  # which of its tokens are trained on; None: all


def _distinct_responses(examples, share: bool) -> tuple[list[_Response], list[list[int]]]:
    """Return each distinct response once, and the numbers of each example's responses."""
    distinct = []
    numbers = {}  # of each, by all that it consists of
    response_index = []
    for place, example in enumerate(examples):
        masks = example.completion_masks or (None,) * len(example.responses)
        of_example = []
        for side, (ids, mask) in enumerate(zip(example.responses, masks, strict=True)):
            # What is shared is equal in all tokens. A number of its own makes a part unique.
            prompt_key = example.prompt.tobytes() if share else (place, side)
            key = (prompt_key, ids.tobytes(), None if mask is None else mask.tobytes())
            if key not in numbers:
                numbers[key] = len(distinct)
                distinct.append(_Response(prompt_key, example.prompt, ids, mask))
            of_example.append(numbers[key])
        response_index.append(of_example)
    return distinct, response_index


def _lay_down(
    responses: list[_Response], shape: Shape
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return the run's tokens and positions, [N], and where each prompt and response is in it.

    A prompt comes before the first of its responses. The indices of prompts and responses are lists
    with an array for each response.
    """
    tokens_N = np.zeros(shape.tokens, np.int32)
    positions_N = np.zeros(shape.tokens, np.int32)
    stripes = shape.stripes
    stripe_length = shape.tokens // stripes
    end = 0  # of what is laid down in each stripe

    def add(ids: np.ndarray, position: int) -> np.ndarray:
        nonlocal end
        number = np.arange(len(ids))
        # Rows of responses alone start with the response.
        place = number if shape.responses_per_row else position + number
        index = place % stripes * stripe_length + end + number // stripes
        tokens_N[index] = ids
        positions_N[index] = position + number
        end += -(-len(ids) // stripes)
        return index

    prompt_indices = {}  # by key
    prompts_Q = []
    responses_Q = []
    for response in responses:
        if response.prompt_key not in prompt_indices:
            prompt_indices[response.prompt_key] = add(response.prompt, 0)
        prompts_Q.append(prompt_indices[response.prompt_key])
        responses_Q.append(add(response.ids, len(response.prompt)))
    return tokens_N, positions_N, prompts_Q, responses_Q


def _completions(
    responses: list[_Response], prompts_Q: list, responses_Q: list, shape: Shape
) -> dict[str, np.ndarray]:
    """Return the fields of a `Batch` that say which tokens are trained on, and from where.

    prompts_Q, responses_Q: indices of tokens, as `_lay_down` returns them.
    """
    targets_M = np.zeros(shape.completion_tokens, np.int32)
    logit_positions_M = np.zeros(shape.completion_tokens, np.int32)
    # Padding has a segment past the last response, so that no sum counts it.
    segment_ids_M = np.full(shape.completion_tokens, shape.responses, np.int32)
    # What padding has is multiplied by a weight of 0, so it must be finite: lengths divide.
    response_lengths_Q = np.ones(shape.responses, np.int32)
    start = 0
    for number, response in enumerate(responses):
        # Each token is predicted by the one before it in its sequence.
        before = np.concatenate([prompts_Q[number][-1:], responses_Q[number]])
        predicted_from = before[: len(responses_Q[number])]
        targets = response.ids
        if response.mask is not None:
            targets = targets[response.mask]
            predicted_from = predicted_from[response.mask]
        end = start + len(targets)
        targets_M[start:end] = targets
        logit_positions_M[start:end] = predicted_from
        segment_ids_M[start:end] = number
        response_lengths_Q[number] = len(targets)
        start = end
    return dict(
        targets=targets_M,
        logit_positions=logit_positions_M,
        segment_ids=segment_ids_M,
        response_lengths=response_lengths_Q,
    )


def _whole_rows(prompts_Q: list, responses_Q: list) -> list[tuple]:
    """Return rows (prompt, responses), indices of tokens: each sequence as one response."""
    no_prompt = np.zeros(0, int)
    sequences = [np.concatenate(parts) for parts in zip(prompts_Q, responses_Q, strict=True)]
    return [(no_prompt, [sequence]) for sequence in sequences]


def _rows_in_two_parts(prompts_Q: list, responses_Q: list, responses_per_row: int) -> list[tuple]:
    """Return rows (prompt, responses), indices of tokens: a prompt and responses to it."""
    responses_of = collections.defaultdict(list)
    prompt_of = {}
    for prompt, response in zip(prompts_Q, responses_Q, strict=True):
        start = int(prompt[0])  # where a prompt starts stands for it
        prompt_of[start] = prompt
        responses_of[start].append(response)
    rows = []
    for start, responses in responses_of.items():
        longest_first = sorted(responses, key=len, reverse=True)
        for first in range(0, len(responses), responses_per_row):
            rows.append((prompt_of[start], longest_first[first : first + responses_per_row]))
    return rows


def _attention_rows(rows: list[tuple], shape: Shape) -> tuple[tuple[Rows, ...], np.ndarray]:
    """Return a batch's `rows` and `token_slots`: the rows, longest first, dealt to the buckets.

    rows: (prompt, responses), indices of tokens, with the longest response first.
    """

    def size(row):
        prompt, responses = row
        return len(prompt), len(responses[0]), len(responses)

    # As `Needs.rows` sorts them, so that each fits into the row of its rank.
    rows = sorted(rows, key=size, reverse=True)
    token_slots_NJ = np.full((shape.tokens, shape.slots_per_token), -1, np.int32)
    buckets = []
    first_slot = 0
    for bucket in shape.rows:
        # Padding reads token 0, which is as good as any: no token sees it.
        prompts_RU = np.zeros((bucket.rows, bucket.prompt), np.int32)
        prompt_lengths_R = np.zeros(bucket.rows, np.int32)
        responses_RAT = np.zeros((bucket.rows, bucket.responses, bucket.response), np.int32)
        prompt_slots_RU = first_slot + np.arange(prompts_RU.size).reshape(prompts_RU.shape)
        first_slot += prompts_RU.size
        response_slots_RAT = first_slot + np.arange(responses_RAT.size).reshape(responses_RAT.shape)
        first_slot += responses_RAT.size

        dealt, rows = rows[: bucket.rows], rows[bucket.rows :]
        for row, (prompt, responses) in enumerate(dealt):  # there may be rows to spare
            prompts_RU[row, : len(prompt)] = prompt
            prompt_lengths_R[row] = len(prompt)
            _add_slots(token_slots_NJ, prompt, prompt_slots_RU[row])
            for place, response in enumerate(responses):
                responses_RAT[row, place, : len(response)] = response
                _add_slots(token_slots_NJ, response, response_slots_RAT[row, place])
        buckets.append(Rows(prompts_RU, prompt_lengths_R, responses_RAT))
    return tuple(buckets), token_slots_NJ


def _add_slots(token_slots_NJ: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> None:
    """Note a slot of each token, in the first place that is free; spare slots are padding's.

    Where MOST_SLOTS + 1 places are taken, the slot need not be noted.
    """
    taken = (token_slots_NJ[tokens] >= 0).sum(axis=1)
    is_noted = taken <= MOST_SLOTS
    token_slots_NJ[tokens[is_noted], taken[is_noted]] = slots[: len(tokens)][is_noted]


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
    if not isinstance(examples, Examples | SingleResponses | Mismatched):
        collected = Examples()
        for number, example in enumerate(examples, 1):
            where = f"example {number}"
            collected.append(example.prompt, example.responses, where, example.completion_masks)
        examples = collected
    prompt_id_P, response_id_PK = examples.identities()
    if not share:
        prompt_id_P = np.arange(len(examples))
        response_id_PK = np.arange(response_id_PK.size).reshape(response_id_PK.shape)
    return Sizes(*examples.lengths(), prompt_id_P, response_id_PK)


def needs_of_cells(sizes: Sizes, cells_XP: np.ndarray, *, share: bool = True) -> Needs:
    """Return what cells of examples require of a shape.

    cells_XP: indices of the examples of each cell, or FILLER. share: as in `pack`.
    """
    cells = len(cells_XP)
    responses_per_example = sizes.response.shape[1]
    is_there_XP = cells_XP != FILLER
    of_cells = sizes[np.where(is_there_XP, cells_XP, 0)]
    # By the responses of a cell, one after the other.
    is_there_XI = np.repeat(is_there_XP, responses_per_example, axis=1)
    prompt_XI = np.repeat(of_cells.prompt, responses_per_example, axis=1)
    prompt_id_XI = np.repeat(of_cells.prompt_id, responses_per_example, axis=1)
    response_XI = of_cells.response.reshape(cells, -1)
    completion_XI = of_cells.completion.reshape(cells, -1)
    if share:
        is_new_XI = _is_first(of_cells.response_id.reshape(cells, -1), is_there_XI)
    else:
        is_new_XI = is_there_XI
        # Every response has a prompt of its own.
        prompt_id_XI = np.broadcast_to(np.arange(prompt_id_XI.shape[1]), prompt_id_XI.shape)

    # The distinct ones come first, by prompt, then the longest first.
    order_XI = np.lexsort((-response_XI, prompt_id_XI, ~is_new_XI), axis=1)
    is_new_XI = np.take_along_axis(is_new_XI, order_XI, axis=1)
    prompt_id_XI = np.take_along_axis(prompt_id_XI, order_XI, axis=1)
    prompt_XI = np.take_along_axis(prompt_XI, order_XI, axis=1) * is_new_XI
    response_XI = np.take_along_axis(response_XI, order_XI, axis=1) * is_new_XI
    completion_XI = np.take_along_axis(completion_XI, order_XI, axis=1) * is_new_XI
    number_XI, siblings_XI = _numbered(prompt_id_XI, is_new_XI)
    prompt_tokens_X = (prompt_XI * (number_XI == 0)).sum(axis=1)
    return Needs(
        tokens=prompt_tokens_X + response_XI.sum(axis=1),
        completion_tokens=completion_XI.sum(axis=1),
        examples=is_there_XP.sum(axis=1),
        prompt=prompt_XI,
        response=response_XI,
        number=number_XI,
        siblings=siblings_XI,
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


def _numbered(ids_XI: np.ndarray, is_there_XI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each one's number among its equals, and how many they are, or zeros.

    ids_XI: equals stand together, and those that are there before the others.
    """
    places_I = np.arange(ids_XI.shape[1])
    starts_XI = np.ones(ids_XI.shape, bool)
    starts_XI[:, 1:] = (ids_XI[:, 1:] != ids_XI[:, :-1]) | ~is_there_XI[:, 1:]
    # Where the run of equals starts, carried to the right, and where the next starts, to the left.
    start_XI = np.maximum.accumulate(np.where(starts_XI, places_I, 0), axis=1)
    next_XI = np.full(ids_XI.shape, ids_XI.shape[1])
    next_XI[:, :-1] = np.where(starts_XI[:, 1:], places_I[1:], ids_XI.shape[1])
    next_XI = np.minimum.accumulate(next_XI[:, ::-1], axis=1)[:, ::-1]
    return (places_I - start_XI) * is_there_XI, (next_XI - start_XI) * is_there_XI


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What a model and its device ask of attention's rows."""

    window: int | None = None  # how far attention looks back; None: to the start
    buckets: int = BUCKETS  # the most
    stripes: int = 1  # devices that the tokens of a row go round


ANY_ROWS = RowLimits()


def shape_of(examples, *, share: bool = True, limits: RowLimits = ANY_ROWS) -> Shape:
    """Return a shape that holds the examples, rounded up; share as in `pack`."""
    one_cell = np.arange(len(examples))[None]
    needs = needs_of_cells(sizes_of(examples, share=share), one_cell, share=share)
    return _covering(needs, limits, share)


def choose_shapes(
    needs: Needs,
    most: int,
    *,
    cells: int = 1,
    share: bool = True,
    limits: RowLimits = ANY_ROWS,
) -> list[Shape]:
    """Return at most `most` shapes, smallest first, so that each step fits into one of them.

    Steps are grouped by their tokens so that padding is least, where another shape must save the
    work of PROGRAM_PRICE steps: a short run has few shapes. cells: of each step, one after another;
    all have one shape. share: as in `pack`.
    """
    # Tokens stand for all work here; lengths and completion tokens grow with them.
    tokens_n = needs.run(limits.stripes).reshape(-1, cells).max(axis=1)
    size_n = _round_up(tokens_n)
    size_m, count_m = np.unique(size_n, return_counts=True)
    steps_below_m = np.concatenate([[0], np.cumsum(count_m)])
    price = PROGRAM_PRICE * tokens_n.mean()

    def cost(end):
        # All steps of sizes [start:end] are padded to the largest of them.
        return size_m[end - 1] * (steps_below_m[end] - steps_below_m[:end]) + price

    shapes = []
    for start, end in _cut(len(size_m), cost, most):
        some_n = (size_m[start] <= size_n) & (size_n <= size_m[end - 1])
        shapes.append(_covering(needs[np.repeat(some_n, cells)], limits, share))
    return shapes


def _covering(needs: Needs, limits: RowLimits, share: bool) -> Shape:
    """Return the smallest shape, rounded up, that all cells fit into."""
    most_responses = MOST_RESPONSES if share else 0
    responses_per_row, rows_R3 = _choose_rows(needs, limits, most_responses)
    tokens = _round_up(needs.run(limits.stripes)).max()
    return Shape(
        tokens=int(_round_up_to(tokens, limits.stripes)),
        rows=_in_buckets(rows_R3, limits.buckets),
        responses_per_row=responses_per_row,
        completion_tokens=int(_round_up(needs.completion_tokens).max()),
        examples=int(needs.examples.max()),
        responses=int(needs.responses.max()),
        slots_per_token=int(needs.slots_per_token(responses_per_row).max()),
        stripes=limits.stripes,
    )


def _choose_rows(needs: Needs, limits: RowLimits, most: int) -> tuple[int, np.ndarray]:
    """Return the responses per row that need few scores, and the rows that hold all cells.

    The rows are U, A and T, rounded up [R, 3]. Whole rows (0 responses) are taken where two parts
    save too little, or where a sequence is longer than the window: how far a response looks back
    into its prompt would depend on the prompt's length. most: responses of a row; 0: whole rows
    only.
    """

    def covering(responses_per_row):
        rows_R3 = needs.rows(responses_per_row).max(axis=0)
        lengths = _round_up(rows_R3[:, [0, 2]])
        rows_R3[:, [0, 2]] = _round_up_to(lengths, limits.stripes)
        return rows_R3, _scores(*rows_R3.T).sum()

    chosen = 0
    rows_R3, least = covering(0)
    most = min(int(needs.siblings.max(initial=0)), most)
    for responses_per_row in range(most, 0, -1):
        in_parts_R3, scores = covering(responses_per_row)
        # As attention sees them: padded.
        longest = in_parts_R3[:, 0].max() + in_parts_R3[:, 2].max()
        is_seen_whole = limits.window is None or longest <= limits.window
        if is_seen_whole and scores < WORTH_IT * least:
            chosen, rows_R3, least = responses_per_row, in_parts_R3, scores
    return chosen, rows_R3


def _in_buckets(rows_R3: np.ndarray, limit: int) -> tuple[RowShape, ...]:
    """Return at most `limit` buckets that hold the rows, in their order, with the fewest scores.

    rows_R3: U, A and T of each row, longest first. A bucket has the largest of each of its rows.
    """
    price = BUCKET_PRICE * _scores(*rows_R3.T).sum()
    # Equal neighbours are taken together, so the search below is short.
    is_new_R = np.ones(len(rows_R3), bool)
    is_new_R[1:] = (rows_R3[1:] != rows_R3[:-1]).any(axis=1)
    first_m = np.append(np.flatnonzero(is_new_R), len(rows_R3))
    size_m3 = rows_R3[first_m[:-1]]

    def cost(end):
        # Sizes [start:end] are padded to the largest of each.
        largest_m3 = np.maximum.accumulate(size_m3[:end][::-1], axis=0)[::-1]
        return _scores(*largest_m3.T) * (first_m[end] - first_m[:end]) + price

    buckets = []
    for start, end in _cut(len(size_m3), cost, limit):
        prompt, responses, response = size_m3[start:end].max(axis=0).tolist()
        rows = int(first_m[end] - first_m[start])
        buckets.append(RowShape(rows, prompt, responses, response))
    return tuple(buckets)


def _cut(count: int, cost: Callable, limit: int) -> list[tuple[int, int]]:
    """Return the parts (start, end) of 0 to `count`, at most `limit`, whose cost is least.

    cost: the end of a part -> its cost for every start before that, [end].
    """
    # Dynamic programming: best[i] is the least cost of the first i, and starts[i] where the parts
    # of them begin, with as many parts as rounds so far.
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    starts = [[] for _ in best]
    costs = [cost(end) for end in range(1, count + 1)]
    for _ in range(min(limit, count)):
        next_best, next_starts = best.copy(), list(starts)
        for end in range(1, count + 1):
            total = best[:end] + costs[end - 1]
            start = int(np.argmin(total))
            if total[start] < next_best[end]:
                next_best[end] = total[start]
                next_starts[end] = [*starts[start], start]
        best, starts = next_best, next_starts
    return list(itertools.pairwise([*starts[-1], count]))


def _round_up(sizes):
    """Round up to multiples of about a thirtieth of the size: little waste, and few shapes."""
    # Steps are powers of 2 so that sizes of different batches meet at the same values.
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(sizes, 1) / 32)), 0).astype(int)
    return -(-sizes // step) * step


def _round_up_to(sizes, multiple: int):
    """Round up to a multiple."""
    return -(-sizes // multiple) * multiple

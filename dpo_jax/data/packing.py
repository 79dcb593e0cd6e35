"""Lays examples down as one flat run of tokens per shard, with the indices to read it by.

An example is a prompt and its responses: one for SFT, two for a pair. The prompt is laid down once,
then each response, whose positions go on from the prompt's end; examples follow each other without
padding:

    tokens_N     prompt  chosen  rejected  prompt  chosen  rejected ...
    positions_N  0 .. p  p+1 ..  p+1 ..    0 .. p  ...

Attention reads whole sequences (prompt + one response) as right-padded rows: `rows` holds, for each
length bucket, rows_RT of indices into N, `back_N` finds each token's output in the flattened rows,
and `uses_NK` all places of a token there, as many as an example has responses (-1: there are no
more). Log-probs are read at `predict_M` (the token before each response token) against `targets_M`,
and belong to response `owner_M`; padding belongs to no response (owner = Q). `ends_Q` is each
response's last token, where a reward model reads its score.

Letters: N tokens, K responses of an example (so places of a token), J its parts, R rows of T
tokens, M scored positions, P examples, Q responses.
"""

import dataclasses

import numpy as np

BUCKETS = 6  # at most; each more shortens rows and lengthens compilation,
BUCKET_PRICE = 0.03  # so it must save this share of attention's work
PROGRAM_PRICE = 10  # and a shape more, a program to compile, this many steps


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of one shard's arrays."""

    tokens: int  # N
    rows: tuple[tuple[int, int], ...]  # (R, T) of each bucket, longest first
    scored: int  # M

    @property
    def lengths(self) -> np.ndarray:
        """Of all rows, longest first."""
        return np.repeat([length for _, length in self.rows], [count for count, _ in self.rows])


@dataclasses.dataclass(frozen=True)
class Needs:
    """What each of n steps needs of a shape."""

    tokens: np.ndarray  # [n]
    lengths: np.ndarray  # of its rows, longest first [n, Q]
    scored: np.ndarray  # [n]

    def met_by(self, shape: Shape) -> np.ndarray:
        """Which steps fit into the shape [n]."""
        return (
            (self.tokens <= shape.tokens)
            & (self.scored <= shape.scored)
            & (self.lengths <= shape.lengths).all(axis=1)
        )


def lengths_of(examples) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt [P] and of each response [P, K]; `examples` is a list of (prompt,
    responses).
    """
    return (
        np.array([len(prompt) for prompt, _ in examples]),
        np.array([list(map(len, responses)) for _, responses in examples]),
    )


def needs_of_lengths(prompt_nP, response_nPK, *, share_prompt: bool = True) -> Needs:
    """What steps need, from the lengths of their examples."""
    lengths_nQ = -np.sort(-(prompt_nP[..., None] + response_nPK).reshape(len(prompt_nP), -1))
    scored_n = response_nPK.sum(axis=(1, 2))
    prompts_n = prompt_nP.sum(axis=1) * (1 if share_prompt else response_nPK.shape[2])
    return Needs(prompts_n + scored_n, lengths_nQ, scored_n)


def shape_of(examples, *, share_prompt: bool = True, buckets: int = BUCKETS) -> Shape:
    """A shape that holds the examples, rounded up."""
    needs = needs_of_lengths(*(x[None] for x in lengths_of(examples)), share_prompt=share_prompt)
    return _covering(needs, slice(None), buckets)


def choose(needs: Needs, limit: int) -> list[Shape]:
    """At most `limit` shapes, smallest first, such that each step fits into one of them; fewer for
    a short run.

    They are cut by tokens so that the least is padded, a shape being worth PROGRAM_PRICE steps.
    """
    size_n = _round_up(needs.tokens)
    ends = _partition(size_n, 1, PROGRAM_PRICE * needs.tokens.mean(), limit)
    return [
        _covering(needs, (low < size_n) & (size_n <= high), BUCKETS)
        for low, high in zip([-1, *ends], ends, strict=False)
    ]


def _covering(needs: Needs, some, buckets: int) -> Shape:
    """The smallest shape, rounded up, that some of the steps fit into."""
    lengths_Q = _round_up(needs.lengths[some].max(axis=0))
    ends = _partition(lengths_Q, 2, BUCKET_PRICE * (lengths_Q.astype(float) ** 2).sum(), buckets)
    bucket_Q = np.searchsorted(ends, lengths_Q)
    rows = tuple((int((bucket_Q == i).sum()), ends[i]) for i in reversed(range(len(ends))))
    return Shape(
        int(_round_up(needs.tokens[some]).max()), rows, int(_round_up(needs.scored[some]).max())
    )


def _partition(sizes, power: int, price: float, limit: int) -> list[int]:
    """Sizes to round up to, ascending, at most `limit`: those that make the sum of rounded sizes to
    a power least.

    Each costs `price` besides.
    """
    size_m, count_m = np.unique(sizes, return_counts=True)
    below_m = np.concatenate([[0], np.cumsum(count_m)])  # how many are smaller
    best = np.concatenate(
        [[0.0], np.full(len(size_m), np.inf)]
    )  # by how many of size_m are dealt with
    found = [(0.0, [])] + [(np.inf, [])] * len(size_m)
    for _ in range(min(limit, len(size_m))):
        after = list(found)
        for end in range(1, len(size_m) + 1):
            cost = (
                best[:end]
                + float(size_m[end - 1]) ** power * (below_m[end] - below_m[:end])
                + price
            )
            start = int(np.argmin(cost))
            if cost[start] < after[end][0]:
                after[end] = cost[start], [*found[start][1], int(size_m[end - 1])]
        found, best = after, np.array([cost for cost, _ in after])
    return found[-1][1]


def _round_up(sizes):
    """To multiples of about a thirtieth of the size: little waste, and few shapes."""
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(sizes, 1) / 32)), 0).astype(int)
    return -(-sizes // step) * step


def pack(examples, shape: Shape, *, share_prompt=True) -> dict:
    """One shard's arrays, as the module's docstring says; int32. Examples have equally many
    responses, K.

    share_prompt=False lays a prompt down once per response: the plain layout, to check the shared
    one against.
    """
    if not share_prompt:
        examples = [
            (prompt, (response,)) for prompt, responses in examples for response in responses
        ]
    tokens = np.concatenate(
        [part for prompt, responses in examples for part in (prompt, *responses)]
    )
    # Parts, the first of each example its prompt, stand one after the other; a response goes on
    # from its prompt's end.
    prompt_P, response_PK = lengths_of(examples)
    length_PJ = np.concatenate([prompt_P[:, None], response_PK], axis=1)
    start_PJ = (np.cumsum(length_PJ) - length_PJ.ravel()).reshape(length_PJ.shape)
    prompt_Q, first_Q = (np.repeat(x_PJ[:, 0], x_PJ.shape[1] - 1) for x_PJ in (length_PJ, start_PJ))
    count_Q, start_Q = (x_PJ[:, 1:].ravel() for x_PJ in (length_PJ, start_PJ))
    offset_PJ = start_PJ - np.where(np.arange(length_PJ.shape[1]), length_PJ[:, :1], 0)
    owner = np.repeat(np.arange(len(count_Q)), count_Q)
    nth = np.arange(len(owner)) - (np.cumsum(count_Q) - count_Q)[owner]  # of its response
    scored = start_Q[owner] + nth
    predict = np.where(nth, scored - 1, (first_Q + prompt_Q - 1)[owner])
    rows, back, uses = _attention_rows(
        first_Q, prompt_Q, start_Q, count_Q, length_PJ.shape[1] - 1, shape
    )
    arrays = dict(
        tokens=_padded(tokens, shape.tokens),
        positions=_padded(
            np.arange(len(tokens)) - np.repeat(offset_PJ.ravel(), length_PJ.ravel()), shape.tokens
        ),
        predict=_padded(predict, shape.scored),
        targets=_padded(tokens[scored], shape.scored),
        owner=_padded(owner, shape.scored, len(count_Q)),
        counts=count_Q,
        ends=start_Q + count_Q - 1,
        rows=rows,
        back=back,
        uses=uses,
    )
    return {
        name: tuple(map(np.int32, x)) if name == "rows" else x.astype(np.int32)
        for name, x in arrays.items()
    }


def _attention_rows(first_Q, prompt_Q, start_Q, count_Q, responses: int, shape: Shape):
    """`rows`, `back` and `uses`: the sequences, longest first, dealt to the shape's buckets."""
    order = np.argsort(-(prompt_Q + count_Q), kind="stable")
    uses_NK, rows, offset, dealt = np.full((shape.tokens, responses), -1), [], 0, 0
    for count, length in shape.rows:
        some_R = order[dealt : dealt + count]
        first, prompt, start, end = (
            x_Q[some_R, None] for x_Q in (first_Q, prompt_Q, start_Q, prompt_Q + count_Q)
        )
        t = np.arange(length)
        token_RT = np.where(t < prompt, first + t, start + t - prompt)
        real_RT = t < end
        place_RT = offset + np.arange(len(some_R))[:, None] * length + t
        use_RT = np.where(
            t < prompt, some_R[:, None] % responses, 0
        )  # a prompt's token is in each response's row
        uses_NK[token_RT[real_RT], use_RT[real_RT]] = place_RT[real_RT]
        rows.append(np.where(real_RT, token_RT, 0))
        rows[-1] = np.pad(rows[-1], ((0, count - len(some_R)), (0, 0)))
        offset, dealt = offset + count * length, dealt + count
    return tuple(rows), np.maximum(uses_NK[:, 0], 0), uses_NK


def _padded(x, size: int, fill: int = 0):
    return np.pad(x, (0, size - len(x)), constant_values=fill)

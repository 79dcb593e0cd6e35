"""Lays examples down as one flat run of tokens per shard, with the indices to read it by.

An example is a prompt and its responses: one for SFT, two for a pair. The prompt is laid down once, then
each response, whose positions go on from the prompt's end; examples follow each other without padding:

    tokens_N     prompt  chosen  rejected  prompt  chosen  rejected ...
    positions_N  0 .. p  p+1 ..  p+1 ..    0 .. p  ...

Attention reads whole sequences (prompt + one response) as right-padded rows: `rows` holds, for each length
bucket, rows_RT of indices into N, `back_N` finds each token's output in the flattened rows, and `uses_NK` all places
of a token there, as many as an example has responses (-1: there are no more). Log-probs are
read at `predict_M` (the token before each response token) against `targets_M`, and belong to response
`owner_M`; padding belongs to no response (owner = Q). `ends_Q` is each response's last token, where a reward
model reads its score.

Letters: N tokens, K responses of an example (so places of a token), J its parts, R rows of T tokens,
M scored positions, P examples, Q responses.
"""

import dataclasses

import numpy as np

BUCKETS = 2  # length buckets of attention rows; each more shortens rows and lengthens compilation


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of one shard's arrays."""
    tokens: int  # N
    rows: tuple[tuple[int, int], ...]  # (R, T) of each bucket, longest first
    scored: int  # M

    def covers(self, other: "Shape") -> bool:
        return (self.tokens >= other.tokens and self.scored >= other.scored
                and all(mine[1] >= its[1] for mine, its in zip(self.rows, other.rows, strict=True)))


def lengths_of(examples) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt [P] and of each response [P, K]; `examples` is a list of (prompt, responses)."""
    return (np.array([len(prompt) for prompt, _ in examples]),
            np.array([list(map(len, responses)) for _, responses in examples]))


def shape_of(examples, *, share_prompt=True, buckets=BUCKETS) -> Shape:
    """The smallest shape that holds the examples."""
    return shape_of_lengths(*lengths_of(examples), share_prompt=share_prompt, buckets=buckets)


def shape_of_lengths(prompt_P, response_PK, *, share_prompt=True, buckets=BUCKETS) -> Shape:
    """Likewise, from their lengths."""
    lengths = -np.sort(-(prompt_P[:, None] + response_PK).ravel())
    scored = int(response_PK.sum())
    prompts = int(prompt_P.sum()) * (1 if share_prompt else response_PK.shape[1])
    parts = np.array_split(lengths, min(buckets, len(lengths)))
    return Shape(prompts + scored, tuple((len(part), int(part[0])) for part in parts), scored)


def union(shapes) -> Shape:
    """The smallest shape that covers all the shapes, rounded up; they hold equally many rows."""
    shapes = list(shapes)
    rows = tuple((shapes[0].rows[i][0], _round_up(max(s.rows[i][1] for s in shapes)))
                 for i in range(len(shapes[0].rows)))
    return Shape(_round_up(max(s.tokens for s in shapes)), rows, _round_up(max(s.scored for s in shapes)))


def _round_up(size: int) -> int:
    """To a multiple of about a thirtieth of the size: little waste, and few shapes."""
    step = 1
    while step * 32 < size:
        step *= 2
    return -(-size // step) * step


def choose(shapes, limit: int) -> list[Shape]:
    """At most `limit` shapes, smallest first, such that each of `shapes` is covered by one of them."""
    ordered = sorted(shapes, key=lambda shape: shape.tokens)
    parts = np.array_split(np.arange(len(ordered)), min(limit, len(ordered)))
    chosen = []
    for part in parts:
        merged = union([ordered[i] for i in part] + chosen[-1:])
        if merged not in chosen:
            chosen.append(merged)
    return chosen


def pack(examples, shape: Shape, *, share_prompt=True) -> dict:
    """One shard's arrays, as the module's docstring says; int32. Examples have equally many responses, K.

    share_prompt=False lays a prompt down once per response: the plain layout, to check the shared one against.
    """
    if not share_prompt:
        examples = [(prompt, (response,)) for prompt, responses in examples for response in responses]
    tokens = np.concatenate([part for prompt, responses in examples for part in (prompt, *responses)])
    # Parts, the first of each example its prompt, stand one after the other; a response goes on from its prompt's end.
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
    rows, back, uses = _attention_rows(first_Q, prompt_Q, start_Q, count_Q, length_PJ.shape[1] - 1, shape)
    arrays = dict(
        tokens=_padded(tokens, shape.tokens), positions=_padded(np.arange(len(tokens)) - np.repeat(
            offset_PJ.ravel(), length_PJ.ravel()), shape.tokens),
        predict=_padded(predict, shape.scored), targets=_padded(tokens[scored], shape.scored),
        owner=_padded(owner, shape.scored, len(count_Q)), counts=count_Q, ends=start_Q + count_Q - 1,
        rows=rows, back=back, uses=uses)
    return {name: tuple(map(np.int32, x)) if name == "rows" else x.astype(np.int32) for name, x in arrays.items()}


def _attention_rows(first_Q, prompt_Q, start_Q, count_Q, responses: int, shape: Shape):
    """`rows`, `back` and `uses`: the sequences, longest first, dealt to the shape's buckets."""
    order = np.argsort(-(prompt_Q + count_Q), kind="stable")
    uses_NK, rows, offset, dealt = np.full((shape.tokens, responses), -1), [], 0, 0
    for count, length in shape.rows:
        some_R = order[dealt:dealt + count]
        first, prompt, start, end = (x_Q[some_R, None] for x_Q in (first_Q, prompt_Q, start_Q, prompt_Q + count_Q))
        t = np.arange(length)
        token_RT = np.where(t < prompt, first + t, start + t - prompt)
        real_RT = t < end
        place_RT = offset + np.arange(len(some_R))[:, None] * length + t
        use_RT = np.where(t < prompt, some_R[:, None] % responses, 0)  # a prompt's token is in each response's row
        uses_NK[token_RT[real_RT], use_RT[real_RT]] = place_RT[real_RT]
        rows.append(np.where(real_RT, token_RT, 0))
        rows[-1] = np.pad(rows[-1], ((0, count - len(some_R)), (0, 0)))
        offset, dealt = offset + count * length, dealt + count
    return tuple(rows), np.maximum(uses_NK[:, 0], 0), uses_NK


def _padded(x, size: int, fill: int = 0):
    return np.pad(x, (0, size - len(x)), constant_values=fill)

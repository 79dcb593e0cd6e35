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

Letters: N tokens, K places of a token, R rows of T tokens, M scored positions, P examples, Q responses.
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


def shape_of(examples, *, share_prompt=True, buckets=BUCKETS) -> Shape:
    """The smallest shape that holds the examples; `examples` is a list of (prompt, responses)."""
    lengths = sorted((len(prompt) + len(r) for prompt, responses in examples for r in responses), reverse=True)
    scored = sum(len(r) for _, responses in examples for r in responses)
    prompts = sum(len(prompt) * (1 if share_prompt else len(responses)) for prompt, responses in examples)
    parts = np.array_split(np.array(lengths), min(buckets, len(lengths)))
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
    """One shard's arrays, as the module's docstring says; int32.

    share_prompt=False lays a prompt down once per response: the plain layout, to check the shared one against.
    """
    response_count = sum(len(responses) for _, responses in examples)
    batch = dict(tokens=np.zeros(shape.tokens, np.int32), positions=np.zeros(shape.tokens, np.int32),
                 predict=np.zeros(shape.scored, np.int32), targets=np.zeros(shape.scored, np.int32),
                 owner=np.full(shape.scored, response_count, np.int32),
                 counts=np.zeros(response_count, np.int32), ends=np.zeros(response_count, np.int32))
    index, sequences, n, m = np.arange(shape.tokens), [], 0, 0
    for prompt, responses in examples:
        for k, response in enumerate(responses):
            if k == 0 or not share_prompt:
                start, n = n, n + len(prompt)
                batch["tokens"][start:n] = prompt
                batch["positions"][start:n] = index[:len(prompt)]
            end, scored_end = n + len(response), m + len(response)
            sequence = np.concatenate((index[start:start + len(prompt)], index[n:end]))
            batch["tokens"][n:end] = response
            batch["positions"][n:end] = index[len(prompt):len(sequence)]
            batch["predict"][m:scored_end] = sequence[len(prompt) - 1:-1]
            batch["targets"][m:scored_end] = response
            batch["owner"][m:scored_end] = len(sequences)
            batch["counts"][len(sequences)] = len(response)
            batch["ends"][len(sequences)] = end - 1
            sequences.append(sequence)
            n, m = end, scored_end
    return batch | _attention_rows(sequences, shape, most_uses=max(len(responses) for _, responses in examples))


def _attention_rows(sequences, shape: Shape, most_uses: int) -> dict:
    """`rows`, `back` and `uses`: the sequences, longest first, dealt to the shape's buckets."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    rows, back = [], np.zeros(shape.tokens, np.int32)
    places = np.arange(sum(count * length for count, length in shape.rows))
    uses, used = np.full((shape.tokens, most_uses), -1, np.int32), np.zeros(shape.tokens, np.int32)
    offset = 0
    for count, length in shape.rows:
        bucket = np.zeros((count, length), np.int32)
        for row, i in zip(bucket, order, strict=False):
            sequence = sequences[i]
            row[:len(sequence)] = sequence
            back[sequence] = uses[sequence, used[sequence]] = places[offset:offset + len(sequence)]
            used[sequence] += 1
            offset += length
        order = order[count:]
        rows.append(bucket)
    return dict(rows=tuple(rows), back=back, uses=uses)

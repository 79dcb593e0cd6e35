"""Tokenised examples: prompts and responses in token ids."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Masks = tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its responses, int32 ids: one response for SFT, two for a pair.

    The completion tokens, those that are trained on, are all of the responses', unless a mask for
    each response, bool [its tokens], leaves some out: what users and tools say within an answer of
    several turns is read, but not trained on.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    completion_masks: Masks | None = None  # None: all tokens are trained on

    def completion_lengths(self) -> list[int]:
        """Return how many tokens of each response are trained on."""
        if self.completion_masks is None:
            return [len(response) for response in self.responses]
        return [int(mask.sum()) for mask in self.completion_masks]


@dataclass(repr=False)
class Examples(Sequence):
    """A sequence of `Example`, and where each comes from.

    An index gives one example; a slice, or a list or array of indices, gives Examples:
    `examples[2:5]`, `examples[[0, 3]]`.
    """

    prompts: list[np.ndarray] = field(default_factory=list)
    responses: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # the file and row of each
    completion_masks: list[Masks | None] = field(default_factory=list)

    def __post_init__(self):
        if not self.completion_masks:
            self.completion_masks = [None] * len(self.prompts)

    def append(
        self,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        where: str,
        completion_masks: Masks | None = None,
    ) -> None:
        """Append an example; ids become int32 arrays."""
        self.prompts.append(np.asarray(prompt, np.int32))
        self.responses.append(tuple(np.asarray(ids, np.int32) for ids in responses))
        self.where.append(where)
        self.completion_masks.append(completion_masks)

    def __repr__(self) -> str:
        is_pairs = len(self) and len(self.responses[0]) == 2
        return f"Examples({len(self)} {'pairs' if is_pairs else 'completions'})"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index):
        if isinstance(index, int | np.integer):
            return Example(self.prompts[index], self.responses[index], self.completion_masks[index])
        if isinstance(index, slice):
            index = range(len(self))[index]
        index = np.asarray(index)
        if index.dtype == bool:  # which of all, as in numpy
            if index.shape != (len(self),):
                raise IndexError(f"{index.size} booleans for {len(self)} examples.")
            index = np.flatnonzero(index)
        return Examples(
            [self.prompts[i] for i in index],
            [self.responses[i] for i in index],
            [self.where[i] for i in index],
            [self.completion_masks[i] for i in index],
        )

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of all ids, of where each part ends, and of what is not trained on.

        Kept reference log-probs are found by it, so its form is fixed. Ask for it only once all
        examples are there.
        """
        numbers = []
        for example in self:
            parts = (example.prompt, *example.responses)
            # Lengths come before the ids: else [1 2][3] and [1][2 3] would be the same.
            numbers.append([len(parts), *map(len, parts)])
            numbers += parts
            # Nothing where all is trained on, so that plain examples keep their fingerprint.
            for mask in example.completion_masks or ():
                numbers.append([-1])
                numbers.append(mask)
        flat = np.concatenate(numbers or [[]]).astype("<i4")
        return hashlib.sha256(flat.tobytes()).hexdigest()

"""Mismatched rows: each prompt of a batch with the completion of another row of it.

KTO estimates the KL from policy to reference by completions that say nothing of their prompts'
(Ethayarajh et al. 2024, section 4.1). Where the prompts of a batch all differ, each row gets the
completion of the row before it, and the first one that of the last, as in TRL:

    prompts        P0  P1  P2  P3
    completions    C3  C0  C1  C2

Rows of one prompt are moved past each other first, so that none gets a completion of its own
prompt unless that prompt has more than half of the batch.
"""

from collections.abc import Sequence

import numpy as np

from dpo_jax.data import grouping
from dpo_jax.data.examples import FILLER, Example, Examples


class Mismatched(Sequence):
    """A sequence of `Example` of one response each, for the batches of an order.

    The rows are those of the order, batch by batch. Tokens are those of the examples, and nothing
    is copied until a row is asked for.
    """

    def __init__(self, examples: Examples, order: np.ndarray, max_length: int):
        """Match the rows of each batch.

        examples: of one response each. order: indices into them, or FILLER, [steps, batch_size].
        max_length: of a prompt and a completion together; a longer completion is cut.
        """
        self._examples = examples
        self._max_length = max_length
        prompt_ids, response_ids = examples.identities()
        prompts = []
        responses = []
        self.order = np.full(order.shape, FILLER)
        first = 0
        for of_step, indices in zip(self.order, order, strict=True):
            indices = indices[indices != FILLER]
            prompts.append(indices)
            responses.append(indices[partners(prompt_ids[indices])])
            of_step[: len(indices)] = first + np.arange(len(indices))
            first += len(indices)
        self._prompt_P = np.concatenate(prompts)
        self._response_P = np.concatenate(responses)
        self._prompt_ids = prompt_ids
        self._response_ids = response_ids[:, 0]

    def __len__(self) -> int:
        return len(self._prompt_P)

    def __getitem__(self, index: int) -> Example:
        prompt = self._examples[self._prompt_P[index]].prompt
        other = self._examples[self._response_P[index]]
        room = self._max_length - len(prompt)
        masks = other.completion_masks
        return Example(
            prompt,
            (other.responses[0][:room],),
            None if masks is None else (masks[0][:room],),
        )

    @property
    def own_prompts(self) -> int:
        """How many rows have a completion of their own prompt."""
        own_P = self._prompt_ids[self._prompt_P] == self._prompt_ids[self._response_P]
        return int(own_P.sum())

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return numbers of tokens as `Examples.lengths` does: [P], [P, 1] and [P, 1].

        Of a cut completion, all tokens count as trained on: no more than these are.
        """
        prompt_P, response_PK, completion_PK = self._examples.lengths()
        prompt_P = prompt_P[self._prompt_P]
        room_P1 = self._max_length - prompt_P[:, None]
        response_P1 = np.minimum(response_PK[self._response_P], room_P1)
        return prompt_P, response_P1, np.minimum(completion_PK[self._response_P], response_P1)

    def identities(self) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of prompts [P] and of responses [P, 1], equal for what is equal.

        Equal completions of two prompts have two numbers, which only reserves room for both.
        """
        prompt_P = self._prompt_ids[self._prompt_P]
        response_P = self._response_ids[self._response_P]
        # An odd factor keeps the pairs apart as well as the two hashes do, modulo 2^64.
        return prompt_P, (prompt_P * MIXER + response_P)[:, None]


def longest(examples: Examples, max_length: int, positions: int) -> int:
    """Return how long a prompt and another row's completion may be together, in tokens.

    max_length: that the examples were cut to; sampled ones may be longer. positions: of the model.
    """
    prompt_P, response_PK, _ = examples.lengths()
    own_P = prompt_P + response_PK.max(axis=1, initial=0)
    return max(int(own_P.max(initial=0)), min(max_length, positions))


MIXER = np.int64(0x9E3779B97F4A7C15 - 2**64)


def partners(prompt_ids: np.ndarray) -> np.ndarray:
    """Return for each row of a batch the row whose completion it gets, each once."""
    group = grouping.numbered(prompt_ids)
    order = np.argsort(group, kind="stable")
    # Rows of a prompt stand together now: shifted by the most of any, none meets its own.
    most = np.bincount(group).max()
    found = np.empty_like(order)
    found[order] = np.roll(order, most)
    return found

"""Prompts to sample from, and completions as text: what `pairs`, `ppo`, `best_of_n` and `evaluate`
begin with.
"""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass
class Prompts:
    """Prompts as the model reads them, and as text."""

    ids: list[np.ndarray]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """The sha256 of all ids, and of where each prompt ends."""
        numbers = np.concatenate([[len(self), *map(len, self.ids)], *self.ids])
        return hashlib.sha256(numbers.astype("<i4").tobytes()).hexdigest()

    def take(self, rows) -> "Prompts":
        return Prompts([self.ids[row] for row in rows], [self.texts[row] for row in rows])


def make(examples, tokenizer, sampling, seed: int) -> Prompts:
    """The prompts of tokenised rows; with sampling.max_prefix, the starts of their texts instead.

    A prefix has sampling.min_prefix to max_prefix tokens, each length as likely (appendix C.1),
    behind the BOS or whatever else the tokenizer starts a text with; texts that do not go on behind
    max_prefix tokens are left out.
    """
    if sampling.max_prefix:
        lengths = np.random.default_rng(seed).integers(
            sampling.min_prefix, sampling.max_prefix + 1, len(examples)
        )
        ids = [
            np.concatenate([prompt, responses[0][:length]])
            for (prompt, responses), length in zip(examples, lengths, strict=True)
            if len(responses[0]) > sampling.max_prefix + 1
        ]  # the last token may be EOS
    else:
        ids = examples.prompts
    return Prompts(list(ids), tokenizer.batch_decode(ids, skip_special_tokens=True))


def completion_texts(prompts: Prompts, completions: list[np.ndarray], tokenizer) -> list[str]:
    """Completions as the text that follows their prompts; they are decoded together, as some
    tokenizers drop a text's first space.
    """
    whole = tokenizer.batch_decode(
        [np.concatenate(pair) for pair in zip(prompts.ids, completions, strict=True)],
        skip_special_tokens=True,
    )
    return [text[len(prompt) :] for prompt, text in zip(prompts.texts, whole, strict=True)]

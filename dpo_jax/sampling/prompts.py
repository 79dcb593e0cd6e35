"""Prompts to sample from, and completions as text."""

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

    def take(self, indices) -> "Prompts":
        """Return the prompts at these indices, which may repeat."""
        ids = [self.ids[index] for index in indices]
        return Prompts(ids, [self.texts[index] for index in indices])


def make(examples, tokenizer, sampling, seed: int) -> Prompts:
    """Return the prompts of tokenised examples; with sampling.max_prefix, starts of their texts.

    sampling: config.sampling. A prefix has sampling.min_prefix to max_prefix tokens, each length as
    likely (appendix C.1), after the BOS or whatever else the tokenizer starts a text with. Texts
    that end within max_prefix tokens are left out.
    """
    if not sampling.max_prefix:
        ids = list(examples.prompts)
        return Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))
    rng = np.random.default_rng(seed)
    lengths = rng.integers(sampling.min_prefix, sampling.max_prefix + 1, len(examples))
    ids = []
    for example, length in zip(examples, lengths, strict=True):
        text = example.responses[0]
        if len(text) > sampling.max_prefix + 1:  # its last token may be EOS
            ids.append(np.concatenate([example.prompt, text[:length]]))
    return Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))


def completion_texts(prompts: Prompts, completions: list[np.ndarray], tokenizer) -> list[str]:
    """Return completions as the text that follows their prompts.

    Both are decoded together: some tokenizers drop the first space of a text.
    """
    whole_ids = [np.concatenate(pair) for pair in zip(prompts.ids, completions, strict=True)]
    whole = tokenizer.batch_decode(whole_ids, skip_special_tokens=True)
    return [text[len(prompt) :] for prompt, text in zip(prompts.texts, whole, strict=True)]

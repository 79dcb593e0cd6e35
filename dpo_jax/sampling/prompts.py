"""Prompts to sample from, and completions as text."""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from dpo_jax.data import draws
from dpo_jax.data.leaks import Hashes


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt as chat messages, which other models read through a template of their own."""

    messages: list
    tools: list | None = None  # definitions of the tools that the model may call
    begun: str = ""  # the start of the answer, where it is part of the prompt


@dataclasses.dataclass
class Prompts:
    """Prompts as the model reads them, and as text."""

    ids: list[np.ndarray]
    texts: list[str]
    # Of each prompt, whole even where the model reads it cut; None where it is plain text. None
    # instead of the list: all are.
    conversations: list[Conversation | None] | None = None
    # Of the data's prompts, of which these may be prefixes; None where they are not known.
    hashes: Hashes | None = None
    subsets: np.ndarray | None = None  # the number of each one's subset [P]; None: not known

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def clusters(self) -> np.ndarray | None:
        """A number of each prompt, equal for rows of one prompt of the data; None: not known."""
        return None if self.hashes is None else self.hashes.exact

    @property
    def fingerprint(self) -> str:
        """The sha256 of all ids, and of where each prompt ends."""
        numbers = np.concatenate([[len(self), *map(len, self.ids)], *self.ids])
        return hashlib.sha256(numbers.astype("<i4").tobytes()).hexdigest()

    def take(self, indices) -> "Prompts":
        """Return the prompts at these indices, which may repeat."""
        indices = list(indices)
        conversations = self.conversations
        if conversations is not None:
            conversations = [conversations[index] for index in indices]
        ids = [self.ids[index] for index in indices]
        texts = [self.texts[index] for index in indices]
        hashes = None if self.hashes is None else self.hashes.take(indices)
        subsets = None if self.subsets is None else self.subsets[indices]
        return Prompts(ids, texts, conversations, hashes, subsets)

    def spread(self, most: int) -> "Prompts":
        """Return `most` of the prompts, or all, in their order, with few of them twice.

        They are chosen by the hashes of the data's prompts, in the shares of their subsets, and
        none comes twice before all others have come. A larger number of them has all of a smaller
        one. Where hashes or subsets are not known they are the first ones.
        """
        if self.hashes is None or self.subsets is None:
            return self.take(range(min(most, len(self))))
        return self.take(draws.spread(self.hashes.exact, self.subsets, most))

    def followed_by(self, others: "Prompts") -> "Prompts":
        """Return these prompts and then others."""
        conversations = None
        if self.conversations is not None or others.conversations is not None:
            first = self.conversations or [None] * len(self)
            conversations = [*first, *(others.conversations or [None] * len(others))]
        hashes = None
        if self.hashes is not None and others.hashes is not None:
            hashes = self.hashes.followed_by(others.hashes)
        ids = [*self.ids, *others.ids]
        return Prompts(ids, [*self.texts, *others.texts], conversations, hashes)


def make(
    examples,
    tokenizer,
    sampling,
    seed: int | None,
    read: Iterable[tuple[str, Conversation | None]] | None = None,
    hashes: Hashes | None = None,
) -> Prompts:
    """Return the prompts of tokenised examples; with sampling.max_prefix, starts of their texts.

    sampling: config.sampling. A prefix has sampling.min_prefix to max_prefix tokens, each length as
    likely (appendix C.1), after the BOS or whatever else the tokenizer starts a text with. Texts
    that end within max_prefix tokens are left out. seed: by which lengths are drawn; None: each
    depends on its text alone, so that every run is measured on the same prefixes. read: where each
    example stood, and its conversation, in the order of the examples; some of them may have been
    dropped since. None: no prompt is a conversation. hashes: of what was read, in its order.
    """
    conversations = None
    if read is not None:
        read = list(read)
        places = _of_examples(examples, read)
        found = [read[place][1] for place in places]
        conversations = found if any(found) else None
        hashes = None if hashes is None else hashes.take(places)
    question_hashes = examples.question_hashes
    subsets = None
    if question_hashes.all():
        _, subsets = examples.subsets
    if not sampling.max_prefix:
        ids = list(examples.prompts)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Prompts(ids, texts, conversations, hashes, subsets)
    if seed is None:
        choices = sampling.max_prefix + 1 - sampling.min_prefix
        # Not the lowest bit, which tells validation from test.
        drawn = (question_hashes >> np.uint64(1)) % np.uint64(choices)
        lengths = sampling.min_prefix + drawn.astype(int)
    else:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(sampling.min_prefix, sampling.max_prefix + 1, len(examples))
    ids = []
    kept = []
    for index, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        text = example.responses[0]
        if not len(text):
            raise ValueError(
                f"{examples.where[index]} is a prompt alone, without a completion that "
                f"config.sampling.max_prefix = {sampling.max_prefix} could take a start of. Set it "
                "to 0, or give rows of texts."
            )
        if len(text) > sampling.max_prefix + 1:  # its last token may be EOS
            ids.append(np.concatenate([example.prompt, text[:length]]))
            kept.append(index)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    hashes = None if hashes is None else hashes.take(kept)
    subsets = None if subsets is None else subsets[kept]
    if conversations is None:
        return Prompts(ids, texts, hashes=hashes, subsets=subsets)
    begun = []
    for index, text in zip(kept, texts, strict=True):
        conversation = conversations[index]
        if conversation is not None:
            before = tokenizer.decode(examples.prompts[index], skip_special_tokens=True)
            conversation = dataclasses.replace(conversation, begun=text[len(before) :])
        begun.append(conversation)
    return Prompts(ids, texts, begun, hashes, subsets)


def _of_examples(examples, read: list[tuple[str, Conversation | None]]) -> list[int]:
    """Return which of what was read each example is.

    Raises RuntimeError for an example that is not among what was read, in the same order.
    """
    left = iter(enumerate(read))
    found = []
    for where in examples.where:
        for number, (place, _) in left:
            if place == where:
                found.append(number)
                break
        else:
            # From here on all prompts would lose their conversations.
            raise RuntimeError(f"{where}: no conversation was read there, or not in this order.")
    return found


def completion_texts(prompts: Prompts, completions: list[np.ndarray], tokenizer) -> list[str]:
    """Return completions as the text that follows their prompts.

    Both are decoded together: some tokenizers drop the first space of a text.
    """
    whole_ids = [np.concatenate(pair) for pair in zip(prompts.ids, completions, strict=True)]
    whole = tokenizer.batch_decode(whole_ids, skip_special_tokens=True)
    return [text[len(prompt) :] for prompt, text in zip(prompts.texts, whole, strict=True)]

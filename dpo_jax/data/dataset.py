"""A data set ready for batches: examples read, tokenised and accounted for."""

import datetime
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from dpo_jax.data import sources, splits
from dpo_jax.data.examples import Example, Examples
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.rows import Numbers, TextExample
from dpo_jax.data.tokenizer import CUE_TOKENS, ChatLengths, Encoder


@dataclass
class Dataset:
    """Tokenised examples to train, to validate and to test on, and what became of all rows."""

    train: Examples
    eval: Examples
    ledger: Ledger
    test: Examples = field(default_factory=Examples)


@dataclass
class LoadedPart:
    """One of the data sets that were loaded, and which of all examples are its own."""

    data: object  # its config block
    ledger: Ledger
    own: dict[str, slice]  # split -> of its examples
    chat_lengths: dict[str, ChatLengths]  # split -> of its chat prompts, before a cut


def load(
    data,
    tokenizer,
    kind: str,
    *,
    date: datetime.date | None = None,
    distinct: bool = False,
    watch: Callable[[str, TextExample], None] | None = None,
) -> Dataset:
    """Read, tokenise and check the data that the config `data` names.

    kind: as for `splits.parts`. date: what chat templates take for today; None: today.
    distinct: leave out a row whose tokens an earlier row of the split has. watch: as for
    `load_parts`. Raises ValueError or FileNotFoundError with the file, row and field, or with the
    reasons for which too many rows were dropped.
    """
    examples, parts = load_parts(data, tokenizer, kind, date=date, distinct=distinct, watch=watch)
    for part in parts.values():
        for split, of_all in examples.items():
            check_cue(part.data, of_all[part.own[split]], tokenizer)
    ledger = Ledger.of_parts({name: part.ledger for name, part in parts.items()})
    ledger.count_subsets(examples)
    ledger.check(data.max_dropped, data.path or data.mix)
    for split, of_split in examples.items():
        if len(of_split) and of_split.weights is not None and not of_split.weights.any():
            raise ValueError(
                f"all {len(of_split)} {split} rows of {data.path or data.mix} have a weight of 0 "
                f"in column {data.weight!r} (data.weight). Give those that count a weight above 0."
            )
    return Dataset(examples["train"], examples["eval"], ledger, examples["test"])


def load_parts(
    data,
    tokenizer,
    kind: str,
    *,
    date: datetime.date | None = None,
    distinct: bool = False,
    watch: Callable[[str, TextExample], None] | None = None,
) -> tuple[dict[str, Examples], dict[str, LoadedPart]]:
    """Read and tokenise the data that the config `data` names, as `load` does.

    Returns the examples of each split, and the data sets that they are from, by name. watch: called
    with the split of each example and its text.
    """
    examples = {split: Examples(distinct=distinct) for split in splits.SPLITS}
    parts = {}
    for part in splits.parts(data, kind):
        truncate = truncation(part.data)
        first, encoders = {}, {}
        for split, into in examples.items():
            into.begin_data_set()
            first[split] = len(into)
            settings = part.data
            if split == "test" and part.has_test_split:
                settings = settings.copy_and_resolve_references()
                settings.on_bad_row = "drop"
            encoders[split] = Encoder(tokenizer, settings, truncate, into=into, date=date)
        # Each example is tokenised soon after it is read, so that few texts are in memory.
        for split, text in part.examples():
            if watch is not None:
                watch(split, text)
            encoders[split].add(text)
        ledger = part.ledger
        for split, encoder in encoders.items():
            _, counts = encoder.finish()
            setattr(ledger, split, getattr(ledger, split).plus(counts))
        own = {split: slice(first[split], len(into)) for split, into in examples.items()}
        chat_lengths = {split: encoder.chat_lengths for split, encoder in encoders.items()}
        parts[part.name] = LoadedPart(part.data, ledger, own, chat_lengths)
    return examples, parts


def truncation(data) -> str:
    """Return which part of a too long prompt stays: for data.truncate="auto" the source's own."""
    return sources.SOURCES[data.source].truncate if data.truncate == "auto" else data.truncate


def check_cue(data, examples: Examples, tokenizer) -> None:
    """Check that no prompt was cut before its cue, without which nothing asks for the answer.

    Raises ValueError that says how many have lost it, and which is the first.
    """
    cue = sources.SOURCES[data.source].cue.strip()
    if not cue:
        return
    # Prompts that were cut are as long as is allowed. Few others are, so few are decoded.
    prompt_lengths_P, _, _ = examples.lengths()
    longest = np.flatnonzero(prompt_lengths_P == data.max_prompt_length).tolist()
    if not longest:
        return
    # The cue as the tokenizer writes it, which may not be how the text had it.
    cue_ids = tokenizer(cue, add_special_tokens=False).input_ids
    written = tokenizer.decode(cue_ids).strip()
    tails = [examples.prompts[index][-CUE_TOKENS:] for index in longest]
    lost = []
    for index, tail in zip(longest, tokenizer.batch_decode(tails), strict=True):
        if not tail.endswith(written):
            lost.append(index)
    if lost:
        raise ValueError(
            f"{len(lost)} prompts ({examples.where[lost[0]]} is the first) have lost their end, "
            f"{cue!r}, by data.truncate={data.truncate!r} to data.max_prompt_length="
            f"{data.max_prompt_length} tokens: take data.truncate=auto, or a longer prompt."
        )


def show(examples: Examples, tokenizer, indices: Iterable[int]) -> str:
    """Return some examples decoded, with the tokens that are trained on between ⟦ and ⟧."""
    blocks = []
    for index in indices:
        example = examples[index]
        names = ("completion",) if len(example.responses) == 1 else ("chosen", "rejected")
        prompt, *responses = decoded(example, tokenizer)
        ((prompt_text, _),) = prompt
        head = f"--- {examples.where[index]}: prompt, {len(example.prompt)} tokens"
        lines = [head + shown_numbers(examples.numbers(index)), prompt_text]
        for name, runs, count in zip(names, responses, example.completion_lengths(), strict=True):
            if example.label is not None:
                name = f"{'desirable' if example.label else 'undesirable'} {name}"
            lines.append(f"--- {name}, {count} tokens trained on")
            lines.append("".join(f"⟦{text}⟧" if marked else text for text, marked in runs))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def shown_numbers(numbers: Numbers) -> str:
    """Return an example's numbers as the end of a line; "" where it has none."""
    text = ""
    if numbers.weight is not None:
        text += f", weight {numbers.weight:g}"
    if numbers.target_margin is not None:
        text += f", target margin {numbers.target_margin:g}"
    return text


def decoded(example: Example, tokenizer) -> list[list[tuple[str, bool]]]:
    """Return the text of the prompt and of each response, special tokens included.

    Each is a list of (text, whether it is trained on): a turn of a user or a tool may stand between
    two of an assistant.
    """

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    prompt = decode(example.prompt)
    found = [[(prompt, False)]]
    masks = example.completion_masks or [np.ones(len(ids), bool) for ids in example.responses]
    for response, mask in zip(example.responses, masks, strict=True):
        runs = []
        before = prompt
        ends = [*(np.flatnonzero(np.diff(mask)) + 1), len(response)]
        for start, end in itertools.pairwise([0, *ends]):
            # After all that comes before it, for some tokenizers write no space where a text
            # begins.
            until = decode(np.concatenate([example.prompt, response[:end]]))
            is_continued = until.startswith(before)
            text = until[len(before) :] if is_continued else decode(response[start:end])
            runs.append((text, bool(mask[start:end].any())))
            before = until
        found.append(runs)
    return found

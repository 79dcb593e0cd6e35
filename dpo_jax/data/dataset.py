"""A data set ready for batches: examples read, tokenised and accounted for."""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dpo_jax.data import sources, splits
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.tokenizer import CUE_TOKENS, Encoder


@dataclass
class Dataset:
    """Tokenised examples to train and to evaluate on, and what became of all rows."""

    train: Examples
    eval: Examples
    ledger: Ledger


def load(
    data, tokenizer, kind: str, *, date: datetime.date | None = None, keep_all: bool = False
) -> Dataset:
    """Read, tokenise and check the data that the config `data` names.

    kind: "sft" or "pairs". date: what chat templates take for today; None: today. keep_all: keep
    rows that teach nothing, those with an empty response or two equal ones. Raises ValueError or
    FileNotFoundError with the file, row and field, or with the reasons for which too many rows were
    dropped.
    """
    examples = {"train": Examples(), "eval": Examples()}
    ledgers = {}
    for part in splits.parts(data, kind, keep_all=keep_all):
        truncate = truncation(part.data)
        first, encoders = {}, {}
        for split, into in examples.items():
            first[split] = len(into)
            encoders[split] = Encoder(
                tokenizer, part.data, truncate, into=into, date=date, keep_all=keep_all
            )
        # Each example is tokenised soon after it is read, so that few texts are in memory.
        for split, text in part.examples():
            encoders[split].add(text)
        ledger = part.ledger
        _, train_counts = encoders["train"].finish()
        _, eval_counts = encoders["eval"].finish()
        ledger.train = ledger.train.plus(train_counts)
        ledger.eval = ledger.eval.plus(eval_counts)
        ledgers[part.name] = ledger
        for split, of_all in examples.items():
            check_cue(part.data, of_all[first[split] :], tokenizer)
    ledger = Ledger.of_parts(ledgers)
    ledger.check(data.max_dropped, data.path or data.mix)
    return Dataset(examples["train"], examples["eval"], ledger)


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

    def decoded(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    blocks = []
    for index in indices:
        example = examples[index]
        prompt = example.prompt
        names = ("completion",) if len(example.responses) == 1 else ("chosen", "rejected")
        lines = [f"--- {examples.where[index]}: prompt, {len(prompt)} tokens", decoded(prompt)]
        masks = example.completion_masks or [np.ones(len(ids), bool) for ids in example.responses]
        for name, response, mask in zip(names, example.responses, masks, strict=True):
            lines.append(f"--- {name}, {mask.sum()} tokens trained on")
            text = ""
            # Marked run by run: a turn of a user or a tool may stand between two of an assistant.
            borders = np.flatnonzero(np.diff(mask)) + 1
            for run, trained_on in zip(
                np.split(response, borders), np.split(mask, borders), strict=True
            ):
                text += f"⟦{decoded(run)}⟧" if trained_on.any() else decoded(run)
            lines.append(text)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

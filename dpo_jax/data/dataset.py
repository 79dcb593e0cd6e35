"""A data set ready for batches: rows read, tokenised and accounted for."""

from dataclasses import dataclass

from dpo_jax.data import sources
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.sources import Row
from dpo_jax.data.tokenizer import CUE_TOKENS, Examples, encode


@dataclass
class Dataset:
    """Tokenised rows to train and to evaluate on, and what became of all rows."""

    train: Examples
    eval: Examples
    ledger: Ledger


def load(data, tokenizer, kind: str) -> Dataset:
    """Reads, tokenises and checks the data set that the config `data` names; `kind` is "sft" or
    "pairs".

    Raises ValueError or FileNotFoundError with the file, row and field, or with the reasons for
    which too many rows were dropped.
    """
    ledger = Ledger()
    rows = sources.read(data, kind, ledger)
    kept = truncation(data, [*rows["train"], *rows["eval"]])
    train = encode(rows["train"], tokenizer, data, kept, ledger.train)
    evals = encode(rows["eval"], tokenizer, data, kept, ledger.eval)
    ledger.check(data.max_dropped)
    for examples in (train, evals):
        check_cue(data, examples, tokenizer)
    return Dataset(train, evals, ledger)


def truncation(data, rows: list[Row]) -> str:
    """Which part of a too long prompt stays: "auto" keeps the cue for the answer, where a source or
    a chat has one.
    """
    if data.truncate != "auto":
        return data.truncate
    chat = any(isinstance(row.prompt, list) for row in rows)
    return "keep_end" if chat else sources.SOURCES[data.source].truncate


def check_cue(data, examples: Examples, tokenizer) -> None:
    """ValueError where a prompt was cut and has lost the cue, without which nothing asks for the
    answer.
    """
    cue = sources.SOURCES[data.source].cue.strip()
    cut = [
        row
        for row, prompt in enumerate(examples.prompts)
        if cue and len(prompt) == data.max_prompt_length
    ]
    if not cut:
        return
    written = tokenizer.decode(tokenizer(cue, add_special_tokens=False).input_ids).strip()
    ends = tokenizer.batch_decode([examples.prompts[row][-CUE_TOKENS:] for row in cut])
    lost = [row for row, end in zip(cut, ends, strict=True) if not end.endswith(written)]
    if lost:
        raise ValueError(
            f"{len(lost)} prompts ({examples.where[lost[0]]} is the first) have lost their end, {cue!r}, by "
            f"data.truncate={data.truncate!r} to data.max_prompt_length={data.max_prompt_length} tokens: take "
            "data.truncate=auto, or a longer prompt."
        )


def show(examples: Examples, tokenizer, rows) -> str:
    """Rows, by index, decoded, with the tokens that are scored between ⟦ and ⟧."""

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    blocks = []
    for where, (prompt, responses) in ((examples.where[row], examples[row]) for row in rows):
        names = ("completion",) if len(responses) == 1 else ("chosen", "rejected")
        lines = [f"--- {where}: prompt, {len(prompt)} tokens", text(prompt)]
        for name, response in zip(names, responses, strict=True):
            lines.append(f"--- {name}, {len(response)} tokens scored\n⟦{text(response)}⟧")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

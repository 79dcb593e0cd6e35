"""The examples of a data set, in two splits: which rows are trained on, and which are held out."""

import hashlib
import itertools
import json
from collections.abc import Iterable

from dpo_jax.data import sources, toy
from dpo_jax.data.ledger import Counts, Filtered, Ledger, Malformed, Unusable
from dpo_jax.data.readers import fields_of, find_splits
from dpo_jax.data.rows import Row, Text, TextExample
from dpo_jax.data.sources import SOURCES, Source

# Where data.eval_split is empty, the first of these that the data set has.
EVAL_SPLITS = ("test", "validation", "valid", "valid1")
# What an assistant's message may say beside its content.
SAID_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")


def read(data, kind: str) -> tuple[dict[str, list[TextExample]], Ledger]:
    """Read the examples of both splits, and what became of all rows.

    Returns {"train": [...], "eval": [...]} and a ledger. kind: "sft" or "pairs". Raises ValueError
    or FileNotFoundError that says which file, row, field or split is wrong.
    """
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r} is not one of {', '.join(SOURCES)}.")
    source = SOURCES[data.source]
    if kind == "pairs" and not source.pairs:
        raise ValueError(
            f"data.source={data.source!r} has no pairs. Make them with the `pairs` stage, or "
            "pass rows of prompt, chosen and rejected with data.source=local."
        )
    if data.source == "toy":
        splits = _toy_splits(data, kind)
        ledger = Ledger(Counts(read=len(splits["train"])), Counts(read=len(splits["eval"])))
    else:
        splits, ledger = _read_splits(data, kind, source)
    # Counted and shown, not removed: some data sets repeat prompts between their splits.
    train_prompts = {_prompt_key(example) for example in splits["train"]}
    for example in splits["eval"]:
        ledger.shared_prompts += _prompt_key(example) in train_prompts
    return splits, ledger


def _read_splits(data, kind: str, source: Source) -> tuple[dict[str, list[TextExample]], Ledger]:
    splits = find_splits(data.path)
    train_names, eval_name = _choose(list(splits), data)
    records = itertools.chain.from_iterable(splits[name]() for name in train_names)
    train, train_counts = _parse(records, data, kind, source, data.max_rows)
    if eval_name:
        evals, eval_counts = _parse(splits[eval_name](), data, kind, source, data.max_eval_rows)
    else:
        train, held_out = _hold_out(train, data.eval_fraction)
        # All that is held out is kept from training, even if the evaluation reads fewer.
        evals = held_out[: data.max_eval_rows or None]
        train_counts.held_out = len(held_out)
        eval_counts = Counts(read=len(evals))
    return {"train": train, "eval": evals}, Ledger(train_counts, eval_counts)


def _choose(names: list[str], data) -> tuple[list[str], str]:
    """Return the splits to train on and the one to evaluate on.

    The latter is "" where a part of the training rows is to be held out.
    """
    train = data.train_split.split("+")
    # A single file has one split, whatever it is called: the default name then means that one.
    if len(names) == 1 and data.train_split == "train" and not data.eval_split:
        train = names
    for name in (*train, data.eval_split or train[0]):
        if name not in names:
            raise ValueError(
                f"{data.path} has no split {name!r}; it has {', '.join(names)}. See "
                f"data.train_split={data.train_split!r} and data.eval_split={data.eval_split!r}."
            )
    if data.eval_split in train:
        raise ValueError(
            f"data.eval_split={data.eval_split!r} is trained on (data.train_split="
            f"{data.train_split!r}): leave it empty to hold out data.eval_fraction of the prompts."
        )
    if data.eval_split:
        return train, data.eval_split
    unused = [name for name in EVAL_SPLITS if name in names and name not in train]
    return train, unused[0] if unused else ""


def _hold_out(
    examples: list[TextExample], fraction: float
) -> tuple[list[TextExample], list[TextExample]]:
    """Part the examples by prompt into (train, held out).

    A prompt's side depends on its text alone, so SFT and DPO on the same prompts hold out the same
    ones. Of few prompts, at least one is held out.
    """
    # By prompt, not by row: no prompt is both trained on and evaluated.
    keys = [_prompt_key(example) for example in examples]
    hashes = {key: _hash(key) for key in keys}
    held_out = {key for key in hashes if hashes[key] < fraction}
    if not held_out and fraction > 0 and len(hashes) > 1:
        held_out = {min(hashes, key=hashes.get)}
    train, evals = [], []
    for example, key in zip(examples, keys, strict=True):
        if key in held_out:
            evals.append(example)
        else:
            train.append(example)
    return train, evals


def _prompt_key(example: TextExample) -> str:
    """Return the text that tells prompts apart: the response, where there is no prompt."""
    # JSON, for a prompt may be a list of messages.
    return json.dumps(example.prompt or example.responses[0])


def _hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, the same in every process."""
    # Not hash(), which differs from process to process. Broken text may hold lone surrogates.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _parse(
    records: Iterable, data, kind: str, source: Source, limit: int
) -> tuple[list[TextExample], Counts]:
    """Return the first `limit` good examples (0: all), and the other records counted by reason.

    records: (where, record) of each.
    """
    if source.sorted:
        records = sorted(records, key=lambda record: _hash(str(record[1])))
    parse = sources.parser(data)
    examples = []
    counts = Counts()
    for where, record in records:
        # Before the row is counted as read: rows after the last one needed are not looked at.
        if limit and len(examples) >= limit:
            break
        counts.read += 1
        try:
            row = parse(fields_of(record))
            counts.recognise(row.shape)
            examples += examples_of(row, kind, data.turns, where)
        except Filtered as reason:
            # Left out on purpose by the source's rule, which is no fault of the row.
            counts.filter(str(reason))
        except Unusable as reason:
            counts.drop(str(reason), where)
        except Malformed as error:
            if data.on_bad_row == "error":
                raise ValueError(_explain(error, where, record, data, source)) from None
            counts.drop(error.reason, where)
    return examples, counts


def examples_of(row: Row, kind: str, turns: str, where: str) -> list[TextExample]:
    """Return the examples of a row: its pairs, or for SFT its best response.

    turns: as config.data.turns. Raises Malformed where this kind of training lacks a response,
    Unusable where one is empty or both of a pair are equal, Filtered where SFT has no use of it.
    """
    if kind == "sft":
        if row.label is False:
            raise Filtered("label is false: an answer that was not liked")
        prompt, response = row.prompt, row.responses[0]
        if prompt == []:
            prompt, response = _split_conversation(response, turns)
        _check_usable((response,))
        return [TextExample(prompt, (response,), where, row.tools)]
    if row.label is not None:
        raise Malformed(
            "a pair needs two responses, and a row of one completion with a label has half of it; "
            "join a completion labelled true and one labelled false of the same prompt as 'chosen' "
            "and 'rejected', or train SFT, on those labelled true"
        )
    if not row.pairs:
        raise Malformed("a pair needs two responses, in 'chosen' and 'rejected'")
    examples = []
    for chosen, rejected in row.pairs:
        responses = (row.responses[chosen], row.responses[rejected])
        _check_usable(responses)
        examples.append(TextExample(row.prompt, responses, where, row.tools))
    return examples


def _split_conversation(messages: list, turns: str) -> tuple[list, list]:
    """Part a conversation before the first assistant turn that answers, or before the last one.

    turns: "all" or "last". Raises Malformed where it does not end in an assistant's turn after
    another's.
    """
    roles = [message["role"] for message in messages]
    # A greeting with which the assistant opens answers nothing.
    asked = roles.index("user") if "user" in roles else len(roles)
    if roles[-1:] != ["assistant"] or "assistant" not in roles[asked:]:
        raise Malformed(
            "the conversation does not end in an assistant's turn after a user's", f"roles {roles}"
        )
    start = roles.index("assistant", asked) if turns == "all" else len(roles) - 1
    return messages[:start], messages[start:]


def _check_usable(responses: tuple[Text, ...]) -> None:
    """Raise Unusable where a response is empty, or both of a pair are equal."""
    texts = [_said(response).strip() for response in responses]
    if not all(texts):
        raise Unusable("empty response")
    # Messages that differ may say the same, and the same text may be split into other messages.
    if len(responses) == 2 and (responses[0] == responses[1] or texts[0] == texts[1]):
        raise Unusable("chosen and rejected are equal")


def _said(response: Text) -> str:
    """Return all that a response says, as one text: its calls of tools and its reasoning too."""
    if isinstance(response, str):
        return response
    parts = []
    for message in response:
        parts.append(message.get("content", ""))
        for key in SAID_BESIDE:
            if message.get(key):
                parts.append(json.dumps(message[key], sort_keys=True))
    return "".join(parts)


def _explain(error: Malformed, where: str, record, data, source: Source) -> str:
    """Say what is wrong with a record, to the person who can mend it."""
    try:
        found = ", ".join(map(str, fields_of(record)))
    except Malformed:
        found = ""
    return "\n".join(
        [
            f"{where}: {error}.",
            f"  data.path: {data.path}",
            f"  fields found: {found or 'none'}",
            f"  a right row for {error.example or f'data.source={data.source}: {source.example}'}",
            "Fix the row, or drop and count such rows with --config.data.on_bad_row=drop.",
        ]
    )


def _toy_splits(data, kind: str) -> dict[str, list[TextExample]]:
    splits = {}
    for split, examples in toy.examples(data, kind).items():
        splits[split] = [TextExample(*example) for example in examples]
    return splits

"""Rows of one split for commands that keep every row: `score` and `sample` add to each."""

import dataclasses
from collections.abc import Iterator

from dpo_jax.data import sources
from dpo_jax.data.conversations import is_chat, without_nulls
from dpo_jax.data.ledger import Counts, Filtered, Malformed, Tie, Unusable
from dpo_jax.data.readers import fields_of, find_splits
from dpo_jax.data.rows import Row, TextExample, names_of
from dpo_jax.data.shapes import local_prompt, parse_columns
from dpo_jax.data.splits import examples_of

# What a source raises of a row that is not in the form to be used.
REFUSALS = (Filtered, Malformed, Unusable)


def read(path: str, split: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (where, fields) of each row of a file, a folder or a hub data set.

    split: the one to read; "": train, or the only one that there is. Raises FileNotFoundError
    where there is nothing to read, and ValueError for a split that is not there and for a row that
    is not an object.
    """
    splits = find_splits(path)
    if not split:
        split = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and split != "train":
            raise ValueError(f"{path} has the splits {', '.join(splits)}: choose one by --split.")
    if split not in splits:
        raise ValueError(f"--split={split}: {path} has no such split; it has {', '.join(splits)}.")
    for where, record in splits[split]():
        try:
            yield where, fields_of(record)
        except Malformed as error:
            raise ValueError(f"{where}: {error}.") from None


def prompt(fields: dict, data, where: str) -> TextExample:
    """Return the prompt of a row, whatever its answers are, as an example without responses.

    Raises ValueError that names the row where it has none.
    """
    try:
        row = local_prompt(fields, parse_columns(data.columns), tuple(data.ignore))
    except REFUSALS as error:
        raise explained(error, where, fields) from None
    return TextExample(row.prompt, (), where, row.tools)


def answered(fields: dict, data, where: str, counts: Counts | None = None) -> list[TextExample]:
    """Return what there is to score in a row: its pairs, or its one completion.

    Each has a place of its own: that of the row, and of several pairs also their number. Of a tie,
    each answer is a completion of its own, and so is each of the `completions` that `sample` writes
    of a prompt. Equal and empty answers are as good as others.
    counts: counts what the row is recognised as. Raises one of REFUSALS where there is nothing.
    """
    parse = sources.parser(data)
    fields = {name: _with_content(value) for name, value in fields.items()}
    try:
        row = parse(fields)
    except Tie as tie:
        if tie.row is None:
            raise
        return _answers(tie.row, data, where)
    except Malformed:
        sampled = _sampled(fields)
        if not sampled:
            raise
        row = parse(sampled[0])
        responses = [parse(alone).responses[0] for alone in sampled]
        return _answers(dataclasses.replace(row, responses=tuple(responses)), data, where)
    if counts is not None:
        counts.recognise(row)
    if len(row.responses) == 1:
        # Whether the completion was liked does not matter here.
        row = dataclasses.replace(row, label=None)
        return examples_of(row, "sft", data.turns, where, keep_all=True)
    examples = examples_of(row, "pairs", data.turns, where, keep_all=True)
    if len(examples) == 1:
        return examples
    numbered = []
    for number, example in enumerate(examples, 1):
        numbered.append(dataclasses.replace(example, where=f"{where} pair {number}"))
    return numbered


def _answers(row: Row, data, where: str) -> list[TextExample]:
    """Return each answer of a row as a completion."""
    examples = []
    for number, response in enumerate(row.responses, 1):
        alone = dataclasses.replace(row, responses=(response,))
        place = f"{where} answer {number}"
        examples += examples_of(alone, "sft", data.turns, place, keep_all=True)
    return examples


def _sampled(fields: dict) -> list[dict]:
    """Return a row for each of several sampled `completions`; [] where there are no such texts."""
    texts = fields.get("completions")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    others = {name: value for name, value in fields.items() if name != "completions"}
    return [others | {"completion": text} for text in texts]


def _with_content(value):
    """Return a field's value; of messages that end in one without content, with an empty one."""
    messages = value if isinstance(value, list) else [value]
    if not messages or not is_chat(messages[-1]):
        return value
    last = without_nulls(messages[-1])
    # A message that has its role alone, which a file for training is not to have.
    if len(last) > 1 or len(last) == len(messages[-1]):
        return value
    messages = [*messages[:-1], messages[-1] | {"value" if "from" in last else "content": ""}]
    return messages if isinstance(value, list) else messages[0]


def explained(error: Exception, where: str, fields: dict, advice: str = "") -> ValueError:
    """Return the error to show for a row that cannot be used: where it is, what is in it."""
    lines = [f"{where}: {error}."]
    found = names_of(fields)
    if not str(error).endswith(f"found {found}"):
        lines.append(f"  fields found: {found or 'none'}")
    example = getattr(error, "example", "")
    if example:
        lines.append(f"  a right row: {example}")
    if advice:
        lines.append(advice)
    return ValueError("\n".join(lines))

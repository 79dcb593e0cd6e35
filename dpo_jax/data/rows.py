"""A row of data as all sources give it, and the values of a record's fields."""

import ast
import itertools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from dpo_jax.data.ledger import Malformed

# Plain text, or chat messages: [{"role": ..., "content": ...}, ...], with whatever other keys of a
# message have a value.
Text = str | list
ONE_PAIR = ((0, 1),)
NO_SUBSET = "(none)"  # how a ledger calls the rows that are of no subset
MOST_NAMED = 20  # fields that a message lists
MOST_NUMBER = 1_000_000  # a weight or margin: beyond it, sums of float32 lose the other pairs
LEAST_WEIGHT = 1e-12  # of those above 0: float32 holds it, and its products with a gradient
# Words for yes and no, and for answers that somebody liked or did not.
TRUTHS = {
    **dict.fromkeys(("true", "yes", "desirable", "liked", "good", "chosen"), True),
    **dict.fromkeys(("false", "no", "undesirable", "disliked", "bad", "rejected"), False),
}


@dataclass(frozen=True)
class Numbers:
    """The numbers that columns of the user's say of an example; None: no column is named."""

    weight: float | None = None  # how often it counts (data.weight)
    target_margin: float | None = None  # by how much the chosen response is to win (data.margin)


NO_NUMBERS = Numbers()


@dataclass(frozen=True)
class Row:
    """A prompt, its responses, best first, and its pairs.

    A conversation that does not say what is prompt and what is response has an empty prompt, [],
    and is the one response.
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), indices of responses
    tools: list | None = None  # definitions of the tools that the model may call
    label: bool | None = None  # of unpaired rows: whether the response was liked
    shape: str = ""  # what the row was recognised as
    doubts: tuple[str, ...] = ()  # what to warn of, although the row is used
    flags: tuple[str, ...] = ()  # of one answer: fields beside it that say true or false
    numbers: Numbers = NO_NUMBERS  # of each of its pairs


@dataclass(frozen=True)
class TextExample:
    """A prompt and its responses.

    They are (chosen, rejected) for pairs, (completion,) for SFT and for unpaired rows, and () for a
    prompt alone, which is sampled from.
    """

    prompt: Text
    responses: tuple[Text, ...]
    where: str  # the file or data set, and the row in it counted from 1
    tools: list | None = None
    # Of a conversation, config.data.turns says how much of it is the prompt.
    is_conversation: bool = False
    label: bool | None = None  # of unpaired rows: whether the completion is desirable
    numbers: Numbers = NO_NUMBERS
    subset: str = ""  # of the data set, if it has any
    # What tells prompts apart, whatever form they are in; 0: not known. It follows from the others.
    question_hash: int = field(default=0, compare=False)


def text_field(fields: dict, name: str) -> str:
    """Return a field that must be text."""
    if fields.get(name) is None:
        raise Malformed(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise Malformed(f"field {name!r} is not text", shown(fields[name]))
    return fields[name]


def number_field(fields: dict, name: str) -> float:
    """Return a field that must be a number, which a table of text has as text."""
    number = number_of(fields.get(name))
    if number is None:
        raise Malformed(f"field {name!r} is missing or not a number", shown(fields.get(name)))
    return number


def numbers_of(fields: dict, weight: str, margin: str) -> Numbers:
    """Return the numbers of a row's examples; weight, margin: names of columns, "" for none.

    Raises Malformed where a column is not there, or holds no number that it can.
    """
    found = {}
    if weight:
        number = _finite_number(fields, weight, "data.weight")
        if number != 0 and not LEAST_WEIGHT <= number <= MOST_NUMBER:
            expected = f"0, or a number from {LEAST_WEIGHT:g} to {MOST_NUMBER:,}"
            raise _wrong_number(weight, "data.weight", expected, fields[weight])
        found["weight"] = number
    if margin:
        number = _finite_number(fields, margin, "data.margin")
        if abs(number) > MOST_NUMBER:
            expected = f"a number from {-MOST_NUMBER:,} to {MOST_NUMBER:,}"
            raise _wrong_number(margin, "data.margin", expected, fields[margin])
        found["target_margin"] = number
    return Numbers(**found)


def _finite_number(fields: dict, column: str, option: str) -> float:
    """Return a number from the column that an option names."""
    if column not in fields:
        reason = f"{option} names a column {column!r}, which is not there"
        raise _of_column(column, option, reason, names_of(fields))
    value = fields[column]
    # Python has True as 1.
    number = None if isinstance(value, bool) else number_of(value)
    if number is None:
        raise _wrong_number(column, option, "a finite number", value)
    return number


def _wrong_number(column: str, option: str, expected: str, value) -> Malformed:
    reason = f"column {column!r} ({option}) is not {expected}"
    return _of_column(column, option, reason, shown(value))


def _of_column(column: str, option: str, reason: str, found: str) -> Malformed:
    error = Malformed(reason, found)
    # The row's texts are right: it is shown with the column alone.
    error.example = f"{option}: {{{json.dumps(column, ensure_ascii=False)}: 1.5, ...}}"
    return error


def shown(value) -> str:
    """Return a value and its type, short enough for a message."""
    text = repr(value)
    if len(text) >= 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def names_of(fields: Collection) -> str:
    """Return the names of fields as a list for a message, however many and however odd they are."""
    names = []
    for key in itertools.islice(fields, MOST_NAMED):
        name = str(key)
        short = name if len(name) < 80 else name[:77] + "..."
        names.append(short if short.isprintable() else repr(short))
    more = len(fields) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def truth_field(fields: dict, name: str) -> bool:
    """Return a field that says yes or no."""
    truth = truth_of(fields[name])
    if truth is not None:
        return truth
    raise Malformed(
        f"field {name!r} is neither true nor false",
        shown(fields[name]),
        f"where it is about something else, leave it out with --config.data.ignore={name}",
    )


def truth_of(value) -> bool | None:
    """Return what a value that says yes or no says; None where it says neither."""
    if isinstance(value, str) and value.strip().lower() in TRUTHS:
        return TRUTHS[value.strip().lower()]
    # Tables of text, and those that have some nulls, hold 1 as 1.0.
    number = number_of(value)
    return bool(number) if number in (0, 1) else None


def number_of(value) -> float | None:
    """Return a score or rank, which may be written as text; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def list_of(value) -> list | None:
    """Return a list, or what a text says that is one in JSON or as Python writes it; else None."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        # NumPy writes no commas, and Python joins two texts with none between them.
        if repr(found) != value.strip():
            return None
    return found if isinstance(found, list) else None


def json_of(text, what: str):
    """Return what a JSON text says."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise Malformed(f"{what} is not JSON", shown(text)) from None


def shared_length(this: str | list, that: str | list) -> int:
    """Return how many characters, or other parts, two sequences share at their start."""
    least, most = 0, min(len(this), len(that))
    while least < most:
        middle = (least + most + 1) // 2
        if this[:middle] == that[:middle]:
            least = middle
        else:
            most = middle - 1
    return least

"""The user's own rows: the shapes that preference data comes in, told apart by their fields.

`SHAPES` lists them, each with the fields that identify it and the function that reads it. To add a
shape, write such a function and its line in the table.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dpo_jax.data.conversations import (
    as_messages,
    content_field,
    is_chat,
    is_said,
    last_turn,
    list_of_structs,
    read_messages,
    same_messages,
    says_turn,
    split_chat,
    split_system,
    squeezed,
    without_nulls,
)
from dpo_jax.data.ledger import Filtered, Malformed, Tie, Unusable
from dpo_jax.data.rows import (
    ONE_PAIR,
    Row,
    Text,
    json_of,
    list_of,
    names_of,
    number_field,
    number_of,
    shared_length,
    shown,
    text_field,
    truth_field,
    truth_of,
)

# Text that asks for an answer, at the start of a line or as a chat format's own marker. Where a
# row's prompt is inside its answers, they begin after the last one that they share.
CUE = re.compile(
    r"(?:^|\n)[ \t]*(?:#+ |\*\*)?"
    r"(?:assistant|bot|chatbot|ai|gpt|chatgpt|model|answer|a|response|output|tl;dr)[ \t]?:(?:\*\*)?"
    r"|<\|assistant\|>\n?|<\|im_start\|>assistant\n?|<start_of_turn>model\n?|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n*",
    re.IGNORECASE,
)
# What may stand behind and before a question that a text answer repeats.
CUE_NEXT = re.compile(rf"\s*(?:{CUE.pattern})", re.IGNORECASE)
ASKER = re.compile(
    r"\s*(?:#+ |\*\*)?(?:user|human|question|q|instruction|prompt|input)[ \t]?:(?:\*\*)?\s*",
    re.IGNORECASE,
)
# Fewer shared words than this at the start of two answers are chance, not a prompt.
FEWEST_WORDS = 3
CJK = "\u2e80"  # the first character of the scripts of China, Japan and Korea
# Fields that say something to a model. Where a shape does not use one, and it says what is not in
# the row anyway, the row is refused.
REASONING = (
    *("reasoning_content", "reasoning", "thinking", "thinking_content", "thinking_process"),
    *("thinking_trajectory", "thinking_trajectories", "thoughts", "chain_of_thought", "cot"),
    *("reasoning_trace", "rationale", "rationales"),
)
CONTENT = (
    *("prompt", "question", "instruction", "input", "context", "history", "text", "completion"),
    *("messages", "conversations", "system", "system_prompt", "system_message", "tools"),
    *("functions", "documents", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios"),
    *REASONING,
)
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
# Fields that may stand beside those of any shape.
BESIDE = (*SYSTEM, *TOOLS, "label")
# Fields beside one answer that say whether it was liked, whatever their values are.
LIKED = ("kto_tag", "is_desirable", "desirable", "is_liked", "liked", "is_preferred", "thumbs_up")
# Fields that say so only where they are true or false; else they are classes or comments.
MAYBE_LIKED = ("label", "preference", "preferred", "feedback")
SCORE_WORDS = (
    *("score", "avg_score", "average_score", "mean_score", "overall_score", "reward", "quality"),
    *("rating", "avg_rating", "average_rating", "mean_rating", "overall_rating"),
)
# Fields with the scores of chosen and rejected: a pair may contradict them.
SCORES = (
    *((f"{word}_chosen", f"{word}_rejected") for word in SCORE_WORDS),
    *((f"chosen_{word}", f"rejected_{word}") for word in SCORE_WORDS),
)
# Where a row that is only to be answered has its prompt: the first of these that it has.
PROMPTS = ("prompt", "messages", "conversations", "conversation", "question", "instruction")
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
STAND_IN = "An answer."  # in its place
ANSWERS = ("completion", "text", *REASONING)  # of CONTENT: no part of a prompt
# Fields that say which answer is better -> a value with which it is not a tie.
DECIDED = {
    "overall_preference": 1,
    "preference_strength": 1,
    "score_ratio": 9.0,
    "winner": "model_a",
    "winner_model_a": 1,
}
# Fields of objects that are used exactly as the row has them, whatever their keys are called.
NO_MESSAGES = ("tools", "functions", "chat_template_kwargs")
# Of these, a row that has several leaves open which one is meant; data.columns says it.
ALTERNATIVES = {
    *("prompt", "question", "instruction", "text", "completion", "messages", "conversations")
}


@dataclass(frozen=True)
class Shape:
    """A kind of row: the fields that identify it, and the function that reads them."""

    name: str  # as the ledger calls it
    needs: tuple[str, ...]
    read: Callable[[dict], Row]
    example: str  # a right row, shown beside a wrong one
    also: tuple[str, ...] = ()  # fields that it uses where they are there
    without: tuple[str, ...] = ()  # fields that a row of this shape does not have
    # What the values must be, where the names of the fields do not tell two shapes apart.
    fits: Callable[[dict], bool] | None = None

    @property
    def uses(self) -> set[str]:
        """All fields that it reads."""
        return {*self.needs, *self.also}


class NoShape(Malformed):
    """This row has none of SHAPES."""


def local(fields: dict, columns: dict | None = None, ignore: tuple = ()) -> Row:
    """Return a row of the user's own data, in whichever of SHAPES it is.

    columns: our name of a field -> the user's. ignore: fields to leave out. Raises Malformed where
    the row has no known shape, or more than one.
    """
    columns = columns or {}
    fields, shape, is_text = _renamed_and_recognised(fields, columns, ignore)
    try:
        try:
            row = shape.read(fields)
        except Tie as tie:
            tie.row = tie.row and _completed(tie.row, fields, is_text)
            raise
        row = _completed(row, fields, is_text)
        is_settled = bool(ALTERNATIVES & set(columns))
        _check_unused(row, fields, {*shape.uses, *(ALTERNATIVES if is_settled else ())}, shape.name)
    except Malformed as error:
        error.example = f"{shape.name}: {shape.example}"
        raise
    row = _with_label(row, fields)
    kind = "chat" if isinstance(row.responses[0], list) else "text"
    return dataclasses.replace(
        row,
        shape=f"{shape.name}{row.shape}, {kind}",
        doubts=tuple(_doubts(row, fields)),
        flags=tuple(_flags(row, fields, shape.uses)),
    )


def _completed(row: Row, fields: dict, is_text: bool) -> Row:
    """Return a row with its system turn and tools, as text if that is how it is to be read."""
    if is_text:
        row = _as_text(row)
    return _with_system_and_tools(row, fields)


def _renamed_and_recognised(fields: dict, columns: dict, ignore: tuple) -> tuple[dict, Shape, bool]:
    """Return a row under our names, its shape, and whether its question is to be read as text.

    The latter is asked for by data.columns=prompt=COLUMN where the shape knows COLUMN by its own
    name, as "instruction" beside UltraFeedback's completions.
    """
    renamed = _given(fields, columns, ignore)
    try:
        return renamed, _recognised(renamed, tuple(columns)), False
    except Malformed as error:
        column = columns.get("prompt")
        if column not in fields:
            raise
        others = {name: each for name, each in columns.items() if name != "prompt"}
        as_they_are = _given(fields, others, ignore)
        try:
            shape = _recognised(as_they_are, tuple(others))
        except Malformed:
            raise error from None
        if column not in shape.needs:
            raise
        return as_they_are, shape, True


def _as_text(row: Row) -> Row:
    """Return a chat row of a question and replies as text.

    Raises Malformed where it has other turns too.
    """
    texts = []
    for part in (row.prompt, *row.responses):
        if isinstance(part, list) and (len(part) != 1 or part[0].keys() != {"role", "content"}):
            raise Malformed("a conversation of several turns cannot be read as a prompt of text")
        texts.append(part if isinstance(part, str) else part[0]["content"])
    return dataclasses.replace(row, prompt=texts[0], responses=tuple(texts[1:]))


def local_prompt(fields: dict, columns: dict | None = None, ignore: tuple = ()) -> Row:
    """Return a row of the user's own data for its prompt alone, with no responses.

    It may be in any of SHAPES, have no answer, or answers that cannot be trained on. The prompt of
    a conversation ends before its last answer. Arguments and errors as of `local`.
    """
    row = None
    # A tie leaves no pair; had it been decided, the prompt would be the same.
    decided = {name: value for name, value in DECIDED.items() if name in fields}
    for attempt in (fields, fields | decided):
        try:
            row = local(attempt, columns, ignore)
            break
        except (Filtered, Malformed, Unusable):
            continue
    is_text_alone = row and not row.prompt and isinstance(row.responses[0], str)
    if row is None or is_text_alone:
        row = local(_answered_by_stand_in(_given(fields, columns or {}, ignore)))
    prompt = row.prompt
    if prompt == []:
        prompt = row.responses[0]
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[: last_turn(prompt)]
    return Row(prompt, (), tools=row.tools)


def local_or_prompt(fields: dict, columns: dict | None = None, ignore: tuple = ()) -> Row:
    """Return a row as `local` does, or a prompt alone, with no responses.

    A prompt alone is text, or messages that end in a turn of a user or a tool. Raises Malformed as
    `local` does, and where there is no prompt either; Unusable for an empty one.
    """
    columns = columns or {}
    try:
        row = local(fields, columns, ignore)
    except NoShape:
        # Nothing in the row is an answer to train on.
        row = local(_answered_by_stand_in(_given(fields, columns, ignore)))
        prompt = row.prompt
    else:
        # A whole conversation may lack its answer.
        if row.prompt != [] or row.responses[0][-1]["role"] == "assistant":
            return row
        prompt = row.responses[0]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Unusable("empty prompt")
        return Row(prompt, (), shape="prompts, text")
    last = prompt[-1]["role"]
    if last not in ("user", "tool"):
        raise Malformed(
            "a prompt of messages does not end in a turn of a user or a tool", f"role {last!r}"
        )
    return Row(prompt, (), tools=row.tools, shape="prompts, chat")


def _answered_by_stand_in(fields: dict) -> dict:
    """Return a row's prompt, system text and tools, with an answer that stands in for any other.

    Raises Malformed where there is no prompt.
    """
    found = [name for name in PROMPTS if name in fields]
    # Messages first: beside them a text is one of their turns.
    found.sort(key=lambda name: isinstance(fields[name], str))
    if not found:
        names = ", ".join(map(repr, PROMPTS))
        raise Malformed(f"none of the fields {names} is there", names_of(fields))
    asked = found[0]
    # Whatever else says something to a model stays, so that nothing is left out silently.
    kept = {}
    for name in CONTENT:
        if name in fields and name not in (asked, *ANSWERS):
            kept[name] = fields[name]
    question = fields[asked]
    # These two are bare questions, which become a user's turn.
    if asked == "instruction":
        return kept | {"instruction": question, "output": STAND_IN}
    if asked == "question":
        return kept | {"question": question, "chosen": STAND_IN, "rejected": f"No {STAND_IN}"}
    if not isinstance(question, str):
        messages = read_messages(question, asked)
        if not messages:
            raise Malformed(f"field {asked!r} is an empty list of messages")
        # A conversation in one field may have its answer already.
        if asked != "prompt" and messages and messages[-1]["role"] == "assistant":
            messages = messages[: last_turn(messages)]
        question = messages
    return kept | {"prompt": question, "completion": STAND_IN}


def parse_columns(text: str) -> dict[str, str]:
    """Return the map of data.columns: our name of a field -> the user's.

    Raises ValueError for what is not NAME=COLUMN, and for a name that no shape uses.
    """
    known = _known_names()
    columns = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, column = map(str.strip, item.partition("="))
        if not name or not column:
            raise ValueError(
                f"data.columns={text!r}: {item!r} is not NAME=COLUMN, as in "
                "prompt=question,chosen=chosen_response."
            )
        if name not in known:
            raise ValueError(
                f"data.columns={text!r}: {name!r} is no name of a field; the usual ones are "
                "prompt, question, chosen, rejected, completion, messages, text, system, tools, "
                f"label; others: {', '.join(sorted(known))}."
            )
        if name in columns:
            raise ValueError(f"data.columns={text!r} names {name!r} twice.")
        columns[name] = column
    if not any(set(columns) - {*BESIDE} <= shape.uses for shape in SHAPES):
        raise ValueError(f"data.columns={text!r}: no kind of row has all of {', '.join(columns)}.")
    return columns


@functools.cache
def _known_names() -> frozenset[str]:
    """Return the names of all fields that some shape reads."""
    names = {*CONTENT}
    for shape in SHAPES:
        names |= shape.uses
    return frozenset(names)


def _given(fields: dict, columns: dict, ignore: tuple) -> dict:
    """Return the fields that have a value, under our names, without those to ignore.

    Columns of system text and tools are returned without one, too: they make all rows chat.
    """
    given = {}
    for name, value in _renamed(fields, columns, ignore).items():
        # Tables have a null where a row lacks a field.
        if value is not None or name in (*SYSTEM, *TOOLS):
            given[name] = value if name in NO_MESSAGES else list_of_structs(value)
    return given


def _renamed(fields: dict, columns: dict, ignore: tuple) -> dict:
    """Return the fields under our names, without those to ignore."""
    found = {}
    for name, column in columns.items():
        try:
            found[name] = fields[column] if column in fields else _inside(fields, column)
        except (KeyError, IndexError, TypeError, ValueError):
            raise Malformed(
                f"data.columns takes {name!r} from a column {column!r}, which is not there",
                names_of(fields),
            ) from None
    # A mapped column is read under our name alone, and takes the place of one that has that name.
    for name, value in fields.items():
        if name not in found and name not in columns.values() and name not in ignore:
            found[name] = value
    return found


def _inside(fields: dict, path: str):
    """Return the value at a dotted path, such as input.messages or choices.0.text."""
    value = fields
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _recognised(fields: dict, mapped: tuple[str, ...]) -> Shape:
    """Return the one shape that a row has.

    mapped: names that data.columns gives, which the shape must use. Raises Malformed where no shape
    fits the row, or several do.
    """
    shapes = []
    for shape in _shapes_with(frozenset(fields), mapped):
        if shape.fits is None or shape.fits(fields):
            shapes.append(shape)
    # A shape with more of the row's fields says more about it than one with a part of them.
    best = []
    for shape in shapes:
        if not any(set(shape.needs) < set(other.needs) for other in shapes):
            best.append(shape)
    if len(best) == 1:
        return best[0]
    if best:
        different = _without_repeats(fields, mapped)
        if len(different) < len(fields):
            return _recognised(different, mapped)
        raise _ambiguous(best)
    raise _unrecognised(fields)


def _without_repeats(fields: dict, mapped: tuple[str, ...]) -> dict:
    """Return the fields without questions that say what `prompt` says, or another one before it."""
    different = {}
    for name, value in fields.items():
        is_question = name in PROMPTS and name not in mapped and isinstance(value, str)
        if not is_question or name == "prompt":
            different[name] = value
            continue
        others = [fields.get("prompt"), *(different.get(other) for other in PROMPTS)]
        texts = [squeezed(other) for other in others if isinstance(other, str)]
        if squeezed(value) not in texts:
            different[name] = value
    return different


@functools.lru_cache(maxsize=1024)
def _shapes_with(names: frozenset, mapped: tuple[str, ...]) -> tuple[Shape, ...]:
    """Return the shapes that a row with these fields may have."""
    chosen_by_user = set(mapped) - {*BESIDE}
    found = []
    for shape in SHAPES:
        # What the user names explicitly overrides which shape comes before another.
        is_excluded = not chosen_by_user and not names.isdisjoint(shape.without)
        if names.issuperset(shape.needs) and not is_excluded and chosen_by_user <= shape.uses:
            found.append(shape)
    return tuple(found)


def _ambiguous(shapes: list[Shape]) -> Malformed:
    """Return the error that says which shapes fit a row, and what to type for each."""
    lines = []
    for shape in shapes:
        others = set()
        for other in shapes:
            if other is not shape:
                others |= other.uses
        # A field that the others do not use says which shape is meant.
        own = [name for name in shape.needs if name not in others] or list(shape.needs)
        line = ",".join(f"{name}={name}" for name in own)
        lines.append(f"--config.data.columns={line} for {shape.name}")
    names = " and ".join(shape.name for shape in shapes)
    return Malformed(f"the row could be {names}", advice=f"choose with {', or '.join(lines)}")


def _unrecognised(fields: dict) -> NoShape:
    """Return the error that says which shapes a row is nearest to, and what it lacks."""
    started = []
    for shape in SHAPES:
        lacking = [name for name in shape.needs if name not in fields]
        present = len(shape.needs) - len(lacking)
        is_excluded = any(name in fields for name in shape.without)
        if present and not is_excluded:
            started.append((present, -len(lacking), shape, lacking))
    # The nearest have most of the row's fields, and of these lack the fewest.
    nearness = max((each[:2] for each in started), default=None)
    hints = []
    for *near, shape, lacking in started:
        if tuple(near) != nearness:
            continue
        lacks = f"without {' and '.join(map(repr, lacking))}" if lacking else "but for the values"
        hints.append(f"{shape.name}, {lacks}")
    nearest = f"nearest: {'; '.join(hints[:3])}" if hints else ""
    nearest = _hint_of_names(fields) or nearest
    error = NoShape("no known shape of row", names_of(fields), nearest)
    error.example = (
        f"{SHAPES[0].name}: {SHAPES[0].example}\n"
        "  if your columns have other names: --config.data.columns=prompt=COLUMN,chosen=COLUMN,"
        "rejected=COLUMN"
    )
    return error


def _hint_of_names(fields: dict) -> str:
    """Return what is wrong with the names of the fields, if they would be right but for it."""
    names = [name for name in fields if isinstance(name, str)]
    for delimiter, called in DELIMITERS.items():
        if len(names) == 1 and delimiter in names[0]:
            return (
                f"the columns seem to be separated by {called}; a .csv file has commas and a .tsv "
                "file has tabs"
            )
    plain = {name.strip().lower(): name for name in names}
    if not _shapes_with(frozenset(plain), ()):
        return ""
    padded = [name for name in names if name != name.strip()]
    if padded:
        return f"take the white space from the names {', '.join(map(repr, padded))}"
    used = set().union(*(shape.uses for shape in _shapes_with(frozenset(plain), ())))
    renamed = [f"{ours}={name}" for ours, name in plain.items() if ours != name and ours in used]
    if not renamed:
        return ""
    return (
        "names of fields are in lower case; read these by --config.data.columns="
        f"{','.join(renamed)}"
    )


def _with_system_and_tools(row: Row, fields: dict) -> Row:
    """Return a row with its column of system text as the system turn, and with its tools.

    Text rows that have such a column become chat, for there is no other place for it; also where it
    is empty, so that all rows of a file are read alike.
    """
    columns = [name for name in (*SYSTEM, *TOOLS) if name in fields]
    if not columns:
        return row
    tools = row.tools or _tools(fields)
    system = _system(fields)
    if isinstance(row.prompt, str):
        if not row.prompt and (system or tools):
            filled = [name for name in columns if fields[name]][0]
            raise Malformed(
                f"text without a prompt has no place for field {filled!r}",
                advice=f"use chat messages, or leave it out with --config.data.ignore={filled}",
            )
        if not row.prompt:
            return row
        row = dataclasses.replace(
            row,
            prompt=as_messages("user", row.prompt),
            responses=tuple(as_messages("assistant", response) for response in row.responses),
            shape=f"{row.shape}, with column {' and '.join(columns)}",
        )
    row = dataclasses.replace(row, tools=tools)
    if not system:
        return row
    # A whole conversation, where the prompt is not told from the response, is the response.
    given, _ = split_system(row.prompt or row.responses[0])
    if given:
        if squeezed(given[0].get("content", "")) != squeezed(system):
            raise Malformed("the column of system text differs from the messages' system turn")
        return row
    turn = as_messages("system", system)
    if row.prompt:
        return dataclasses.replace(row, prompt=turn + row.prompt)
    return dataclasses.replace(row, responses=(turn + row.responses[0],))


def _system(fields: dict) -> str | None:
    """Return the text in a row's column of system text, "" if that is blank; None without one."""
    texts = [text_field(fields, name) for name in SYSTEM if fields.get(name) is not None]
    if not texts:
        return None
    if len(set(texts)) > 1:
        raise Malformed(f"the fields {' and '.join(n for n in SYSTEM if n in fields)} differ")
    return texts[0] if texts[0].strip() else ""


def _with_label(row: Row, fields: dict) -> Row:
    """Return a row of one answer with its label, where fields beside it say yes or no.

    KTO's own rows have theirs already; words of another kind are classes, which say nothing of the
    answer. Raises Malformed for a number that is neither 0 nor 1, or where two fields differ.
    """
    if row.pairs or row.prompt == "":
        return row
    labels = {} if row.label is None else {"label": row.label}
    for name in (*LIKED, *MAYBE_LIKED):
        value = fields.get(name)
        if value is None or value == "" or name in labels:
            continue
        is_class = truth_of(value) is None and number_of(value) is None
        if name in LIKED or not is_class:
            labels[name] = truth_field(fields, name)
    if len(set(labels.values())) > 1:
        raise Malformed(
            f"the fields {' and '.join(map(repr, labels))} differ in whether the answer was liked",
            advice="leave out those that say something else with --config.data.ignore",
        )
    return dataclasses.replace(row, label=next(iter(labels.values()), None))


def _doubts(row: Row, fields: dict) -> Iterable[str]:
    """Yield what a person should look at in a row that says two things."""
    if row.pairs == ONE_PAIR:
        for names in SCORES:
            # Most rows have none of them.
            if names[0] not in fields or names[1] not in fields:
                continue
            chosen, rejected = (number_of(fields.get(name)) for name in names)
            if chosen is None or rejected is None:
                continue
            if chosen < rejected:
                yield f"{names[0]!r} is below {names[1]!r}, which contradicts the pair"
            elif chosen == rejected:
                yield f"{names[0]!r} equals {names[1]!r}, by which the pair is a tie"
    said = [_last_words(response) for response in row.responses]
    if all(_is_list_of_texts(answer) for answer in said):
        yield "the answers are lists that are written as text, and are used as such text"
    if row.prompt:
        asked = _last_words(row.prompt)
        if any(_ends_in(asked, answer) for answer in said):
            yield "the prompt ends in one of its answers, which may be meant to follow it"


def _is_list_of_texts(text: str) -> bool:
    """Return whether a text is a list of texts, as tables of text have lists."""
    found = list_of(text)
    return bool(found) and all(isinstance(part, str) for part in found)


def _last_words(text: Text) -> str:
    """Return a text, or what the last message says, without the white space around it."""
    return (text if isinstance(text, str) else text[-1].get("content", "")).strip()


def _ends_in(text: str, end: str) -> bool:
    """Return whether a text ends in another, and not within a word."""
    start = len(text) - len(end)
    return bool(end) and text.endswith(end) and not (start and _in_word(text, start))


def _flags(row: Row, fields: dict, used: set[str]) -> Iterable[str]:
    """Yield "FIELD: true" or "FIELD: false" of the fields beside one answer that no one reads."""
    if row.pairs or row.prompt == "" or row.label is not None:
        return
    for name, value in fields.items():
        is_truth = isinstance(value, bool)
        # As tables of text have it.
        is_truth |= isinstance(value, str) and value.strip().lower() in ("true", "false")
        if is_truth and name not in used:
            yield f"{name}: {str(truth_of(value)).lower()}"


def _tools(holder: dict) -> list | None:
    """Return the definitions of tools that a row holds, as a list or its JSON text."""
    tools = _definitions(holder, "tools")
    functions = _definitions(holder, "functions")  # OpenAI's older name
    found = [*tools, *({"type": "function", "function": function} for function in functions)]
    return found or None


def _definitions(holder: dict, name: str) -> list[dict]:
    value = holder.get(name)
    if isinstance(value, str) and value.strip():
        value = json_of(value, f"field {name!r}")
    if not value:
        return []
    found = []
    for each in value if isinstance(value, list) else [value]:
        # Some sets hold each definition as JSON text.
        definition = json_of(each, f"field {name!r}") if isinstance(each, str) else each
        if not isinstance(definition, dict):
            raise Malformed(
                f"field {name!r} is not a list of definitions, each an object", shown(each)
            )
        found.append(definition)
    return found


def _check_unused(row: Row, fields: dict, used: set[str], shape: str) -> None:
    """Raise Malformed where a field that is not used says something that the row does not say."""
    for name in CONTENT:
        value = fields.get(name)
        is_used = name in used or name in (*SYSTEM, "tools", "functions")
        if is_used or not value or _restates(row, name, value):
            continue
        way = f"leave it out with --config.data.ignore={name} if no answer depends on it"
        if name in REASONING:
            way = (
                "to train on it, write the answers as messages, with the key 'reasoning_content'; "
                f"else leave it out with --config.data.ignore={name}"
            )
        if name in ALTERNATIVES:
            way += f", or read the row by it with --config.data.columns={name}={name}"
        raise Malformed(
            f"field {name!r} has content that rows of {shape} do not use", shown(value), way
        )


def _restates(row: Row, name: str, value) -> bool:
    """Return whether another field says only what the row says already."""
    for response in row.responses:
        # Text rows too: what matters is what is said.
        conversation = [*as_messages("user", row.prompt), *as_messages("assistant", response)]
        if isinstance(value, str) and is_said(value, conversation):
            return True
        # The conversation rendered as text, or its prompt with something around it.
        if name in ("prompt", "text") and isinstance(value, str) and says_turn(value, conversation):
            return True
        # The conversation, or its beginning. The system turn may be in one of them alone.
        if is_chat(value):
            _, given = split_system(read_messages(value, name))
            _, turns = split_system(conversation)
            if same_messages(given, turns[: len(given)]):
                return True
    return False


# ---- tests of values, where the names of the fields do not tell two shapes apart


def _texts(*names: str) -> Callable[[dict], bool]:
    """Return the test whether all of these fields are text."""

    def fits(fields: dict) -> bool:
        return all(isinstance(fields[name], str) for name in names)

    return fits


def _chats(*names: str) -> Callable[[dict], bool]:
    """Return the test whether all of these fields are chat messages."""

    def fits(fields: dict) -> bool:
        return all(is_chat(fields[name]) for name in names)

    return fits


def _lists(*names: str) -> Callable[[dict], bool]:
    """Return the test whether all of these fields are lists that are no messages."""

    def fits(fields: dict) -> bool:
        values = [list_of(fields[name]) for name in names]
        return all(value is not None and not is_chat(value) for value in values)

    return fits


def _are_answers(fields: dict) -> bool:
    """Return whether both sides are answers alone, not whole conversations."""
    for name in ("chosen", "rejected"):
        answer = content_field(fields, name)
        is_chat_answer = isinstance(answer, list) and answer
        if is_chat_answer and answer[0]["role"] != "assistant":
            return False
    return True


# ---- readers of prompts and answers, as text or as chat messages


def _answered(*names: str) -> Callable[[dict], Row]:
    """Return the reader of rows whose answers are in these fields, and their prompt in `prompt`.

    Without that field the answers are whole conversations.
    """

    def read(fields: dict) -> Row:
        prompt = content_field(fields, "prompt") if "prompt" in fields else None
        responses = tuple(content_field(fields, name) for name in names)
        # With it, the answers are whole conversations.
        if prompt == [] and not all(_is_conversation(response) for response in responses):
            raise Malformed("field 'prompt' is an empty list of messages")
        pairs = ONE_PAIR if len(responses) == 2 else ()
        if any(isinstance(part, list) for part in (prompt, *responses)):
            return Row(*split_chat(prompt, responses), pairs)
        return _text_row(text_field(fields, "prompt"), responses, pairs)

    return read


def _is_conversation(response: Text) -> bool:
    """Return whether a response has a turn to which it answers."""
    if isinstance(response, str):
        return False
    return not response or any(message["role"] == "user" for message in response)


def _prompt_inside(fields: dict) -> Row:
    """Read a pair whose prompt is what both answers begin with."""
    chosen, rejected = content_field(fields, "chosen"), content_field(fields, "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        return Row(*split_chat(None, (chosen, rejected)), ONE_PAIR)
    end = _shared_prompt(chosen, rejected)
    return Row(chosen[:end], (chosen[end:], rejected[end:]), ONE_PAIR)


def _labelled(*names: str) -> Callable[[dict], Row]:
    """Return the reader of unpaired rows: an answer, and whether it was liked."""
    read_answer = _answered(*names)

    def read(fields: dict) -> Row:
        return dataclasses.replace(read_answer(fields), label=truth_field(fields, "label"))

    return read


def _whole_text(fields: dict) -> Row:
    """Read a text that is trained on as a whole."""
    return Row("", (text_field(fields, "text"),))


def _conversation(name: str) -> Callable[[dict], Row]:
    """Return the reader of rows of a conversation in this field."""

    def read(fields: dict) -> Row:
        return Row(*split_chat(None, (read_messages(fields[name], name),)))

    return read


def _continued(name: str, chosen: str, rejected: str) -> Callable[[dict], Row]:
    """Return the reader of rows of messages so far and two answers to them, in these fields."""

    def read(fields: dict) -> Row:
        asked = read_messages(fields[name], name)
        answers = (content_field(fields, chosen), content_field(fields, rejected))
        return Row(*split_chat(asked, answers), ONE_PAIR)

    return read


# ---- readers of known sets, and of what other tools read


def _records(fields: dict, name: str) -> list[dict]:
    """Return a field that must be a list of objects."""
    value = fields[name]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise Malformed(f"field {name!r} is not a list of objects", shown(value))
    return [without_nulls(each) for each in value]


def _swift(fields: dict) -> Row:
    """Read ms-swift's rows: a conversation, and another answer in the place of its last one."""
    messages = read_messages(fields["messages"], "messages")
    last = messages[-1]["role"] if messages else "none"
    if last != "assistant":
        raise Malformed("field 'messages' does not end in an assistant's turn", f"role {last}")
    turn = last_turn(messages)
    rejected = as_messages("assistant", content_field(fields, "rejected_response"))
    return Row(*split_chat(messages[:turn], (messages[turn:], rejected)), ONE_PAIR)


def _swift_messages(fields: dict) -> Row:
    """Read ms-swift's rows of two whole conversations."""
    chosen = read_messages(fields["messages"], "messages")
    rejected = read_messages(fields["rejected_messages"], "rejected_messages")
    return Row(*split_chat(None, (chosen, rejected)), ONE_PAIR)


def _openai(fields: dict) -> Row:
    """Read the rows of OpenAI's preference fine-tuning."""
    given = fields["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise Malformed("field 'input' is not an object with 'messages'", shown(given))
    asked = read_messages(list_of_structs(given["messages"]), "input.messages")
    answers = (
        content_field(fields, "preferred_output"),
        content_field(fields, "non_preferred_output"),
    )
    return Row(*split_chat(asked, answers), ONE_PAIR, tools=_tools(given))


def _replies(question: str, *names: str) -> Callable[[dict], Row]:
    """Return the reader of rows of a question and bare replies to it, in these fields."""

    def read(fields: dict) -> Row:
        replies = tuple(text_field(fields, name) for name in names)
        return _reply_row(text_field(fields, question), replies)

    return read


def _alpaca(instruction: str, *names: str) -> Callable[[dict], Row]:
    """Return the reader of rows of an instruction, an input to it, earlier turns, and replies.

    instruction, names: the fields of the instruction and of the replies.
    """

    def read(fields: dict) -> Row:
        question = text_field(fields, instruction)
        # The set has an empty text where an instruction needs no input.
        if fields.get("input"):
            question = f"{question}\n{text_field(fields, 'input')}"
        replies = tuple(text_field(fields, name) for name in names)
        row = _reply_row(question, replies)
        earlier = []
        if not isinstance(fields.get("history", []), list):
            raise Malformed("field 'history' is not a list", shown(fields["history"]))
        for turn in fields.get("history") or []:
            match turn:
                case [str(asked), str(answer)]:
                    earlier += [*as_messages("user", asked), *as_messages("assistant", answer)]
                case _:
                    raise Malformed(
                        "field 'history' is not a list of [question, answer]", shown(turn)
                    )
        return dataclasses.replace(row, prompt=earlier + row.prompt)

    return read


def _distilabel(fields: dict) -> Row:
    """Read the rows of distilabel's own pairs."""
    # The set keeps its ties, with the answers in the order of the set that it was made from.
    if fields.get("status") == "tie":
        raise Tie
    return _replies("input", "chosen", "rejected")(fields)


def _generations(fields: dict) -> Row:
    """Read an instruction with several rated generations."""
    generations, scores = (list_of(fields[name]) for name in ("generations", "ratings"))
    for name, value in (("generations", generations), ("ratings", scores)):
        if value is None:
            raise Malformed(f"field {name!r} is not a list", shown(fields[name]))
    if len(scores) != len(generations):
        raise Malformed(
            "the fields 'generations' and 'ratings' have different lengths",
            f"{len(generations)} and {len(scores)}",
        )
    question = text_field(fields, "instruction")
    return _ranked_row(as_messages("user", question), zip(generations, scores, strict=True))


def _ultrafeedback(fields: dict) -> Row:
    """Read UltraFeedback's full rows: an instruction and completions with scores."""
    question = text_field(fields, "instruction")
    completions = _records(fields, "completions")
    # Some copies of the set lack the overall scores.
    has_overall = any("overall_score" in completion for completion in completions)
    score = "overall_score" if has_overall else "fine-grained_score"
    scored = []
    for completion in completions:
        scored.append((text_field(completion, "response"), completion.get(score)))
    row = _ranked_row(as_messages("user", question), scored)
    return dataclasses.replace(row, shape=f"{row.shape} by {score}")


def _nectar(fields: dict) -> Row:
    """Read Nectar's rows: a transcript as the prompt, and answers with ranks, 1 the best."""
    # The transcript ends in a space, which belongs to the answer.
    prompt = text_field(fields, "prompt").rstrip()
    ranked = []
    for answer in _records(fields, "answers"):
        rank = number_of(answer.get("rank"))
        # As a transcript goes on.
        text = " " + text_field(answer, "answer").strip()
        # A score: higher is better.
        ranked.append((text, None if rank is None else -rank))
    return _ranked_row(prompt, ranked)


def _helpsteer3(fields: dict) -> Row:
    """Read HelpSteer3's rows: a negative preference is for response 1, 0 for neither."""
    context = content_field(fields, "context")
    preference = number_field(fields, "overall_preference")
    # Theirs is how much better the second is, from -3 to 3.
    return _either(context, fields, ("response1", "response2"), -preference)


def _helpsteer2(fields: dict) -> Row:
    """Read HelpSteer2's preferences: a negative strength is for response 1, 0 for neither."""
    preference = number_field(fields, "preference_strength")
    prompt = text_field(fields, "prompt")
    return _either(prompt, fields, ("response_1", "response_2"), -preference)


def _pku(fields: dict) -> Row:
    """Read PKU-SafeRLHF's rows by which response is better; which is safer is another label."""
    better = number_field(fields, "better_response_id")
    if better not in (0, 1):
        raise Malformed("field 'better_response_id' is neither 0 nor 1", shown(better))
    prompt = text_field(fields, "prompt")
    return _either(prompt, fields, ("response_0", "response_1"), 1 if better == 0 else -1)


def shp(fields: dict) -> Row:
    """Stanford Human Preferences: pairs of Reddit answers whose scores differ twofold or more."""
    history = text_field(fields, "history")
    answer_a, answer_b = text_field(fields, "human_ref_A"), text_field(fields, "human_ref_B")
    label = number_field(fields, "labels")
    ratio = number_field(fields, "score_ratio")
    if label not in (0, 1):
        raise Malformed("field 'labels' is neither 1 (A is preferred) nor 0 (B is)", repr(label))
    if ratio < 2:
        raise Filtered("score ratio below 2")
    chosen, rejected = (answer_a, answer_b) if label == 1 else (answer_b, answer_a)
    prompt = f"\n\nHuman: {history}\n\nAssistant:"
    return Row(prompt, (" " + chosen.strip(), " " + rejected.strip()), ONE_PAIR)


def _arena(fields: dict) -> Row:
    """Read votes on two conversations."""
    winner = text_field(fields, "winner")
    chats = []
    for name in ("conversation_a", "conversation_b"):
        chat = read_messages(fields[name], name)
        chats.append(chat[: _end_of_turn(chat, fields.get("turn"))])
    if winner not in ("model_a", "model_b"):
        # The sets have "tie", "tie (bothbad)" and "both_bad".
        if winner.startswith("tie") or winner == "both_bad":
            raise Tie
        raise Malformed("field 'winner' is none of model_a, model_b, tie, both_bad", shown(winner))
    chosen, rejected = chats if winner == "model_a" else reversed(chats)
    return Row(*split_chat(None, (chosen, rejected)), ONE_PAIR)


def _end_of_turn(chat: list[dict], turn) -> int:
    """Return where a conversation's answer number `turn` ends, which MT-bench's votes are about."""
    answers = 0
    for end, message in enumerate(chat, 1):
        answers += message["role"] == "assistant"
        if answers == turn:
            return end
    return len(chat)


def _arena_texts(fields: dict) -> Row:
    """Read votes whose turns are lists of texts, as JSON: prompts, and answers of two models."""
    turns = {}
    for name in ("prompt", "response_a", "response_b"):
        turns[name] = fields[name]
        if isinstance(fields[name], str):
            turns[name] = json_of(fields[name], f"field {name!r}")
        if not isinstance(turns[name], list) or len(turns[name]) != len(turns["prompt"]):
            raise Malformed(
                f"field {name!r} is not a list of texts, one a turn of 'prompt'",
                shown(fields[name]),
            )
    chats = []
    for name in ("response_a", "response_b"):
        chat = []
        for asked, answer in zip(turns["prompt"], turns[name], strict=True):
            # A turn may be null, where a model said nothing.
            chat += as_messages("user", str(asked or ""))
            chat += as_messages("assistant", str(answer or ""))
        chats.append(chat)
    a_wins, b_wins = truth_field(fields, "winner_model_a"), truth_field(fields, "winner_model_b")
    if a_wins == b_wins:
        raise Tie
    chosen, rejected = chats if a_wins else reversed(chats)
    return Row(*split_chat(None, (chosen, rejected)), ONE_PAIR)


def _reward_bench_2(fields: dict) -> Row:
    """Read RewardBench 2: some right answers, and some wrong ones, in every pair of both."""
    right, wrong = list_of(fields["chosen"]), list_of(fields["rejected"])
    for text in (*right, *wrong):
        if not isinstance(text, str):
            raise Malformed(
                "the fields 'chosen' and 'rejected' are not lists of texts", shown(text)
            )
    pairs = itertools.product(range(len(right)), range(len(right), len(right) + len(wrong)))
    return _reply_row(text_field(fields, "prompt"), (*right, *wrong), tuple(pairs))


# ---- rows of answers


def _text_row(prompt: str, responses: tuple[str, ...], pairs: tuple) -> Row:
    """Return a row of text; a prompt that its responses repeat is cut from them."""
    ends, shape = _repeats(prompt, responses)
    if all(ends):
        # The answers' own: what stands around the prompt in them is the text that they continue.
        prompt = responses[0][: ends[0]]
    rests = [response[end:] for response, end in zip(responses, ends, strict=True)]
    return Row(prompt, tuple(rests), pairs, shape=shape)


def _reply_row(question: str, replies: tuple[str, ...], pairs: tuple | None = None) -> Row:
    """Return a chat row of a question and bare replies to it; two of them are a pair."""
    if pairs is None:
        pairs = ONE_PAIR if len(replies) == 2 else ()
    ends, shape = _repeats(question, replies)
    answers = []
    for reply, end in zip(replies, ends, strict=True):
        # A turn of its own does not need the white space between the two.
        rest = reply[end:].lstrip() if end else reply
        answers.append(as_messages("assistant", rest))
    return Row(as_messages("user", question), tuple(answers), pairs, shape=shape)


def _either(prompt: Text, fields: dict, names: tuple[str, str], first_is_better: float) -> Row:
    """Return a chat row of two replies, of which the first is better, the other (< 0), or none."""
    first, second = (text_field(fields, name) for name in names)
    replies = (first, second) if first_is_better >= 0 else (second, first)
    if first_is_better == 0:
        answers = tuple(as_messages("assistant", reply) for reply in replies)
        raise Tie(Row(as_messages("user", prompt), answers))
    if isinstance(prompt, str):
        return _reply_row(prompt, replies)
    return Row(*split_chat(prompt, replies), ONE_PAIR)


def _ranked_row(prompt: Text, scored: Iterable[tuple[str, object]]) -> Row:
    """Return a row of several answers, best first, with a pair of any two whose scores differ.

    Answers that are empty or have no score are left out.
    """
    ranked = []
    answers = 0
    for text, score in scored:
        number = number_of(score)
        if not isinstance(text, str) or not text.strip():
            continue
        answers += 1
        if number is not None:
            ranked.append((number, text))
    if answers < 2:
        raise Filtered("fewer than two answers")
    if len(ranked) < 2:
        raise Unusable("fewer than two answers have a score")
    # Answers with equal scores stay in the row's order.
    ranked.sort(key=lambda answer: -answer[0])
    pairs = []
    for (i, better), (j, worse) in itertools.combinations(enumerate(ranked), 2):
        # Two models may say the same.
        if better[0] > worse[0] and better[1].strip() != worse[1].strip():
            pairs.append((i, j))
    if not pairs and ranked[0][0] > ranked[-1][0]:
        raise Unusable("answers with different scores are equal")
    texts = [text for _, text in ranked]
    if isinstance(prompt, list):
        texts = [as_messages("assistant", text) for text in texts]
    if not pairs:
        raise Tie(Row(prompt, tuple(texts)))
    return Row(prompt, tuple(texts), tuple(pairs), shape=f", {len(ranked)} completions")


def _repeats(prompt: str, responses: tuple[str, ...]) -> tuple[list[int], str]:
    """Return where each response starts behind the prompt, 0 where it does not repeat it.

    Also returns what the ledger says of it: "" where none does.
    """
    end = _repeated(prompt, responses)
    if end:
        return [end] * len(responses), ", repeated prompts cut"
    ends = []
    for response in responses:
        end = _repeated(prompt, (response,))
        # "The sea is" is not repeated by "The sea isn't", nor "a sea" by "a season".
        ends.append(0 if _in_word(response, end) else end)
    if not any(ends):
        return ends, ""
    # Such as a whole text of a model beside an answer alone. Left as it is, the pair would teach
    # whether to repeat the prompt.
    return ends, ", prompt cut from the answer that repeats it"


def _repeated(prompt: str, responses: tuple[str, ...]) -> int:
    """Return where the responses start behind a prompt that all of them repeat, or else 0."""
    said = prompt.rstrip()
    # Short prompts are how many an answer begins.
    if not said or not (_is_long(said) or prompt.endswith("\n")):
        return 0
    if all(response.startswith(prompt) for response in responses):
        return len(prompt)
    if all(response.startswith(said) for response in responses):
        return len(said)
    # A transcript: "User: ", the prompt, "Bot:" and the answer.
    asker = ASKER.match(responses[0])
    if asker and responses[0].startswith(said, asker.end()):
        asked = responses[0][: asker.end() + len(said)]
        cue = CUE_NEXT.match(responses[0], len(asked))
        end = cue.end() if cue else len(asked)
        if all(response.startswith(responses[0][:end]) for response in responses):
            return end
    return 0


def _shared_prompt(chosen: str, rejected: str) -> int:
    """Return where the answers start in two texts that begin with the same prompt."""
    shared = shared_length(chosen, rejected)
    # Answers may begin with the same words, so the last cue they share says more than these.
    cues = list(CUE.finditer(chosen, 0, shared))
    if cues:
        return cues[-1].end()
    # Without one, where they part; but answers may begin with the same letters.
    end = shared
    while end and (_in_word(chosen, end) or _in_word(rejected, end)):
        end -= 1
    # A space before the answer is the answer's, as tokenizers have it.
    if end and chosen[end - 1] == " ":
        end -= 1
    if not _is_long(chosen[:end]):
        raise Malformed(
            "there is no field 'prompt', and 'chosen' and 'rejected' do not begin with the same "
            "prompt",
            f"{shown(chosen)} and {shown(rejected)}",
            "if a column has it, name it with --config.data.columns=prompt=COLUMN",
        )
    return end


def _is_long(text: str) -> bool:
    """Return whether a text is too long for two others to begin with it by chance."""
    if len(text.split()) >= FEWEST_WORDS:
        return True
    # Scripts that write words without spaces.
    return sum(letter >= CJK for letter in text) >= 2 * FEWEST_WORDS


def _in_word(text: str, place: int) -> bool:
    """Return whether a place in a text is between two letters or digits of a word."""
    around = text[place - 1 : place + 1]
    # Scripts without spaces have no other words than their characters.
    return len(around) == 2 and all(each.isalnum() and each < CJK for each in around)


# ---- the table

# How messages stand in the examples.
ASKED = '[{"role": "user", "content": "Why?"}]'
ANSWER = '{"role": "assistant", "content": "So."}'
OTHER = '{"role": "assistant", "content": "No."}'
WHOLE = f'[{{"role": "user", "content": "Why?"}}, {ANSWER}]'
PAIR = ("chosen", "rejected")

SHAPES = (
    Shape(
        "TRL pairs",
        ("prompt", *PAIR),
        _answered(*PAIR),
        '{"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}, or each a list '
        "of chat messages",
    ),
    Shape(
        "UltraFeedback binarized",
        ("prompt", *PAIR, "score_chosen", "score_rejected"),
        _answered(*PAIR),
        f'{{"prompt": "Why?", "chosen": {WHOLE}, "rejected": [...], "score_chosen": 8.0, '
        '"score_rejected": 5.0}',
    ),
    Shape(
        "TRL prompt and completion",
        ("prompt", "completion"),
        _answered("completion"),
        '{"prompt": "Name a colour.", "completion": " Blue."}, or each a list of chat messages',
        without=PAIR,
    ),
    Shape(
        "TRL pairs with the prompt inside",
        PAIR,
        _prompt_inside,
        f'{{"chosen": {WHOLE}, "rejected": [...]}}, or two texts that begin with the same prompt',
    ),
    Shape(
        "prompt and chosen",
        ("prompt", "chosen"),
        _answered("chosen"),
        '{"prompt": "Name a colour.", "chosen": " Blue."}',
        without=("rejected",),
    ),
    Shape(
        "chosen conversations",
        ("chosen",),
        _answered("chosen"),
        f'{{"chosen": {WHOLE}}}',
        without=("prompt", "rejected"),
        fits=_chats("chosen"),
    ),
    Shape(
        "completion conversations",
        ("completion",),
        _answered("completion"),
        f'{{"completion": {WHOLE}}}',
        without=("prompt", *PAIR),
        fits=_chats("completion"),
    ),
    Shape(
        "KTO rows",
        ("prompt", "completion", "label"),
        _labelled("completion"),
        '{"prompt": "Name a colour.", "completion": " Blue.", "label": true}',
        without=PAIR,
    ),
    Shape(
        "KTO messages",
        ("messages", "label"),
        _labelled("messages"),
        f'{{"messages": {WHOLE}, "label": true}}',
        also=("prompt",),
        without=(*PAIR, "completion"),
    ),
    Shape(
        "messages",
        ("messages",),
        _answered("messages"),
        f'{{"messages": {WHOLE}}}',
        also=("prompt",),
        without=(*PAIR, "completion"),
    ),
    Shape(
        "whole texts",
        ("text",),
        _whole_text,
        '{"text": "Once upon a time."}',
        without=(*PAIR, "completion", "messages", "conversations", "instruction"),
    ),
    # ShareGPT's names, which LLaMA-Factory reads too
    Shape(
        "ShareGPT conversations",
        ("conversations",),
        _conversation("conversations"),
        '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}',
        without=PAIR,
    ),
    Shape(
        "conversations",
        ("conversation",),
        _conversation("conversation"),
        f'{{"conversation": {WHOLE}}}',
        without=PAIR,
        fits=_chats("conversation"),
    ),
    Shape(
        "ShareGPT ranking",
        ("conversations", *PAIR),
        _continued("conversations", *PAIR),
        '{"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", '
        '"value": "So."}, "rejected": {"from": "gpt", "value": "No."}}',
        fits=_are_answers,
    ),
    # axolotl's chat_template.default
    Shape(
        "messages and two answers",
        ("messages", *PAIR),
        _continued("messages", *PAIR),
        f'{{"messages": {ASKED}, "chosen": {ANSWER}, "rejected": {OTHER}}}',
        fits=_are_answers,
    ),
    # When2Call's
    Shape(
        "messages and two responses",
        ("messages", "chosen_response", "rejected_response"),
        _continued("messages", "chosen_response", "rejected_response"),
        f'{{"messages": {ASKED}, "chosen_response": {ANSWER}, "rejected_response": {OTHER}}}',
    ),
    Shape(
        "ms-swift",
        ("messages", "rejected_response"),
        _swift,
        f'{{"messages": {WHOLE}, "rejected_response": "No."}}',
    ),
    Shape(
        "ms-swift conversations",
        ("messages", "rejected_messages"),
        _swift_messages,
        f'{{"messages": {WHOLE}, "rejected_messages": [...]}}',
    ),
    Shape(
        "OpenAI preferences",
        ("input", "preferred_output", "non_preferred_output"),
        _openai,
        f'{{"input": {{"messages": {ASKED}, "tools": []}}, "preferred_output": [{ANSWER}], '
        f'"non_preferred_output": [{OTHER}]}}',
    ),
    # questions and bare replies: chat by their nature
    Shape(
        "orca_dpo_pairs",
        ("question", *PAIR),
        _replies("question", *PAIR),
        '{"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."}',
        fits=_texts("question", *PAIR),
    ),
    Shape(
        "distilabel",
        ("input", *PAIR),
        _distilabel,
        '{"system": "", "input": "Why?", "chosen": "So.", "rejected": "No."}',
        without=("instruction",),
        fits=_texts("input", *PAIR),
        also=("rationale", "rationales"),  # a judge's, of the scores
    ),
    Shape(
        "Alpaca pairs",
        ("instruction", *PAIR),
        _alpaca("instruction", *PAIR),
        '{"instruction": "Answer.", "input": "Why?", "chosen": "So.", "rejected": "No."}',
        also=("input", "history"),
        fits=_texts("instruction", *PAIR),
    ),
    Shape(
        "Alpaca",
        ("instruction", "output"),
        _alpaca("instruction", "output"),
        '{"instruction": "Answer.", "input": "Why?", "output": "So."}',
        also=("input", "history"),
        without=PAIR,
        fits=_texts("instruction", "output"),
    ),
    Shape(
        "question and completion",
        ("question", "completion"),
        _replies("question", "completion"),
        '{"question": "Why?", "completion": "So."}',
        without=(*PAIR, "prompt"),
        fits=_texts("question", "completion"),
    ),
    # ms-swift's rows of text
    Shape(
        "query and two responses",
        ("query", "response", "rejected_response"),
        _alpaca("query", "response", "rejected_response"),
        '{"query": "Why?", "response": "So.", "rejected_response": "No."}',
        also=("history",),
    ),
    Shape(
        "query and response",
        ("query", "response"),
        _alpaca("query", "response"),
        '{"query": "Why?", "response": "So."}',
        also=("history",),
        without=PAIR,
    ),
    Shape(
        "Argilla binarized",
        ("instruction", "chosen_response", "rejected_response"),
        _replies("instruction", "chosen_response", "rejected_response"),
        '{"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No."}',
    ),
    Shape(
        "stack-exchange-paired",
        ("question", "response_j", "response_k"),
        _replies("question", "response_j", "response_k"),
        '{"question": "Why?", "response_j": "So.", "response_k": "No."}',
    ),
    Shape(
        "UltraFeedback",
        ("instruction", "completions"),
        _ultrafeedback,
        '{"instruction": "Why?", "completions": [{"response": "So.", "overall_score": 8.0}, '
        '{"response": "No.", "overall_score": 2.0}]}',
        without=PAIR,
    ),
    Shape(
        "distilabel ratings",
        ("instruction", "generations", "ratings"),
        _generations,
        '{"instruction": "Why?", "generations": ["So.", "No."], "ratings": [5, 1]}',
        without=PAIR,
        also=("rationale", "rationales"),  # a judge's, of the scores
    ),
    Shape(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3,
        f'{{"context": {ASKED}, "response1": "So.", "response2": "No.", "overall_preference": -2}}',
    ),
    Shape(
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2,
        '{"prompt": "Why?", "response_1": "So.", "response_2": "No.", "preference_strength": -2}',
    ),
    Shape(
        "Nectar",
        ("prompt", "answers"),
        _nectar,
        r'{"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": [{"answer": "So.", "rank": 1}, '
        '{"answer": "No.", "rank": 2}]}',
    ),
    Shape(
        "PKU-SafeRLHF by better_response_id",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _pku,
        '{"prompt": "Why?", "response_0": "So.", "response_1": "No.", "better_response_id": 0}',
    ),
    Shape(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio"),
        shp,
        '{"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea.", "labels": 1, '
        '"score_ratio": 3.0}',
    ),
    Shape(
        "arena votes",
        ("conversation_a", "conversation_b", "winner"),
        _arena,
        f'{{"conversation_a": {WHOLE}, "conversation_b": [...], "winner": "model_a"}}',
    ),
    Shape(
        "arena votes as text",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        _arena_texts,
        r'{"prompt": "[\"Why?\"]", "response_a": "[\"So.\"]", "response_b": "[\"No.\"]", '
        '"winner_model_a": 1, "winner_model_b": 0}',
    ),
    Shape(
        "RewardBench",
        ("prompt", *PAIR, "chosen_model", "rejected_model", "subset"),
        _replies("prompt", *PAIR),
        '{"prompt": "Why?", "chosen": "So.", "chosen_model": "a", "rejected": "No.", '
        '"rejected_model": "b", "subset": "alpacaeval-easy"}',
        fits=_texts("prompt", *PAIR),
    ),
    Shape(
        "RewardBench 2",
        ("prompt", *PAIR, "subset"),
        _reward_bench_2,
        '{"prompt": "Why?", "chosen": ["So."], "rejected": ["No.", "Hm."], "subset": "Focus"}',
        fits=_lists(*PAIR),
    ),
)

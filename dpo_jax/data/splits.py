"""The examples of a data set, in two splits: which rows are trained on, and which are held out.

Rows are read one after the other and none is kept, but for sources whose rows come sorted: these
are in memory, to be put in another order.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpo_jax.data import mixtures, sources, toy
from dpo_jax.data.conversations import as_context, is_trained_on
from dpo_jax.data.ledger import Counts, Filtered, Ledger, Malformed, Unusable
from dpo_jax.data.readers import fields_of, find_splits
from dpo_jax.data.rows import Row, Text, TextExample, names_of
from dpo_jax.data.sources import SOURCES, Source

# Where data.eval_split is empty, the first of these that the data set has.
EVAL_SPLITS = ("test", "validation", "valid", "valid1")
# A longer system text, in characters, is taken for what the question is about, not for a manner to
# answer in.
LONGEST_MANNER = 200
NOTHING_HELD_OUT = (
    "so none is held out and nothing is evaluated. Pass rows to evaluate on as a split of their "
    "own (files named train and test, data.eval_split), or --config.data.eval_fraction=0 to do "
    "without."
)
LABELLED_ROW = '{"prompt": "Name a colour.", "completion": " Blue.", "label": true}'
# What an assistant's message may say beside its content.
SAID_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")

# (split, example) of each example, where split is "train" or "eval"
SplitExamples = Iterator[tuple[str, TextExample]]


@dataclass
class Part:
    """One of the data sets that are read, and what became of its rows."""

    data: object  # its config block
    read: Callable[[Ledger], SplitExamples]
    name: str = ""  # in a mixture
    # Filled as examples are read, and complete when the last one is.
    ledger: Ledger = field(default_factory=Ledger)

    def examples(self) -> SplitExamples:
        """Read the examples, which can be done once."""
        return self.read(self.ledger)


def read(data, kind: str) -> tuple[dict[str, list[TextExample]], Ledger]:
    """Read the examples of both splits, and what became of all rows.

    Returns {"train": [...], "eval": [...]} and a ledger. Otherwise as `parts`.
    """
    examples = {"train": [], "eval": []}
    ledgers = {}
    for part in parts(data, kind):
        for split, example in part.examples():
            examples[split].append(example)
        ledgers[part.name] = part.ledger
    return examples, Ledger.of_parts(ledgers)


def parts(data, kind: str) -> list[Part]:
    """Return the data sets to read: the one at data.path, or those of data.mix.

    kind: "sft", "pairs" or "unpaired". Raises ValueError or FileNotFoundError that says which file,
    row, field or split is wrong; so does reading the examples.
    """
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r} is not one of {', '.join(SOURCES)}.")
    if data.mix:
        return _parts_of_mixture(data, kind)
    _check_kind(data, kind)
    return [Part(data, functools.partial(_read_set, _Reading(data, kind)))]


def _check_kind(data, kind: str) -> None:
    if kind == "pairs" and not SOURCES[data.source].pairs:
        raise ValueError(
            f"data.source={data.source!r} has no pairs. Make them with the `pairs` stage, or "
            "pass rows of prompt, chosen and rejected with data.source=local."
        )


@dataclass(frozen=True)
class _Reading:
    """How records become examples."""

    data: object
    kind: str
    # In a mixture, whose sets may have files of the same name: what goes before theirs.
    folder: str = ""

    def splits(self) -> tuple[Iterable, Callable[[], Iterable] | None]:
        """Return the records to train on, and what reads those to evaluate on, if there are any."""
        splits = find_splits(self.data.path)
        train_names, eval_name = choose(list(splits), self.data)
        train = itertools.chain.from_iterable(splits[name]() for name in train_names)
        return train, splits[eval_name] if eval_name else None

    def rows(
        self, records: Iterable, counts: Counts, limit: int = 0
    ) -> Iterator[tuple[dict, list[TextExample]]]:
        """Yield the fields and the examples of each good row, and count the others by reason.

        records: (where, record) of each. limit: of examples, 0 for none; the row that passes it is
        the last.
        """
        data = self.data
        source = SOURCES[data.source]
        parse = sources.parser(data)
        if source.sorted:
            records = sorted(records, key=lambda record: _hash(str(record[1])))
        found = 0
        for where, record in records:
            # Before the row is counted as read: rows after the last one needed are not looked at.
            if limit and found >= limit:
                break
            counts.read += 1
            if self.folder:
                where = os.path.join(self.folder, where)
            try:
                fields = fields_of(record)
                row = parse(fields)
                counts.recognise(row)
                examples = examples_of(row, self.kind, data.turns, where)
            except Filtered as reason:
                # Left out on purpose by the source's rule, which is no fault of the row.
                counts.filter(str(reason))
            except Unusable as reason:
                counts.drop(str(reason), where)
            except Malformed as error:
                if data.on_bad_row == "error":
                    raise ValueError(_explain(error, where, record, data, source)) from None
                counts.drop(error.reason, where)
            else:
                counts.further_pairs += len(examples) - 1
                found += len(examples)
                yield fields, examples


def _read_set(reading: _Reading, ledger: Ledger) -> SplitExamples:
    """Yield the examples of one data set, and fill its ledger."""
    data = reading.data
    if data.source == "toy":
        yield from _count_shared_prompts(_toy_examples(data, reading.kind, ledger), ledger)
        return
    train, evals = reading.splits()
    train = _flat(reading.rows(train, ledger.train, data.max_rows))
    if evals:
        evals = _flat(reading.rows(evals(), ledger.eval, data.max_eval_rows))
        both = itertools.chain(
            zip(itertools.repeat("train"), train), zip(itertools.repeat("eval"), evals)
        )
        yield from _count_shared_prompts(both, ledger)
        return
    for split, example in _hold_out(train, data.eval_fraction, ledger.train):
        if split == "eval":
            # All that is held out is kept from training, even if the evaluation reads fewer.
            ledger.train.held_out += 1
            if data.max_eval_rows and ledger.eval.read == data.max_eval_rows:
                continue
            ledger.eval.read += 1
        yield split, example


def _flat(rows: Iterable[tuple[dict, list[TextExample]]]) -> Iterator[TextExample]:
    for _, examples in rows:
        yield from examples


def _toy_examples(data, kind: str, ledger: Ledger) -> SplitExamples:
    for split, examples in toy.examples(data, kind).items():
        for example in examples:
            getattr(ledger, split).read += 1
            yield split, TextExample(*example)


def _count_shared_prompts(examples: SplitExamples, ledger: Ledger) -> SplitExamples:
    """Yield all examples, and count those to evaluate on whose prompt is trained on."""
    hashes = {"train": array("Q"), "eval": array("Q")}
    for split, example in examples:
        hashes[split].append(prompt_hash(example))
        yield split, example
    # Counted and shown, not removed: some data sets repeat prompts between their splits.
    ledger.shared_prompts += int(np.isin(hashes["eval"], hashes["train"]).sum())


def choose(names: list[str], data) -> tuple[list[str], str]:
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


def _hold_out(examples: Iterable[TextExample], fraction: float, counts: Counts) -> SplitExamples:
    """Part the examples by prompt into "train" and "eval".

    A prompt's side depends on its question alone, so SFT and DPO on the same prompts hold out the
    same ones. Of few prompts, at least one is held out; a fraction of 0 holds out none. counts: of
    the rows to train on, warned of where all have one prompt.
    """
    # Until a prompt is held out, it may be that none is, and that the least has to be.
    waiting = []
    is_any_held_out = not fraction
    for example in examples:
        # By prompt, not by row: no prompt is both trained on and evaluated.
        place = _place(prompt_hash(example))
        waiting.append((place, example))
        is_any_held_out |= place < fraction
        if is_any_held_out:
            for place, example in waiting:
                yield ("eval" if place < fraction else "train"), example
            waiting = []
    places = {place for place, _ in waiting}
    held_out = min(places) if len(places) > 1 else None
    if len(places) == 1:
        counts.warnings.append(f"all rows have one prompt, {NOTHING_HELD_OUT}")
    for place, example in waiting:
        yield ("eval" if place == held_out else "train"), example


def prompt_hash(example: TextExample) -> int:
    """Return 8 bytes that tell prompts apart, whatever form they are in."""
    # JSON, for it may be a list of messages.
    return hash64(json.dumps(question(example)))


def question(example: TextExample) -> Text:
    """Return what tells an example's prompt from others; where there is none, the response.

    Text is itself. A chat is its turns up to the last thing that a user says, without tools and
    short system texts, and where that is one message, its text: so a question is the same in every
    form. In a whole conversation it does not depend on how much of it config.data.turns takes as
    the prompt.
    """
    if not example.prompt or isinstance(example.prompt, str):
        return example.prompt or example.responses[0]
    messages = list(example.prompt)
    if example.is_conversation:
        messages += example.responses[0]
    turns = []
    end = 0
    for message in messages:
        role = message["role"]
        content = message.get("content", "")
        # "Be brief." makes no other question of it; a document to answer about does.
        if role in ("system", "developer") and len(content) <= LONGEST_MANNER:
            continue
        turns.append({"role": role, "content": content})
        if role == "user":
            end = len(turns)
    # What comes after it, such as calls of tools, may be in one row's prompt and another's answer.
    asked = turns[:end] or turns
    return asked[0]["content"] if len(asked) == 1 else asked


def _row_hash(fields: dict) -> int:
    """Return 8 bytes that tell rows apart, whatever the order of their fields."""
    return hash64(json.dumps(_without_nulls(fields), sort_keys=True, default=str))


def _without_nulls(value):
    """Return a value without empty fields: tables have a null where JSON leaves a field out."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, the same in every process."""
    return _place(hash64(text))


def _place(hashed: int) -> float:
    # 6 of the 8 bytes: a float holds no more.
    return (hashed >> 16) / 2**48


def hash64(text: str) -> int:
    """Return 8 bytes that tell texts apart, the same in every process."""
    # Not hash(), which differs from process to process. Broken text may hold lone surrogates.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass
class _Survey:
    """What a first pass over a set of a mixture finds out: hashes of its good rows, uint64."""

    reading: _Reading
    ingredient: mixtures.Ingredient
    train_rows: np.ndarray
    train_prompts: np.ndarray
    # Of the rows to evaluate on: of a split of their own, or held out from the training rows.
    eval_rows: np.ndarray
    eval_prompts: np.ndarray
    train: mixtures.Draw | None = None  # which rows are trained on,
    eval: mixtures.Draw | None = None  # and evaluated on


def _parts_of_mixture(data, kind: str) -> list[Part]:
    """Return the sets of data.mix; each is read twice, first to find out what is in it."""
    if data.path or data.max_rows:
        name = "path" if data.path else "max_rows"
        raise ValueError(
            f"data.mix and data.{name}={data[name]!r} cannot both be set: a mixture says itself "
            f"which sets are read, and how much of each. Pass --config.data.{name}= to clear it."
        )
    surveys = []
    for ingredient in mixtures.parse(data.mix, SOURCES):
        set_data = data.copy_and_resolve_references()
        set_data.update(
            mix="",
            path=ingredient.path,
            source=ingredient.source or data.source,
            train_split=ingredient.split or data.train_split,
        )
        if set_data.source != "local":
            set_data.columns = ""
        if set_data.source == "toy":
            raise ValueError("data.mix: the toy makes its own data, and is in no mixture.")
        _check_kind(set_data, kind)
        reading = _Reading(set_data, kind, _folder_of(ingredient.path))
        surveys.append(_survey(reading, ingredient))

    eval_prompts = np.unique(np.concatenate([survey.eval_prompts for survey in surveys]))
    for survey in surveys:
        may_train = ~np.isin(survey.train_prompts, eval_prompts)
        survey.train = mixtures.draw(survey.train_rows[may_train], survey.ingredient)
    _draw_evaluation(surveys, data.max_eval_rows)

    evaluated_on = set(eval_prompts.tolist())
    found = []
    for survey in surveys:
        read_drawn = functools.partial(_drawn_examples, survey, evaluated_on)
        found.append(Part(survey.reading.data, read_drawn, survey.ingredient.name))
    return found


def _survey(reading: _Reading, ingredient: mixtures.Ingredient) -> _Survey:
    train, evals = reading.splits()
    train_rows, train_prompts = _hashes(reading, train)
    if evals:
        eval_rows, eval_prompts = _hashes(reading, evals())
    else:
        is_held_out = _held_out(train_prompts, reading.data.eval_fraction)
        eval_rows, eval_prompts = train_rows[is_held_out], train_prompts[is_held_out]
    return _Survey(reading, ingredient, train_rows, train_prompts, eval_rows, eval_prompts)


def _hashes(reading: _Reading, records: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the good rows and of their prompts."""
    rows, prompts = array("Q"), array("Q")
    for fields, examples in reading.rows(records, Counts()):
        rows.append(_row_hash(fields))
        # The pairs of a row have one prompt.
        prompts.append(prompt_hash(examples[0]))
    return np.array(rows, np.uint64), np.array(prompts, np.uint64)


def _held_out(prompts: np.ndarray, fraction: float) -> np.ndarray:
    """Return which prompts are held out, as `_hold_out` does."""
    place = (prompts >> np.uint64(16)) / 2**48
    is_held_out = place < fraction
    if fraction and not is_held_out.any() and len(np.unique(place)) > 1:
        is_held_out = place == place.min()
    return is_held_out


def _draw_evaluation(surveys: list[_Survey], max_rows: int) -> None:
    """Draw at most `max_rows` rows to evaluate on (0: all), as many of each set as its share."""
    # A set of which half is trained on comes up half as often: its hashes count twice.
    scaled = []
    for survey in surveys:
        share = max(survey.train.limit / 2.0**64, 2.0**-64)
        scaled.append(survey.eval_rows / 2.0**64 / share)
    everything = np.concatenate(scaled)
    for survey in surveys:
        survey.eval = mixtures.Draw(2**64, 0)
    if not max_rows or len(everything) <= max_rows:
        return
    limit = np.partition(everything, max_rows - 1)[max_rows - 1]
    left = max_rows - int((everything < limit).sum())
    for survey, of_set in zip(surveys, scaled, strict=True):
        # Copies of one row have the same hash, so some of them may be taken and others not.
        count = int((of_set < limit).sum())
        at_limit = min(left, int((of_set == limit).sum()))
        left -= at_limit
        survey.eval = mixtures.Draw(0, 0)
        if count + at_limit:
            survey.eval = mixtures.smallest(survey.eval_rows, count + at_limit)


def _drawn_examples(survey: _Survey, evaluated_on: set[int], ledger: Ledger) -> SplitExamples:
    reading = survey.reading
    train, evals = reading.splits()
    if not evaluated_on and reading.data.eval_fraction:
        # Each set of a mixture holds out prompts of its own, where it has two or more.
        reason = "no data set has two different prompts"
        ledger.train.warnings.append(f"{reason}, {NOTHING_HELD_OUT}")
    own_prompts = set() if evals else set(survey.eval_prompts.tolist())
    for fields, examples in reading.rows(train, ledger.train):
        prompt = prompt_hash(examples[0])
        if prompt in own_prompts:
            ledger.train.held_out += len(examples)
            ledger.eval.read += 1
            ledger.eval.further_pairs += len(examples) - 1
            yield from _drawn(survey.eval, "eval", fields, examples, ledger.eval)
        elif prompt in evaluated_on:
            for _ in examples:
                ledger.train.filter("its prompt is evaluated on")
        else:
            yield from _drawn(survey.train, "train", fields, examples, ledger.train)
    if evals:
        for fields, examples in reading.rows(evals(), ledger.eval):
            yield from _drawn(survey.eval, "eval", fields, examples, ledger.eval)


def _drawn(draw: mixtures.Draw, split: str, fields: dict, examples: list, counts: Counts):
    """Yield (split, example) of a row's examples if the row is drawn; else count them."""
    if draw.takes(_row_hash(fields)):
        for example in examples:
            yield split, example
    else:
        counts.not_drawn += len(examples)


def _folder_of(path: str) -> str:
    """Return the folder that a set's files are named from; "" for a set of the hub."""
    for candidate in (path, path.rpartition(":")[0]):
        if candidate and Path(candidate).expanduser().is_dir():
            return candidate
    return os.path.dirname(path) if Path(path).expanduser().is_file() else ""


def examples_of(
    row: Row, kind: str, turns: str, where: str, *, keep_all: bool = False
) -> list[TextExample]:
    """Return the examples of a row: its pairs, for SFT its best response, or its unpaired rows.

    kind: "pairs", "sft" or "unpaired". turns: as config.data.turns, for SFT. Raises Malformed where
    this kind of training lacks a response or a label, Filtered where SFT has no use of it, and,
    unless keep_all, Unusable where a response is empty or both of a pair are equal.
    """
    if kind == "unpaired":
        return _unpaired(row, where)
    if kind == "sft":
        if row.label is False:
            raise Filtered("label is false: an answer that was not liked")
        prompt, response = row.prompt, row.responses[0]
        is_conversation = prompt == []
        if is_conversation:
            prompt, response = _split_conversation(response, turns)
        if isinstance(prompt, list):
            prompt = as_context(prompt)
        if not keep_all:
            _check_usable((response,))
        example = TextExample(prompt, (response,), where, row.tools, is_conversation)
        return [dataclasses.replace(example, numbers=row.numbers)]
    if row.label is not None:
        raise Malformed(
            "a pair needs two responses, and a row of one completion with a label has half of it",
            advice="train on such rows as they are with --config=kto, or join a completion "
            "labelled true and one labelled false of the same prompt as 'chosen' and 'rejected'",
        )
    if not row.pairs:
        raise Malformed("a pair needs two responses, in 'chosen' and 'rejected'")
    examples = []
    prompt = as_context(row.prompt) if isinstance(row.prompt, list) else row.prompt
    for chosen, rejected in row.pairs:
        responses = (row.responses[chosen], row.responses[rejected])
        if not keep_all:
            _check_usable(responses)
        # What a column says of the row, it says of each of its pairs.
        examples.append(TextExample(prompt, responses, where, row.tools, numbers=row.numbers))
    return examples


def _unpaired(row: Row, where: str) -> list[TextExample]:
    """Return a completion with its label, or each pair as two completions: true, then false.

    Of a conversation, the label is that of its last answer.
    """
    if row.pairs:
        examples = []
        for pair in examples_of(row, "pairs", "last", where):
            for response, label in zip(pair.responses, (True, False), strict=True):
                examples.append(dataclasses.replace(pair, responses=(response,), label=label))
        return examples
    if row.label is None:
        error = Malformed(
            "an unpaired row needs a field 'label', true for a desirable completion and false for "
            "an undesirable one",
            advice="if another column has it, name it with --config.data.columns=label=COLUMN",
        )
        error.example = f"KTO rows: {LABELLED_ROW}"
        raise error
    label = row.label
    row = dataclasses.replace(row, label=None)
    (example,) = examples_of(row, "sft", "last", where)
    return [dataclasses.replace(example, label=label)]


def _split_conversation(messages: list, turns: str) -> tuple[list, list]:
    """Part a conversation before the first assistant turn that answers, or before the last one.

    turns: "all" or "last". The first turns of "all" are prompt, too, where their weight is 0.
    Raises Malformed where it does not end in an assistant's turn after another's.
    """
    roles = [message["role"] for message in messages]
    # A greeting with which the assistant opens answers nothing.
    asked = roles.index("user") if "user" in roles else len(roles)
    if roles[-1:] != ["assistant"] or "assistant" not in roles[asked:]:
        raise Malformed(
            "the conversation does not end in an assistant's turn after a user's", f"roles {roles}"
        )
    start = len(roles) - 1
    if turns == "all":
        answers = [turn for turn in range(asked, len(roles)) if roles[turn] == "assistant"]
        trained = [turn for turn in answers if is_trained_on(messages[turn])]
        # With none, the last one is the response, of which the chat template refuses the weight.
        start = trained[0] if trained else start
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
        found = names_of(fields_of(record))
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

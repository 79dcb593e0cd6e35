"""The examples of a data set, in three splits: to train on, to validate on, and to test on.

A prompt that is held out is of validation ("eval") or of test for good, whatever is drawn of the
two: what training evaluates on, and selects by, is never what is reported.

Rows are read one after the other and none is kept, but for sources whose rows come sorted: these
are in memory, to be put in another order. Where a part of them is drawn or held out, they are read
twice. The first pass looks at all rows and keeps a few hashes of each, also for those who read the
same files later; the second looks at those rows alone that are used.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpo_jax.data import draws, mixtures, sources, toy
from dpo_jax.data.conversations import as_context, is_trained_on
from dpo_jax.data.ledger import Counts, Filtered, Ledger, Malformed, Unusable
from dpo_jax.data.readers import fields_of, find_splits, names_split
from dpo_jax.data.rows import NO_SUBSET, Row, Text, TextExample, names_of
from dpo_jax.data.shapes import PROMPTS, NoShape
from dpo_jax.data.sources import SOURCES, Source

SPLITS = ("train", "eval", "test")  # to train on, to validate on, to test on
# Where data.eval_split is empty, the first of these that the data set has.
VALIDATION_SPLITS = ("validation", "valid", "valid1")
TEST_SPLIT = "test"
# Fields that say which subset a row is of; SHP adds the split to it.
SUBSET_FIELDS = ("subset", "domain")
SPLIT_OF_DOMAIN = re.compile(r"_(train|validation|test)$")
LONGEST_SUBSET = 80  # characters of a name
# A longer system text, in characters, is taken for what the question is about, not for a manner to
# answer in.
LONGEST_MANNER = 200
NOTHING_HELD_OUT = (
    "so none is held out and nothing is evaluated. Pass rows to evaluate on as a split of their "
    "own (files named train and test, data.eval_split), or --config.data.eval_fraction=0 to do "
    "without."
)
PROMPTS_ALONE = (
    "Rows of a prompt alone are for stages that only sample (ppo, pairs, best_of_n and evaluate); "
    "all others, and the command `dpo-jax data`, need an answer."
)
MOST_KEPT = 4_000_000  # rows, of which 36 bytes each are kept for later readers
LABELLED_ROW = '{"prompt": "Name a colour.", "completion": " Blue.", "label": true}'
# What an assistant's message may say beside its content.
SAID_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")

# (split, example) of each example, where split is one of SPLITS
SplitExamples = Iterator[tuple[str, TextExample]]


@dataclass
class Part:
    """One of the data sets that are read, and what became of its rows."""

    data: object  # its config block
    read: Callable[[Ledger, Collection[str]], SplitExamples]
    name: str = ""  # in a mixture
    has_test_split: bool = False  # of its own: bad rows of it are counted, and stop no run
    # Filled as examples are read, and complete when the last one is.
    ledger: Ledger = field(default_factory=Ledger)

    def examples(self, wanted: Collection[str] = SPLITS) -> SplitExamples:
        """Read the examples, which can be done once; wanted: of these splits alone.

        Rows of others are not read where they are in files of their own.
        """
        return self.read(self.ledger, wanted)


def read(
    data, kind: str, wanted: Collection[str] = SPLITS
) -> tuple[dict[str, list[TextExample]], Ledger]:
    """Read the examples of all splits, or of some, and what became of all rows.

    Returns {"train": [...], "eval": [...], "test": [...]} and a ledger. Otherwise as `parts`.
    """
    examples = {split: [] for split in SPLITS}
    ledgers = {}
    for part in parts(data, kind):
        for split, example in part.examples(wanted):
            examples[split].append(example)
        ledgers[part.name] = part.ledger
    return examples, Ledger.of_parts(ledgers)


def parts(data, kind: str) -> list[Part]:
    """Return the data sets to read: the one at data.path, or those of data.mix.

    kind: "sft", "pairs", "unpaired" or "prompts". Raises ValueError or FileNotFoundError that says
    which file, row, field or split is wrong; so does reading the examples.
    """
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r} is not one of {', '.join(SOURCES)}.")
    if data.mix:
        return _parts_of_mixture(data, kind)
    _check_kind(data, kind)
    if data.source == "toy":
        return [Part(data, functools.partial(_read_toy, data, kind))]
    reading = _Reading(data, kind)
    streams = reading.streams()
    read_set = functools.partial(_read_set, reading, streams)
    return [Part(data, read_set, has_test_split="test" in streams)]


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
    # In a mixture, whose sets may have files of the same name: what goes before theirs, and the
    # subset that the set is.
    folder: str = ""
    subset: str = ""

    def streams(self) -> dict[str, Callable[[], Iterable]]:
        """Return what reads the records of each of SPLITS that has files of its own."""
        splits = find_splits(self.data.path)
        train_names, eval_name, test_name = choose(list(splits), self.data)

        def train():
            return itertools.chain.from_iterable(splits[name]() for name in train_names)

        streams = {"train": train}
        if eval_name:
            streams["eval"] = splits[eval_name]
        if test_name:
            streams["test"] = splits[test_name]
        return streams

    def in_order(self, records: Iterable) -> Iterable:
        """Return (where, record) of each row of a stream in the order in which they are used."""
        if SOURCES[self.data.source].sorted:
            return sorted(records, key=lambda record: _hash(str(record[1])))
        return records

    def rows(self, split: str, records: Iterable, counts: Counts) -> Iterator["_GoodRow"]:
        """Yield each good row of a stream, and count the others by reason.

        split: whose stream it is. records: as `streams` reads them.
        """
        data = self.data
        parse = self.parser()
        # A stage that trains does not read the test split, and judging does not need all of it.
        stops_at_bad_row = data.on_bad_row == "error" and split != "test"
        for place, (where, record) in enumerate(self.in_order(records)):
            counts.read += 1
            try:
                good = self.row(parse, place, where, record, counts)
            except Filtered as reason:
                # Left out on purpose by the source's rule, which is no fault of the row.
                counts.filter(str(reason))
            except Unusable as reason:
                counts.drop(str(reason), self.named(where))
            except Malformed as error:
                if stops_at_bad_row:
                    source = SOURCES[data.source]
                    told = _explain(error, self.named(where), record, data, source)
                    raise ValueError(told) from None
                counts.drop(error.reason, self.named(where))
            else:
                counts.further_pairs += len(good.examples) - 1
                yield good

    def parser(self) -> Callable[[dict], Row]:
        """Return the function that reads a record's fields."""
        return sources.parser(self.data, takes_prompts=self.kind == "prompts")

    def row(
        self, parse: Callable[[dict], Row], place: int, where: str, record, counts: Counts
    ) -> "_GoodRow":
        """Return what a record is used for, and count it as it is recognised.

        Raises Filtered, Unusable or Malformed.
        """
        fields = fields_of(record)
        row = parse(fields)
        counts.recognise(row)
        examples = examples_of(row, self.kind, self.data.turns, self.named(where))
        file, _, _ = where.rpartition(" row ")
        subset = self.subset or subset_of(fields, file)
        # The pairs of a row have one prompt.
        return _GoodRow(place, fields, examples, subset, prompt_hash(examples[0]))

    def named(self, where: str) -> str:
        """Return where a record stands, as messages name it."""
        return os.path.join(self.folder, where) if self.folder else where


@dataclass(frozen=True)
class _GoodRow:
    """A row that can be used."""

    place: int  # in its stream, from 0
    fields: dict
    examples: list[TextExample]
    subset: str
    question_hash: int

    def marked(self) -> list[TextExample]:
        """Return the examples with what is known of the row."""
        known = dict(subset=self.subset, question_hash=self.question_hash)
        return [dataclasses.replace(example, **known) for example in self.examples]


def subset_of(fields: dict, file: str) -> str:
    """Return the subset that a row is of: as a field says, or else as the folder of its file does.

    file: the name of its file, as it is named in messages. "" where nothing tells, or where the
    field says what rows of no subset are called in a ledger.
    """
    for name in SUBSET_FIELDS:
        value = fields.get(name)
        if isinstance(value, str) and 0 < len(value) <= LONGEST_SUBSET:
            return "" if value == NO_SUBSET else SPLIT_OF_DOMAIN.sub("", value)
    return _folder_subset(file)


@functools.lru_cache(maxsize=1000)
def _folder_subset(file: str) -> str:
    """Return the folders that a file is in, without those that are named after a split."""
    if file.endswith("]"):  # a split of the hub, owner/name[train]
        return ""
    folders = os.path.dirname(file).split("/")
    return "/".join(folder for folder in folders if folder and not names_split(folder))


def _read_toy(data, kind: str, ledger: Ledger, _wanted: Collection[str]) -> SplitExamples:
    yield from _count_shared_prompts(_toy_examples(data, kind, ledger), ledger)


def _read_set(
    reading: _Reading, streams: dict[str, Callable], ledger: Ledger, wanted: Collection[str]
) -> SplitExamples:
    """Yield the examples of one data set, and fill its ledger."""
    yield from _count_shared_prompts(_examples_of_set(reading, streams, ledger, wanted), ledger)


def _examples_of_set(
    reading: _Reading, streams: dict[str, Callable], ledger: Ledger, wanted: Collection[str]
) -> SplitExamples:
    for own, records in streams.items():
        if not _may_give(own, streams, wanted):
            continue
        plan = _plan_of(own, reading, streams, ledger)
        if plan is not None:
            yield from _planned(reading, own, records, plan, ledger, wanted)
            continue
        for row in reading.rows(own, records(), getattr(ledger, own)):
            if own not in wanted:
                continue
            for example in row.marked():
                yield own, example


def _may_give(own: str, streams: dict[str, Callable], wanted: Collection[str]) -> bool:
    """Return whether a stream may have examples of the splits that are wanted."""
    gives = {own}
    if own == "eval" or (own == "train" and "eval" not in streams):
        gives = set(SPLITS[SPLITS.index(own) :])
    return not gives.isdisjoint(wanted)


LEFT_OUT = -1  # the side of a row whose prompt is of another split


@dataclass(frozen=True)
class _Found:
    """What a first pass finds out about the good rows of a stream: numbers of each, [R]."""

    places: np.ndarray  # where in the stream they are, from 0, int64
    rows: np.ndarray  # hashes of what they say, uint64
    prompts: np.ndarray  # and of their prompts, uint64
    strata: np.ndarray  # and of their subsets, uint64
    sizes: np.ndarray  # how many examples each makes, int32
    counts: Counts  # of all rows, before any is drawn


def _find(reading: _Reading, split: str, records: Iterable) -> _Found:
    """Read a stream once, for the hashes of its good rows."""
    places, rows, prompts, strata, sizes = (
        array("q"),
        array("Q"),
        array("Q"),
        array("Q"),
        array("i"),
    )
    counts = Counts()
    for row in reading.rows(split, records, counts):
        places.append(row.place)
        rows.append(_row_hash(row.fields))
        prompts.append(row.question_hash)
        strata.append(_subset_hash(row.subset))
        sizes.append(len(row.examples))
    hashes = [np.array(numbers, np.uint64) for numbers in (rows, prompts, strata)]
    return _Found(np.array(places, np.int64), *hashes, np.array(sizes, np.int32), counts)


@functools.lru_cache(maxsize=10_000)
def _subset_hash(subset: str) -> int:
    return hash64(subset)


# What first passes found out, the oldest first: a run reads the same files for several stages.
_kept: dict[tuple, _Found] = {}


def _found(reading: _Reading, split: str, streams: dict[str, Callable]) -> _Found:
    """Return what a first pass over a stream finds out, or has found out in this process."""
    files = _files_at(reading.data.path)
    if not files:
        return _find(reading, split, streams[split]())
    settings = sorted(reading.data.to_dict().items())
    same_files = (repr(settings), files, reading.folder, reading.subset, split)
    found = _kept.get((*same_files, reading.kind))
    if found is None and reading.kind == "prompts":
        # Where each row has an answer, prompts are read as for SFT.
        of_sft = _kept.get((*same_files, "sft"))
        found = None if of_sft is None or of_sft.counts.dropped else of_sft
    if found is None:
        found = _find(reading, split, streams[split]())
        _kept[(*same_files, reading.kind)] = found
        while len(_kept) > 1 and sum(len(kept.rows) for kept in _kept.values()) > MOST_KEPT:
            del _kept[next(iter(_kept))]
    return found


def _files_at(path: str) -> tuple:
    """Return name, size and time of each file that a data set may be read from; () if elsewhere."""
    for candidate in (path, path.rpartition(":")[0]):
        place = Path(candidate).expanduser()
        if not candidate or not place.exists():
            continue
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found = []
        for file in files:
            if file.is_file():
                state = file.stat()
                found.append((str(file), state.st_size, state.st_mtime_ns))
        return tuple(found)
    return ()


@dataclass
class _Plan:
    """What becomes of each good row of a stream, in its order."""

    found: _Found
    sides: np.ndarray  # int8 [R]: an index into SPLITS, or LEFT_OUT
    is_drawn: np.ndarray  # bool [R]: else the row is counted as not drawn

    @classmethod
    def of_all(cls, found: _Found, split: str) -> "_Plan":
        """Return the plan by which all rows are of one split."""
        count = len(found.prompts)
        return cls(found, np.full(count, SPLITS.index(split), np.int8), np.ones(count, bool))

    def divide(self, is_held_out: np.ndarray) -> None:
        """Divide the rows that are held out between validation and test."""
        index = np.flatnonzero(is_held_out)
        is_test = draws.are_test(self.found.prompts[index])
        self.sides[index] = np.where(is_test, SPLITS.index("test"), SPLITS.index("eval"))

    def draw(self, split: str, most: int) -> None:
        """Draw at most `most` examples of a split, 0 for all."""
        found = self.found
        index = np.flatnonzero(self.sides == SPLITS.index(split))
        sizes = found.sizes[index]
        order = draws.order(
            found.prompts[index],
            found.rows[index],
            found.strata[index],
            sizes,
            held_out=split != "train",
        )
        self.is_drawn[index] = draws.drawn(order, sizes, most)


def _plan_of(
    own: str, reading: _Reading, streams: dict[str, Callable], ledger: Ledger
) -> _Plan | None:
    """Return the plan of a stream of a set on its own; None: all of its rows are trained on."""
    data = reading.data
    holds_out = own == "train" and "eval" not in streams and data.eval_fraction > 0
    if own == "train" and not holds_out and not data.max_rows:
        return None
    found = _found(reading, own, streams)
    plan = _Plan.of_all(found, own)
    if holds_out:
        is_held_out = _held_out(found.prompts, data.eval_fraction)
        if len(found.prompts) and not is_held_out.any():
            ledger.train.warnings.append(f"all rows have one prompt, {NOTHING_HELD_OUT}")
        plan.divide(is_held_out)
    if own == "eval" and "test" in streams:
        # Some data sets repeat prompts between their splits.
        plan.sides[np.isin(found.prompts, _test_prompts(reading, streams))] = LEFT_OUT
    elif own == "eval":
        plan.divide(np.ones(len(found.prompts), bool))
    if own == "train":
        plan.draw("train", data.max_rows)
    for split in ("eval", "test"):
        plan.draw(split, data.max_eval_rows)
    return plan


def _test_prompts(reading: _Reading, streams: dict[str, Callable]) -> np.ndarray:
    """Return the hashes of all prompts of the test split, those of rows without an answer too."""
    found = _found(reading, "test", streams)
    if not found.counts.dropped or reading.kind == "prompts":
        return found.prompts
    alone = _found(dataclasses.replace(reading, kind="prompts"), "test", streams)
    return np.concatenate([found.prompts, alone.prompts])


def _planned(
    reading: _Reading,
    own: str,
    records: Callable[[], Iterable],
    plan: _Plan,
    ledger: Ledger,
    wanted: Collection[str],
) -> SplitExamples:
    """Yield the examples of a stream that are planned, and count those of all rows.

    own: whose stream it is. Other rows are not looked at again.
    """
    _count_planned(own, plan, ledger)
    numbers = [SPLITS.index(split) for split in wanted]
    index = np.flatnonzero(plan.is_drawn & np.isin(plan.sides, numbers))
    parse = reading.parser()
    counted = Counts()  # a second time
    at = 0
    changed = f"{reading.data.path}: the file changed while it was read."
    for place, (where, record) in enumerate(reading.in_order(records())):
        if at == len(index):
            break
        if place != plan.found.places[index[at]]:
            continue
        try:
            row = reading.row(parse, place, where, record, counted)
        except (Filtered, Unusable, Malformed):
            raise RuntimeError(changed) from None
        number = index[at]
        if row.question_hash != plan.found.prompts[number]:
            raise RuntimeError(changed)
        at += 1
        for example in row.marked():
            yield SPLITS[plan.sides[number]], example
    if at < len(index):
        raise RuntimeError(changed)


def _count_planned(own: str, plan: _Plan, ledger: Ledger) -> None:
    """Count all rows of a stream: as they were found, and what is planned of them."""
    counts = getattr(ledger, own).plus(plan.found.counts)
    setattr(ledger, own, counts)
    sizes = plan.found.sizes
    left_out = int(sizes[plan.sides == LEFT_OUT].sum())
    if left_out:
        other = "evaluated" if own == "train" else "tested"
        counts.filtered[f"its prompt is {other} on"] = left_out
    for number, split in enumerate(SPLITS):
        is_of_split = plan.sides == number
        into = getattr(ledger, split)
        rows, examples = int(is_of_split.sum()), int(sizes[is_of_split].sum())
        if split != own:
            counts.held_out += examples
            into.read += rows
            into.further_pairs += examples - rows
        into.not_drawn += int(sizes[is_of_split & ~plan.is_drawn].sum())


def _toy_examples(data, kind: str, ledger: Ledger) -> SplitExamples:
    kind = "sft" if kind == "prompts" else kind
    for split, examples in toy.examples(data, kind).items():
        for example in examples:
            getattr(ledger, split).read += 1
            yield split, TextExample(*example)


def _count_shared_prompts(examples: SplitExamples, ledger: Ledger) -> SplitExamples:
    """Yield all examples, and count those held out whose prompt is trained on."""
    hashes = {split: array("Q") for split in SPLITS}
    for split, example in examples:
        hashes[split].append(example.question_hash or prompt_hash(example))
        yield split, example
    # Counted and shown, not removed: some data sets repeat prompts between their splits.
    ledger.shared_prompts += int(np.isin(hashes["eval"], hashes["train"]).sum())
    ledger.shared_test_prompts += int(np.isin(hashes["test"], hashes["train"]).sum())


def choose(names: list[str], data) -> tuple[list[str], str, str]:
    """Return the splits to train on, the one to validate on, and the one to test on.

    The latter two are "" where there is none: then a part of the split before is taken.
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
    unused = [name for name in names if name not in train]
    test = TEST_SPLIT if TEST_SPLIT in unused else ""
    if data.eval_split:
        # Another one than those that are known may be a part of the test split.
        return train, data.eval_split, test if data.eval_split in VALIDATION_SPLITS else ""
    validation = [name for name in VALIDATION_SPLITS if name in unused]
    if validation:
        return train, validation[0], test
    return train, test, ""


def prompt_hash(example: TextExample) -> int:
    """Return 8 bytes that tell prompts apart, whatever form they are in."""
    return hash_of(question(example))


def hash_of(asked: Text) -> int:
    """Return 8 bytes that tell what `question` returns apart."""
    # JSON, for it may be a list of messages.
    return hash64(json.dumps(asked))


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


def answered_questions(example: TextExample) -> list[Text]:
    """Return what tells the prompt of each further answer apart that an example trains on.

    A response of several turns answers more than its prompt: each turn of the assistant that is
    trained on has the conversation up to it as its prompt. Without those that `question` is of.
    """
    found = []
    for response in example.responses:
        if isinstance(response, str) or isinstance(example.prompt, str):
            continue
        for turn, message in enumerate(response):
            if message["role"] != "assistant" or not is_trained_on(message):
                continue
            asked = question(TextExample([*example.prompt, *response[:turn]], (), example.where))
            if asked not in found:
                found.append(asked)
    own = question(example)
    return [asked for asked in found if asked != own]


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
    """What a first pass over a set of a mixture finds out, and what is planned for its rows."""

    reading: _Reading
    ingredient: mixtures.Ingredient
    streams: dict[str, Callable[[], Iterable]]
    plans: dict[str, _Plan]  # of each stream
    share: float = 1.0  # of the rows to train on, how much is drawn

    def held_out(self) -> Iterator[tuple[_Plan, np.ndarray]]:
        """Yield the plan of each stream, with the indices of the rows that are held out."""
        for plan in self.plans.values():
            yield plan, np.flatnonzero(plan.sides > SPLITS.index("train"))

    def prompts(self) -> np.ndarray:
        """Return the hashes of all prompts that are held out."""
        return np.concatenate([plan.found.prompts[index] for plan, index in self.held_out()])


def _parts_of_mixture(data, kind: str) -> list[Part]:
    """Return the sets of data.mix; each is read twice, first to find out what is in it."""
    if data.path or data.max_rows:
        name = "path" if data.path else "max_rows"
        raise ValueError(
            f"data.mix and data.{name}={data[name]!r} cannot both be set: a mixture says itself "
            f"which sets are read, and how much of each. Pass --config.data.{name}= to clear it."
        )
    surveys = []
    ingredients = mixtures.parse(data.mix, SOURCES)
    for ingredient, subset in zip(ingredients, mixtures.short_names(ingredients), strict=True):
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
        reading = _Reading(set_data, kind, _folder_of(ingredient.path), subset)
        surveys.append(_survey(reading, ingredient))

    _divide_mixture(surveys)
    held_out = np.unique(np.concatenate([survey.prompts() for survey in surveys]))
    for survey in surveys:
        plan = survey.plans["train"]
        found = plan.found
        in_train = plan.sides == SPLITS.index("train")
        # No prompt is trained on that any of the sets evaluates on.
        plan.sides[in_train & np.isin(found.prompts, held_out)] = LEFT_OUT
        index = np.flatnonzero(plan.sides == SPLITS.index("train"))
        draw = mixtures.draw(found.rows[index], survey.ingredient)
        survey.share = max(draw.limit / 2.0**64, 2.0**-64)
        plan.is_drawn[index] = [draw.takes(row) for row in found.rows[index].tolist()]
    for split in ("eval", "test"):
        _draw_evaluation(surveys, split, data.max_eval_rows)

    parts_of_mixture = []
    for survey in surveys:
        read_drawn = functools.partial(_drawn_examples, survey, bool(len(held_out)))
        part = Part(survey.reading.data, read_drawn, survey.ingredient.name)
        part.has_test_split = "test" in survey.streams
        parts_of_mixture.append(part)
    return parts_of_mixture


def _survey(reading: _Reading, ingredient: mixtures.Ingredient) -> _Survey:
    """Read a set of a mixture once, and find out which of its rows are held out."""
    streams = reading.streams()
    plans = {}
    for split in streams:
        plans[split] = _Plan.of_all(_found(reading, split, streams), split)
    if "eval" not in streams:
        is_held_out = _held_out(plans["train"].found.prompts, reading.data.eval_fraction)
        plans["train"].sides[is_held_out] = SPLITS.index("eval")
    return _Survey(reading, ingredient, streams, plans)


def _divide_mixture(surveys: list[_Survey]) -> None:
    """Divide what is held out between validation and test, each prompt alike in all sets."""
    to_divide = [survey for survey in surveys if "test" not in survey.streams]
    prompts = [survey.prompts() for survey in to_divide]
    everything = np.concatenate([*prompts, np.zeros(0, np.uint64)])
    test_prompts = everything[draws.are_test(everything)]
    of_splits = []
    for survey in surveys:
        if "test" in survey.streams:
            of_splits.append(_test_prompts(survey.reading, survey.streams))
    # Those of a split of their own come first: they cannot be of validation in another set.
    test_prompts = np.unique(np.concatenate([test_prompts, *of_splits]))
    for survey in surveys:
        for plan, index in survey.held_out():
            is_test = np.isin(plan.found.prompts[index], test_prompts)
            plan.sides[index[is_test]] = SPLITS.index("test")


def _held_out(prompts: np.ndarray, fraction: float) -> np.ndarray:
    """Return which rows of a set are held out, by the hashes of their prompts.

    A prompt's side depends on its question alone, so SFT and DPO on the same prompts hold out the
    same ones, and no prompt is both trained on and evaluated. Of few prompts, at least one is held
    out, unless all are the same; a fraction of 0 holds out none.
    """
    place = (prompts >> np.uint64(16)) / 2**48
    is_held_out = place < fraction
    if fraction and not is_held_out.any() and len(np.unique(place)) > 1:
        is_held_out = place == place.min()
    return is_held_out


def _draw_evaluation(surveys: list[_Survey], split: str, most: int) -> None:
    """Draw at most `most` examples of a split (0: all), as many of each set as its share.

    A set of which half is trained on comes up half as often.
    """
    held_out = []  # (plan, indices) of each stream that has rows of the split
    columns = {name: [] for name in ("prompts", "rows", "strata", "sizes", "scale")}
    for number, survey in enumerate(surveys):
        for plan, index in survey.held_out():
            found = plan.found
            index = index[plan.sides[index] == SPLITS.index(split)]
            held_out.append((plan, index))
            columns["prompts"].append(found.prompts[index])
            columns["rows"].append(found.rows[index])
            columns["sizes"].append(found.sizes[index])
            columns["strata"].append(np.full(len(index), number))
            columns["scale"].append(np.full(len(index), survey.share))
    values = {name: np.concatenate(of_sets) for name, of_sets in columns.items()}
    is_drawn = draws.drawn(draws.order(**values, held_out=True), values["sizes"], most)
    start = 0
    for plan, index in held_out:
        plan.is_drawn[index] = is_drawn[start : start + len(index)]
        start += len(index)


def _drawn_examples(
    survey: _Survey, is_any_held_out: bool, ledger: Ledger, wanted: Collection[str]
) -> SplitExamples:
    if not is_any_held_out and survey.reading.data.eval_fraction:
        # Each set of a mixture holds out prompts of its own, where it has two or more.
        reason = "no data set has two different prompts"
        ledger.train.warnings.append(f"{reason}, {NOTHING_HELD_OUT}")
    for own, records in survey.streams.items():
        if _may_give(own, survey.streams, wanted):
            yield from _planned(survey.reading, own, records, survey.plans[own], ledger, wanted)


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

    kind: "pairs", "sft", "unpaired", or "prompts", which are as for SFT, or without a response.
    turns: as config.data.turns, for SFT. Raises Malformed where this kind of training lacks a
    response or a label, Filtered where SFT has no use of it, and, unless keep_all, Unusable where a
    response is empty or both of a pair are equal.
    """
    if kind == "unpaired":
        return _unpaired(row, where)
    if kind == "prompts" and not row.responses:
        prompt = as_context(row.prompt) if isinstance(row.prompt, list) else row.prompt
        return [TextExample(prompt, (), where, row.tools)]
    if kind in ("sft", "prompts"):
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
        fields = fields_of(record)
    except Malformed:
        fields = {}
    lines = [
        f"{where}: {error}.",
        f"  data.path: {data.path}",
        f"  fields found: {names_of(fields) or 'none'}",
        f"  a right row for {error.example or f'data.source={data.source}: {source.example}'}",
    ]
    if isinstance(error, NoShape) and not fields.keys().isdisjoint(PROMPTS):
        lines.append(PROMPTS_ALONE)
    lines.append("Fix the row, or drop and count such rows with --config.data.on_bad_row=drop.")
    return "\n".join(lines)

"""What a data set looks like to a model: lengths, repeats, overlap, and what a cut would cost.

`take` reads and tokenises the rows as training does. Of each text it keeps a few hashes and
lengths, so that memory hardly grows with the data set.
"""

import dataclasses
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.data import dataset, leaks, mixtures, readers, sources, splits
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Counts, Ledger
from dpo_jax.data.rows import Numbers, Text, TextExample
from dpo_jax.data.tokenizer import ChatLengths, cut_examples

LIMITS = (512, 1024, 2048)  # values of max_length whose cost is measured
UNCUT = 1 << 30  # tokens: more than any row has


@dataclass(frozen=True)
class Cut:
    """What the training rows lose where they are cut to a length."""

    max_length: int
    max_prompt_length: int
    rows: int  # that lose a token, or are dropped
    prompts: int  # that lose a token
    responses: int  # that lose a token, and so their EOS
    dropped: int  # rows whose responses are equal once they are cut
    tokens: int  # that are no longer read
    share_of_rows: float
    share_of_responses: float
    share_of_tokens: float


@dataclass(frozen=True)
class Repeats:
    """Prompts and rows that are there more than once."""

    eval_prompts_in_train: int  # eval rows whose prompt is a training prompt too
    eval_prompts_nearly_in_train: int  # likewise, or normalised: see leaks.py
    test_prompts_in_train: int  # test rows whose prompt is a training prompt too
    test_prompts_nearly_in_train: int  # likewise, or normalised
    train_rows_repeated: int  # training rows that are equal to an earlier one
    train_pairs_reversed: int  # pairs whose responses another pair has the other way round


@dataclass(frozen=True)
class Piece:
    """A part of a row's text."""

    text: str
    is_trained_on: bool


@dataclass(frozen=True)
class ShownRow:
    """A row as the model reads it: the pieces of each part, by the part's name."""

    where: str
    parts: dict[str, tuple[Piece, ...]]
    tokens: dict[str, int]  # of each part; empty without a tokenizer
    numbers: Numbers  # of columns that the config names


@dataclass(frozen=True)
class Survey:
    """What was found in a data set."""

    kind: str  # "pairs", "unpaired" or "sft"
    unit: str  # of lengths: "tokens" or "characters"
    truncate: tuple[str, ...]  # which part of a cut prompt stays; of a mixture, several
    uses: dict[str, str]  # split -> "train", "eval", "test", or "" where it is not used
    ledger: Ledger
    lengths: dict[str, np.ndarray]  # of each training row before a cut, by part
    trained_on: dict[str, np.ndarray]  # how much of each response is trained on, by part
    rows_per_prompt: np.ndarray  # for each training prompt; empty where rows have no prompt
    repeats: Repeats
    cuts: list[Cut]  # at LIMITS and at data.max_length; none without a tokenizer
    rows: list[ShownRow]
    # Of the training prompts that are chat, before a cut; none without a tokenizer.
    chat_lengths: ChatLengths = dataclasses.field(default_factory=ChatLengths)
    refusal: str = ""  # why training would stop at these rows, in its own words
    stops_at_row: bool = False  # whether at a bad row, and not because too many are dropped

    def cut_at(self, max_length: int) -> Cut:
        """Return what a cut to one of the measured lengths costs."""
        (found,) = [cut for cut in self.cuts if cut.max_length == max_length]
        return found


def find_kind(data) -> str:
    """Return what the rows are: "pairs", "unpaired" (labelled), or "sft" where they are neither."""
    data = data.copy_and_resolve_references()
    # Else all rows are read first, to know which are held out or drawn.
    data.update(eval_fraction=0.0, max_rows=0)
    data.update(weight="", margin="")  # texts alone tell
    if data.mix:
        # The first set tells.
        first = mixtures.parse(data.mix, sources.SOURCES)[0]
        data.update(mix="", path=first.path, source=first.source or data.source)
        data.train_split = first.split or data.train_split
        if data.source != "local":
            data.columns = ""  # they are of the local sets
    if data.source in sources.SOURCES and not sources.SOURCES[data.source].pairs:
        return "sft"
    # The first row tells; where it is bad, the first good one.
    tried = (("pairs", "error"), ("unpaired", "error"), ("sft", "error"), ("pairs", "drop"))
    for kind, on_bad_row in tried:
        data.on_bad_row = on_bad_row
        try:
            (part,) = splits.parts(data, kind)
            for _ in part.examples():
                return kind
        except ValueError:
            continue
    return "sft"


def take(
    data,
    kind: str,
    tokenizer=None,
    *,
    shown: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read and tokenise a data set as training does, and measure it.

    data: the config's block. kind: "pairs", "unpaired" or "sft". tokenizer: the tokenizer; None:
    lengths are in characters. shown: how many rows to show. progress: called with the number of
    rows that are read so far. Rows at which training would stop are dropped and counted, and the
    survey has training's words for it. Raises what `dataset.load` raises for data of which no row
    can be used.
    """
    showing = _Showing(shown, progress)
    try:
        return _take(data, kind, tokenizer, showing)
    except ValueError as error:
        refusal = error
    # First with the rows that training drops anyway: these may only be too many.
    for on_bad_row in (data.on_bad_row, "drop"):
        lenient = data.copy_and_resolve_references()
        lenient.update(on_bad_row=on_bad_row, max_dropped=1.0)
        try:
            found = _take(lenient, kind, tokenizer, showing, must_keep_cue=False)
        except ValueError:
            continue
        stops = on_bad_row != data.on_bad_row
        return dataclasses.replace(found, refusal=str(refusal), stops_at_row=stops)
    # The settings are wrong, or no row is right: what training says explains it best.
    raise refusal


@dataclass(frozen=True)
class _Showing:
    """What a person is to see of the rows, and meanwhile."""

    rows: int
    progress: Callable[[int], None] | None


def _take(data, kind: str, tokenizer, showing: _Showing, *, must_keep_cue: bool = True) -> Survey:
    seen = {split: _Seen(showing.rows) for split in splits.SPLITS}

    def watch(split: str, example: TextExample) -> None:
        seen[split].add(example)
        if showing.progress is not None:
            showing.progress(sum(map(len, seen.values())))

    chat_lengths = ChatLengths()
    if tokenizer is None:
        ledger = _read_texts(data, kind, watch)
        lengths = seen["train"].lengths()
        trained_on = {name: lengths[name] for name in lengths if name != "prompt"}
        truncate = ()
        cuts = []
        rows = [_text_row(example) for example in seen["train"].kept()]
    else:
        # Tokenised once, whole, for the rows are to be cut to several lengths.
        examples, parts = dataset.load_parts(
            _at_length(data, UNCUT, UNCUT - 1), tokenizer, kind, watch=watch
        )
        whole = examples["train"]
        kept, ledger = _cut_as_trained(examples, parts, data, tokenizer, must_keep_cue)
        ledger.check(data.max_dropped, data.path or data.mix)
        prompt_P, response_PK, trained_on_PK = whole.lengths()
        names = _part_names(response_PK.shape[1])
        lengths = dict(zip(names, [prompt_P, *response_PK.T], strict=True))
        trained_on = dict(zip(names[1:], trained_on_PK.T, strict=True))
        truncate = tuple(sorted({dataset.truncation(part.data) for part in parts.values()}))
        cuts = _cuts(whole, list(parts.values()), data, tokenizer)
        for part in parts.values():
            chat_lengths.extend(part.chat_lengths["train"])
        rows = [_token_row(kept, index, tokenizer) for index in _spread(len(kept), showing.rows)]
    return Survey(
        kind=kind,
        unit="tokens" if tokenizer is not None else "characters",
        truncate=truncate,
        uses={} if data.mix else _uses(data),
        ledger=ledger,
        lengths=lengths,
        trained_on=trained_on,
        rows_per_prompt=seen["train"].rows_per_prompt(),
        repeats=_repeats(seen["train"], seen["eval"], seen["test"]),
        cuts=cuts,
        rows=rows,
        chat_lengths=chat_lengths,
    )


def _at_length(data, max_length: int, max_prompt_length: int):
    """Return the settings with another length."""
    settings = data.copy_and_resolve_references()
    settings.update(max_length=max_length, max_prompt_length=max_prompt_length)
    return settings


def _uses(data) -> dict[str, str]:
    """Return what each split of the data is used for: one of splits.SPLITS, or ""."""
    if data.source == "toy":
        return {"train": "train", "eval": "eval"}
    names = list(readers.find_splits(data.path))
    train_names, eval_name, test_name = splits.choose(names, data)
    uses = dict.fromkeys(names, "")
    uses |= dict.fromkeys(train_names, "train")
    if eval_name:
        uses[eval_name] = "eval"
    if test_name:
        uses[test_name] = "test"
    return uses


# ---- what training reads


def _read_texts(data, kind: str, watch: Callable[[str, TextExample], None]) -> Ledger:
    """Read the examples without tokenising them; return the ledger, in which all are kept."""
    ledgers = {}
    counted = {split: Examples() for split in splits.SPLITS}
    for part in splits.parts(data, kind):
        weights = {split: array("f") for split in splits.SPLITS}
        margins = {split: array("f") for split in splits.SPLITS}
        for split, example in part.examples():
            watch(split, example)
            if example.numbers.weight is not None:
                weights[split].append(example.numbers.weight)
            if example.numbers.target_margin is not None:
                margins[split].append(example.numbers.target_margin)
            counts = getattr(part.ledger, split)
            counts.kept += 1
            if example.label is not None:
                counts.count_label(example.label)
            # Without ids, for the numbers of subsets and prompts alone.
            in_split = (*[[0]] * len(example.responses),)
            counted[split].append(
                [0],
                in_split,
                example.where,
                subset=example.subset,
                question_hash=example.question_hash,
            )
        for split in weights:
            counts = getattr(part.ledger, split)
            counts.count_numbers(np.array(weights[split]), np.array(margins[split]))
        ledgers[part.name] = part.ledger
    ledger = Ledger.of_parts(ledgers)
    ledger.count_subsets(counted)
    ledger.check(data.max_dropped, data.path or data.mix)
    return ledger


def _cut_as_trained(
    examples: dict[str, Examples],
    parts: dict[str, dataset.LoadedPart],
    data,
    tokenizer,
    must_keep_cue: bool,
) -> tuple[Examples, Ledger]:
    """Cut whole examples to the length that is set; return those to train on, and the ledger."""
    kept = {split: Examples() for split in examples}
    for part in parts.values():
        settings = _at_length(part.data, data.max_length, data.max_prompt_length)
        for split, into in kept.items():
            # The sets of a mixture follow one another in the examples of a split.
            first = len(into)
            whole = examples[split][part.own[split]]
            truncate = dataset.truncation(part.data)
            counts = cut_examples(whole, tokenizer, settings, truncate, into=into)
            cut_chats = part.chat_lengths[split].warning(settings, truncate)
            if cut_chats:
                counts.warnings.append(cut_chats)
            # All that the cut keeps was counted as kept before.
            before = dataclasses.replace(
                getattr(part.ledger, split),
                kept=0,
                mean_tokens={},
                labels={},
                weights={},
                margins={},
                prompts=0,
            )
            setattr(part.ledger, split, before.plus(counts))
            if must_keep_cue:
                dataset.check_cue(settings, into[first:], tokenizer)
    ledger = Ledger.of_parts({name: part.ledger for name, part in parts.items()})
    ledger.count_subsets(kept)
    return kept["train"], ledger


# ---- lengths, and what a cut costs


def _part_names(responses: int, label: bool | None = None) -> tuple[str, ...]:
    """Return the names of a row's parts; label: of an unpaired row, where it is to be shown."""
    if responses == 2:
        return ("prompt", "chosen", "rejected")
    if label is None:
        return ("prompt", "completion")
    return ("prompt", "desirable completion" if label else "undesirable completion")


def _cuts(whole: Examples, parts: list[dataset.LoadedPart], data, tokenizer) -> list[Cut]:
    """Return what a cut to LIMITS and to the length that is set costs, the shortest first."""
    # The prompt gets half of a length, as it does by default.
    limits = {max_length: max_length // 2 for max_length in LIMITS}
    limits[data.max_length] = data.max_prompt_length
    cuts = []
    for max_length in sorted(limits):
        cuts.append(_cut(whole, parts, (max_length, limits[max_length]), tokenizer))
    return cuts


def _cut(
    whole: Examples, parts: list[dataset.LoadedPart], limits: tuple[int, int], tokenizer
) -> Cut:
    """Return what a cut to (max_length, max_prompt_length) costs."""
    max_length, max_prompt_length = limits
    prompt_P, response_PK, _ = whole.lengths()
    is_long_P = prompt_P + response_PK.max(axis=1) > max_length  # the others stay as they are
    counts = Counts()
    kept = Examples()
    for part in parts:
        own = np.arange(len(whole))[part.own["train"]]
        long = whole[own[is_long_P[own]]]
        settings = _at_length(part.data, max_length, max_prompt_length)
        truncate = dataset.truncation(part.data)
        counts = counts.plus(cut_examples(long, tokenizer, settings, truncate, into=kept))
    tokens = int(prompt_P.sum() + response_PK.sum())
    tokens_of_long = int(prompt_P[is_long_P].sum() + response_PK[is_long_P].sum())
    tokens_of_kept = 0
    if len(kept):
        kept_prompt_P, kept_response_PK, _ = kept.lengths()
        tokens_of_kept = int(kept_prompt_P.sum() + kept_response_PK.sum())
    # A dropped row loses all of its tokens.
    rows = int(is_long_P.sum())
    lost = tokens_of_long - tokens_of_kept
    return Cut(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        rows=rows,
        prompts=counts.prompts_truncated,
        responses=counts.responses_truncated,
        dropped=sum(counts.dropped.values()),
        tokens=lost,
        share_of_rows=rows / len(whole),
        share_of_responses=counts.responses_truncated / response_PK.size,
        share_of_tokens=lost / tokens,
    )


# ---- rows to show


def _spread(size: int, count: int) -> list[int]:
    """Return up to `count` indices, from the first to the last of so many examples."""
    return np.linspace(0, size - 1, min(size, count)).astype(int).tolist()


def _token_row(examples: Examples, index: int, tokenizer) -> ShownRow:
    """Return an example as its tokens say it."""
    example = examples[index]
    names = _part_names(len(example.responses), example.label)
    parts = {}
    for name, runs in zip(names, dataset.decoded(example, tokenizer), strict=True):
        parts[name] = tuple(Piece(text, is_trained_on) for text, is_trained_on in runs)
    counts = [len(example.prompt), *example.completion_lengths()]
    tokens = dict(zip(names, counts, strict=True))
    return ShownRow(examples.where[index], parts, tokens, examples.numbers(index))


def _text_row(example: TextExample) -> ShownRow:
    """Return an example as its text says it, before any chat template."""
    names = _part_names(len(example.responses), example.label)
    parts = {"prompt": tuple(_pieces(example.prompt, ()))}
    for name, response in zip(names[1:], example.responses, strict=True):
        parts[name] = tuple(_pieces(response, ("assistant",)))
    return ShownRow(example.where, parts, {}, example.numbers)


def _pieces(text: Text, roles: Sequence[str]) -> Iterator[Piece]:
    """Yield the pieces of a text, or of the turns of a conversation; roles: who is trained on."""
    if isinstance(text, str):
        yield Piece(text, bool(roles))
        return
    for index, message in enumerate(text):
        gap = "\n" if index else ""
        yield Piece(f"{gap}{message['role']}: ", False)
        yield Piece(leaks.plain([message]), message["role"] in roles)


# ---- repeats, by hashes


class _Seen:
    """What is kept of the texts of a split: hashes and lengths, and a few whole rows."""

    def __init__(self, shown: int):
        self._shown = shown
        self._prompts = array("Q")
        self._nearly = array("Q")  # of the prompts, normalised
        self._rows = array("Q")
        self._reversed = array("Q")  # of the rows, with their responses the other way round
        self._lengths = array("Q")  # of the parts of each row, one after the other
        self._parts = 0  # of a row
        self._without_prompt = 0
        self._kept: list[TextExample] = []
        self._stride = 1  # between rows that are kept

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, example: TextExample) -> None:
        """Look at an example."""
        index = len(self._rows)
        prompt = json.dumps(example.prompt or example.responses[0])
        self._without_prompt += not example.prompt
        self._prompts.append(splits.prompt_hash(example))
        self._nearly.append(splits.hash64(leaks.normalised(splits.question(example))))
        responses = [leaks.plain(response) for response in example.responses]
        self._rows.append(splits.hash64(json.dumps([prompt, *responses])))
        self._reversed.append(splits.hash64(json.dumps([prompt, *reversed(responses)])))
        self._parts = 1 + len(responses)
        self._lengths.extend(map(len, (leaks.plain(example.prompt), *responses)))

        # Every so many rows one is kept, and every other one let go of where they become many.
        if self._shown and index % self._stride == 0:
            self._kept.append(example)
        if len(self._kept) > 2 * self._shown:
            self._kept = self._kept[::2]
            self._stride *= 2

    def lengths(self) -> dict[str, np.ndarray]:
        """Return the lengths of each row in characters, by part."""
        lengths = np.array(self._lengths, int).reshape(-1, self._parts)
        return dict(zip(_part_names(self._parts - 1), lengths.T, strict=True))

    def kept(self) -> list[TextExample]:
        """Return the rows to show, from all over the split."""
        return [self._kept[index] for index in _spread(len(self._kept), self._shown)]

    def rows_per_prompt(self) -> np.ndarray:
        """Return how many rows each prompt has; nothing where rows have no prompt."""
        if self._without_prompt == len(self._rows):
            return np.zeros(0, int)
        return np.unique(self.prompts, return_counts=True)[1]

    @property
    def prompts(self) -> np.ndarray:
        return np.array(self._prompts)

    @property
    def nearly(self) -> np.ndarray:
        return np.array(self._nearly)

    @property
    def rows(self) -> np.ndarray:
        return np.array(self._rows)

    @property
    def reversed(self) -> np.ndarray:
        return np.array(self._reversed)


def _repeats(train: _Seen, evals: _Seen, tests: _Seen) -> Repeats:
    reversed_pairs = np.isin(train.reversed, train.rows)
    # A row whose reverse is itself is one completion, or a pair of equal responses.
    reversed_pairs &= train.reversed != train.rows
    return Repeats(
        eval_prompts_in_train=int(np.isin(evals.prompts, train.prompts).sum()),
        eval_prompts_nearly_in_train=int(np.isin(evals.nearly, train.nearly).sum()),
        test_prompts_in_train=int(np.isin(tests.prompts, train.prompts).sum()),
        test_prompts_nearly_in_train=int(np.isin(tests.nearly, train.nearly).sum()),
        train_rows_repeated=len(train.rows) - len(np.unique(train.rows)),
        train_pairs_reversed=int(reversed_pairs.sum()),
    )

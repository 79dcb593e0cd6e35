"""Tokenised examples: prompts and responses in token ids, in memory or in a file.

The ids of all examples stand in one run. A small set keeps it in memory; a larger one keeps it in a
temporary file, from which an example is read when it is asked for, so that memory does not grow
with the set. Only a few numbers for each example stay: where it starts, and how long its parts are.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.data import grouping
from dpo_jax.data.rows import NO_NUMBERS, NO_SUBSET, Numbers

Masks = tuple[np.ndarray, ...]

# How many numbers of a run stay in memory; 4 million token ids are 16 MB.
IN_MEMORY = 1 << 22
MOST_SUBSETS = 32  # more names of subsets are no subsets, but say something of single rows
BLOCK = 1000  # examples read at a time, where all are
# A prompt and a response together are shorter, so that sizes of batches can be numbers of 64 bits.
LENGTH_LIMIT = 2**28
FILLER = -1  # in an order or a cell: no example, the place is only filled up


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its responses, int32 ids: two for a pair, one for SFT and for unpaired rows.

    The completion tokens, those that are trained on, are all of the responses', unless a mask for
    each response, bool [its tokens], leaves some out: what users and tools say within an answer of
    several turns is read, but not trained on.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    completion_masks: Masks | None = None  # None: all tokens are trained on
    label: bool | None = None  # of unpaired rows: whether the response is desirable

    def completion_lengths(self) -> list[int]:
        """Return how many tokens of each response are trained on."""
        if self.completion_masks is None:
            return [len(response) for response in self.responses]
        return [int(mask.sum()) for mask in self.completion_masks]

    def identities(self) -> list[int]:
        """Return a number of the prompt and of each response, equal for what is equal.

        Responses are equal where their prompts are equal too. With 64 bits of a hash, two different
        ones among ten million have the same number with a probability of 3 in a million.
        """
        prompt = self.prompt.tobytes()
        numbers = [_hash(prompt)]
        masks = self.completion_masks or (None,) * len(self.responses)
        for ids, mask in zip(self.responses, masks, strict=True):
            marked = b"" if mask is None else mask.tobytes()
            numbers.append(_hash(prompt, ids.tobytes(), marked))
        return numbers


class Examples(Sequence):
    """A sequence of `Example`, all with as many responses, and where each comes from.

    An index gives one example; a slice, or a list or array of indices, gives Examples:
    `examples[2:5]`, `examples[[0, 3]]`. They share their ids with the whole.
    """

    def __init__(self, *, distinct: bool = False):
        """Begin without an example; distinct: `append` leaves out one that is there already."""
        self._there: set[tuple] | None = set() if distinct else None  # identities, and numbers
        self._ids = Run(np.int32, IN_MEMORY)
        self._masks = Run(np.bool_, IN_MEMORY)
        self._starts = Run(np.int64)  # where each example starts in the run of ids
        self._mask_starts = Run(np.int64)  # and in the run of masks; -1: it has none
        self._lengths = Run(np.int32)  # of its prompt and each response: 1 + responses numbers
        self._completion_lengths = Run(np.int32)  # responses numbers
        self._identities = Run(np.int64)  # see Example.identities: 1 + responses numbers
        self._sampled_sets = Run(np.int64)  # -1: not sampled in a set
        self._labels = Run(np.int8)  # 1: desirable, 0: undesirable, -1: the example has no label
        self._data_sets = Run(np.int32)  # which data set of a mixture each is from
        # How often each counts, and its target margin; empty where no column says it.
        self._weights = Run(np.float32)
        self._target_margins = Run(np.float32)
        # What tells their prompts apart before they are tokenised; 0: not known.
        self._questions = Run(np.uint64)
        self._subsets = Run(np.int32)  # the number of each one's subset in the names
        self._subset_names: dict[str, int] = {}  # name -> number, of MOST_SUBSETS + 1 at most
        self._data_set = 0  # that of the examples appended next
        self.max_length = 0  # what each was cut to, in tokens; 0: not known
        self._parts = 0  # of each example, a prompt and its responses; 0 while there is none
        self.where = Places()  # the file and row of each

    def append(
        self,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        where: str,
        completion_masks: Masks | None = None,
        sampled_set: int | None = None,
        label: bool | None = None,
        numbers: Numbers = NO_NUMBERS,
        subset: str = "",
        question_hash: int = 0,
    ) -> bool:
        """Append an example, ids as int32; return False where it is left out, as not distinct.

        sampled_set: the number of the set of completions that the responses were sampled with,
        if any. It decides what belongs together: see `groups`. label: whether the response of an
        unpaired row is desirable. numbers: of columns, which all examples have or none. subset: of
        the data set, "" where it has none. question_hash: as a `TextExample` has it.

        Raises ValueError where it has not as many responses as those before it, where its prompt
        has no token, from which the first of a response could be predicted, or where it is too
        long.
        """
        example = Example(
            np.asarray(prompt, np.int32),
            tuple(np.asarray(ids, np.int32) for ids in responses),
            completion_masks,
        )
        lengths = [len(prompt), *map(len, responses)]
        self._parts = self._parts or len(lengths)
        if len(lengths) != self._parts:
            raise ValueError(
                f"{where} has {len(lengths) - 1} responses; those before it have {self._parts - 1}."
            )
        if not len(prompt):
            raise ValueError(
                f"{where} has a prompt without tokens, so nothing predicts the first token of a "
                "response. Give it a token, such as the tokenizer's BOS or EOS."
            )
        longest = len(prompt) + max(lengths[1:], default=0)
        if longest >= LENGTH_LIMIT:
            raise ValueError(
                f"{where} has {longest:,} tokens of prompt and response; expected fewer than "
                f"{LENGTH_LIMIT:,}. Cut it, or leave it out."
            )
        identities = example.identities()
        if self._there is not None:
            key = (*identities, numbers)
            if key in self._there:
                return False
            self._there.add(key)
        self._append_number(self._weights, numbers.weight, where)
        self._append_number(self._target_margins, numbers.target_margin, where)
        self._starts.append(self._ids.end)
        for ids in (prompt, *responses):
            self._ids.extend(ids)
        self._mask_starts.append(self._masks.end if completion_masks else -1)
        for mask in completion_masks or ():
            self._masks.extend(mask)
        self._lengths.extend(lengths)
        self._completion_lengths.extend(example.completion_lengths())
        self._identities.extend(identities)
        self._sampled_sets.append(-1 if sampled_set is None else sampled_set)
        self._labels.append(-1 if label is None else int(label))
        self._data_sets.append(self._data_set)
        self._questions.append(question_hash)
        self._subsets.append(self._number_of_subset(subset))
        self.where.append(where)
        return True

    def _number_of_subset(self, subset: str) -> int:
        if subset not in self._subset_names and len(self._subset_names) <= MOST_SUBSETS:
            self._subset_names[subset] = len(self._subset_names)
        return self._subset_names.get(subset, MOST_SUBSETS)

    def _append_number(self, run: "Run", number: float | None, where: str) -> None:
        """Append a number to a run that all examples are in, or none is."""
        if len(self) and (number is None) != (run.end == 0):
            raise ValueError(f"{where} and the examples before it do not both have a number.")
        if number is not None:
            run.append(number)

    def begin_data_set(self) -> None:
        """Begin the next data set of a mixture: no group has examples of two data sets."""
        self._data_set += 1

    def __repr__(self) -> str:
        return f"Examples({len(self)} {'pairs' if self._parts == 3 else 'completions'})"

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index):
        if isinstance(index, int | np.integer):
            return self._example(range(len(self))[index])
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        index = np.asarray(index)
        if index.dtype == bool:  # which of all, as in numpy
            if index.shape != (len(self),):
                raise IndexError(f"{index.size} booleans for {len(self)} examples.")
            index = np.flatnonzero(index)
        return self._some(index.astype(int))

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self._example(index)

    @property
    def prompts(self) -> "_PartOfEach":
        """The prompts, as a sequence."""
        return _PartOfEach(self, "prompt")

    @property
    def responses(self) -> "_PartOfEach":
        """The responses, as a sequence of tuples."""
        return _PartOfEach(self, "responses")

    @property
    def weights(self) -> np.ndarray | None:
        """How often each example counts, float32 [P]; None: each once."""
        return self._weights.all() if self._weights.end else None

    @property
    def target_margins(self) -> np.ndarray | None:
        """By how much each chosen response is to win, float32 [P]; None: no column says it."""
        return self._target_margins.all() if self._target_margins.end else None

    @property
    def labels(self) -> np.ndarray | None:
        """Which examples are desirable, bool [P]; None: they are no unpaired rows."""
        labels_P = self._labels.all()
        return labels_P > 0 if len(labels_P) and labels_P.min() >= 0 else None

    @property
    def question_hashes(self) -> np.ndarray:
        """What tells the prompts apart before they are tokenised, uint64 [P]; 0: not known."""
        return self._questions.all()

    @property
    def subsets(self) -> tuple[list[str], np.ndarray]:
        """The names of the subsets, and the number of each example's, int32 [P].

        There are no names where all examples are of one subset, or of more than MOST_SUBSETS.
        """
        number_P = self._subsets.all()
        present = np.unique(number_P)
        names = list(self._subset_names)
        if len(present) < 2 or len(names) > MOST_SUBSETS:
            return [], np.zeros(len(self), np.int32)
        # In the order of their names, so that it does not depend on the order of the rows.
        found = sorted((names[number], number) for number in present)
        place = np.zeros(len(names), np.int32)
        place[[number for _, number in found]] = np.arange(len(found))
        return [name or NO_SUBSET for name, _ in found], place[number_P]

    def subset(self, index: int) -> str:
        """Return the name of an example's subset; "" where it has none, or there are too many."""
        number = self._subsets[index]
        return list(self._subset_names)[number] if number < len(self._subset_names) else ""

    def question_hash(self, index: int) -> int:
        """Return what tells an example's prompt apart; 0: not known."""
        return self._questions[index]

    def numbers(self, index: int) -> Numbers:
        """Return the numbers of an example, as it was appended with."""
        found = {}
        if self._weights.end:
            found["weight"] = float(self.weights[index])
        if self._target_margins.end:
            found["target_margin"] = float(self.target_margins[index])
        return Numbers(**found)

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of prompts [P] and responses [P, K], and those trained on [P, K]."""
        if not len(self):
            return np.zeros(0, int), np.zeros((0, 0), int), np.zeros((0, 0), int)
        lengths = _table(self._lengths, len(self)).astype(int)
        completion_PK = _table(self._completion_lengths, len(self)).astype(int)
        return lengths[:, 0], lengths[:, 1:], completion_PK

    def identities(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the `Example.identities` of prompts [P] and responses [P, K]."""
        if not len(self):
            return np.zeros(0, int), np.zeros((0, 0), int)
        identities = _table(self._identities, len(self))
        return identities[:, 0], identities[:, 1:]

    def groups(self, most: int) -> np.ndarray:
        """Return the number of each example's group, [P], counted in the order of the data.

        A group is a set of completions that were sampled together, or else the pairs of one prompt
        from one data set. Single completions that were not sampled together are a group each. No
        group has more than `most` examples: a larger one is cut into several.
        """
        prompt_id_P, _ = self.identities()
        sampled_set_P = self._sampled_sets.all().copy()
        # Texts without a prompt would make one group of a whole file, perhaps sorted by label.
        is_alone_P = (sampled_set_P < 0) & (self._parts == 2)
        sampled_set_P[is_alone_P] = -2 - np.flatnonzero(is_alone_P)
        together = np.stack([prompt_id_P, sampled_set_P, self._data_sets.all()])
        whole_P = grouping.numbered(together)
        piece_P = grouping.places(whole_P) // most
        return grouping.numbered(np.stack([whole_P, piece_P]))

    def single_responses(self, places: np.ndarray) -> "SingleResponses":
        """Return some responses, each with its prompt as an example of its own.

        places: indices into a flat [examples, responses].
        """
        return SingleResponses(self, places)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of all ids, of where each part ends, of what is not trained on, and of labels.

        Kept reference log-probs are found by it, so its form is fixed. Ask for it only once all
        examples are there.
        """
        digest = hashlib.sha256()
        numbers = []
        for number, example in enumerate(self, 1):
            parts = (example.prompt, *example.responses)
            # Lengths come before the ids: else [1 2][3] and [1][2 3] would be the same.
            numbers.append([len(parts), *map(len, parts)])
            numbers += parts
            # Nothing where all is trained on, so that plain examples keep their fingerprint.
            for mask in example.completion_masks or ():
                numbers.append([-1])
                numbers.append(mask)
            if example.label is not None:
                numbers.append([-2, int(example.label)])
            if number % BLOCK == 0 or number == len(self):
                digest.update(np.concatenate(numbers).astype("<i4").tobytes())
                numbers = []
        return digest.hexdigest()

    @property
    def fingerprints(self) -> list[str]:
        """All that training reads: `fingerprint`, and the sha256 of the numbers if there are any.

        The numbers are apart, as kept reference log-probs do not depend on them.
        """
        digest = hashlib.sha256()
        for name, values in (("weights", self.weights), ("margins", self.target_margins)):
            if values is not None:
                digest.update(name.encode() + values.astype("<f4").tobytes())
        has_numbers = self._weights.end or self._target_margins.end
        return [self.fingerprint, digest.hexdigest()] if has_numbers else [self.fingerprint]

    def _example(self, index: int) -> Example:
        lengths = self._lengths.take(index * self._parts, (index + 1) * self._parts)
        start = self._starts[index]
        prompt, *responses = _parted(self._ids.take(start, start + lengths.sum()), lengths)
        masks = None
        mask_start = self._mask_starts[index]
        if mask_start >= 0:
            of_all = self._masks.take(mask_start, mask_start + lengths[1:].sum())
            masks = tuple(_parted(of_all, lengths[1:]))
        label = self._labels[index]
        return Example(prompt, tuple(responses), masks, None if label < 0 else bool(label))

    def _some(self, index: np.ndarray) -> "Examples":
        """Return the examples at these indices, which share the runs of ids and masks."""
        some = Examples()
        some._ids = self._ids
        some._masks = self._masks
        some._parts = self._parts
        some.max_length = self.max_length
        some._starts.extend(self._starts.all()[index])
        some._mask_starts.extend(self._mask_starts.all()[index])
        some._sampled_sets.extend(self._sampled_sets.all()[index])
        some._labels.extend(self._labels.all()[index])
        some._data_sets.extend(self._data_sets.all()[index])
        some._questions.extend(self._questions.all()[index])
        some._subsets.extend(self._subsets.all()[index])
        some._subset_names = dict(self._subset_names)
        for name in ("_weights", "_target_margins"):
            if getattr(self, name).end:
                getattr(some, name).extend(getattr(self, name).all()[index])
        for name in ("_lengths", "_completion_lengths", "_identities"):
            rows = _table(getattr(self, name), len(self))[index]
            getattr(some, name).extend(rows.ravel())
        some.where = self.where.some(index)
        return some


class SingleResponses(Sequence):
    """Responses of some examples, each with its prompt as an example of its own.

    The tokens are those of the examples, and nothing is copied.
    """

    def __init__(self, examples: Examples, places: np.ndarray):
        """Take responses; places: indices into a flat [examples, responses]."""
        self._examples = examples
        responses_per_example = max(examples.identities()[1].shape[1], 1)
        self._index_P, self._side_P = np.divmod(places, responses_per_example)

    def __len__(self) -> int:
        return len(self._index_P)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[self._index_P[index]]
        side = self._side_P[index]
        masks = example.completion_masks
        return Example(
            example.prompt, (example.responses[side],), None if masks is None else (masks[side],)
        )

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return numbers of tokens as `Examples.lengths` does: [P], [P, 1] and [P, 1]."""
        prompt_P, response_PK, completion_PK = self._examples.lengths()
        return prompt_P[self._index_P], self._of_each(response_PK), self._of_each(completion_PK)

    def identities(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the `Example.identities` of prompts [P] and responses [P, 1]."""
        prompt_P, response_PK = self._examples.identities()
        return prompt_P[self._index_P], self._of_each(response_PK)

    def _of_each(self, values_PK: np.ndarray) -> np.ndarray:
        return values_PK[self._index_P, self._side_P][:, None]


def _hash(*parts: bytes) -> int:
    """Return a number of 64 bits that depends on the parts alone, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _table(run: "Run", examples: int) -> np.ndarray:
    """Return a run of as many numbers for each example as an array [P, numbers]."""
    return run.all().reshape(examples, run.end // max(examples, 1))


def _parted(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return consecutive parts of these lengths."""
    parts = []
    start = 0
    for length in lengths.tolist():
        parts.append(values[start : start + length])
        start += length
    return parts


class _PartOfEach(Sequence):
    """The same part of each example."""

    def __init__(self, examples: Examples, name: str):
        self._examples = examples
        self._name = name

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, int | np.integer):
            return getattr(self._examples[index], self._name)
        return [getattr(example, self._name) for example in self._examples[index]]


class Places(Sequence):
    """Where examples come from, "FILE row NUMBER": files once each, and a number for each."""

    def __init__(self):
        self._labels: dict[str, int] = {}  # label -> its number, in order
        self._names: list[str] = []
        self._label_ids = Run(np.int32)
        self._numbers = Run(np.int64)  # -1: the label says all

    def append(self, where: str) -> None:
        """Append one."""
        label, _, digits = where.rpartition(" row ")
        # Only what is written back as it was.
        is_numbered = digits.isascii() and digits.isdigit() and str(int(digits)) == digits
        if not label or not is_numbered:
            label = where
        if label not in self._labels:
            self._labels[label] = len(self._names)
            self._names.append(label)
        self._label_ids.append(self._labels[label])
        self._numbers.append(-1 if label is where else int(digits))

    def some(self, index: np.ndarray) -> "Places":
        """Return those at these indices."""
        places = Places()
        # Not the dict itself: it grows with what is appended.
        places._labels = dict(self._labels)
        places._names = list(self._names)
        places._label_ids.extend(self._label_ids.all()[index])
        places._numbers.extend(self._numbers.all()[index])
        return places

    def __len__(self) -> int:
        return self._numbers.end

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        label = self._names[self._label_ids[index]]
        number = self._numbers[index]
        return label if number < 0 else f"{label} row {number}"

    def __eq__(self, other) -> bool:
        return list(self) == list(other)


class Run:
    """Numbers one after the other, which only grow at their end.

    limit: how many may be in memory; the others are in a temporary file, which the system deletes
    when the run is let go of, or the process ends.
    """

    def __init__(self, dtype, limit: int | None = None):
        self._kept = np.empty(16, dtype)  # the last ones, and room for more
        self._count = 0  # of those in `_kept`
        self._written = 0  # how many are in the file
        self._file = None
        self._limit = limit

    @property
    def end(self) -> int:
        """How many there are."""
        return self._written + self._count

    def append(self, value) -> None:
        """Append one number."""
        self.extend([value])

    def extend(self, values) -> None:
        """Append numbers."""
        if self._limit and self._count + len(values) > self._limit:
            self._write()
        needed = self._count + len(values)
        if needed > len(self._kept):
            # Twice as much, so that all appending together copies each number about once.
            larger = np.empty(2 * needed, self._kept.dtype)
            larger[: self._count] = self._kept[: self._count]
            self._kept = larger
        self._kept[self._count : needed] = values
        self._count = needed

    def all(self) -> np.ndarray:
        """Return all numbers of a run without a limit, or of one that is small."""
        return self.take(0, self.end)

    def __getitem__(self, index: int) -> int:
        return int(self.take(index, index + 1)[0])

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers from start to stop, which are not to be written to."""
        if start >= self._written:
            return self._kept[start - self._written : stop - self._written]
        if stop > self._written:
            self._write()
        # Read rather than mapped: mapped pages count as the process's own memory. It is as fast, as
        # the system caches the file.
        size = self._kept.itemsize
        data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        return np.frombuffer(data, self._kept.dtype)

    def _write(self) -> None:
        """Move what is in memory into the file."""
        try:
            if self._file is None:
                # Not closed here: the examples are read from it as long as they are there.
                self._file = tempfile.TemporaryFile(prefix="dpo_jax-")  # noqa: SIM115
            self._file.write(self._kept[: self._count].data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"token ids are kept in a file in {tempfile.gettempdir()}, where writing fails: "
                f"{error}. Make room there, or set TMPDIR to another folder."
            ) from error
        self._written += self._count
        self._count = 0
        # Arrays that were handed out still show the memory, so others get new memory.
        self._kept = np.empty(min(len(self._kept), self._limit or 16), self._kept.dtype)

"""Held-out prompts that are trained on, across all data sets of a run.

A prompt is known by 8 bytes in each of two forms, so memory hardly grows with the data: a million
rows take 24 MB while they are read, and their prompts 16 MB after that. Prompts are compared as
they stand (exactly), and by their normalised texts: Unicode's NFKC form, whatever the case and the
white space. What has no prompt, as a film review, is its own prompt, and counts where its whole
text is trained on.

    STAGE/prompts.safetensors   the hashes of what a stage trains on and holds out

A stage gathers them while it reads its data, and later stages of the run read that file in place of
the data.
"""

import dataclasses
import json
import pathlib
import unicodedata
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.data import splits
from dpo_jax.data.rows import Text, TextExample
from dpo_jax.whole_file import whole_file

FILE = "prompts.safetensors"
TRAIN = "train"  # the split that is trained on; all others are held out
VALIDATION, TEST = "eval", "test"  # of those, what training is evaluated on, and what is reported
# Of the training split, the questions of further turns that are answered in a response.
FURTHER = "further"
SHOWN = 60  # characters of a prompt in a message
NORMALISED = "the same after Unicode NFKC, whatever the case and the white space"


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Hashes of some prompts, in their order: uint64 [prompts] each."""

    exact: np.ndarray
    normalised: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[TextExample]) -> "Hashes":
        """Return the hashes of the prompts of examples."""
        gathered = Gathered()
        for example in examples:
            gathered.add(TRAIN, example)
        return gathered.hashes(TRAIN)

    @classmethod
    def none(cls) -> "Hashes":
        """Return the hashes of no prompt."""
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.uint64))

    def __len__(self) -> int:
        return len(self.exact)

    def take(self, indices: Sequence[int]) -> "Hashes":
        """Return those at these indices, which may repeat."""
        index = np.asarray(indices, np.int64)
        return Hashes(self.exact[index], self.normalised[index])

    def followed_by(self, others: "Hashes") -> "Hashes":
        """Return these hashes and then others."""
        return Hashes(
            np.concatenate([self.exact, others.exact]),
            np.concatenate([self.normalised, others.normalised]),
        )

    def distinct(self) -> "Hashes":
        """Return the hashes of each prompt once."""
        _, first = np.unique(self.exact, return_index=True)
        return self.take(first)

    def are_in(self, others: "Hashes") -> tuple[np.ndarray, np.ndarray]:
        """Return which of these prompts are among others: (exactly, or normalised), bool each.

        What is the same exactly is the same normalised.
        """
        exactly = np.isin(self.exact, others.exact)
        return exactly, exactly | np.isin(self.normalised, others.normalised)


class Gathered:
    """Hashes of the prompts of a data set, gathered by split while its examples are read."""

    def __init__(self):
        self._exact: dict[str, array] = {}
        self._normalised: dict[str, array] = {}
        self._places: dict[str, array] = {}  # hashes of where the examples stand

    def add(self, split: str, example: TextExample) -> None:
        """Add an example of a split."""
        self._add_question(split, splits.question(example), example.where)
        if split == TRAIN:
            for question in splits.answered_questions(example):
                self._add_question(FURTHER, question, example.where)

    def _add_question(self, split: str, question: Text, where: str) -> None:
        if split not in self._exact:
            for hashes, kind in (
                (self._exact, "Q"),
                (self._normalised, "Q"),
                (self._places, "q"),
            ):
                hashes[split] = array(kind)
        self._exact[split].append(splits.hash_of(question))
        self._normalised[split].append(splits.hash64(normalised(question)))
        # Only compared in this process, where hash() is the same.
        self._places[split].append(hash(where))

    def trained_on(self, kept: Sequence[str] | None = None) -> Hashes:
        """Return the hashes of all that is trained on: of each turn whose answer is, too.

        kept: as for `hashes`.
        """
        return self.hashes(TRAIN, kept).followed_by(self.hashes(FURTHER, kept))

    def hashes(self, split: str, kept: Iterable[str] | None = None) -> Hashes:
        """Return the hashes of a split, in the order in which the examples were read.

        kept: where the examples stand that are used, which takes 8 bytes each; others, as those
        with equal responses once they are cut, are left out. None: all are used.
        """
        if split not in self._exact:
            return Hashes.none()
        exact = np.array(self._exact[split], np.uint64)
        nearly = np.array(self._normalised[split], np.uint64)
        found = Hashes(exact, nearly)
        if kept is None:
            return found
        kept_places = np.fromiter((hash(where) for where in kept), np.int64)
        if not len(kept_places):
            return Hashes.none()
        # np.isin would take many times the memory of its arguments.
        kept_places.sort()
        places = np.array(self._places[split], np.int64)
        next_kept = np.searchsorted(kept_places, places)
        np.minimum(next_kept, len(kept_places) - 1, out=next_kept)
        return found.take(np.flatnonzero(kept_places[next_kept] == places))


def normalised(text: Text) -> str:
    """Return a text or a conversation so that those which only look different are the same.

    Roles of a chat do not matter, so that the same text in another form is the same.
    """
    said = plain(text)
    if not said.isascii():
        said = unicodedata.normalize("NFKC", said)
    return " ".join(said.casefold().split())


def plain(text: Text) -> str:
    """Return all that a text or a conversation says: contents, calls of tools and reasoning."""
    if isinstance(text, str):
        return text
    said = []
    for message in text:
        for key, value in message.items():
            if key != "role":
                said.append(value if isinstance(value, str) else json.dumps(value, default=str))
    return "\n".join(said)


# ---- what the stages of a run read


@dataclasses.dataclass(frozen=True)
class Seen:
    """The prompts of one stage: those that it trains on, and those of its splits to evaluate on."""

    stage: str  # the name of its folder
    data: str  # where they are from, for a message
    splits: dict[str, Hashes]

    @property
    def trained(self) -> Hashes:
        """The prompts that the stage trains on."""
        return self.splits.get(TRAIN, Hashes.none())

    @property
    def validated(self) -> Hashes:
        """The prompts that training is evaluated on, and by which results are selected."""
        return self.splits.get(VALIDATION, Hashes.none())

    @property
    def held_out(self) -> Hashes:
        """The prompts of all other splits."""
        found = Hashes.none()
        for split, hashes in self.splits.items():
            if split != TRAIN:
                found = found.followed_by(hashes)
        return found


def read(data, kind: str, stage: str, name: str) -> Seen:
    """Read the prompts of a data set without tokenising it.

    data, kind: as for `splits.parts`, whose errors it raises. stage, name: of Seen.
    """
    gathered = Gathered()
    found = set()
    for part in splits.parts(data, kind):
        for split, example in part.examples():
            found.add(split)
            gathered.add(split, example)
    of_splits = {split: gathered.hashes(split) for split in sorted(found)}
    if TRAIN in found and kind != "prompts":  # of those, no answer is trained on
        of_splits[TRAIN] = gathered.trained_on()
    return Seen(stage, name, of_splits)


def read_runs(run_configs: Iterable) -> list[Seen]:
    """Read the prompts of all data sets that runs train on, without tokenising them.

    run_configs: the configs of runs that share a WORKDIR, or of one. Each data set is read once,
    under the name of the first stage that trains on it. Prompts that are sampled from count as
    trained on, all of them. Raises what `splits.parts` raises.
    """
    found = {}
    for config in run_configs:
        for stage, (key, data) in data_sets(config).items():
            if key not in found:
                found[key] = read_of_stage(data, stage)
    return list(found.values())


def data_sets(config) -> dict[str, tuple[tuple, object]]:
    """Return (what tells it from others, config block) of the data set of each stage, in order.

    Stages that do not train, or that train on the run's own samples, have none.
    """
    found = {}
    for stage in config.stages:
        table = stage_table.STAGES[stage]
        is_sampled = stage_table.trains_on_samples(config, stage)
        if is_sampled or not (table.trains or stage == "pairs"):
            continue
        is_of_sft = table.data in ("sft", "prompts")
        data = configs.sft_data(config) if is_of_sft else config.data
        names = ("source", "path", "mix", "train_split", "eval_split")
        found[stage] = (tuple(data[name] for name in names), data)
    return found


def read_of_stage(data, stage: str) -> Seen:
    """Read the prompts of a data set that a stage trains on, without tokenising it."""
    table = stage_table.STAGES[stage]
    kind = table.data if table.data in ("sft", "prompts") else table.kind
    return read(data, kind, stage, data.path or data.mix or data.source)


def write(folder: pathlib.Path, seen: Seen) -> None:
    """Write FILE in a stage's folder: each prompt of a split once."""
    from safetensors.numpy import save_file

    tensors = {}
    for split, hashes in seen.splits.items():
        once = hashes.distinct()
        tensors[f"{split}.exact"] = once.exact
        tensors[f"{split}.normalised"] = once.normalised
    # One text: several keys would be written in any order, and the file's bytes would differ.
    about = json.dumps(dict(stage=seen.stage, data=seen.data))
    with whole_file(folder / FILE) as draft:
        save_file(tensors, draft, metadata=dict(about=about))


def load(folder: pathlib.Path) -> Seen | None:
    """Return what `write` wrote in a stage's folder; None where there is no such file.

    Raises ValueError where it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    arrays: dict[str, dict[str, np.ndarray]] = {}
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["about"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                split, _, kind = name.rpartition(".")
                arrays.setdefault(split, {})[kind] = file.get_tensor(name)
        found = {split: Hashes(**of_split) for split, of_split in arrays.items()}
        return Seen(about["stage"], about["data"], found)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not what was written there ({error}). Put it back from a copy; or remove "
            "it, and which held-out prompts this stage trains on is not known."
        ) from None


# ---- the report


@dataclasses.dataclass(frozen=True)
class Leak:
    """How many prompts of a held-out set are trained on; each prompt counts once."""

    held_out: str  # the stage that holds them out, or that judges them
    prompts: int
    exact: int
    normalised: int  # those that are the same exactly among them
    by: dict[str, int]  # stage that trains on some of them -> how many, normalised
    # Prompts to report on that a stage validates on, and so may have been selected by, normalised.
    selected_on: int = 0
    selected_by: dict[str, int] = dataclasses.field(default_factory=dict)  # stage -> how many

    def told(self) -> str:
        """Return which stages train on them, as a part of a sentence."""
        return ", ".join(f"{stage} trains on {count:,}" for stage, count in self.by.items())

    def told_of_selection(self) -> str:
        """Return which stages validate on them, as a part of a sentence."""
        found = self.selected_by.items()
        return ", ".join(f"{stage} validates on {count:,}" for stage, count in found)

    def selection(self) -> str:
        """Return a warning where prompts that are judged are validated on; "" where none is."""
        if not self.selected_on:
            return ""
        return (
            f"{self.selected_on:,} of the {self.prompts:,} prompts that are judged are validated "
            f"on, too ({self.told_of_selection()}), and what is chosen by validation looks better "
            "on them. Give the data sets splits with other prompts, or choose nothing by these "
            "evaluations."
        )


def leak(
    held_out: str, prompts: Hashes, seen: Sequence[Seen], reported: Hashes | None = None
) -> Leak:
    """Return how many of some prompts the stages that were seen train on, or select by.

    reported: those of the prompts that results are reported on; None: all of them.
    """
    once = prompts.distinct()
    exactly = np.zeros(len(once), bool)
    nearly = np.zeros(len(once), bool)
    by = {}
    for one in seen:
        of_stage_exactly, of_stage = once.are_in(one.trained)
        exactly |= of_stage_exactly
        nearly |= of_stage
        if of_stage.any():
            by[one.stage] = int(of_stage.sum())
    to_report = once if reported is None else reported.distinct()
    selected = np.zeros(len(to_report), bool)
    selected_by = {}
    for one in seen:
        _, of_stage = to_report.are_in(one.validated)
        selected |= of_stage
        if of_stage.any():
            selected_by[one.stage] = int(of_stage.sum())
    counts = (len(once), int(exactly.sum()), int(nearly.sum()))
    return Leak(held_out, *counts, by, int(selected.sum()), selected_by)


def of_run(seen: Sequence[Seen]) -> list[Leak]:
    """Return the leaks of each held-out set among the stages of a run so far."""
    found = []
    for one in seen:
        if len(one.held_out):
            reported = one.splits.get(TEST, Hashes.none())
            found.append(leak(one.stage, one.held_out, seen, reported))
    return found


def to_dict(leaks: Iterable[Leak], unknown: Sequence[str] = ()) -> dict:
    """Return leaks as plain dicts, for a ledger; unknown: stages of which nothing is known."""
    found = {}
    for one in leaks:
        values = dataclasses.asdict(one)
        found[values.pop("held_out")] = values
    values = dict(held_out=found)
    if unknown:
        values["unknown"] = list(unknown)
    return values


def table(leaks: Sequence[Leak], unknown: Sequence[str] = ()) -> str:
    """Return leaks as lines for a person; "" where there is nothing to say."""
    lines = []
    if leaks:
        label = "held-out prompts that are trained on"
        names = [f"  held out by {one.held_out}" for one in leaks]
        width = max(map(len, [label, *names]))
        columns = ("prompts", "exactly", "nearly", "selected on")
        lines.append(f"{label:<{width}}" + "".join(f"  {column:>11}" for column in columns))
        for one, name in zip(leaks, names, strict=True):
            counts = (one.prompts, one.exact, one.normalised, one.selected_on)
            numbers = "".join(f"  {count:>11,}" for count in counts)
            told = "; ".join(filter(None, (one.told(), one.told_of_selection())))
            lines.append(f"{name:<{width}}{numbers}" + (f"  ({told})" if told else ""))
        if any(one.normalised or one.selected_on for one in leaks):
            lines.append(f"nearly: {NORMALISED}")
        if any(one.selected_on for one in leaks):
            lines.append("selected on: test prompts that a stage validates on, exactly or nearly")
    if unknown:
        lines.append(
            f"not known of: {', '.join(unknown)}, which an earlier version of dpo_jax trained"
        )
    return "\n".join(lines)


# ---- the refusal


def trained(prompts: Hashes, seen: Iterable[Seen]) -> np.ndarray:
    """Return which of some prompts a stage trains on, exactly or normalised: bool [prompts]."""
    found = np.zeros(len(prompts), bool)
    for one in seen:
        _, nearly = prompts.are_in(one.trained)
        found |= nearly
    return found


def refusal(judge: str, prompts: Hashes, texts: Sequence[str], seen: Sequence[Seen]) -> str:
    """Return why prompts cannot be judged, as one paragraph; "" where none is trained on.

    judge: what judges them, as a message calls it. texts: of the prompts.
    """
    leaked = trained(prompts, seen)
    if not leaked.any():
        return ""
    found = leak(judge, prompts, seen)
    first = texts[int(np.argmax(leaked))]
    start = first if len(first) <= SHOWN else first[:SHOWN] + "..."
    sources = {one.stage: one.data for one in seen}
    where = ", ".join(
        f"{count:,} by {stage} ({sources[stage]})" for stage, count in found.by.items()
    )
    return (
        f"{found.normalised:,} of the {found.prompts:,} prompts that {judge} are trained on in "
        f"this run ({where}; {found.exact:,} exactly, the others but for case, white space or the "
        f"form of their characters), so the result would be too good. One begins {start!r}. Give "
        "held-out rows with other prompts; or leave these prompts out with "
        "--config.data.on_leak=drop, or take them all the same with --config.data.on_leak=allow."
    )


def shared_prefixes(held_out: Iterable[np.ndarray], training: Iterable[np.ndarray]) -> int:
    """Return how many held-out prompts, as token ids, are training prompts too.

    Prefixes of a few tokens are often the same, although the texts that they begin are not.
    """
    known = {ids.tobytes() for ids in training}
    return sum(ids.tobytes() in known for ids in held_out)

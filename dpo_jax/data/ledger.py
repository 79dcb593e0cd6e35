"""Account for every row: read, left out by design, dropped, cut or kept.

Rows add up in each split: rows + further pairs = filtered + dropped + held out + not drawn + kept.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# What is counted of chat rows, shown where there is any: label -> field of Counts.
CHAT_LINES = {
    "responses rendered behind the prompt": "laid_behind",
    "prompts without the thinking mark": "without_cue",
    "responses inside the thinking": "inside_thinking",
    "developer messages as system": "developer_is_system",
    "turns in responses not trained on": "other_turns",
    "reasoning left out by the template": "reasoning_left_out",
}
EXAMPLES = 3  # how many dropped rows are named for each reason
NOT_DISTINCT = "an earlier row has this response"  # a reason in Counts.filtered
# Weighted desirable rows to weighted undesirable ones, at which KTO is meant to be trained.
BALANCED = (1.0, 4 / 3)
ROUNDED = 0.01  # how far beyond is taken for rounding
HEADINGS = ("train", "validation", "test")  # of the table's columns
COLUMN = 12  # characters of a column of the table
WIDEST = 100  # characters of a table with a column for each set of a mixture


class Filtered(Exception):
    """The source's own rule leaves this row out: counted by reason, not held against the data."""


class Tie(Filtered):
    """No answer of a row is better than another."""

    def __init__(self, row=None):
        super().__init__("a tie: no answer is better")
        self.row = row  # its prompt and answers, without pairs, where they can be scored


class Unusable(Exception):
    """This row has a known defect: dropped and counted by reason."""


class Malformed(ValueError):
    """This row is not in the form its source needs.

    It stops the run, unless such rows are to be dropped.
    """

    def __init__(self, reason: str, found: str = "", advice: str = ""):
        super().__init__(reason, found, advice)
        self.reason = reason  # the same for all such rows, so that they can be counted
        self.example = ""  # a right row, where the row's shape is known

    def __str__(self) -> str:
        # What to do is said where the run stops, and not in the ledger's lines.
        reason, found, advice = self.args
        parts = [reason, advice, found and f"found {found}"]
        return "; ".join(filter(None, parts))


@dataclass
class Counts:
    """The counts of one split."""

    read: int = 0
    # what rows were recognised as -> rows, of those that are in a known shape
    shapes: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)  # reason -> rows
    doubts: dict[str, int] = field(default_factory=dict)  # reason to look at them -> rows, kept
    flags: dict[str, int] = field(default_factory=dict)  # "FIELD: true" or "FIELD: false" -> rows
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    # reason -> where the first few dropped rows are
    examples: dict[str, list[str]] = field(default_factory=dict)
    further_pairs: int = 0  # of rows that have several; one is counted by `read`
    held_out: int = 0  # rows moved from train to eval or test, or from eval to test
    not_drawn: int = 0  # rows beyond max_rows or max_eval_rows, or that a mixture leaves out
    kept: int = 0  # rows that are trained or evaluated on
    prompts: int = 0  # different prompts of the kept rows
    # subset -> kept rows; empty where all are of one, or there are too many to be subsets
    subsets: dict[str, int] = field(default_factory=dict)
    # "desirable" and "undesirable" -> kept rows; empty where rows have no labels
    labels: dict[str, int] = field(default_factory=dict)
    prompts_truncated: int = 0
    responses_truncated: int = 0
    eos_lost: int = 0  # responses whose end was cut off with its EOS
    boundaries: int = 0  # between prompt and response
    boundary_merges: int = 0  # of those, how many lie within a token of the two as one text
    merge_example: str = ""  # how the tokens differ at the first of them
    # responses that the chat template does not write straight after the prompt
    laid_behind: int = 0
    without_cue: int = 0  # prompts without the mark that opens the thinking before an answer
    inside_thinking: int = 0  # responses in the thinking that the prompt opens
    developer_is_system: int = 0  # rows whose developer's messages are written as the system's
    other_turns: int = 0  # turns of users and tools in responses, which are not trained on
    reasoning_left_out: int = 0  # turns whose reasoning the chat template leaves out by design
    warnings: list[str] = field(default_factory=list)  # what a person should look at
    mean_tokens: dict[str, float] = field(default_factory=dict)  # of the kept rows, by part
    # of the kept rows: "sum", "least" and "most"; empty where no column says them
    weights: dict[str, float] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)

    def count_numbers(self, weights: np.ndarray | None, margins: np.ndarray | None) -> None:
        """Add up the weights and target margins of the kept rows, where there are any."""
        for name, values in (("weights", weights), ("margins", margins)):
            if values is not None and len(values):
                # In float64, as there may be millions.
                total = float(values.sum(dtype=np.float64))
                spread = dict(sum=total, least=float(values.min()), most=float(values.max()))
                setattr(self, name, spread)

    def count_prompts(self, question_hashes: np.ndarray) -> None:
        """Count the different prompts of the kept rows, where they are known."""
        self.prompts = len(np.unique(question_hashes[question_hashes > 0]))

    def recognise(self, row) -> None:
        """Count a row by its shape, "" where its source has one alone, and what is odd about it."""
        if row.shape:
            self.shapes[row.shape] = self.shapes.get(row.shape, 0) + 1
        for doubt in row.doubts:
            self.doubts[doubt] = self.doubts.get(doubt, 0) + 1
        for flag in row.flags:
            self.flags[flag] = self.flags.get(flag, 0) + 1

    def filter(self, reason: str) -> None:
        """Count a row that the source leaves out by design."""
        self.filtered[reason] = self.filtered.get(reason, 0) + 1

    def drop(self, reason: str, where: str) -> None:
        """Count a bad row, and remember where the first few are."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(where)

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts of both; each row was counted as read, kept and so on by one alone."""
        total = {}
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name == "merge_example":
                total[name] = mine or theirs
                continue
            if not isinstance(mine, dict):
                total[name] = mine + theirs
                continue
            both = dict(mine)
            for key, value in theirs.items():
                both[key] = both[key] + value if key in both else value
            total[name] = both
        for reason, named in total["examples"].items():
            total["examples"][reason] = named[:EXAMPLES]
        total["mean_tokens"] = self._mean_tokens_with(other)
        for name in ("weights", "margins"):
            total[name] = _spread_of_both(getattr(self, name), getattr(other, name))
        return Counts(**total)

    def _mean_tokens_with(self, other: "Counts") -> dict[str, float]:
        """Return the means over the kept rows of both."""
        if not (self.mean_tokens and other.mean_tokens):
            return dict(self.mean_tokens or other.mean_tokens)
        means = {}
        for part, mean in self.mean_tokens.items():
            tokens = mean * self.kept + other.mean_tokens[part] * other.kept
            means[part] = tokens / (self.kept + other.kept)
        return means

    def all_warnings(self) -> list[str]:
        """Return what a person should look at, of single rows and of all together."""
        lines = list(self.warnings)
        texts, chats = (
            sum(count for shape, count in self.shapes.items() if shape.endswith(f", {kind}"))
            for kind in ("text", "chat")
        )
        if texts and chats:
            lines.append(
                f"mixes text and chat rows: {texts} are text, which is trained on as it stands, "
                f"and {chats} are chat, which goes through the chat template"
            )
        for doubt, count in self.doubts.items():
            lines.append(f"{doubt} ({count} rows)")
        for flag, count in self.flags.items():
            name, _, value = flag.rpartition(": ")
            others = self.flags.get(f"{name}: true", 0)
            # A column that never changes tells no answer from another.
            if value == "false" and others:
                lines.append(
                    f"field {name!r} is false in {count} rows and true in {others}, and is not "
                    "read; if it says which answers are good, pass "
                    f"--config.data.columns=label={name}, else --config.data.ignore={name}"
                )
        return lines

    def count_label(self, label: bool) -> None:
        """Count a row that is kept by its label."""
        self.labels = self.labels or {"desirable": 0, "undesirable": 0}
        self.labels["desirable" if label else "undesirable"] += 1

    def imbalance(self, desirable_weight: float, undesirable_weight: float) -> str:
        """Return a warning where KTO's two kinds of rows do not balance; "" where they do.

        The weighted rows should be desirable to undesirable as 1:1 to 4:3 (Ethayarajh et al. 2024,
        section 4.2).
        """
        desirable = self.labels.get("desirable", 0)
        undesirable = self.labels.get("undesirable", 0)
        told = f"{desirable:,} rows are desirable and {undesirable:,} undesirable"
        if not desirable or not undesirable:
            return f"{told}: KTO learns from the difference, and needs rows of both kinds"
        ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
        least, most = BALANCED
        # The weights that the line below recommends are rounded, and no reason for another line.
        if least * (1 - ROUNDED) <= ratio <= most * (1 + ROUNDED):
            return ""
        if ratio < least:
            name = "desirable_weight"
            weights = (desirable_weight * least / ratio, desirable_weight * most / ratio)
        else:
            name = "undesirable_weight"
            weights = (undesirable_weight * ratio / most, undesirable_weight * ratio / least)
        return (
            f"{told}, which the weights make {ratio:.3g} to 1; KTO is meant for 1 to 1 up to 4 to "
            f"3: set --config.kto.{name} between {weights[0]:.3g} and {weights[1]:.3g}"
        )

    def drops(self) -> list[str]:
        """Return one line for each reason that rows were dropped for."""
        lines = []
        for reason, count in self.dropped.items():
            named = ", ".join(self.examples[reason])
            more = ", ..." if count > EXAMPLES else ""
            lines.append(f"{count} x {reason} ({named}{more})")
        return lines


def _spread_of_both(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    if not one or not other:
        return dict(one or other)
    return dict(
        sum=one["sum"] + other["sum"],
        least=min(one["least"], other["least"]),
        most=max(one["most"], other["most"]),
    )


@dataclass(frozen=True)
class Reading:
    """How many tokens a run reads: examples of a batch share prompts and responses."""

    examples: int  # as often as they are read
    tokens: int
    tokens_one_at_a_time: int  # if each example were read alone, its prompt once

    def told(self, name: str) -> str:
        """Return it as a sentence; name: what an example is called, "pair" or "row"."""
        told = f"{self.tokens:,} tokens are read for {self.examples:,} {name}s"
        if self.tokens < self.tokens_one_at_a_time:
            told += f"; one {name} at a time it would be {self.tokens_one_at_a_time:,}"
        return told


@dataclass
class Ledger:
    """The counts of all splits."""

    train: Counts = field(default_factory=Counts)
    eval: Counts = field(default_factory=Counts)  # what training evaluates on: validation
    test: Counts = field(default_factory=Counts)  # what results are reported on
    shared_prompts: int = 0  # eval rows whose prompt is a training prompt too
    shared_test_prompts: int = 0  # test rows whose prompt is a training prompt too
    parts: dict[str, "Ledger"] = field(default_factory=dict)  # of a mixture: by data set

    @classmethod
    def of_parts(cls, parts: dict[str, "Ledger"]) -> "Ledger":
        """Return the ledger of some data sets together, by name; of one, its own."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        total = cls(parts=parts)
        for part in parts.values():
            total.train = total.train.plus(part.train)
            total.eval = total.eval.plus(part.eval)
            total.test = total.test.plus(part.test)
            total.shared_prompts += part.shared_prompts
            total.shared_test_prompts += part.shared_test_prompts
        return total

    def count_subsets(self, examples: dict) -> None:
        """Count the kept rows of each subset; examples: the `Examples` of each split, by name."""
        for split, of_split in examples.items():
            names, number_P = of_split.subsets
            counts = getattr(self, split)
            for number, name in enumerate(names):
                counts.subsets[name] = int((number_P == number).sum())
            # Several sets may have the same prompts.
            counts.count_prompts(of_split.question_hashes)

    def by_split(self) -> dict[str, Counts]:
        """Return the counts by the name that a person reads."""
        return dict(zip(HEADINGS, (self.train, self.eval, self.test), strict=True))

    @property
    def further(self) -> str:
        """The name of what `further_pairs` counts."""
        if self.train.labels or self.eval.labels:
            return "further completions of the same pairs"
        return "further pairs of the same rows"

    def to_dict(self) -> dict:
        """Return the ledger as plain dicts, for a JSON file."""
        values = dataclasses.asdict(self)
        for counts in (values["train"], values["eval"], values["test"]):
            for name in ("weights", "margins"):
                if not counts[name]:
                    del counts[name]
        values["parts"] = {name: part.to_dict() for name, part in self.parts.items()}
        if not self.parts:
            del values["parts"]
        return values

    def table(self) -> str:
        """Return a line for each count, with a column for each split, then the dropped rows.

        A mixture also has a column for the training rows of each set. Of more sets than there is
        room for, each has a table of its own.
        """
        rows = [("", *HEADINGS), *self._rows()]
        lines = _aligned(rows, [COLUMN] * len(HEADINGS))
        of_sets = self._columns_of_sets() if self.parts else []
        has_room = bool(of_sets) and max(map(len, of_sets)) <= WIDEST
        if has_room:
            lines = of_sets
        for name, counts in self.by_split().items():
            lines += [f"dropped from {name}: {line}" for line in counts.drops()]
        for name, counts in self.by_split().items():
            lines += [f"warning, {name}: {line}" for line in counts.all_warnings()]
        if not has_room:
            for name, part in self.parts.items():
                lines += ["", f"of these, {name}", part.table()]
        return "\n".join(lines)

    def _columns_of_sets(self) -> list[str]:
        """Return the lines of the table with a column for each set, then what these are."""
        rows = [["", *HEADINGS], *map(list, self._rows())]
        notes = []
        for number, (name, part) in enumerate(self.parts.items(), 1):
            train_of = {label: train for label, train, *_ in part._rows()}
            rows[0].append(f"[{number}]")
            for row in rows[1:]:
                # A set has no line for what is not in it.
                row.append(train_of.get(row[0], 0))
            notes.append(f"[{number}] training rows of {name}")
        widths = []
        for column in list(zip(*rows, strict=True))[1:]:
            widths.append(max(len(str(cell)) for cell in column) + 1)
        return [*_aligned(rows, widths), *notes]

    def _rows(self) -> Iterator[tuple]:
        """Yield the lines of the table: (label, train, validation, test)."""

        def of_each(name: str) -> list:
            return [getattr(counts, name) for counts in self.by_split().values()]

        def by_key(name: str) -> Iterator[tuple]:
            found = of_each(name)
            # Each once, in the order in which the splits have them.
            for key in dict.fromkeys(itertools.chain.from_iterable(found)):
                yield key, [of_split.get(key, 0) for of_split in found]

        yield "rows", *of_each("read")
        if any(of_each("further_pairs")):
            yield self.further, *of_each("further_pairs")
        for shape, numbers in by_key("shapes"):
            yield f"  recognised as: {shape}", *numbers
        for reason, numbers in by_key("filtered"):
            yield f"  filtered: {reason}", *numbers
        for reason, numbers in by_key("dropped"):
            yield f"  dropped: {reason}", *numbers
        yield "  held out", self.train.held_out, self.eval.held_out or "", ""
        if any(of_each("not_drawn")):
            yield "  not drawn", *of_each("not_drawn")
        yield "kept", *of_each("kept")
        for label, numbers in by_key("labels"):
            yield f"  {label}", *numbers
        for subset, numbers in by_key("subsets"):
            yield f"  subset {subset}", *numbers
        if any(of_each("prompts")):
            yield "prompts", *of_each("prompts")
        yield "prompts cut", *of_each("prompts_truncated")
        yield "responses cut", *of_each("responses_truncated")
        yield "  EOS lost", *of_each("eos_lost")
        merges = []
        for counts in self.by_split().values():
            merges.append(f"{counts.boundary_merges} of {counts.boundaries}")
        yield "boundary merges", *merges
        for label, name in CHAT_LINES.items():
            numbers = of_each(name)
            if any(numbers):
                yield label, *numbers
        for part, numbers in by_key("mean_tokens"):
            yield f"mean tokens, {part}", *(f"{number:.1f}" for number in numbers)
        for label, name in (("weights", "weights"), ("target margins", "margins")):
            for part, numbers in by_key(name):
                yield f"{label}, {part}", *(f"{number:.6g}" for number in numbers)
        yield "rows whose prompt is trained on", "", self.shared_prompts, self.shared_test_prompts

    def check(self, max_dropped: float, path: str) -> None:
        """Stop a run whose data is mostly bad.

        Raises ValueError where more than `max_dropped` of the rows to train or to validate on were
        dropped (filtered ones do not count), or where no row is left to train on. path: of the
        data, for the message.
        """
        for name, part in self.parts.items():
            try:
                part.check(max_dropped, name)
            except ValueError as error:
                raise ValueError(f"data.mix: {name}: {error}") from None
        if not self.train.read:
            raise ValueError(f"{path} has no rows to train on.")
        for name, counts in self.by_split().items():
            dropped = sum(counts.dropped.values())
            judged = counts.read + counts.further_pairs - sum(counts.filtered.values())
            reasons = "".join(f"\n  {line}" for line in counts.drops())
            if counts is self.test:
                continue  # it is not trained on, and what can be read of it is counted
            if dropped > max_dropped * judged:
                raise ValueError(
                    f"{dropped} of {judged} {name} rows ({dropped / judged:.1%}) had to be "
                    f"dropped; data.max_dropped allows {max_dropped:.1%}:{reasons}\n"
                    "Fix these rows, or raise data.max_dropped if losing them is right."
                )
        if not self.train.kept:
            reasons = "".join(f"\n  {line}" for line in self.train.drops())
            filtered = sum(self.train.filtered.values())
            dropped = sum(self.train.dropped.values())
            raise ValueError(
                f"{path}: no row is left to train on: {self.train.read} read, {filtered} filtered, "
                f"{dropped} dropped, {self.train.held_out} held out for eval. See data.path, "
                f"data.train_split, data.max_rows and data.eval_fraction.{reasons}"
            )


def _aligned(rows: list, widths: list[int]) -> list[str]:
    """Return the lines of a table: labels, and columns of these widths."""
    width = max(len(row[0]) for row in rows)
    lines = []
    for label, *cells in rows:
        columns = [f"{label:<{width}}"]
        for cell, cell_width in zip(cells, widths, strict=True):
            columns.append(f"{cell:>{cell_width}}")
        lines.append("  ".join(columns).rstrip())
    return lines

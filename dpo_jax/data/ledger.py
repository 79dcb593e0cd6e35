"""What became of every row: read, left out by design, dropped, cut, kept.

Rows add up in each split: read = filtered + dropped + held out + kept.
"""

import dataclasses
from dataclasses import dataclass, field

EXAMPLES = 3  # rows named for each reason


class Filtered(Exception):
    """The source's own rule leaves this row out: counted by reason, not held against the data."""


class Unusable(Exception):
    """This row has a known defect: dropped and counted by reason."""


class Malformed(ValueError):
    """This row is not in the form its source needs: stops the run, unless such rows are to be
    dropped.
    """

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason, found)
        self.reason = reason  # the same for all such rows, so that they can be counted

    def __str__(self) -> str:
        reason, found = self.args
        return f"{reason}; found {found}" if found else reason


@dataclass
class Counts:
    """The counts of one split."""

    read: int = 0
    filtered: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, list[str]] = field(
        default_factory=dict
    )  # reason -> where the first few dropped are
    held_out: int = 0  # rows moved from train to eval
    kept: int = 0  # rows that are trained or evaluated on
    prompts_truncated: int = 0
    responses_truncated: int = 0
    eos_lost: int = 0  # responses whose end was cut off with its EOS
    boundaries: int = 0  # prompt and response boundaries looked at
    boundary_merges: int = 0  # of those, how many would be tokenised otherwise in one piece
    mean_tokens: dict[str, float] = field(default_factory=dict)  # of the kept rows, by part

    def filter(self, reason: str):
        """Counts a row that the source leaves out by design."""
        self.filtered[reason] = self.filtered.get(reason, 0) + 1

    def drop(self, reason: str, where: str):
        """Counts a bad row, and remembers where the first few are."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    def drops(self) -> list[str]:
        """One line for each reason that rows were dropped for."""
        more = {
            reason: ", ..." if count > EXAMPLES else "" for reason, count in self.dropped.items()
        }
        return [
            f"{count} x {reason} ({', '.join(self.examples[reason])}{more[reason]})"
            for reason, count in self.dropped.items()
        ]


@dataclass
class Ledger:
    """The counts of both splits."""

    train: Counts = field(default_factory=Counts)
    eval: Counts = field(default_factory=Counts)
    shared_prompts: int = 0  # eval rows whose prompt is a training prompt too

    def to_dict(self) -> dict:
        """The ledger as plain dicts, for a JSON file."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The ledger for a reader: a line for each count, a column for each split, then the dropped
        rows.
        """
        rows = [("", "train", "eval"), *self._rows()]
        width = max(len(label) for label, _, _ in rows)
        lines = [
            f"{label:<{width}}  {train:>12}  {evals:>12}".rstrip() for label, train, evals in rows
        ]
        for name, counts in (("train", self.train), ("eval", self.eval)):
            lines += [f"dropped from {name}: {line}" for line in counts.drops()]
        return "\n".join(lines)

    def _rows(self):
        """The lines of the table: (label, train, eval)."""
        both = self.train, self.eval
        yield "read", *(counts.read for counts in both)
        for reason in self.train.filtered | self.eval.filtered:
            yield f"  filtered: {reason}", *(counts.filtered.get(reason, 0) for counts in both)
        for reason in self.train.dropped | self.eval.dropped:
            yield f"  dropped: {reason}", *(counts.dropped.get(reason, 0) for counts in both)
        yield "  held out for eval", self.train.held_out, ""
        yield "kept", *(counts.kept for counts in both)
        yield "prompts cut", *(counts.prompts_truncated for counts in both)
        yield "responses cut", *(counts.responses_truncated for counts in both)
        yield "  EOS lost", *(counts.eos_lost for counts in both)
        yield (
            "boundary merges, first rows",
            *(f"{counts.boundary_merges} of {counts.boundaries}" for counts in both),
        )
        for part in self.train.mean_tokens | self.eval.mean_tokens:
            yield (
                f"mean tokens, {part}",
                *(f"{counts.mean_tokens.get(part, 0):.1f}" for counts in both),
            )
        yield "eval prompts also in train", "", self.shared_prompts

    def check(self, max_dropped: float):
        """Stops a run whose data is mostly bad.

        Raises ValueError when more than `max_dropped` of a split's rows were dropped (filtered ones
        do not count), or when no row is left to train on.
        """
        for name, counts in (("train", self.train), ("eval", self.eval)):
            dropped = sum(counts.dropped.values())
            judged = counts.read - sum(counts.filtered.values())
            reasons = "".join(f"\n  {line}" for line in counts.drops())
            if dropped > max_dropped * judged:
                raise ValueError(
                    f"{dropped} of {judged} {name} rows ({dropped / judged:.1%}) had to be "
                    f"dropped; data.max_dropped allows {max_dropped:.1%}:{reasons}\n"
                    "Mend these rows, or raise data.max_dropped if losing them is right."
                )
        if not self.train.kept:
            filtered, dropped = sum(self.train.filtered.values()), sum(self.train.dropped.values())
            raise ValueError(
                f"no row is left to train on: {self.train.read} read, {filtered} filtered, "
                f"{dropped} dropped, {self.train.held_out} held out for eval. See data.path, "
                "data.train_split, data.max_rows and data.eval_fraction."
            )

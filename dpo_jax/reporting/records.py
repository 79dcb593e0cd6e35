"""What is known of a run's stages when a page about them is written. Plain data, without files."""

import dataclasses
import typing

from dpo_jax.reporting.charts import Points

LARGEST = 1e100  # a value beyond it, or below its inverse, was not measured in float32


def can_be_drawn(value: object) -> bool:
    """Return whether a value is a number, and finite, as its square and its inverse are."""
    if type(value) not in (int, float):
        return False
    return value == 0 or 1 / LARGEST <= abs(value) <= LARGEST


class Completion(typing.NamedTuple):
    """A text that a model gave, and its reward where one was measured."""

    text: str
    reward: float | None = None


class Sample(typing.NamedTuple):
    """A held-out prompt, and what the policy and its reference make of it."""

    prompt: str
    policy: Completion
    reference: Completion | None  # None in runs from before it was kept


@dataclasses.dataclass
class Record:
    """A stage of a run, as its files tell."""

    name: str  # of its folder, with the WORKDIR's name in front where there are several
    stage: str
    status: str  # for a person: "finished 2026-01-02 03:04", "running at step 3 of 240"
    is_finished: bool
    config: dict  # the whole config that the stage was started with, nested
    differs: dict | None  # dotted field -> (value, default); None for another version's config
    changes: list[str]  # a line for each change that a resumed run took
    rows: list[dict]  # of metrics.jsonl, finite numbers alone
    problems: list[str]  # a line for each file that could not be read, wholly or in part
    ledger: dict  # of data, or {}
    result: dict  # numbers that done.json keeps
    stopped: str  # what a run that ended by a number that is not finite said; "" for others
    samples: list[Sample]

    @property
    def block(self) -> dict:
        """The stage's own fields."""
        block = self.config.get(self.stage)
        return block if isinstance(block, dict) else {}

    def number(self, name: str) -> float | None:
        """Return a number of the stage's own fields; None where it is none, or is not finite."""
        found = self.block.get(name)
        return found if can_be_drawn(found) else None

    @property
    def _model(self) -> dict:
        model = self.config.get("model")
        return model if isinstance(model, dict) else {}

    @property
    def has_adapters(self) -> bool:
        lora = self._model.get("lora")
        return isinstance(lora, dict) and bool(lora.get("rank"))

    @property
    def is_from_scratch(self) -> bool:
        """Whether training began with random weights: no model is given, and none is fine-tuned."""
        stages = self.config.get("stages") or []
        return self._model.get("path") == "" and "sft" not in stages

    def points(self, metric: str) -> Points:
        """Return (step, value) of a metric wherever it was written."""
        return [(row["step"], row[metric]) for row in self.rows if metric in row]

    def values(self, metric: str) -> list[float]:
        """Return the values of a metric in the order of the steps."""
        return [value for _, value in self.points(metric)]

    def count(self, split: str, name: str) -> int:
        """Return a count of the ledger; 0 where it has none."""
        counts = self.ledger.get(split)
        found = counts.get(name) if isinstance(counts, dict) else 0
        return found if type(found) is int and found > 0 else 0

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None without rows."""
        return self.rows[-1]["step"] if self.rows else None

    @property
    def total(self) -> int | None:
        """The steps that the stage has, where that is known: of a finished one, or one by steps."""
        return self.last_step if self.is_finished else self.number("steps") or None

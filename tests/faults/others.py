"""Parts that are tried in processes of the harness: hostile input, all but the real commands."""

import pathlib
from collections.abc import Iterator

from tests.faults.outcomes import CLEAR, DEEP, HANGING, SAME, SILENT, Try
from tests.helpers.paths import STORIES

PART = "hostile"
# What tests/hostile calls an end -> what the table calls it. "taken": rightly. "unclear": a refusal
# that does not name what is wrong, or is no paragraph.
OUTCOMES = {
    "taken": SAME,
    "refused": CLEAR,
    "silent": SILENT,
    "unclear": DEEP,
    "deep": DEEP,
    "slow": HANGING,
    "large": HANGING,
}


def hostile(folder: pathlib.Path) -> Iterator[Try]:
    """Give every generated hostile input to the function that reads it, in this process."""
    from dpo_jax.data import tokenizer as tokenizers
    from tests.hostile import data, models, typed

    for name in ("data", "models", "typed"):
        (folder / name).mkdir(parents=True)
    yield from _tries(data.verdicts(folder / "data", tokenizers.load(STORIES)))
    yield from _tries(models.verdicts(folder / "models"))
    yield from _tries(typed.verdicts(folder / "typed"))


def _tries(found) -> Iterator[Try]:
    for case, verdict in found:
        outcome = OUTCOMES[verdict.verdict]
        detail = f"{case.name}: {verdict.words}"
        yield Try(PART, case.kind, outcome, 0.0, detail)

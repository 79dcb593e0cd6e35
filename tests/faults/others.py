"""Parts of the table that are counted elsewhere: damaged files of a WORKDIR, hostile data files."""

import pathlib

from tests.faults.outcomes import CLEAR, DEEP, HANGING, SAME, SILENT, Try
from tests.helpers.paths import STORIES

FILES = "files"
HOSTILE = "hostile"
# What tests/faults/files.py and tests/hostile call an end -> what the table calls it. "told": the
# result is the same but for rows of metrics, and a line says that they are lost.
OF_FILES = {
    "same bits": SAME,
    "told": CLEAR,
    "clear": CLEAR,
    "silent": SILENT,
    "deep": DEEP,
    "hanging": HANGING,
}
# "taken": all that the ledger counts is there to train on. "unclear": a refusal that does not name
# the file or is no paragraph. "slow", "large": more than 30 seconds, or 2 GB.
OF_HOSTILE = {
    "taken": SAME,
    "refused": CLEAR,
    "silent": SILENT,
    "unclear": SILENT,
    "deep": DEEP,
    "slow": HANGING,
    "large": HANGING,
}


def damaged_files(folder: pathlib.Path) -> list[Try]:
    """Damage every file of small runs in turn, and run them again in this process."""
    from tests.faults import files

    tries = []
    for kind in files.KINDS:
        for name, counts in files.count(kind, folder / kind).items():
            what = f"every file of {name}"
            bad = list(counts.bad)
            for outcome, number in counts.outcomes.items():
                for _ in range(number):
                    is_bad = outcome in files.BAD
                    detail = bad.pop(0) if is_bad and bad else ""
                    tries.append(Try(FILES, what, OF_FILES[outcome], 0.0, detail))
    return tries


def hostile_data(folder: pathlib.Path) -> list[Try]:
    """Read every generated hostile data file in this process."""
    from dpo_jax.data import tokenizer as tokenizers
    from tests.hostile import data

    folder.mkdir(parents=True)
    tries = []
    for case, verdict in data.verdicts(folder, tokenizers.load(STORIES)):
        outcome = OF_HOSTILE[verdict.verdict]
        detail = "" if outcome in (SAME, CLEAR) else f"{case.name}: {verdict.words}"
        tries.append(Try(HOSTILE, case.kind, outcome, 0.0, detail))
    return tries

"""Judge the generated hostile inputs, and print how many of each kind met which verdict.

python -m tests.hostile prints a table in Markdown; its exit status is 1 where a case is wrong.
"""

import collections
import pathlib
import sys
import tempfile
from collections.abc import Iterable

from dpo_jax.data import tokenizer as tokenizers
from tests.helpers.paths import STORIES
from tests.hostile import data

RIGHT = ("taken", "refused")
WRONG = ("silent", "deep", "unclear", "slow", "large")


def table(found: Iterable[tuple]) -> str:
    """Return the counts of (case, verdict) as a table: a row for each kind, and one for all."""
    counts: dict[str, collections.Counter] = {}
    for case, verdict in found:
        counts.setdefault(case.kind, collections.Counter())[verdict.verdict] += 1
    counts["all"] = sum(counts.values(), collections.Counter())
    # A verdict that no case met has no column, but for the two right ones.
    columns = [*RIGHT, *(verdict for verdict in WRONG if counts["all"][verdict])]
    lines = [f"| kind | tried | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1)]
    for kind, of_kind in counts.items():
        numbers = [of_kind.total(), *(of_kind[verdict] for verdict in columns)]
        lines.append(f"| {kind} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = list(data.verdicts(pathlib.Path(folder), tokenizers.load(STORIES)))
    print(table(found))
    wrong = [(case, verdict) for case, verdict in found if verdict.verdict not in RIGHT]
    for case, verdict in wrong:
        print(f"{case.kind}, {case.name}: {verdict.verdict}: {verdict.words}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""The table of how the tries ended, and the machine that they were made on."""

import json
import os
import pathlib
import platform
import subprocess

from tests.faults import outcomes
from tests.faults.outcomes import Try
from tests.helpers.paths import ROOT

PAGE = "reliability.md"
# A line for how each part was measured, and one for each of its tries.
RECORD = "reliability.jsonl"


def write(folder: pathlib.Path, measured: dict[str, dict]) -> dict[str, dict]:
    """Write the table and the record of all tries; parts that were not run now stay as they were.

    measured: part -> record, as `record` makes it. Returns all parts.
    """
    path = folder / RECORD
    before = _read(path) if path.exists() else {}
    parts = before | measured
    lines = []
    for part, kept in parts.items():
        about = {name: value for name, value in kept.items() if name != "tries"}
        lines += [json.dumps({"part": part, **about}), *map(json.dumps, kept["tries"])]
    path.write_text("".join(f"{line}\n" for line in lines))
    (folder / PAGE).write_text(text(parts))
    return parts


def _read(path: pathlib.Path) -> dict[str, dict]:
    """Return the parts that were measured before."""
    parts = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "command" in row:
            parts[row.pop("part")] = row | {"tries": []}
        else:
            parts[row["part"]]["tries"].append(row)
    return parts


def record(tries: list[Try], planned: int, command: str, minutes: float) -> dict:
    """Return what is kept of a part; planned: how many tries it has when it is through."""
    return dict(
        planned=planned,
        command=command,
        machine=machine(),
        commit=commit(),
        minutes=round(minutes, 1),
        tries=[vars(one) for one in tries],
    )


def commit() -> str:
    """Return the commit of the code, "" outside of a clone."""
    shown = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(shown, cwd=ROOT, text=True, capture_output=True)
    return done.stdout.strip()


def machine() -> str:
    """Return the machine and the versions, in words."""
    import jax

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB of memory, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}"
    )


def text(parts: dict[str, dict]) -> str:
    """Return the page: what was tried, the counts, and every bad end as it was."""
    tries = [Try(**one) for part in parts.values() for one in part["tries"]]
    rows = outcomes.counts(tries)
    total = [sum(one.outcome == name for one in tries) for name in outcomes.OUTCOMES]
    lines = [
        "# Faults on purpose, and how runs end",
        "",
        "Made by `python -m tests.faults`; `--parts=NAME` measures one part again.",
        "",
        "Each try starts a small run, hurts it, and gives the same command again. **Same bits**: "
        "in the end, exported weights, metrics without timings, pairs, completions, verdicts and "
        "the toy's table equal an uninterrupted run's; of hostile data: the counts of the ledger "
        "are right. **Clear refusal**: exit status 2 and one paragraph; where the cause can go "
        "away, the same command then ended with the same bits. **Silent**: another result that "
        "passes for right, or an end without a word or with the wrong status. **Deep**: a "
        "traceback. **Hanging**: no end in time.",
        "",
        "| part | what | tried | same bits | clear refusals | silent | deep | hanging |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (part, what), count in rows.items():
        # A bar would end the cell.
        name = what.replace("|", "\\|")
        lines.append(_row(part, name, [count[outcome] for outcome in outcomes.OUTCOMES]))
    lines.append(_row("all", "", total))
    lines += [
        "",
        "| part | tried | minutes | at commit | command | machine |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        tried = f"{len(part['tries'])} of {part['planned']}"
        minutes = f"{part['minutes']:.0f}"
        cells = [name, tried, minutes, part["commit"], f"`{part['command']}`", part["machine"]]
        lines.append("| " + " | ".join(cells) + " |")
    bad = [one for one in tries if one.outcome in outcomes.BAD]
    if bad:
        lines += ["", "## Bad ends", ""]
        lines += [f"- {one.part}, {one.what}: {one.outcome}. {_shown(one.detail)}" for one in bad]
    return "\n".join(lines) + "\n"


def _row(part: str, what: str, count: list[int]) -> str:
    cells = [part, what, str(sum(count)), *map(str, count)]
    return "| " + " | ".join(cells) + " |"


def _shown(detail: str) -> str:
    """Return a detail as code, so that nothing in it is markup."""
    return "`" + detail.replace("`", "'") + "`" if detail else ""

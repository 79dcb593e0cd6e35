"""The tables of how the tries ended, and the machine that they were made on."""

import json
import os
import pathlib
import platform
import re
import subprocess

from tests.faults import outcomes
from tests.faults.load import Result
from tests.faults.outcomes import Try
from tests.helpers.paths import ROOT

PAGE = "reliability.md"
# A line for how each part was measured, and then its counts and what ended badly, a line each.
RECORD = "reliability.jsonl"
LISTS = ("counts", "bad", "load")  # the keys of a part's lines: one line for each item
EXPLAINED = """\
# Faults on purpose, and how runs end

Made by `python -m tests.faults`; `--parts=NAME` measures one part again. What each part tries is
in [tests/README.md](../../tests/README.md#faults).

A try of `kills`, `signals`, `surroundings` or `files` starts a small run, hurts it or its files,
and gives the same command again. A try of `hostile` gives a command, or the function behind it, a
file, a model, a config or a flag that nobody means.
"""
# Column -> when a try counts there.
COLUMNS = {
    outcomes.SAME: "the command ended with status 0 and the right result: exported weights, "
    "metrics without timings, pairs, completions, verdicts and the toy's table equal an "
    "uninterrupted run's. Of hostile data: the ledger's counts add up, and every text that is "
    "trained on is of a good row. Of a hostile model, config or flag: its values are usable",
    outcomes.TOLD: "the command ended with status 0 and the right result, but rows of metrics that "
    "cannot be computed again are lost, and a line says so",
    outcomes.CLEAR: "the command ended with status 2 and one paragraph without a traceback that "
    "names what is wrong (of damage: the file, or the folder of its checkpoint) and what to do. "
    "Where the cause can go away, it was then taken away, and the same command ended with the same "
    "bits",
    outcomes.SILENT: "another result passed for right, the command ended without a word or with "
    "another status, or `dpo-jax check` took a damaged file for whole",
    outcomes.DEEP: "it ended with a traceback, or with a message that does not name what is wrong "
    "and what to do",
    outcomes.HANGING: "it did not end in time (a command 240 s, or 480 s where another process of "
    "it was killed; a signalled one 8 s; a run after damage 60 s; hostile input 30 s, of a "
    "processor's time for a real command), or hostile input took more than 2 GB of memory",
}


def write(folder: pathlib.Path, measured: dict[str, dict]) -> dict[str, dict]:
    """Write the tables and their record; parts that were not run now stay as they were.

    measured: part -> record, as `record` makes it. Returns all parts.
    """
    path = folder / RECORD
    before = _read(path) if path.exists() else {}
    parts = before | measured
    lines = []
    for part, kept in parts.items():
        about = {name: value for name, value in kept.items() if name not in LISTS}
        lines.append({"part": part, "about": about})
        for name in LISTS:
            lines += [{"part": part, name: item} for item in kept[name]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / PAGE).write_text(text(parts))
    return parts


def _read(path: pathlib.Path) -> dict[str, dict]:
    """Return the parts that were measured before."""
    parts = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        part = row.pop("part")
        name, value = row.popitem()
        if name == "about":
            parts[part] = value | {name: [] for name in LISTS}
        else:
            parts[part][name].append(value)
    return parts


def record(
    tries: list[Try], planned: int, command: str, minutes: float, load: list[Result] = ()
) -> dict:
    """Return what is kept of a part: counts, and details only of what is not right.

    planned: how many tries it has when it is through. load: what was measured, of the part `load`.
    """
    counts = []
    for what, count in outcomes.counts(tries).items():
        counts.append({"what": what} | {name: count[name] for name in outcomes.OUTCOMES})
    bad = []
    for one in tries:
        if one.outcome in outcomes.BAD:
            detail = _without_paths(one.detail)
            bad.append({"what": one.what, "outcome": one.outcome, "detail": detail})
    return dict(
        planned=planned,
        command=command,
        machine=machine(),
        commit=commit(),
        minutes=round(minutes, 1),
        counts=counts,
        bad=bad,
        load=[vars(one) for one in load],
    )


def _without_paths(detail: str) -> str:
    """Return a detail without folders of this machine: the last name of a path tells enough."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", ".../", detail)


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
        f"jax {jax.__version__}, load average {os.getloadavg()[0]:.0f} at the end"
    )


def text(parts: dict[str, dict]) -> str:
    """Return the page: what was tried, the counts, what load took, and every bad end as it was."""
    lines = [EXPLAINED, "| column | a try counts here if |", "|---|---|"]
    lines += [f"| {name} | {meaning} |" for name, meaning in COLUMNS.items()]
    lines.append("")
    columns = " | ".join(outcomes.OUTCOMES)
    lines.append(f"| part | what | tried | {columns} |")
    lines.append("|---|---|" + "---:|" * (1 + len(outcomes.OUTCOMES)))
    total = [0] * len(outcomes.OUTCOMES)
    for part, kept in parts.items():
        for row in kept["counts"]:
            count = [row[name] for name in outcomes.OUTCOMES]
            total = [sum(both) for both in zip(total, count, strict=True)]
            # A bar would end the cell.
            lines.append(_row(part, row["what"].replace("|", "\\|"), count))
    lines.append(_row("all", "", total))

    lines += ["", *_load(parts), "## How it was measured", ""]
    lines.append("| part | tried | minutes | at commit | command | machine |")
    lines.append("|---|---|---:|---|---|---|")
    for part, kept in parts.items():
        tried = f"{_tried(kept)} of {kept['planned']}"
        minutes = f"{kept['minutes']:.0f}"
        cells = [part, tried, minutes, kept["commit"], f"`{kept['command']}`", kept["machine"]]
        lines.append("| " + " | ".join(cells) + " |")

    bad = []
    for part, kept in parts.items():
        for one in kept["bad"]:
            bad.append(f"- {part}, {one['what']}: {one['outcome']}. {_shown(one['detail'])}")
    if bad:
        lines += ["", "## Bad ends", "", *bad]
    return "\n".join(lines) + "\n"


def _load(parts: dict[str, dict]) -> list[str]:
    """Return the lines about load; none where it was not measured."""
    measured = [Result(**one) for kept in parts.values() for one in kept["load"]]
    if not measured:
        return []
    return [
        "## Load",
        "",
        "Long work, each kind in a process of its own, whose memory (VmRSS) is measured. Times "
        "depend on what else the machine does.",
        "",
        *Result.table(measured),
        "",
    ]


def _tried(kept: dict) -> int:
    """Return how many tries of a part have ended."""
    counted = [row[name] for row in kept["counts"] for name in outcomes.OUTCOMES]
    return sum(counted) + len(kept["load"])


def _row(part: str, what: str, count: list[int]) -> str:
    cells = [part, what, str(sum(count)), *map(str, count)]
    return "| " + " | ".join(cells) + " |"


def _shown(detail: str) -> str:
    """Return a detail as code, so that nothing in it is markup."""
    return "`" + detail.replace("`", "'") + "`" if detail else ""

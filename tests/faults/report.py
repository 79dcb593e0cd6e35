"""The table of how the tries ended, and the machine that they were made on."""

import json
import os
import pathlib
import platform

from tests.faults import outcomes
from tests.faults.outcomes import Try


def write(folder: pathlib.Path, tries: list[Try], command: str, minutes: float) -> None:
    """Write reliability.md, and each try in reliability.json beside it."""
    record = dict(
        command=command,
        machine=machine(),
        minutes=round(minutes, 1),
        tries=[vars(one) for one in tries],
    )
    (folder / "reliability.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "reliability.md").write_text(text(tries, command, minutes))


def machine() -> str:
    """Return the machine and the versions, in words."""
    import jax

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB of memory, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}"
    )


def text(tries: list[Try], command: str, minutes: float) -> str:
    """Return the page: what was tried, the counts, and every bad end as it was."""
    rows = outcomes.counts(tries)
    total = [sum(one.outcome == name for one in tries) for name in outcomes.OUTCOMES]
    lines = [
        "# Faults on purpose, and how runs end",
        "",
        f"Made by `{command}` in {minutes:.0f} minutes on {machine()}.",
        "",
        "Each try starts a small run, hurts it, and gives the same command again. **Same bits**: "
        "in the end, exported weights, metrics without timings, pairs, completions, verdicts and "
        "the toy's table equal an uninterrupted run's. **Clear refusal**: exit status 2 and one "
        "paragraph; where the cause can go away, the same command then ended with the same bits. "
        "**Silent**: another result that passes for right, or an end without a word or with the "
        "wrong status. **Deep**: a traceback. **Hanging**: no end in time.",
        "",
        "| part | what | tried | same bits | clear refusals | silent | deep | hanging |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (part, what), count in rows.items():
        # A bar would end the cell.
        name = what.replace("|", "\\|")
        lines.append(_row(part, name, [count[outcome] for outcome in outcomes.OUTCOMES]))
    lines.append(_row("all", "", total))
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

"""Report win rates as a table, a figure and JSON."""

import pathlib
from collections.abc import Callable

from dpo_jax.console import say
from dpo_jax.evaluation import plots, winrate_stats
from dpo_jax.workdir import write_json, write_text

ROUGE = ("rouge1", "rouge2", "rougeL")
RATES = ("rate", "low", "high", "wins", "ties", "losses", "unparsable", "n")


def write(
    task: str, prompts: int, rows: list[dict], folder: pathlib.Path, *, complete: bool
) -> None:
    """Write winrate.json, winrate.md and winrate.png, and print the table.

    rows: as winrate.judge_all makes them. complete: whether they are all that was asked for.
    """
    if not rows:
        return
    paired = against(rows, "dpo")
    written = []
    for row in rows:
        # The verdicts have files of their own, and the judge is the same for all rows.
        written.append({name: row[name] for name in row if name not in ("judged", "verdicts")})
    result = dict(
        task=task,
        prompts=prompts,
        complete=complete,
        judged=rows[-1]["judged"],
        paired=paired,
        rows=written,
    )
    write_json(folder / "winrate.json", result)
    text = table(rows, paired)
    write_text(folder / "winrate.md", text)
    plots.win_rates(folder / "winrate.png", panels(rows))
    say(f"{text}\n{folder}: winrate.json, winrate.md, winrate.png")


def label(row: dict) -> str:
    """Return a method's name in tables and figures."""
    if row["method"] == "best_of_n":
        return f"best of {row['best_of']}"
    return row["method"]


def cell(result: dict) -> str:
    """Return a win rate and its interval as text."""
    return _with_interval(result, "rate")


def _with_interval(result: dict, name: str) -> str:
    value = result[name]
    if value is None:
        return "none"
    return f"{value:.3f} [{result['low']:.3f}, {result['high']:.3f}]"


def against(rows: list[dict], method: str) -> list[dict]:
    """Compare a method with each other one, prompt by prompt, at the same temperature."""
    rows = [row for row in rows if row["step"] is None]
    verdicts = {row["temperature"]: row["verdicts"] for row in rows if row["method"] == method}
    found = []
    for row in rows:
        temperature = row["temperature"]
        if row["method"] == method or temperature not in verdicts:
            continue
        about = dict(first=method, second=label(row), temperature=temperature)
        found.append(about | winrate_stats.paired(verdicts[temperature], row["verdicts"]))
    return found


def panels(rows: list[dict]) -> dict[str, tuple[str, list[dict]]]:
    """Return title -> (what varies, rows to draw), for the panels that have rows."""
    by_method, best_of_n, over_training = [], [], []
    for row in rows:
        if row["step"] is not None:
            name = f"{row['method']}, T={row['temperature']:g}"
            over_training.append(row | dict(x=row["step"], label=name))
            continue
        drawn = row | dict(x=row["temperature"], label=label(row))
        if row["method"] == "best_of_n":
            best_of_n.append(drawn)
        by_method.append(drawn)
    # Of best of N, the other methods are drawn beside the largest N only.
    most = max((row["best_of"] for row in best_of_n), default=1)
    by_method = [row for row in by_method if row["method"] != "best_of_n" or row["best_of"] == most]
    found = {
        "by method": ("temperature", by_method),
        "best of N": ("temperature", best_of_n),
        "over training": ("step", over_training),
    }
    return {title: (varies, drawn) for title, (varies, drawn) in found.items() if drawn}


def table(rows: list[dict], paired: list[dict]) -> str:
    """Return the tables in Markdown, those that have rows.

    Win rates by method and by step at each temperature; methods compared on the same prompts; then
    what else was measured of the answers.
    """
    at_end = [row for row in rows if row["step"] is None]
    over_training = [row for row in rows if row["step"] is not None]
    tables = [
        _by_temperature(at_end, "win rate", label),
        _by_temperature(over_training, "step", lambda row: str(row["step"])),
        _comparisons(paired),
        _measured(at_end, [name for name in ("words", *ROUGE) if name in rows[0]]),
    ]
    return "\n".join(_markdown(lines) for lines in tables if len(lines) > 1)


# The lines of a table are tuples of cells, its heads first.
Lines = list[tuple[str, ...]]


def _by_temperature(rows: list[dict], head: str, name_of: Callable[[dict], str]) -> Lines:
    """Return a line for each name and a column for each temperature."""
    temperatures = sorted({row["temperature"] for row in rows})
    cells = {(name_of(row), row["temperature"]): cell(row) for row in rows}
    names = dict.fromkeys(map(name_of, rows))  # each once, in their order
    lines = [(head, *(f"T={temperature:g}" for temperature in temperatures))]
    for name in names:
        found = [cells.get((name, temperature), "") for temperature in temperatures]
        lines.append((name, *found))
    return lines


def _comparisons(paired: list[dict]) -> Lines:
    lines = [("beside", "T", "difference of win rates", "better on", "worse on", "p")]
    for pair in paired:
        line = (
            f"{pair['first']} - {pair['second']}",
            f"{pair['temperature']:g}",
            _with_interval(pair, "difference"),
            str(pair["better"]),
            str(pair["worse"]),
            f"{pair['p']:.2g}",
        )
        lines.append(line)
    return lines


def _measured(rows: list[dict], names: list[str]) -> Lines:
    lines = [("answers", "T", *names, "unparsable")]
    for row in rows:
        values = [f"{row[name]:.3g}" for name in names]
        lines.append((label(row), f"{row['temperature']:g}", *values, str(row["unparsable"])))
    return lines


def _markdown(lines: Lines) -> str:
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    rule = "|" + "---|" * len(lines[0])
    return "\n".join([head, rule, *rows]) + "\n"


def rouge(answers: list[str], references: list[str]) -> dict[str, float]:
    """Return the mean ROUGE F-measures, without stemming, by Google's library."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "ROUGE needs rouge-score, which is an extra: "
            'pip install "dpo_jax[judge]" (or pip install rouge-score).'
        ) from error

    scorer = RougeScorer(ROUGE)
    measured = []
    for answer, reference in zip(answers, references, strict=True):
        measured.append(scorer.score(reference, answer))
    means = {}
    for name in ROUGE:
        means[name] = sum(one[name].fmeasure for one in measured) / len(measured)
    return means

"""What the win-rate experiments write of their rows: a table, a figure, and all in JSON."""

import pathlib

from dpo_jax.console import say
from dpo_jax.evaluation import plots, winrate_stats
from dpo_jax.workdir import write_json, write_text

ROUGE = ("rouge1", "rouge2", "rougeL")
RATES = ("rate", "low", "high", "wins", "ties", "losses", "unparsable", "n")


def write(
    task: str, prompts: int, rows: list[dict], folder: pathlib.Path, *, complete: bool
) -> None:
    """Writes winrate.json, winrate.md and winrate.png.

    rows: as winrate_stats.judge_all makes them; complete: whether they are all that was asked for.
    """
    if not rows:
        return
    paired = against(rows, "dpo")
    write_json(
        folder / "winrate.json",
        dict(
            task=task,
            prompts=prompts,
            complete=complete,
            judged=rows[-1]["judged"],
            paired=paired,
            rows=[
                {name: value for name, value in row.items() if name not in ("judged", "verdicts")}
                for row in rows
            ],
        ),
    )
    text = table(rows, paired)
    write_text(folder / "winrate.md", text)
    plots.win_rates(folder / "winrate.png", panels(rows))
    say(f"{text}\n{folder}: winrate.json, winrate.md, winrate.png")


def label(row: dict) -> str:
    return f"best of {row['best_of']}" if row["method"] == "best_of_n" else row["method"]


def cell(result: dict) -> str:
    """A win rate and its interval."""
    return _interval(result, "rate")


def _interval(result: dict, name: str) -> str:
    value = result[name]
    return "none" if value is None else f"{value:.3f} [{result['low']:.3f}, {result['high']:.3f}]"


def against(rows: list[dict], method: str) -> list[dict]:
    """A method beside each other one at the same temperature, prompt by prompt."""
    rows = [row for row in rows if row["step"] is None]
    ours = {row["temperature"]: row["verdicts"] for row in rows if row["method"] == method}
    return [
        dict(
            first=method,
            second=label(row),
            temperature=row["temperature"],
            **winrate_stats.paired(ours[row["temperature"]], row["verdicts"]),
        )
        for row in rows
        if row["method"] != method and row["temperature"] in ours
    ]


def panels(rows: list[dict]) -> dict[str, tuple[str, list[dict]]]:
    """Title -> (what varies, rows to draw): all methods, the N of best of N, and steps, where there
    are some.
    """
    steps = [
        row | dict(x=row["step"], label=row["method"]) for row in rows if row["step"] is not None
    ]
    rows = [
        row | dict(x=row["temperature"], label=label(row)) for row in rows if row["step"] is None
    ]
    best = [row for row in rows if row["method"] == "best_of_n"]
    most = max((row["best_of"] for row in best), default=1)
    found = {
        "by method": (
            "temperature",
            [row for row in rows if row not in best or row["best_of"] == most],
        ),
        "best of N": ("temperature", best),
        "over training": ("step", steps),
    }
    return {title: panel for title, panel in found.items() if panel[1]}


def table(rows: list[dict], paired: list[dict]) -> str:
    """In Markdown: win rates by method and temperature, and by step; methods beside each other on
    the same prompts; then what else was measured of the answers.
    """
    plain, steps = (
        [row for row in rows if (row["step"] is None) == whole] for whole in (True, False)
    )
    temperatures = sorted({row["temperature"] for row in plain})
    cells = {(label(row), row["temperature"]): cell(row) for row in plain}
    measured = [name for name in ("words", *ROUGE) if name in rows[0]]
    blocks = [
        [
            ("win rate", *(f"T={temperature:g}" for temperature in temperatures)),
            *(
                (name, *(cells.get((name, temperature), "") for temperature in temperatures))
                for name in dict.fromkeys(map(label, plain))
            ),
        ],
        [("step", "win rate"), *((str(row["step"]), cell(row)) for row in steps)],
        [
            ("beside", "T", "difference of win rates", "better on", "worse on", "p"),
            *(
                (
                    f"{pair['first']} - {pair['second']}",
                    f"{pair['temperature']:g}",
                    _interval(pair, "difference"),
                    str(pair["better"]),
                    str(pair["worse"]),
                    f"{pair['p']:.2g}",
                )
                for pair in paired
            ),
        ],
        [
            ("answers", "T", *measured, "unparsable"),
            *(
                (
                    label(row),
                    f"{row['temperature']:g}",
                    *(f"{row[name]:.3g}" for name in measured),
                    str(row["unparsable"]),
                )
                for row in plain
            ),
        ],
    ]
    return "\n".join(_markdown(block) for block in blocks if len(block) > 1)


def _markdown(block: list[tuple]) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in block]
    return "\n".join([head, "|" + "---|" * len(block[0]), *rows]) + "\n"


def rouge(answers: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures, without stemming, by Google's library."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "ROUGE needs rouge-score, which is an extra: "
            'pip install "dpo_jax[judge]" (or pip install rouge-score).'
        ) from error

    scorer = RougeScorer(ROUGE)
    scores = [
        scorer.score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}

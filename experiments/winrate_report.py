"""Report win rates: tables, a figure, votes and pages of examples."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable

import numpy as np

from dpo_jax.console import say
from dpo_jax.evaluation import plots, statistics, tables, winrate_stats
from dpo_jax.evaluation.judge import ORDERS, Vote
from dpo_jax.workdir import write_json, write_lines, write_text

OPTIMISING = {"ppo", "best_of_n"}  # methods that are made for the run's reward model
ROUGE = ("rouge1", "rouge2", "rougeL")
RATES = ("rate", "low", "high", "wins", "ties", "losses", "unparsable", "n")
COUNTED = ("wins", "ties", "losses", "unparsable", "n")
P_HEADS = ("p over prompts", "p by Holm")  # of comparisons; they leave seeds of training out
POINT = ("method", "temperature", "best_of", "step")  # what rows of a group have in common
# Of a row, what has a file of its own or is the same for all rows.
NOT_WRITTEN = ("judged", "verdicts", "votes", "compared", "points")
# Columns of winrate.csv and winrate.tex.
EQUAL_LENGTH = tables.Column(
    "at equal length",
    "equal_length_rate",
    ".3f",
    interval=("equal_length_low", "equal_length_high"),
)
COLUMNS = (
    tables.Column("method", "name"),
    tables.Column("T", "temperature", "g"),
    tables.Column("step", "step", "g"),
    tables.Column("seeds", "seeds", "g"),
    tables.Column("draws", "draws", "g"),
    tables.Column("win rate", "rate", ".3f", interval=("low", "high")),
    EQUAL_LENGTH,
    *(tables.Column(name, name, "g") for name in COUNTED),
    tables.Column("words", "words", ".3g"),
)


def write(about: dict, rows: list[dict], folder: pathlib.Path, *, complete: bool) -> None:
    """Write votes.jsonl, winrate.json, .csv, .md, .tex and the figure, and print the tables.

    about: task, against, prompts and warning, for winrate.json. rows: as winrate.judge_all makes
    them. complete: whether they are all that was asked for.
    """
    if not rows:
        return
    groups = grouped(rows)
    paired = compared_with(groups, "dpo")
    result = about | dict(
        complete=complete,
        judged=rows[-1]["judged"],
        paired=paired,
        rows=[written(row) for row in rows],
        groups=[written(group) for group in groups],
    )
    write_json(folder / "winrate.json", result)
    votes = []
    for row in rows:
        point = {name: row[name] for name in (*POINT, "seed", "draw")}
        matchup = f"{full_name(row)}; {about['against']}"
        votes += vote_rows(row["compared"], row["votes"], dict(matchup=matchup) | point)
    write_lines(folder / "votes.jsonl", votes)
    text = table(groups, paired)
    if about.get("warning"):
        text += f"\n{about['warning']}\n"
    write_text(folder / "winrate.md", text)
    named = [group | dict(name=label(group)) for group in groups]
    write_text(folder / "winrate.csv", tables.to_csv(named, COLUMNS))
    write_text(folder / "winrate.tex", tables.to_latex(named, COLUMNS))
    plots.win_rates(folder / "winrate.png", panels(groups))
    say(f"{text}\n{folder}: winrate.json, .csv, .md, .tex, .png and votes.jsonl")


def of_optimised_judge(judge, methods: set[str]) -> str:
    """Return a warning where a judge is the reward model that methods optimise; "" else.

    judge: None for the run's reward model. methods: whose answers are judged.
    """
    optimised = " and ".join(sorted(methods & OPTIMISING))
    if judge is not None or not optimised:
        return ""
    return (
        f"Warning: the judge is the reward model that {optimised} optimised, so these win rates "
        "say how well it was optimised, and not which answers are better."
    )


def written(row: dict) -> dict:
    """Return a row without what stands elsewhere."""
    return {name: row[name] for name in row if name not in NOT_WRITTEN}


def grouped(rows: list[dict]) -> list[dict]:
    """Return a row for each point over its seeds and draws: their numbers, the rates and counts.

    The interval of one seed is that over prompts: Wilson's, or for several draws clustered by
    prompt. Of several seeds, prompts_low and prompts_high are that interval for these very seeds,
    and seeds_low and seeds_high Student's t over the seeds' rates, for other trainings on these
    very prompts. low and high add their widths in quadrature, for other prompts and trainings.
    So do the intervals at equal length and of subsets; a seed without such a rate leaves them out.
    """
    by_point = {}
    for row in rows:
        by_point.setdefault(tuple(row[name] for name in POINT), []).append(row)
    return [_group(of_point) for of_point in by_point.values()]


def _group(rows: list[dict]) -> dict:
    """Return one row for those of a point."""
    first = rows[0]
    over_prompts = winrate_stats.win_rate(_verdicts(rows), _prompts(rows))
    group = {name: first[name] for name in POINT}
    group |= dict(
        seeds=len({row["seed"] for row in rows}),
        draws=len({row["draw"] for row in rows}),
        **over_prompts,
        points=winrate_stats.mean_points([row["verdicts"] for row in rows]),
    )
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    rates = [winrate_stats.win_rate(_verdicts(of_seed))["rate"] for of_seed in by_seed.values()]
    rates = [rate for rate in rates if rate is not None]
    if len(rates) > 1:
        over_seeds = statistics.mean_interval(rates)
        for side in ("low", "high"):
            group[f"seeds_{side}"] = over_seeds[side]
            group[f"prompts_{side}"] = over_prompts[side]
        group |= over_both(over_prompts, rates)
    at_equal_length = _at_equal_length(rows)
    group["length_effect"] = at_equal_length["length_effect"]
    if len(by_seed) > 1:
        of_seeds = [_at_equal_length(of_seed)["rate"] for of_seed in by_seed.values()]
        at_equal_length = over_both(at_equal_length, of_seeds)
    for name in ("rate", "low", "high"):
        group[f"equal_length_{name}"] = at_equal_length[name]
    for name in ("words", *ROUGE):
        if name in first:
            group[name] = float(np.mean([row[name] for row in rows]))
    by_subset = _by_subset(rows)
    if len(by_seed) > 1:
        of_seeds = [_by_subset(of_seed) for of_seed in by_seed.values()]
        for subset, found in by_subset.items():
            found |= over_both(found, [of_seed[subset]["rate"] for of_seed in of_seeds])
    if len(by_subset) > 1:
        group["by_subset"] = by_subset
    return group


def over_both(over_prompts: dict, rates: list[float | None]) -> dict:
    """Return rate, low and high for other prompts and other trainings.

    over_prompts: rate, low and high of all seeds, for these very trainings. rates: of each seed.
    The widths on either side add up in quadrature. Where a seed has no rate, there is no interval.
    """
    if None in rates or None in (over_prompts["low"], over_prompts["high"]):
        return dict(rate=over_prompts["rate"], low=None, high=None)
    over_seeds = statistics.mean_interval(rates)
    mean = over_seeds["mean"]
    reach = {}
    for side in ("low", "high"):
        of_prompts = over_prompts[side] - over_prompts["rate"]
        reach[side] = math.hypot(over_seeds[side] - mean, of_prompts)
    return dict(rate=mean, low=max(0.0, mean - reach["low"]), high=min(1.0, mean + reach["high"]))


def _verdicts(rows: list[dict]) -> list[str | None]:
    """Return the verdicts of all rows, one row after the other."""
    return [verdict for row in rows for verdict in row["verdicts"]]


def _prompts(rows: list[dict]) -> list[int]:
    """Return the number of the prompt of each verdict."""
    return [number for row in rows for number in range(len(row["verdicts"]))]


def _at_equal_length(rows: list[dict]) -> dict:
    """Return the win rate that answers of equal length would have, over all rows."""
    longer_by = []
    for row in rows:
        for pair in row["compared"]:
            longer_by.append(len(pair["ours"].strip()) - len(pair["other"].strip()))
    return winrate_stats.length_controlled(_verdicts(rows), longer_by, _prompts(rows))


def _by_subset(rows: list[dict]) -> dict[str, dict]:
    """Return the win rate of each subset of the data over all rows, with Wilson's interval."""
    verdicts, prompts = {}, {}
    for row in rows:
        for number, (pair, verdict) in enumerate(
            zip(row["compared"], row["verdicts"], strict=True)
        ):
            subset = pair.get("subset", "")
            verdicts.setdefault(subset, []).append(verdict)
            prompts.setdefault(subset, []).append(number)
    found = {}
    for subset in sorted(verdicts):
        found[subset] = winrate_stats.win_rate(verdicts[subset], prompts[subset])
    return found


def as_records(votes: list[tuple[Vote, ...]]) -> list[list[dict]]:
    """Return the votes on each comparison as JSON holds them."""
    return [[dataclasses.asdict(vote) for vote in of_prompt] for of_prompt in votes]


def compared(
    prompts: list[str], ours: list[str], others: list[str], subsets: list[str] | None = None
) -> list[dict]:
    """Return a row for each prompt: prompt, ours and other, as the judge reads them, and subset.

    subsets: of the data set; "" for prompts of none.
    """
    rows = []
    for prompt, our, other, subset in zip(
        prompts, ours, others, subsets or [""] * len(prompts), strict=True
    ):
        about = dict(subset=subset) if subset else {}
        rows.append(dict(prompt=prompt, ours=our.strip(), other=other.strip()) | about)
    return rows


def vote_rows(pairs: list[dict], votes: list[list[dict]], about: dict) -> list[dict]:
    """Return a row for each vote: about, what was compared, and the vote.

    pairs, votes: as `compared` and `as_records` return them. about: of all rows. With a `matchup`
    there, prompt, ours and other are as in judge_agreement's file of people's votes.
    """
    found = []
    for pair, of_pair in zip(pairs, votes, strict=True):
        for vote in of_pair:
            found.append(about | pair | vote)
    return found


def label(row: dict) -> str:
    """Return a method's name in tables and figures."""
    if row["method"] == "best_of_n":
        return f"best of {row['best_of']}"
    return row["method"]


def full_name(row: dict) -> str:
    """Return the name of one row's answers."""
    name = f"{label(row)}, T={row['temperature']:g}"
    if row["step"] is not None:
        name += f", step {row['step']}"
    if row["seed"]:
        name += f", seed {row['seed']}"
    if row["draw"]:
        name += f", draw {row['draw']}"
    return name


def cell(result: dict, name: str = "rate", ends: str = "") -> str:
    """Return a value and its interval as text; ends: what the interval's fields begin with."""
    value = result[name]
    if value is None:
        return "none"
    low, high = result[f"{ends}low"], result[f"{ends}high"]
    if low is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def compared_with(groups: list[dict], method: str) -> list[dict]:
    """Compare a method with each other one, prompt by prompt, at the same temperature.

    p_holm is p adjusted for the number of comparisons.
    """
    groups = [group for group in groups if group["step"] is None]
    points = {
        group["temperature"]: group["points"] for group in groups if group["method"] == method
    }
    found = []
    for group in groups:
        temperature = group["temperature"]
        if group["method"] == method or temperature not in points:
            continue
        about = dict(first=method, second=label(group), temperature=temperature)
        pair = winrate_stats.paired_points(points[temperature], group["points"])
        found.append(about | pair)
    adjusted = statistics.holm([pair["p"] for pair in found])
    for pair, p_holm in zip(found, adjusted, strict=True):
        pair["p_holm"] = p_holm
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


def table(groups: list[dict], paired: list[dict]) -> str:
    """Return the tables in Markdown, those that have rows.

    Win rates by method and by step at each temperature, as they are and at equal length; methods
    compared on the same prompts; then what else was measured of the answers.
    """
    at_end = [group for group in groups if group["step"] is None]
    over_training = [group for group in groups if group["step"] is not None]

    def step_of(group):
        return str(group["step"])

    def at_equal_length(group):
        return cell(group, "equal_length_rate", "equal_length_")

    parts = [
        _by_temperature(at_end, "win rate", label, cell),
        _by_temperature(at_end, "at equal length", label, at_equal_length),
        _by_temperature(over_training, "step", step_of, cell),
        _subsets(at_end),
        _comparisons(paired),
        _measured(at_end, [name for name in ("words", *ROUGE) if name in groups[0]]),
    ]
    text = "\n".join(_markdown(lines) for lines in parts if len(lines) > 1)
    if paired:
        text += (
            "\nDifferences and p are over prompts, for these very trainings: they do not say how "
            "much another seed of training would change.\n"
        )
    seeds = max(group["seeds"] for group in groups)
    if seeds > 1:
        text += (
            f"\nMeans of up to {seeds} seeds of training; intervals of win rates are over seeds "
            "and prompts.\n"
        )
    return text


# The lines of a table are tuples of cells, its heads first.
Lines = list[tuple[str, ...]]


def _by_temperature(rows: list[dict], head: str, name_of: Callable, cell_of: Callable) -> Lines:
    """Return a line for each name and a column for each temperature."""
    temperatures = sorted({row["temperature"] for row in rows})
    cells = {(name_of(row), row["temperature"]): cell_of(row) for row in rows}
    names = dict.fromkeys(map(name_of, rows))  # each once, in their order
    lines = [(head, *(f"T={temperature:g}" for temperature in temperatures))]
    for name in names:
        found = [cells.get((name, temperature), "") for temperature in temperatures]
        lines.append((name, *found))
    return lines


def _subsets(groups: list[dict]) -> Lines:
    """Return a line for each method and temperature and a column for each subset of the data."""
    subsets = sorted({subset for group in groups for subset in group.get("by_subset", {})})
    if not subsets:
        return []
    lines = [("by subset", "T", *(escaped(subset or "none") for subset in subsets))]
    for group in groups:
        cells = [cell(group["by_subset"][subset]) for subset in subsets]
        lines.append((label(group), f"{group['temperature']:g}", *cells))
    return lines


def _comparisons(paired: list[dict]) -> Lines:
    lines = [("beside", "T", "difference of win rates", "better on", "worse on", *P_HEADS)]
    for pair in paired:
        line = (
            f"{pair['first']} - {pair['second']}",
            f"{pair['temperature']:g}",
            cell(pair, "difference"),
            str(pair["better"]),
            str(pair["worse"]),
            f"{pair['p']:.2g}",
            f"{pair['p_holm']:.2g}",
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


def write_examples(path: pathlib.Path, name: str, opponent: str, row: dict, count: int) -> None:
    """Write a page of the first prompts with both answers, the verdict and the judge's words.

    name, opponent: whose answers they are. row: rate, low, high, verdicts, and compared and votes
    of each prompt. The prompts are in an order that does not depend on the answers, so they are not
    chosen to please.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {escaped(name)} against {escaped(opponent)}", ""]
    total = len(row["compared"])
    lines += [f"Win rate {cell(row)}, the first {min(count, total)} of {total} comparisons.", ""]
    verdicts = {"win": f"{name} wins", "loss": f"{opponent} wins", "tie": "tie", None: "no verdict"}
    shown = zip(row["compared"], row["votes"], row["verdicts"], strict=True)
    for number, (pair, votes, verdict) in enumerate(shown, 1):
        if number > count:
            break
        lines += [f"## {number}. {escaped(verdicts[verdict])}", ""]
        lines += ["**Prompt**", "", quoted(pair["prompt"]), ""]
        lines += [f"**{escaped(name)}**", "", quoted(pair["ours"]), ""]
        lines += [f"**{escaped(opponent)}**", "", quoted(pair["other"]), ""]
        for vote in votes:
            if not vote["order"]:
                lines += ["**Judge**: no chat model was asked.", ""]
                continue
            first = name if vote["order"] == ORDERS[0] else opponent
            heading = f"**Judge**, who saw {escaped(first)} as A: {verdicts[vote['verdict']]}"
            lines += [heading, "", quoted(vote["answer"]), ""]
    write_text(path, "\n".join(lines))


def quoted(text: str) -> str:
    """Return text as a quotation in Markdown that shows it as it is."""
    lines = text.strip().splitlines() or ["(empty)"]
    # A backslash at the end of a line keeps the break, but shows where an empty line follows.
    shown = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        mark = "\\" if line.strip() and following.strip() else ""
        shown.append(f"> {escaped(line)}{mark}".rstrip())
    return "\n".join(shown)


def escaped(line: str) -> str:
    """Return a line of text with all that Markdown or HTML would read as its own escaped."""
    plain = "".join(mark if mark.isprintable() else " " for mark in line)
    indent = len(plain) - len(plain.lstrip())
    text = re.sub(r"([\\`*_\[\]<>|~&$@]|:(?=//))", r"\\\1", plain.strip())
    # Lists and headings begin with these, or are underlined by them.
    text = re.sub(r"^(\d*)([-+=.)#])", r"\1\\\2", text)
    return "&nbsp;" * indent + text

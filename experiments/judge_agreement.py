"""Judges against people and each other: python -m experiments.judge_agreement --votes=FILE.jsonl
--workdir=DIR \\
    --judge=gpt-4:summary_simple --judge=gpt-4:summary_concise --reward_model=runs/tldr/rm/hf

The paper's human study (table 2). Each row of FILE is a comparison and people's votes on it, as
verdicts on `ours`; `matchup` is optional and makes a table of its own:

    {"prompt": "...", "ours": "...", "other": "...", "votes": ["win", "loss"], "matchup": "DPO,
    PPO"}

A judge is MODEL:TEMPLATE, behind OPENAI_BASE_URL and OPENAI_API_KEY. Writes DIR/agreement.json, the
verdicts of each judge, and DIR/judgements.jsonl, which the same command goes on from. As in the
paper, agreement leaves ties out.
"""

import itertools
import json
import pathlib
import re

import numpy as np

from dpo_jax.data.readers import read_jsonl
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation import winrate_stats

PEOPLE = "people"


def read_votes(path: str) -> list[dict]:
    """The rows of a file of votes; ValueError naming the line and the field that is not as it
    should be.
    """
    rows = []
    for number, row in read_jsonl(path):
        row.setdefault("matchup", "all")
        for name in ("prompt", "ours", "other", "matchup"):
            if not isinstance(row.get(name), str):
                raise ValueError(
                    f"{path} line {number}: expected a field {name!r}, text; found {row.get(name)!r:.80}."
                )
        votes = row.get("votes")
        if (
            not isinstance(votes, list)
            or not votes
            or any(vote not in list(winrate_stats.POINTS) for vote in votes)
        ):
            raise ValueError(
                f"{path} line {number}: expected a field 'votes', a list of {', '.join(winrate_stats.POINTS)}; "
                f"found {votes!r:.80}."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def tables(rows: list[dict], verdicts: dict[str, list[str | None]]) -> dict[str, dict]:
    """matchup -> win rates of ours by each rater, and agreement of every two; verdicts: judge ->
    one for each row.
    """
    found = {}
    for matchup in dict.fromkeys(row["matchup"] for row in rows):
        which = [number for number, row in enumerate(rows) if row["matchup"] == matchup]
        said = {PEOPLE: [rows[number]["votes"] for number in which]}
        said |= {name: [[given[number]] for number in which] for name, given in verdicts.items()}
        found[matchup] = dict(
            win_rates=[dict(rater=rater) | _win_rate(items) for rater, items in said.items()],
            agreement=[
                row
                for first, second in itertools.combinations_with_replacement(said, 2)
                if first != second or first == PEOPLE
                if (row := _agreement(first, said[first], second, said[second]))["n"]
            ],
        )
    return found


def _win_rate(items: list[list[str | None]]) -> dict:
    """Mean over comparisons of the share of verdicts that are wins, a tie a half, with Wilson's
    interval.
    """
    given = [[winrate_stats.POINTS[verdict] for verdict in item if verdict] for item in items]
    scores = [np.mean(item) for item in given if item]
    low, high = winrate_stats.wilson(sum(scores), len(scores))
    counts = {
        name: sum(item.count(verdict) for item in items)
        for name, verdict in [("ties", "tie"), ("unparsable", None)]
    }
    return dict(
        rate=float(np.mean(scores)) if scores else None, low=low, high=high, n=len(scores), **counts
    )


def _agreement(first: str, of_first: list, second: str, of_second: list) -> dict:
    """Agreement of two raters, or of people among themselves, who have no order: each two of them
    count both ways.
    """
    decided = [
        [[verdict for verdict in item if verdict in ("win", "loss")] for item in items]
        for items in (of_first, of_second)
    ]
    if first == second:
        pairs = [list(itertools.permutations(item, 2)) for item in decided[0]]
    else:
        pairs = [list(itertools.product(*items)) for items in zip(*decided, strict=True)]
    return dict(first=first, second=second) | winrate_stats.agreement(pairs)


def show(found: dict[str, dict]) -> str:
    """The tables, as text; rates in percent."""
    lines = []
    for matchup, table in found.items():
        rates = [["win rate of ours", "%", "95 %", "n", "ties", "unparsable"]]
        rates += [
            [
                row["rater"],
                *_cells(row, "rate", "low", "high", 100),
                str(row["n"]),
                str(row["ties"]),
                str(row["unparsable"]),
            ]
            for row in table["win_rates"]
        ]
        agreement = [["agreement", "%", "95 %", "n", "kappa", "95 %"]]
        agreement += [
            [
                f"{row['first']}, {row['second']}",
                *_cells(row, "rate", "low", "high", 100),
                str(row["n"]),
                *_cells(row, "kappa", "kappa_low", "kappa_high", 1),
            ]
            for row in table["agreement"]
        ]
        lines += [f"--- {matchup}", *_aligned(rates), "", *_aligned(agreement), ""]
    return "\n".join(lines)


def _cells(row: dict, value: str, low: str, high: str, times: int) -> list[str]:
    """A number and its interval, "-" where there is none."""
    form = "{:.1f}" if times == 100 else "{:.2f}"
    found, *ends = [
        None if row[name] is None else form.format(times * row[name]) for name in (value, low, high)
    ]
    return [found or "-", "-" if None in ends else " to ".join(ends)]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def run(
    votes: str, workdir: str, chosen: dict[str, judges.Judge], reward_models: list[str]
) -> dict[str, dict]:
    """Asks all judges about all rows and compares them; chosen: name -> judge."""
    rows, folder, verdicts = read_votes(votes), pathlib.Path(workdir), {}
    comparisons = [judges.Comparison(row["prompt"], row["ours"], row["other"]) for row in rows]
    for name, judge in chosen.items():
        print(f"{name}: {len(comparisons)} comparisons", flush=True)
        verdicts[name] = judges.compare(judge, comparisons, folder)
        judges.write_verdicts(
            folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json", judge, verdicts[name], folder
        )
    for path in reward_models:
        verdicts[path] = by_reward_model(path, comparisons)
    found = tables(rows, verdicts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + show(found) + f"\n{folder / 'agreement.json'}")
    return found


def by_reward_model(path: str, comparisons: list[judges.Comparison]) -> list[str]:
    """The verdicts of a reward model of ours."""
    from dpo_jax.parallel import processes, sharding
    from dpo_jax.rewards import make

    processes.start()
    return judges.compare_by_reward(
        make.make_reward("model", path, 64, sharding.make_mesh()), comparisons
    )


def main():
    from absl import flags

    from dpo_jax import command_line

    votes = flags.DEFINE_string("votes", None, "Comparisons with people's votes, JSON lines.")
    workdir = flags.DEFINE_string("workdir", None, "Where the calls and the results go.")
    names = flags.DEFINE_multi_string(
        "judge", [], "MODEL:TEMPLATE, a name or a file; may be repeated."
    )
    reward_models = flags.DEFINE_multi_string(
        "reward_model", [], "Folder of a reward model of ours; may be repeated."
    )
    make = judges.define_flags()
    flags.mark_flags_as_required(["votes", "workdir"])

    def compare_judges():
        chosen = {}
        for name in names.value:
            model, _, template = name.rpartition(":")
            chosen[name] = make(model=model, template=template)
        run(votes.value, workdir.value, chosen, reward_models.value)

    command_line.run(compare_judges, __doc__)


if __name__ == "__main__":
    main()

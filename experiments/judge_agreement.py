"""Compare judges with people and with each other, as in the paper's human study (table 2).

    python -m experiments.judge_agreement --votes=FILE.jsonl --workdir=DIR \\
        --judge=gpt-4:summary_simple --judge=gpt-4:summary_concise --reward_model=runs/tldr/rm/hf

Each row of FILE is a comparison with people's votes on it, as verdicts on `ours`. `matchup` is
optional; each matchup gets a table of its own:

    {"prompt": "...", "ours": "...", "other": "...", "votes": ["win"], "matchup": "DPO, PPO"}

The first three are text or chat messages.

A judge is MODEL:TEMPLATE, behind OPENAI_BASE_URL and OPENAI_API_KEY. Writes DIR/agreement.json and
the verdicts of each judge. DIR/judgements.jsonl keeps every answer, so an interrupted command
resumes. As in the paper, agreement leaves ties out.
"""

import itertools
import json
import pathlib
import re

import numpy as np

from dpo_jax.data.conversations import content_field, reply, transcript
from dpo_jax.data.readers import read_jsonl
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation import winrate_stats
from dpo_jax.storage.addresses import shown
from experiments.commands import in_workdir, refuse_flags

PEOPLE = "people"


def read_votes(path: str) -> list[dict]:
    """Read the rows of a file of votes; ValueError names the line and the field that is wrong."""
    rows = []
    for number, row in read_jsonl(path):
        row.setdefault("matchup", "all")
        for name in ("prompt", "ours", "other"):
            if isinstance(row.get(name), list):
                messages = content_field(row, name)
                row[name] = transcript(messages) if name == "prompt" else reply(messages)
        for name in ("prompt", "ours", "other", "matchup"):
            if not isinstance(row.get(name), str):
                raise ValueError(
                    f"{path} line {number}: expected a field {name!r}, text; found "
                    f"{row.get(name)!r:.80}."
                )
        votes, allowed = row.get("votes"), list(winrate_stats.POINTS)
        if not isinstance(votes, list) or not votes or any(vote not in allowed for vote in votes):
            raise ValueError(
                f"{path} line {number}: expected a field 'votes', a list of "
                f"{', '.join(allowed)}; found {votes!r:.80}."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def tables(rows: list[dict], verdicts: dict[str, list[str | None]]) -> dict[str, dict]:
    """Return for each matchup the win rates by each rater and the agreement of every two raters.

    verdicts: judge -> one for each row.
    """
    found = {}
    for matchup in dict.fromkeys(row["matchup"] for row in rows):
        which = [number for number, row in enumerate(rows) if row["matchup"] == matchup]
        said = {PEOPLE: [rows[number]["votes"] for number in which]}
        for name, given in verdicts.items():
            said[name] = [[given[number]] for number in which]
        agreement = []
        for first, second in itertools.combinations_with_replacement(said, 2):
            if first == second and first != PEOPLE:
                continue  # a judge has one verdict an item, so nothing to compare with
            row = _agreement(first, said[first], second, said[second])
            if row["n"]:
                agreement.append(row)
        win_rates = [dict(rater=rater) | _win_rate(items) for rater, items in said.items()]
        found[matchup] = dict(win_rates=win_rates, agreement=agreement)
    return found


def _win_rate(items: list[list[str | None]]) -> dict:
    """The mean win rate over comparisons with Wilson's interval; a tie counts as half a win."""
    given = [[winrate_stats.POINTS[verdict] for verdict in item if verdict] for item in items]
    shares = [np.mean(item) for item in given if item]
    low, high = winrate_stats.wilson(sum(shares), len(shares))
    return dict(
        rate=float(np.mean(shares)) if shares else None,
        low=low,
        high=high,
        n=len(shares),
        ties=sum(item.count("tie") for item in items),
        unparsable=sum(item.count(None) for item in items),
    )


def _agreement(first: str, of_first: list, second: str, of_second: list) -> dict:
    """The agreement of two raters, or of people among themselves.

    People have no order, so each two of them count both ways.
    """
    first_decided = [_decided(item) for item in of_first]
    second_decided = [_decided(item) for item in of_second]
    if first == second:
        pairs = [list(itertools.permutations(item, 2)) for item in first_decided]
    else:
        both = zip(first_decided, second_decided, strict=True)
        pairs = [list(itertools.product(*items)) for items in both]
    return dict(first=first, second=second) | winrate_stats.agreement(pairs)


def _decided(item: list[str | None]) -> list[str]:
    """The verdicts that are neither a tie nor missing."""
    return [verdict for verdict in item if verdict in ("win", "loss")]


def show(found: dict[str, dict]) -> str:
    """Return the tables as text, rates in percent."""
    lines = []
    for matchup, table in found.items():
        rates = [["win rate of ours", "%", "95 %", "n", "ties", "unparsable"]]
        for row in table["win_rates"]:
            counts = [str(row[name]) for name in ("n", "ties", "unparsable")]
            rates.append([row["rater"], *_cells(row, "rate", "low", "high", 100), *counts])
        agreement = [["agreement", "%", "95 %", "n", "kappa", "95 %"]]
        for row in table["agreement"]:
            rate = _cells(row, "rate", "low", "high", 100)
            kappa = _cells(row, "kappa", "kappa_low", "kappa_high", 1)
            agreement.append([f"{row['first']}, {row['second']}", *rate, str(row["n"]), *kappa])
        lines += [f"--- {matchup}", *_aligned(rates), "", *_aligned(agreement), ""]
    return "\n".join(lines)


def _cells(row: dict, value: str, low: str, high: str, times: int) -> list[str]:
    """A number and its interval as two cells, "-" if there is none."""
    form = "{:.1f}" if times == 100 else "{:.2f}"
    shown = [
        None if row[name] is None else form.format(times * row[name]) for name in (value, low, high)
    ]
    number, *ends = shown
    return [number or "-", "-" if None in ends else " to ".join(ends)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines whose columns are aligned, the first one on the left."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([f"{name:<{first_width}}", *aligned]))
    return lines


def run(
    votes: str, workdir: str, chosen: dict[str, judges.Judge], reward_models: list[str]
) -> dict[str, dict]:
    """Ask all judges about all rows and compare them. chosen: name -> judge."""
    rows, folder, verdicts = read_votes(votes), pathlib.Path(workdir), {}
    comparisons = [judges.Comparison(row["prompt"], row["ours"], row["other"]) for row in rows]
    for name, judge in chosen.items():
        print(f"{name}: {len(comparisons)} comparisons", flush=True)
        verdicts[name] = judges.compare(judge, comparisons, folder)
        file_name = re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".json"
        judges.write_verdicts(folder / file_name, judge, verdicts[name], folder)
    for path in reward_models:
        verdicts[path] = by_reward_model(path, comparisons)
    found = tables(rows, verdicts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{show(found)}\n{shown(str(folder / 'agreement.json'))}")
    return found


def by_reward_model(path: str, comparisons: list[judges.Comparison]) -> list[str]:
    """Return the verdicts of a reward model that dpo_jax trained."""
    from dpo_jax.parallel import processes, sharding
    from dpo_jax.rewards import make

    processes.start()
    return judges.compare_by_reward(
        make.make_reward("model", path, 64, sharding.make_mesh()), comparisons
    )


def main():
    from absl import flags

    from dpo_jax import command_line

    votes = flags.DEFINE_string("votes", None, "JSON lines of comparisons with people's votes.")
    workdir = flags.DEFINE_string("workdir", None, "Folder for the calls and the results.")
    names = flags.DEFINE_multi_string(
        "judge", [], "MODEL:TEMPLATE, the template a name or a file; may be repeated."
    )
    reward_models = flags.DEFINE_multi_string(
        "reward_model", [], "Folder of a reward model that dpo_jax trained; may be repeated."
    )
    known = set(flags.FLAGS)
    make = judges.define_flags()
    judge_flags = sorted(set(flags.FLAGS) - known)
    flags.mark_flags_as_required(["votes", "workdir"])

    def compare_judges():
        chosen = {}
        if not names.value:
            refuse_flags("without --judge=MODEL:TEMPLATE", *judge_flags)
        for name in names.value:
            model, _, template = name.rpartition(":")
            chosen[name] = make(model=model, template=template)
        with in_workdir(workdir.value) as folder:
            run(votes.value, folder, chosen, reward_models.value)

    command_line.run(compare_judges, __doc__)


if __name__ == "__main__":
    main()

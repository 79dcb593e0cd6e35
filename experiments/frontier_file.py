"""Write what a frontier experiment found: its rows, tables over seeds, and the figure.

frontier.json has

- rows: one per run and checkpoint, and one for each point that needs no training: panel, method,
  parameter (as a figure writes it), value (the same as a number, or null), seed (of training, or
  null where nothing is trained), step, reward, kl, and what else was measured, such as reward_se.
  The reference is a row of its own at step 0 and KL 0. rows of exact experiments have gap, to the
  highest reward at their KL, and, where a run aims at a known optimum, analytic_reward and
  analytic_kl.
- curves: panel -> kls and rewards of the optimum, with low and high, its 95 % interval, or null
  where the curve is exact.
"""

import json
import pathlib

from dpo_jax.evaluation import plots, statistics, tables
from dpo_jax.evaluation.frontier import Curve

MATCHED_KLS = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats, at which methods are compared
COMPARED = "dpo"  # the method that the others are compared with
# Methods with several strengths, between whose points rewards can be interpolated.
SWEPT = ("dpo", "ppo", "ppo_gt", "unlikelihood", "best_of_n", "rm_optimum")

OVER_SEEDS = [
    tables.Column("panel", "panel"),
    tables.Column("method", "method"),
    tables.Column("", "parameter"),
    tables.Column("seeds", "seeds", "d"),
    tables.Column("reward", "reward", "z.3f", interval=("reward_low", "reward_high")),
    tables.Column("KL, nats", "kl", "z.3f", interval=("kl_low", "kl_high")),
    tables.Column("gap", "gap", "z.3f", interval=("gap_low", "gap_high")),
    tables.Column("largest gap", "gap_worst", "z.3f"),
    tables.Column("reward off its optimum, at most", "reward_off_worst", "z.3f"),
    tables.Column("KL off, at most", "kl_off_worst", "z.3f"),
]
AT_MATCHED_KL = [
    tables.Column("panel", "panel"),
    tables.Column("KL, nats", "kl", ".2f"),
    tables.Column("method", "method"),
    tables.Column("seeds", "seeds", "d"),
    tables.Column("reward", "reward", "z.3f", interval=("reward_low", "reward_high")),
    tables.Column("less than DPO by", "behind", "z.3f", interval=("behind_low", "behind_high")),
    tables.Column("p", "p", ".2g"),
    tables.Column("p, Holm", "p_holm", ".2g"),
]


def write(
    folder: pathlib.Path,
    rows: list[dict],
    curves: dict[str, Curve],
    titles: dict[str, str],
    *,
    curve_name: str,
) -> None:
    """Write frontier.json, both tables in three formats each, and the figure as PNG and PDF."""
    found = dict(rows=rows, curves={panel: _as_json(curve) for panel, curve in curves.items()})
    (folder / "frontier.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables.write(folder / "frontier", over_seeds(rows), OVER_SEEDS)
    tables.write(folder / "matched_kl", at_matched_kl(rows), AT_MATCHED_KL)
    plots.panels(folder / "frontier.png", rows, curves, titles, curve_name=curve_name)


def read(path: pathlib.Path) -> tuple[list[dict], dict[str, Curve]]:
    """Return the rows and the curves of a frontier.json."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["rows"], {panel: Curve(**curve) for panel, curve in found["curves"].items()}


def _as_json(curve: Curve) -> dict:
    return {
        name: None if values is None else list(map(float, values))
        for name, values in curve._asdict().items()
    }


def ends(rows: list[dict]) -> list[dict]:
    """Return the last row of each run, in the order of the rows."""
    last = {}
    for row in rows:
        last[row["panel"], row["method"], row["parameter"], row["seed"]] = row
    return list(last.values())


def over_seeds(rows: list[dict]) -> list[dict]:
    """Return the ends of all runs: mean and interval over seeds, and the worst of them.

    The interval is Student's t. Of one seed, it is that of the row's own error, if it has one.
    """
    grouped = {}
    for row in ends(rows):
        grouped.setdefault((row["panel"], row["method"], row["parameter"]), []).append(row)
    found = []
    for (panel, method, parameter), seeds in grouped.items():
        summary = dict(panel=panel, method=method, parameter=parameter, value=seeds[0]["value"])
        # A point that needs no training is no sample of seeds.
        summary["seeds"] = sum(row["seed"] is not None for row in seeds) or None
        for name in ("reward", "kl", "gap"):
            if name in seeds[0]:
                summary |= statistics.over_seeds(seeds, name)
        if "gap" in seeds[0]:
            summary["gap_worst"] = max(row["gap"] for row in seeds)
        if "analytic_kl" in seeds[0]:
            for name in ("reward", "kl"):
                off = [abs(row[name] - row[f"analytic_{name}"]) for row in seeds]
                summary[f"{name}_off_worst"] = max(off)
        found.append(summary)
    return found


def at_matched_kl(rows: list[dict]) -> list[dict]:
    """Return rewards at MATCHED_KLS, and by how much they are less than DPO's, seed by seed.

    A method's path at a seed goes from the reference through the ends of its runs, by their KL.
    The p-values of a panel are adjusted together, by Holm. Left out are methods that do not reach a
    KL with every seed.
    """
    found = []
    for panel in dict.fromkeys(row["panel"] for row in rows):
        of_panel = [row for row in rows if row["panel"] == panel]
        compared = _at_kls_of_panel(panel, of_panel)
        known = [row for row in compared if row["p"] is not None]
        adjusted = statistics.holm([row["p"] for row in known])
        for row, p in zip(known, adjusted, strict=True):
            row["p_holm"] = p
        found += compared
    return found


def _at_kls_of_panel(panel: str, rows: list[dict]) -> list[dict]:
    (start,) = [row["reward"] for row in rows if row["method"] == "reference"]
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    last = ends(rows)
    found = []
    for kl in MATCHED_KLS:
        rewards = {}
        for method in SWEPT:
            at_seeds = []
            for seed in seeds:
                # What is not trained is the same at every seed.
                runs = [
                    row for row in last if row["method"] == method and row["seed"] in (seed, None)
                ]
                runs.sort(key=_kl)
                kls = [0.0, *(row["kl"] for row in runs)]
                at_seeds.append(
                    statistics.reward_at_kl(kls, [start, *(row["reward"] for row in runs)], kl)
                )
            if at_seeds and all(value == value for value in at_seeds):  # nan: not reached
                rewards[method] = at_seeds
        for method, at_seeds in rewards.items():
            of_seeds = statistics.mean_interval(at_seeds)
            row = dict(panel=panel, kl=kl, method=method, seeds=of_seeds["n"], p=None)
            row |= dict(reward=of_seeds["mean"])
            row |= {f"reward_{end}": of_seeds[end] for end in ("low", "high")}
            if COMPARED in rewards and method != COMPARED:
                behind = statistics.paired_difference(rewards[COMPARED], at_seeds)
                row |= dict(behind=behind["difference"], p=behind["p"])
                row |= {f"behind_{end}": behind[end] for end in ("low", "high")}
            found.append(row)
    return found


def _kl(row: dict) -> float:
    return row["kl"]

"""Write what a frontier experiment found: its rows, tables over seeds, and the figure.

frontier.json has

- rows: one per run and checkpoint, and one for each point that needs no training: panel, method,
  parameter (as a figure writes it), value (the same as a number, or null), seed (of training, or
  null where nothing is trained), step, reward, kl, and what else was measured, such as reward_se.
  The reference is a row of its own at step 0 and KL 0. rows of exact experiments have gap, to the
  highest reward at their KL, and, where a run aims at a known optimum, analytic_reward and
  analytic_kl. Runs on their way, and those that broke off, have their rows here. Where no seed of a
  run is finished, its furthest one is drawn, with a hollow point; they are in no table.
- curves: panel -> kls and rewards of the optimum, with low and high, its 95 % interval, or null
  where the curve is exact.
- closed_forms: panel -> method -> kls and rewards of a method that is known at any strength.

Intervals are over prompts where rewards are measured on samples (rows with reward_se), and else
over seeds: see statistics.over_seeds.
"""

import json
import math
import pathlib

import numpy as np

from dpo_jax.evaluation import plots, statistics, tables
from dpo_jax.evaluation.frontier import Curve

MATCHED_KLS = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats, at which methods are compared
COMPARED = "dpo"  # the method that the others are compared with
# Methods with several strengths, between whose points rewards can be interpolated.
SWEPT = ("dpo", "ppo", "ppo_gt", "ppo_gt_trl", "unlikelihood", "best_of_n", "rm_optimum")

OVER_SEEDS = [
    tables.Column("panel", "panel"),
    tables.Column("method", "method"),
    tables.Column("", "parameter"),
    tables.Column("seeds", "seeds", "d"),
    tables.Column("reward", "reward", "z.3f", interval=("reward_low", "reward_high")),
    tables.Column("KL, nats", "kl", "z.3f", interval=("kl_low", "kl_high")),
    tables.Column("gap", "gap", "z.3f", interval=("gap_low", "gap_high")),
    tables.Column("intervals over", "interval_unit"),
    tables.Column("reward's sd between seeds", "reward_sd", ".3f"),
    tables.Column("largest gap", "gap_worst", "z.3f"),
    tables.Column("reward off its optimum, worst", "reward_off_worst", "z.3f"),
    tables.Column("KL off, worst", "kl_off_worst", "z.3f"),
]
AT_MATCHED_KL = [
    tables.Column("panel", "panel"),
    tables.Column("KL, nats", "kl", ".2f"),
    tables.Column("method", "method"),
    tables.Column("seeds", "seeds", "d"),
    tables.Column("reward", "reward", "z.3f", interval=("reward_low", "reward_high")),
    tables.Column("less than DPO by", "behind", "z.3f", interval=("behind_low", "behind_high")),
    tables.Column("intervals over", "interval_unit"),
    tables.Column("p", "p", ".2g"),
    tables.Column("p, Holm", "p_holm", ".2g"),
]

# panel -> method -> its rewards at any KL.
ClosedForms = dict[str, dict[str, Curve]]


def write(
    folder: pathlib.Path,
    rows: list[dict],
    curves: dict[str, Curve],
    titles: dict[str, str],
    *,
    curve_name: str,
    closed_forms: ClosedForms | None = None,
) -> None:
    """Write frontier.json, both tables in three formats each, and the figure as PNG and PDF."""
    found = dict(rows=rows, curves={panel: _as_json(curve) for panel, curve in curves.items()})
    if closed_forms:
        found["closed_forms"] = {
            panel: {method: _as_json(curve) for method, curve in methods.items()}
            for panel, methods in closed_forms.items()
        }
    (folder / "frontier.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finished = of_finished_runs(rows)
    tables.write(folder / "frontier", over_seeds(finished), OVER_SEEDS)
    at_kls = at_matched_kl(finished, curves, closed_forms)
    tables.write(folder / "matched_kl", at_kls, AT_MATCHED_KL)
    plots.panels(folder / "frontier.png", drawn(rows), curves, titles, curve_name=curve_name)


def read(path: pathlib.Path) -> tuple[list[dict], dict[str, Curve]]:
    """Return the rows and the curves of a frontier.json."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["rows"], {panel: Curve(**curve) for panel, curve in found["curves"].items()}


def read_closed_forms(path: pathlib.Path) -> ClosedForms:
    """Return the closed forms of a frontier.json."""
    found = json.loads(path.read_text(encoding="utf-8")).get("closed_forms", {})
    return {
        panel: {method: Curve(**curve) for method, curve in methods.items()}
        for panel, methods in found.items()
    }


def _as_json(curve: Curve) -> dict:
    return {
        name: None if values is None else list(map(float, values))
        for name, values in curve._asdict().items()
    }


def of_finished_runs(rows: list[dict]) -> list[dict]:
    """Return the rows less those of runs that are on their way, or broke off.

    Rows that say what prompts they were measured on have "test" at the end of a finished run.
    """
    finished = {_seed_of_run(row) for row in rows if row.get("prompts") == "test"}
    return [row for row in rows if "prompts" not in row or _seed_of_run(row) in finished]


def drawn(rows: list[dict]) -> list[dict]:
    """Return the rows of finished seeds, and where a run has none, those of its furthest seed.

    A mean of an end and of a checkpoint on the way, or of checkpoints of several steps, would be
    neither.
    """
    finished = of_finished_runs(rows)
    have_ended = {_run_of(row) for row in finished}
    on_their_way = [row for row in rows if _run_of(row) not in have_ended]
    furthest = {}
    for row in ends(on_their_way):
        most = furthest.setdefault(_run_of(row), row)
        if row["step"] > most["step"]:
            furthest[_run_of(row)] = row
    seeds = {_seed_of_run(row) for row in furthest.values()}
    return finished + [row for row in on_their_way if _seed_of_run(row) in seeds]


def _run_of(row: dict) -> tuple:
    """Return what the seeds of a run have in common."""
    return row["panel"], row["method"], row["parameter"]


def _seed_of_run(row: dict) -> tuple:
    return *_run_of(row), row["seed"]


def ends(rows: list[dict]) -> list[dict]:
    """Return the last row of each run, in the order of the rows."""
    last = {}
    for row in rows:
        last[_seed_of_run(row)] = row
    return list(last.values())


def over_seeds(rows: list[dict]) -> list[dict]:
    """Return the ends of all runs: mean, interval and spread over seeds, and the worst of them.

    Intervals are those of `statistics.over_seeds`.
    """
    grouped = {}
    for row in ends(rows):
        grouped.setdefault(_run_of(row), []).append(row)
    found = []
    for (panel, method, parameter), seeds in grouped.items():
        summary = dict(panel=panel, method=method, parameter=parameter, value=seeds[0]["value"])
        # A point that needs no training is no sample of seeds.
        summary["seeds"] = sum(row["seed"] is not None for row in seeds) or None
        # The reward comes last: whose interval it is stands for the whole row.
        for name in ("kl", "gap", "reward"):
            if name in seeds[0]:
                summary |= statistics.over_seeds(seeds, name)
        if len(seeds) > 1:
            summary["reward_sd"] = float(np.std([row["reward"] for row in seeds], ddof=1))
        if "gap" in seeds[0]:
            summary["gap_worst"] = max(row["gap"] for row in seeds)
        if "analytic_kl" in seeds[0]:
            for name in ("reward", "kl"):
                off = [abs(row[name] - row[f"analytic_{name}"]) for row in seeds]
                summary[f"{name}_off_worst"] = max(off)
        found.append(summary)
    return found


def at_matched_kl(
    rows: list[dict], curves: dict[str, Curve], closed_forms: ClosedForms | None = None
) -> list[dict]:
    """Return rewards at MATCHED_KLS, and by how much they are less than DPO's.

    A method's path at a seed goes through the ends of its runs, by their KL. Where rows have their
    gap to an exact curve, the gap is interpolated, and else the reward, both over sqrt(KL); a
    closed form is read as it is. Only the seeds with the most runs count: a path through fewer
    points would be another. A method has a row at a KL only where each of these seeds has runs on
    both sides: between the reference and a method's first run, it would be that run alone, scaled.

    Differences are over the seeds that both methods have, seed by seed. Where rewards are
    measured on samples, their intervals are over prompts. Differences are then those of the
    means over these seeds, and have no interval, nor a p: `comparisons` has the prompts of
    trained runs for that. The p-values of a panel are adjusted together, by Holm.
    """
    found = []
    for panel in dict.fromkeys(row["panel"] for row in rows):
        of_panel = [row for row in rows if row["panel"] == panel]
        of_methods = (closed_forms or {}).get(panel, {})
        compared = _at_kls_of_panel(panel, of_panel, curves[panel], of_methods)
        known = [row for row in compared if row["p"] is not None]
        adjusted = statistics.holm([row["p"] for row in known])
        for row, p in zip(known, adjusted, strict=True):
            row["p_holm"] = p
        found += compared
    return found


def _at_kls_of_panel(
    panel: str, rows: list[dict], curve: Curve, closed_forms: dict[str, Curve]
) -> list[dict]:
    last = ends(rows)
    found = []
    for kl in MATCHED_KLS:
        # method -> the rows at this KL, by seed; None: what is not trained.
        at_kl = {}
        for method in SWEPT:
            paths = _paths([row for row in last if row["method"] == method])
            at_seeds = {seed: _point_at(path, kl, curve) for seed, path in paths.items()}
            if method in closed_forms:
                at_seeds = {None: dict(reward=_read(closed_forms[method], kl))}
            rewards = [point["reward"] for point in at_seeds.values()]
            if rewards and all(map(math.isfinite, rewards)):  # nan: not reached
                at_kl[method] = at_seeds
        for method, at_seeds in at_kl.items():
            seeds = sum(seed is not None for seed in at_seeds)
            row = dict(panel=panel, kl=kl, method=method, seeds=seeds or None, p=None)
            row |= statistics.over_seeds(list(at_seeds.values()), "reward")
            if COMPARED in at_kl and method != COMPARED:
                row |= _behind(at_kl[COMPARED], at_seeds)
            found.append(row)
    return found


def _paths(rows: list[dict]) -> dict[int | None, list[dict]]:
    """Return a method's path for each of the seeds that have the most runs.

    What is not trained has the seed None.
    """
    of_seeds = {}
    for row in rows:
        of_seeds.setdefault(row["seed"], []).append(row)
    most = max(map(len, of_seeds.values()), default=0)
    return {seed: sorted(runs, key=_kl) for seed, runs in of_seeds.items() if len(runs) == most}


def _point_at(path: list[dict], kl: float, curve: Curve) -> dict:
    """Return the reward of a path at a KL, nan where it does not reach it, and its reward_se.

    The error is known where all rows have one. Between two points it is interpolated, too: theirs
    can at most add up so, if both are measured on the same prompts.
    """
    kls = [row["kl"] for row in path]

    def at_kl(name: str) -> float:
        return statistics.reward_at_kl(kls, [row[name] for row in path], kl)

    if all("gap" in row for row in path):
        return dict(reward=_read(curve, kl) - at_kl("gap"))
    point = dict(reward=at_kl("reward"))
    if all(row.get("reward_se") is not None for row in path):
        point["reward_se"] = at_kl("reward_se")
    return point


def _read(curve: Curve, kl: float) -> float:
    """Return the reward of a curve at a KL; nan beyond its end."""
    return statistics.reward_at_kl(curve.kls, curve.rewards, kl)


def _behind(compared: dict[int | None, dict], at_seeds: dict[int | None, dict]) -> dict:
    """Return by how much a method's reward at a KL is below the compared one's, as row fields.

    What is not trained is the same beside every seed of the other.
    """
    points = [*compared.values(), *at_seeds.values()]
    if any("reward_se" in point for point in points):
        return dict(behind=_mean_reward(compared) - _mean_reward(at_seeds))
    if None in at_seeds:
        at_seeds = dict.fromkeys(compared, at_seeds[None])
    shared = [seed for seed in compared if seed in at_seeds]
    if not shared:
        return {}
    points = [(compared[seed], at_seeds[seed]) for seed in shared]
    found = statistics.paired_difference(
        [first["reward"] for first, _ in points], [second["reward"] for _, second in points]
    )
    row = dict(behind=found["difference"], p=found["p"])
    if found["low"] is not None:
        row |= dict(behind_low=found["low"], behind_high=found["high"], interval_unit="seeds")
    return row


def _mean_reward(at_seeds: dict[int | None, dict]) -> float:
    return float(np.mean([point["reward"] for point in at_seeds.values()]))


def _kl(row: dict) -> float:
    return row["kl"]

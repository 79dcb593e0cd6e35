"""What each method of an experiment costs beside the others, from the cost.json of its stages.

SFT is left out, as all methods share it, and so is evaluation. PPO needs the reward model and the
pairs that this is trained on; DPO needs the pairs.
"""

import pathlib

from dpo_jax import config as configs
from dpo_jax import costs
from dpo_jax.evaluation import tables

SHARED = ("sft", "evaluate")  # stages that are no part of a method's cost
SUMMED = ("samples", "sampled_tokens", "examples", "read_tokens", "flops", "seconds")
GIB = 2**30

COLUMNS = [
    tables.Column("method", "method"),
    tables.Column("stages", "stages"),
    tables.Column("completions sampled", "samples", ",.0f"),
    tables.Column("tokens sampled", "sampled_tokens", ",.0f"),
    tables.Column("rows or pairs read", "examples", ",.0f"),
    tables.Column("tokens read", "read_tokens", ",.0f"),
    tables.Column("10¹² FLOPs", "teraflops", ",.4g"),
    tables.Column("minutes", "minutes", ",.3g"),
    tables.Column("peak memory, GiB", "gib", ".2f"),
]


def rows_of(folder: pathlib.Path, runs: dict[str, list]) -> list[dict]:
    """Return a row of costs for each method: the sum over its stages, the mean over its runs.

    runs: method -> the configs of its finished runs, in the WORKDIR `folder`. Peak memory is the
    largest of a stage. A sum is None where a stage kept no cost, as those of earlier versions.
    """
    rows = []
    for method, of_method in runs.items():
        found = [_cost_of(folder, config) for config in of_method]
        if not found:
            continue
        row = dict(method=method, stages=found[0]["stages"], runs=len(found))
        for name in (*SUMMED, "peak_memory"):
            values = [cost[name] for cost in found]
            row[name] = None if None in values else sum(values) / len(values)
        scales = dict(teraflops=("flops", 1e12), minutes=("seconds", 60), gib=("peak_memory", GIB))
        for name, (source, unit) in scales.items():
            row[name] = None if row[source] is None else row[source] / unit
        rows.append(row)
    return rows


def _cost_of(folder: pathlib.Path, config) -> dict:
    """Return the costs of one run: the sum over the stages that it is made of."""
    names = configs.folder_names(config)
    stages = [stage for stage in config.stages if stage not in SHARED]
    of_stages = [costs.read(folder / names[stage]) for stage in stages]
    total = dict(stages=", ".join(stages))
    for name in SUMMED:
        # Seconds are of every stage; counts only of those that sample or train.
        known = all(cost and (name != "seconds" or name in cost) for cost in of_stages)
        total[name] = sum(cost.get(name, 0) for cost in of_stages) if known else None
    peaks = [cost.get("peak_memory") for cost in of_stages]
    total["peak_memory"] = None if None in peaks else max(peaks)
    return total


def write(out: pathlib.Path, folder: pathlib.Path, runs: dict[str, list]) -> None:
    """Write costs.csv, costs.md and costs.tex to `out`; folder, runs: as for `rows_of`."""
    rows = rows_of(folder, runs)
    if rows:
        tables.write(out / "costs", rows, COLUMNS)

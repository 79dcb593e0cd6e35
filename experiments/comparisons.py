"""Runs compared on the same prompts: by their ends, and at equal KL, with intervals.

Prompts are the units, however many rows each has. Rewards of seeds are averaged row by row, so the
interval is of the prompts and their samples, and not of the training.

Letters: U rows, each a prompt with its completion; K points of a path, R resamples.
"""

import dataclasses
import math

import numpy as np

from dpo_jax.evaluation import statistics, tables

# A KL has settled if it moves by less than this share of itself in a quarter of the run.
SETTLED = 0.1
QUARTER = 4
VERDICTS = ("yes", "cannot tell", "no")  # from the best to the worst
FEWEST_STEPS = 8  # over which the slope of a KL is measured
FEWEST_PROMPTS = 8  # resamples of fewer are too much alike for an interval


def columns(compared: str) -> list[tables.Column]:
    """Return the columns of the table. compared: its name for the run that `compare` compares."""
    return [
        tables.Column("method", "method"),
        tables.Column("", "parameter"),
        tables.Column("seeds", "seeds", "d"),
        tables.Column("KL, nats", "kl", ".2f"),
        tables.Column("reward", "reward", ".3f", interval=("reward_low", "reward_high")),
        tables.Column(
            f"less than {compared} by", "behind", ".3f", interval=("behind_low", "behind_high")
        ),
        tables.Column(f"p beside {compared}, Holm", "behind_p_holm", ".2g"),
        tables.Column("DPO at this KL", "dpo_at_kl", ".3f"),
        tables.Column(
            "less than DPO at this KL by", "below", ".3f", interval=("below_low", "below_high")
        ),
        tables.Column("p beside DPO at this KL, Holm", "below_p_holm", ".2g"),
        tables.Column(
            "KL's change in a quarter of the steps",
            "kl_change",
            "+.0%",
            interval=("kl_change_low", "kl_change_high"),
        ),
        tables.Column("settled", "settled"),
    ]


@dataclasses.dataclass(frozen=True)
class End:
    """Rewards and KLs of a run's end in each row, [U]: the means over its seeds."""

    method: str
    parameter: str
    rewards_U: np.ndarray
    kls_U: np.ndarray
    seeds: int = 1


def compare(
    ends: list[End], reference_U: np.ndarray, compared: tuple[str, str], prompts_U
) -> list[dict]:
    """Return a row for each run: beside one DPO run, and beside all of them at the same KL.

    reference_U: the rewards of what all runs start from. compared: method and parameter of the run
    that the others are compared with. prompts_U: the prompt of each row; those with one prompt
    count as one. p-values are adjusted by Holm's method within each column.
    """
    path = path_of([end for end in ends if end.method == "dpo"], reference_U)
    others = {(end.method, end.parameter): end for end in ends}
    baseline = others.get(compared)
    rows = []
    for end in ends:
        of_prompts = statistics.clustered_interval(end.rewards_U, prompts_U)
        row = dict(method=end.method, parameter=end.parameter, seeds=end.seeds)
        row |= dict(kl=float(end.kls_U.mean()), reward=of_prompts["mean"])
        row |= dict(reward_low=of_prompts["low"], reward_high=of_prompts["high"])
        if baseline is not None and end is not baseline:
            found = statistics.paired_difference(baseline.rewards_U, end.rewards_U, prompts_U)
            row |= _named("behind", found)
        if path is not None and end.method != "dpo":
            row |= _named("below", below_path(path, end, prompts_U))
            row["dpo_at_kl"] = _known(path.reward_at(row["kl"]))
        rows.append(row)
    for name in ("behind", "below"):
        tested = [row for row in rows if row.get(f"{name}_p") is not None]
        adjusted = statistics.holm([row[f"{name}_p"] for row in tested]) if tested else []
        for row, p in zip(tested, adjusted, strict=True):
            row[f"{name}_p_holm"] = p
    return rows


def path_of(ends: list[End], reference_U: np.ndarray) -> statistics.Path | None:
    """Return the path from the reference through the ends of a method's runs, by their KL."""
    if not ends:
        return None
    kls = [np.zeros_like(reference_U)]
    rewards = [reference_U]
    for end in sorted(ends, key=_mean_kl):
        kls.append(end.kls_U)
        rewards.append(end.rewards_U)
    return statistics.Path(np.stack(kls), np.stack(rewards))


def below_path(path: statistics.Path, end: End, prompts_U) -> dict:
    """Return by how much a run's reward is below a path at the run's own KL, with its interval.

    Prompts are drawn again for both, so that in each resample the run has another KL, at which the
    path is read. There is no interval and no p for fewer than 8 prompts, nor where the path does
    not reach the KL in 95 % of the resamples. p is two-sided: twice the smaller share of resamples
    on either side of 0.
    """

    def below(drawn_U=slice(None)) -> float:
        kl = float(end.kls_U[drawn_U].mean())
        return path.reward_at(kl, drawn_U) - float(end.rewards_U[drawn_U].mean())

    found = dict(difference=_known(below()), low=None, high=None, p=None)
    if len(np.unique(prompts_U)) < FEWEST_PROMPTS:
        return found
    found_R = statistics.bootstrap(below, len(end.rewards_U), clusters=prompts_U)
    reached_R = found_R[np.isfinite(found_R)]
    if len(reached_R) >= statistics.REACHED * len(found_R):
        low, high = statistics.percentiles(reached_R)
        # Not 0, which so many resamples cannot show.
        smaller = min((reached_R <= 0).mean(), (reached_R >= 0).mean())
        p = min(1.0, 2 * max(float(smaller), 1 / len(reached_R)))
        found |= dict(low=float(low), high=float(high), p=p)
    return found


def settling(kls_of_seeds: list[list[float]]) -> dict:
    """Return how fast a run's KL still moved at its end, with an interval, and `settled`.

    kls_of_seeds: of the steps in training, seed by seed. kl_change is the share of itself by which
    the KL would move in another quarter of the run. `settled` is "yes" where that is less than
    10 %, up or down, in all of its interval; "no" where it is more in all of it: then the run ends
    where it was stopped, and not where it was going. Else it is "cannot tell". Both are of the seed
    that has settled least, and of several such, of the one whose KL moves the most. {} if a seed
    has fewer than 8 steps.

    Steps are taken to be independent. Those of one policy are not quite, so the interval is rather
    too narrow.
    """
    if not kls_of_seeds or min(map(len, kls_of_seeds)) < FEWEST_STEPS:
        return {}
    changes = [_change_at_end(np.array(kls)) for kls in kls_of_seeds]

    def badness(change: dict) -> tuple:
        return VERDICTS.index(change["settled"]), abs(change["kl_change"])

    return max(changes, key=badness)


def _change_at_end(kls: np.ndarray) -> dict:
    """Return the share by which a seed's KL moves in a quarter of its run, and whether it settled.

    It is the slope of a straight line through the last quarter of the steps, or through the last 8
    of a short run; their scatter about the line gives the interval.
    """
    window = max(len(kls) // QUARTER, FEWEST_STEPS)
    steps = np.arange(window) - (window - 1) / 2
    last = kls[-window:]
    slope = steps @ last / (steps @ steps)
    scatter = last - last.mean() - slope * steps
    error = np.sqrt(scatter @ scatter / (window - 2) / (steps @ steps))
    half = statistics.t_quantile(window - 2) * error
    share = len(kls) / QUARTER / max(abs(last.mean()), 1e-6)  # of the KL, for a slope of 1
    low, high = (slope - half) * share, (slope + half) * share
    if low >= -SETTLED and high <= SETTLED:
        settled = "yes"
    elif low > SETTLED or high < -SETTLED:
        settled = "no"
    else:
        settled = "cannot tell"
    bounds = dict(kl_change_low=float(low), kl_change_high=float(high))
    return dict(kl_change=float(slope * share), settled=settled) | bounds


def _named(name: str, found: dict) -> dict:
    """Return a difference with its interval and p by the names of a table's fields."""
    return {
        name: found["difference"],
        f"{name}_low": found["low"],
        f"{name}_high": found["high"],
        f"{name}_p": found["p"],
    }


def _mean_kl(end: End) -> float:
    return float(end.kls_U.mean())


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Train the toy by DPO's gradient with its weight and without it.

    python -m experiments.gradient_weight --workdir=DIR

The gradient of DPO's loss of a pair is

    -beta * weight * (gradient of log p(chosen) - gradient of log p(rejected))

with the weight sigmoid(r(rejected) - r(chosen)) of implicit rewards (the paper's section 4). The
paper says that without the weight the model degenerates. What is left then is beta times the
gradient of the stage `unlikelihood` with alpha 1, so that is what is trained here, from the same
model, on the same pairs in the same order, with the same learning rate. RMSprop does not see the
factor beta; the norm that gradients are clipped to is divided by it.

Each run is an ordinary run of configs/toy.py in DIR/seed-N; finished runs are reused. Writes
DIR/gradient_weight.json, with the rows of all evaluations, and gradient_weight.png. Rewards and KLs
are exact. It takes about a minute of one CPU core per seed.
"""

import json
import pathlib

import numpy as np

from experiments.commands import in_workdir
from experiments.toy_runs import bound_curve, evaluations_of, first_policy, one_thread

METHODS = {"weighted": "DPO", "unweighted": "without the weight"}
# What the table shows of a method's last row -> its title
COLUMNS = {
    "reward": "reward",
    "kl": "KL, nats",
    "gap": "below the highest reward at that KL",
    "chosen": "chosen, nats",
    "rejected": "rejected, nats",
}
COLORS = {"weighted": "Blues", "unweighted": "YlOrRd"}  # a shade for each seed
EVERY = 10  # steps between evaluations
SEEDS = 3


def config_of(method: str, seed: int):
    """Return the config of one run, and the stage that trains it."""
    from configs import toy

    stage = "dpo" if method == "weighted" else "unlikelihood"
    config = toy.get_config(stage)
    config.seed = seed
    block = config[stage]
    block.eval_every = EVERY
    if method == "unweighted":
        beta = toy.get_config("dpo").dpo.beta
        block.update(alpha=1.0, max_grad_norm=block.max_grad_norm / beta)
    config.run = f"gradient_{method}"
    return config


def rows_of_seed(workdir: pathlib.Path, seed: int) -> list[dict]:
    """Train a seed's two runs; return a row for each evaluation.

    chosen, rejected: how much likelier the held-out responses are than under the reference, mean
    over pairs, nats. gradient_weight: of DPO alone. gap: of the last row, how far its reward is
    below the highest one at its KL.
    """
    rows = []
    for method in METHODS:
        evaluations, end = evaluations_of(config_of(method, seed), workdir / f"seed-{seed}")
        first = evaluations[0]
        for evaluation in evaluations:
            changes = {}
            for side in ("chosen", "rejected"):
                name = f"logps_eval/{side}"
                changes[side] = evaluation[name] - first[name]
            rows.append(
                dict(
                    method=method,
                    seed=seed,
                    step=evaluation["step"],
                    reward=evaluation["frontier/reward"],
                    kl=evaluation["frontier/kl"],
                    **changes,
                    gradient_weight=evaluation.get("dpo_eval/gradient_weight"),
                )
            )
        rows[-1]["gap"] = end["gap"]
        print(f"seed {seed}, {method}: {rows[-1]}", flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Return the last values of each method.

    Each is a mean with a 95 % interval over the seeds, as statistics.mean_interval.
    """
    from dpo_jax.evaluation.statistics import mean_interval

    last_step = max(row["step"] for row in rows)
    found = []
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        last = [row for row in of_method if row["step"] == last_step]
        one = dict(method=method, step=last_step)
        for name in COLUMNS:
            one[name] = mean_interval([row[name] for row in last])
        found.append(one)
    return found


def table(found: list[dict]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        f"| gradient | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for one in found:
        cells = [METHODS[one["method"]], *(_cell(one[name]) for name in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measured: dict) -> str:
    half = "" if measured["high"] is None else f" ± {measured['high'] - measured['mean']:.2f}"
    return f"{measured['mean']:.2f}{half}".replace("-", "−")


def draw(path: pathlib.Path, rows: list[dict], curve: dict) -> None:
    """Draw reward against KL, both over the steps, log-probs, and the weight of DPO's gradient.

    DPO's region of the first panel is drawn again in the second. A seed has a shade of its own, and
    rings mark where runs end.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from dpo_jax.evaluation import plots

    figure = Figure(figsize=(15, 8.2), dpi=100, layout="constrained")
    (whole, near, reward), (kl, log_probs, weight) = figure.subplots(2, 3)
    for axes in (whole, near):
        axes.plot(
            curve["kl"],
            curve["reward"],
            color="black",
            linewidth=1,
            label=f"highest possible from the reference of seed {curve['seed']}",
        )
    seeds = sorted({row["seed"] for row in rows})
    styles = {"chosen": "-", "rejected": ":"}
    dpo_rows = [row for row in rows if row["method"] == "weighted"]
    for method, title in METHODS.items():
        shades = matplotlib.colormaps[COLORS[method]](np.linspace(0.45, 0.95, len(seeds)))
        for seed, shade in zip(seeds, shades, strict=True):
            run = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
            steps = [row["step"] for row in run]
            kls, rewards = [row["kl"] for row in run], [row["reward"] for row in run]
            line = dict(color=shade, linewidth=1.2)
            for axes in (whole, near):
                if axes is near and method == "unweighted":
                    continue  # its first point is beyond
                label = f"{title}, seed {seed}" if axes is whole else None
                axes.plot(kls, rewards, ".-", markersize=4, label=label, **line)
                end = dict(markersize=9, markeredgewidth=2, fillstyle="none", zorder=5)
                axes.plot(kls[-1:], rewards[-1:], "o", color=shade, **end)
            reward.plot(steps, rewards, **line)
            kl.plot(steps, kls, **line)
            for side, style in styles.items():
                log_probs.plot(steps, [row[side] for row in run], linestyle=style, **line)
            if method == "weighted":
                weight.plot(steps, [row["gradient_weight"] for row in run], **line)
    against_kl = dict(xlabel="KL(policy || reference), nats", ylabel="expected true reward")
    whole.set(title="both; rings: where runs end", **against_kl)
    near.set(title="DPO alone", xlim=_around(dpo_rows, "kl"), **against_kl)
    near.set_ylim(_around(dpo_rows, "reward"))
    reward.set(xlabel="step", ylabel="expected true reward")
    kl.set(xlabel="step", ylabel="KL(policy || reference), nats")
    log_probs.set(
        xlabel="step", ylabel="log-prob of held-out responses\nless the reference's, nats"
    )
    log_probs.set_yscale("symlog", linthresh=1)
    of_sides = [Line2D([], [], color="gray", linestyle=style) for style in styles.values()]
    log_probs.legend(of_sides, styles, frameon=False)
    weight.set(xlabel="step", ylabel="DPO's mean weight of held-out pairs", ylim=(0, 0.55))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, labels = whole.get_legend_handles_labels()
    lower = dict(loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.legend(handles, labels, **lower)
    plots.save(figure, path)


def _around(rows: list[dict], name: str) -> tuple[float, float]:
    """Return limits that leave a margin around the values of some rows."""
    values = [row[name] for row in rows]
    margin = 0.08 * (max(values) - min(values))
    return min(values) - margin, max(values) + margin


def run(folder: pathlib.Path, seeds: int) -> dict:
    """Make the runs that are not done; write the rows and the figure, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(seeds):
        rows += rows_of_seed(folder, seed)
    largest = max(row["kl"] for row in rows)
    kls, bound = bound_curve(*first_policy(folder / "seed-0"), largest)
    curve = dict(seed=0, kl=kls.tolist(), reward=bound.tolist())
    result = dict(summary=summary(rows), rows=rows, bound=curve)
    (folder / "gradient_weight.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(folder / "gradient_weight.png", rows, curve)
    print(table(result["summary"]))
    return result


def main():
    from absl import flags

    from dpo_jax import command_line

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    seeds = flags.DEFINE_integer("seeds", SEEDS, "How many: 0, 1, ...", lower_bound=1)
    flags.mark_flags_as_required(["workdir"])

    def compare():
        one_thread()
        with in_workdir(workdir.value) as folder:
            run(pathlib.Path(folder), seeds.value)

    command_line.run(compare, __doc__)


if __name__ == "__main__":
    main()

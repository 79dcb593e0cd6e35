"""Show what beta does on the toy: to the first steps of training, and to where it ends.

    python -m experiments.beta --workdir=DIR

Beta multiplies the gradient of DPO's loss, so that under SGD a larger beta makes larger first
steps. RMSprop divides by the gradient's own size, which takes that away. In the end a larger beta
stays nearer to the reference under both, as the loss asks for (eq. 4). Rewards and KLs are exact,
over all completions.

Each run is an ordinary run of configs/toy.py in DIR/seed-N, without a warm-up and with a constant
learning rate, so that steps are alike. Finished runs are reused. Writes DIR/beta.json, with the
rows of all evaluations, and beta.png. A run takes about ten seconds of one CPU core, and the model
and the pairs of a seed half a minute.
"""

import json
import pathlib

from experiments.commands import in_workdir
from experiments.toy_runs import evaluations_of, one_thread, rows_of_tasks

BETAS = (1.0, 2.0, 4.0)
LEARNING_RATES = {"sgd": 0.003, "rmsprop": 2e-4}
TITLES = {"sgd": "SGD", "rmsprop": "RMSprop"}
STEPS = 160
EVERY = 8  # steps between evaluations; the first is what "first steps" means
SEEDS = 3


def config_of(optimizer: str, beta: float, seed: int, steps: int = STEPS):
    """Return the config of one run."""
    from configs import toy

    config = toy.get_config()
    config.seed = seed
    config.dpo.update(
        beta=beta,
        optimizer=optimizer,
        lr=LEARNING_RATES[optimizer],
        schedule="constant",
        warmup_steps=0,
        steps=steps,
        eval_every=EVERY,
        save_every=steps,
        log_every=EVERY,
        cache_reference=True,  # for all runs of a seed
    )
    config.run = f"beta_{optimizer}_{beta:g}"
    return config


def rows_of_seed(workdir: str, seed: int, steps: int) -> list[dict]:
    """Train a seed's runs; return a row for each evaluation.

    optimum_kl, optimum_reward: of the policy at which the loss is least. grad_norm: of the step.
    """
    rows = []
    for optimizer in LEARNING_RATES:
        for beta in BETAS:
            config = config_of(optimizer, beta, seed, steps)
            evaluations, end = evaluations_of(config, pathlib.Path(workdir) / f"seed-{seed}")
            of_run = dict(optimizer=optimizer, beta=beta, seed=seed)
            of_run |= dict(optimum_reward=end["analytic_reward"], optimum_kl=end["analytic_kl"])
            for evaluation in evaluations:
                row = of_run | dict(
                    step=evaluation["step"],
                    reward=evaluation["frontier/reward"],
                    kl=evaluation["frontier/kl"],
                    gradient_weight=evaluation["dpo_eval/gradient_weight"],
                    grad_norm=evaluation.get("grad_norm"),
                )
                rows.append(row)
            print(f"{of_run} KL {rows[-1]['kl']:.3f}", flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Return a row per optimiser and beta: KL at the first evaluation and the last, by seeds.

    first, last, optimum: mean and 95 % interval over the seeds, as statistics.mean_interval.
    """
    from dpo_jax.evaluation.statistics import mean_interval

    last_step = max(row["step"] for row in rows)
    found = []
    for optimizer in LEARNING_RATES:
        for beta in BETAS:
            of_runs = [row for row in rows if (row["optimizer"], row["beta"]) == (optimizer, beta)]
            first = [row["kl"] for row in of_runs if row["step"] == EVERY]
            last = [row["kl"] for row in of_runs if row["step"] == last_step]
            optimum = [row["optimum_kl"] for row in of_runs if row["step"] == last_step]
            found.append(
                dict(
                    optimizer=optimizer,
                    beta=beta,
                    first=mean_interval(first),
                    last=mean_interval(last),
                    optimum=mean_interval(optimum),
                )
            )
    return found


def table(found: list[dict]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        f"| optimiser | β | KL after {EVERY} steps | KL at the end | the optimum's KL |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in found:
        cells = [TITLES[one["optimizer"]], f"{one['beta']:g}"]
        for name in ("first", "last", "optimum"):
            measured = one[name]
            half = (
                "" if measured["high"] is None else f" ± {measured['high'] - measured['mean']:.3f}"
            )
            cells.append(f"{measured['mean']:.3f}{half}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: pathlib.Path, rows: list[dict]) -> None:
    """Draw KL over the steps: a panel per optimiser, a colour per beta, a line per seed."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from dpo_jax.evaluation import plots

    figure = Figure(figsize=(10.5, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(LEARNING_RATES), sharey=True, squeeze=False)[0]
    colors = matplotlib.colormaps["plasma"]([0.75, 0.45, 0.05])
    for optimizer, axes in zip(LEARNING_RATES, panels, strict=True):
        for beta, color in zip(BETAS, colors, strict=True):
            of_runs = [row for row in rows if (row["optimizer"], row["beta"]) == (optimizer, beta)]
            for seed in sorted({row["seed"] for row in of_runs}):
                of_seed = [row for row in of_runs if row["seed"] == seed and row["step"]]
                label = f"β {beta:g}" if seed == 0 else None
                steps = [row["step"] for row in of_seed]
                kls = [row["kl"] for row in of_seed]
                axes.plot(steps, kls, color=color, linewidth=1.2, alpha=0.85, label=label)
            optima = [row["optimum_kl"] for row in of_runs]
            axes.axhline(sum(optima) / len(optima), color=color, linewidth=0.9, linestyle=":")
        axes.set(
            title=f"{TITLES[optimizer]}, learning rate {LEARNING_RATES[optimizer]:g}",
            xlabel="step",
            xscale="log",
            yscale="log",
        )
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("KL(policy || reference), nats")
    lines, labels = panels[0].get_legend_handles_labels()
    dotted = Line2D([], [], color="gray", linewidth=0.9, linestyle=":")
    labels.append("optimum of this β (mean of seeds)")
    panels[0].legend([*lines, dotted], labels, loc="lower right", frameon=False)
    plots.save(figure, path)


def run(folder: pathlib.Path, *, seeds: int, steps: int, jobs: int) -> dict:
    """Make the runs that are not done; write beta.json and the figure, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(str(folder), seed, steps) for seed in range(seeds)]
    rows = rows_of_tasks(rows_of_seed, tasks, jobs)
    result = dict(learning_rates=LEARNING_RATES, summary=summary(rows), rows=rows)
    (folder / "beta.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(folder / "beta.png", rows)
    print(table(result["summary"]))
    return result


def main():
    from absl import flags

    from dpo_jax import command_line

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    seeds = flags.DEFINE_integer("seeds", SEEDS, "How many: 0, 1, ...", lower_bound=1)
    jobs = flags.DEFINE_integer("jobs", 1, "Seeds at a time, each in a process.", lower_bound=1)
    flags.mark_flags_as_required(["workdir"])

    def compare():
        one_thread()
        with in_workdir(workdir.value) as folder:
            run(pathlib.Path(folder), seeds=seeds.value, steps=STEPS, jobs=jobs.value)

    command_line.run(compare, __doc__)


if __name__ == "__main__":
    main()

"""Look for reward hacking on the toy: PPO on a learned reward, with and without the KL penalty.

    python -m experiments.reward_hacking --workdir=DIR

A reward model is trained on few pairs (of --prompts prompts; the toy's own run has 10,300), so that
it is wrong about completions that they lack. PPO then maximises it, once with the KL penalty that
adapts to a target and once with none (ppo.init_kl_coef=0), and DPO is trained on the same pairs at
a tiny beta. All completions can be enumerated, so the true reward, the learned one and the KL of
each checkpoint are exact.

Trains configs/toy.py in DIR/PROMPTS-SEED for each seed, and reuses the runs that are finished.
Writes DIR/reward_hacking.json, with a row per reward model and per checkpoint, the figure as
DIR/reward_hacking.png and .pdf, and a table of how the runs end as .csv, .md and .tex. It takes
about a minute per seed on an idle CPU core.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import time

import numpy as np

from dpo_jax.evaluation import tables
from dpo_jax.evaluation.tables import Column
from dpo_jax.stage_table import STAGES
from experiments import toy_runs
from experiments.commands import in_workdir
from experiments.implicit_reward import agreement

# Run -> (method of configs/toy.py, changes of the stage's block, colour, name in the figure).
RUNS = {
    "ppo_kl": ("ppo", {}, "tab:blue", "PPO, KL penalty adapts to 3 nats"),
    "ppo_no_kl": ("ppo", dict(init_kl_coef=0.0), "tab:red", "PPO, no KL penalty"),
    "dpo_tiny_beta": ("dpo", dict(beta=0.01), "tab:green", "DPO, β 0.01"),
}
STEPS = {"ppo": 60, "dpo": 240}
CHECKPOINTS = 12  # of each run, after equal numbers of steps
PAIRS_OF_PROMPT = 6  # every two of its 4 completions
COLUMNS = [
    Column("pairs", "pairs", ",d"),
    Column("run", "run"),
    Column("seed", "seed", "d"),
    Column("KL", "kl", ".2f"),
    Column("learned reward", "learned_reward", ".2f"),
    Column("true reward", "true_reward", ".2f"),
    Column("best true reward", "best_true_reward", ".2f"),
    Column("at KL", "best_kl", ".2f"),
    Column("lost since", "lost", ".2f"),
]
PANELS = {  # against the share of the training that is done
    "learned_reward": "learned reward, less the reference's",
    "true_reward": "true reward, less the reference's",
    "kl": "KL(policy || reference), nats",
}


@dataclasses.dataclass(frozen=True)
class Completions:
    """The reference's log-probs of all completions and their rewards, [P, C] each."""

    reference_PC: np.ndarray  # nats
    true_PC: np.ndarray
    learned_PC: np.ndarray

    def measure(self, policy_PC: np.ndarray) -> dict[str, float]:
        """Return expected rewards, as gains over the reference, and the KL of a policy."""
        from dpo_jax.evaluation.exact import reward_and_kl

        found = {}
        rewards = dict(true_reward=self.true_PC, learned_reward=self.learned_PC)
        for name, rewards_PC in rewards.items():
            start, _ = reward_and_kl(self.reference_PC, self.reference_PC, rewards_PC)
            reward, found["kl"] = reward_and_kl(policy_PC, self.reference_PC, rewards_PC)
            # A reward that is learned from pairs is known up to a number for each prompt.
            found[name] = reward - start
        return found


def config_of(name: str, prompts: int, seed: int):
    """Return the config of one of RUNS, and the stage that it is about."""
    from configs import toy

    stage, changes, _, _ = RUNS[name]
    config = toy.get_config(stage)
    config.seed = seed
    config.run = name
    config.pairs.prompts = prompts
    every = STEPS[stage] // CHECKPOINTS
    config[stage].update(steps=STEPS[stage], eval_every=every, save_every=every, keep=CHECKPOINTS)
    config[stage].update(changes)
    return config, stage


def run_seed(workdir: str, prompts: int, seed: int) -> list[dict]:
    """Make a seed's runs that are not done; return its rows, that of the reward model first."""
    from dpo_jax.pipeline.stages import run_stages

    folder = pathlib.Path(workdir) / f"{prompts}-{seed}"
    for name in RUNS:
        began = time.monotonic()
        config, _ = config_of(name, prompts, seed)
        with contextlib.redirect_stdout(io.StringIO()):
            run_stages(config, str(folder))
        seconds = time.monotonic() - began
        print(f"{prompts} prompts, seed {seed}: {name} ({seconds:.0f} s)", flush=True)

    reference_PC, true_PC = toy_runs.first_policy(folder)
    completions = Completions(reference_PC, true_PC, toy_runs.learned_rewards(folder))
    about = dict(prompts=prompts, seed=seed)
    rows = [about | reward_model_row(folder, completions)]
    for name in RUNS:
        config, stage = config_of(name, prompts, seed)
        for row in rows_of(folder / name, stage, completions):
            progress = row["step"] / config[stage].steps
            rows.append(about | dict(run=name, progress=progress) | row)
    return rows


def reward_model_row(folder: pathlib.Path, completions: Completions) -> dict:
    """Return how well the learned reward agrees with the true one, and its held-out accuracy."""
    from dpo_jax.training.metrics import read_rows

    last = read_rows(folder / "rm" / "metrics.jsonl")[-1]
    row = dict(run="rm", accuracy=last["rewards_eval/accuracies"])
    weights = {
        "reference": np.exp(completions.reference_PC),
        "uniform": np.full(completions.true_PC.shape, 1 / completions.true_PC.shape[-1]),
    }
    for name, weights_PC in weights.items():
        found = agreement(completions.true_PC, completions.learned_PC, weights_PC)
        row |= {f"{measure}_{name}": value for measure, value in found.items()}
    return row


def rows_of(trained: pathlib.Path, stage: str, completions: Completions) -> list[dict]:
    """Return a row for each checkpoint of a run, and one for the reference that it starts from."""
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.models import loading, transformer
    from dpo_jax.parallel import sharding
    from dpo_jax.training import checkpoint

    model = loading.open_checkpoint(str(trained / "hf")).config
    with_head = dataclasses.replace(model, head=STAGES[stage].head)
    shapes = transformer.abstract(with_head)
    placed = sharding.param_shardings(sharding.make_mesh(), shapes)
    checkpoints = trained / "checkpoints"

    policies = {0: completions.reference_PC}
    for step in checkpoint.saved_steps(checkpoints):
        params = checkpoint.load_params(checkpoints, step, shapes, placed)
        policies[step] = exact.enumerate_log_probs(model, params, toy.PROMPTS)
    rows = []
    for step, policy_PC in sorted(policies.items()):
        rows.append(dict(step=step) | completions.measure(policy_PC))
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Return a row per run: its last checkpoint, and its best one by the true reward."""
    runs = {}
    for row in rows:
        if row["run"] in RUNS:
            runs.setdefault((row["prompts"], row["run"], row["seed"]), []).append(row)
    found = []
    for (prompts, name, seed), of_run in sorted(runs.items()):
        last, best = of_run[-1], max(of_run, key=lambda row: row["true_reward"])
        found.append(
            dict(
                pairs=PAIRS_OF_PROMPT * prompts,
                run=name,
                seed=seed,
                kl=last["kl"],
                learned_reward=last["learned_reward"],
                true_reward=last["true_reward"],
                best_true_reward=best["true_reward"],
                best_kl=best["kl"],
                lost=best["true_reward"] - last["true_reward"],
            )
        )
    return found


def draw(path: pathlib.Path, rows: list[dict]) -> None:
    """Draw PANELS over training, a row for each number of prompts.

    A thin line is a seed, and a thick one the mean of the seeds.
    """
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    sizes = sorted({row["prompts"] for row in rows})
    figure = Figure(figsize=(13.2, 4.0 * len(sizes)), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(sizes), len(PANELS), squeeze=False, sharex=True, sharey="col")
    for prompts, of_size in zip(sizes, all_axes, strict=True):
        of_prompts = [row for row in rows if row["prompts"] == prompts]
        for axes, (measure, title) in zip(of_size, PANELS.items(), strict=True):
            for name in RUNS:
                _draw_run(axes, [row for row in of_prompts if row["run"] == name], name, measure)
            axes.set_title(f"{title}\n{PAIRS_OF_PROMPT * prompts:,} pairs", fontsize=10)
            axes.grid(alpha=0.3)
    for axes in all_axes[-1]:
        axes.set_xlabel("share of the training that is done")
    all_axes[0, -1].legend(frameon=False)
    plots.save(figure, path)


def _draw_run(axes, rows: list[dict], name: str, measure: str) -> None:
    """Draw a measure of one of RUNS over training, by seeds."""
    _, _, color, label = RUNS[name]
    lines = {}
    for row in rows:
        lines.setdefault(row["seed"], []).append((row["progress"], row[measure]))
    points_SX2 = np.array(list(lines.values()))
    progress_X = points_SX2[0, :, 0]
    for values_X in points_SX2[:, :, 1]:
        axes.plot(progress_X, values_X, color=color, linewidth=0.7, alpha=0.5)
    mean_X = points_SX2[:, :, 1].mean(axis=0)
    axes.plot(progress_X, mean_X, color=color, linewidth=2, marker="o", markersize=3, label=label)


def run(folder: pathlib.Path, sizes: list[int], seeds: int, jobs: int) -> list[dict]:
    """Make the runs that are not done, and write rows, figure and table.

    sizes: how many prompts the pairs are sampled for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(str(folder), prompts, seed) for prompts in sizes for seed in range(seeds)]
    rows = toy_runs.rows_of_tasks(run_seed, tasks, jobs)
    (folder / "reward_hacking.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(folder / "reward_hacking.png", rows)
    tables.write(folder / "reward_hacking", summary(rows), COLUMNS)
    print(tables.to_markdown(summary(rows), COLUMNS))
    return rows


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    seeds = flags.DEFINE_integer(
        "seeds", 3, "How many seeds: 0, 1, ...", lower_bound=1, upper_bound=20
    )
    prompts = flags.DEFINE_multi_integer(
        "prompts",
        [300],
        "Prompts that pairs are sampled for, 6 of each; may be repeated.",
        lower_bound=50,
        upper_bound=1_000_000,
    )
    jobs = flags.DEFINE_integer("jobs", 2, "Number of processes.", lower_bound=1, upper_bound=20)
    flags.mark_flags_as_required(["workdir"])
    processes.start()

    def look():
        with in_workdir(workdir.value) as folder:
            run(pathlib.Path(folder), prompts.value, seeds.value, jobs.value)

    command_line.run(look, __doc__)


if __name__ == "__main__":
    main()

"""Reproduce the paper's figure 2, left: reward against KL on IMDb.

    python -m experiments.imdb_frontier --config=FILE --workdir=DIR

Makes 22 runs over one SFT model and one set of pairs: DPO at 4 betas, unlikelihood at 4 alphas, PPO
on the learned reward, on the true one, and on the true one by TRL's settings at 4 target KLs each,
and Preferred-FT with 2 seeds. (The paper gives the values and the sum of 22 runs; that TRL's PPO
has the same 4 target KLs, and Preferred-FT the 2 runs that remain, is inferred.) Each run is
evaluated while it trains. Every run is an ordinary run of dpo_jax.train in DIR, so finished
runs are reused and interrupted ones resume.

--dry_run lists the runs, whether they are done, and what each will cost. --run=NAME picks runs,
with * for any letters. --config.FIELD=VALUE changes a field of every run that has it. Writes
DIR/frontier.json, with a row per run and checkpoint, and DIR/frontier.png with the optimum as
estimated from the reference's samples, as far as that estimate can be trusted.
"""

import fnmatch
import json
import math
import pathlib

import numpy as np

from dpo_jax.data.batches import steps_of
from experiments.commands import config_maker, in_workdir

# Method -> (swept field, its values, how a value is written).
SWEEP = {
    "dpo": ("dpo.beta", (0.05, 0.1, 1.0, 5.0), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "ppo_gt": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "ppo": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "ppo_gt_trl": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "preferred_ft": ("preferred_ft.seed", (0, 1), "seed {:g}"),
}
REVIEWS = 25_000  # in IMDb's train split; each gives one prompt
MEASURED = (
    "reward",
    "reward_se",
    "kl",
    "kl_se",
    "kl_sampled",
    "kl_sampled_se",
    "length",
    "eos_rate",
    "repetition",
)


def run_name(method: str, value: float) -> str:
    """Return the name of a run's folder."""
    return f"{method}_{value:g}"


def config_of(make_config, method: str, value: float):
    """Return one run's config, and the stage that the run is about."""
    config = make_config(method)
    stage, _, field = SWEEP[method][0].partition(".")
    config[stage][field] = value
    if stage == "dpo":
        config.dpo.cache_reference = True  # the four runs share the reference's log-probs
    config.run = run_name(method, value)
    return config, stage


def cost(config, stage: str) -> str:
    """Say what a run has to do after the stages that it shares with others."""
    block, sampling = config[stage], config.sampling
    if stage == "ppo":
        steps = steps_of(REVIEWS, block.batch_size, steps=block.steps, epochs=block.epochs)
        return (
            f"{steps} steps: {steps * block.batch_size:,} completions of up to "
            f"{sampling.max_new_tokens} tokens, {block.inner_epochs} passes over each"
        )
    size = 1 + sampling.max_prefix + sampling.max_new_tokens  # BOS, the prompt, the completion
    pairs = config.pairs.prompts * math.comb(config.pairs.completions, 2)
    steps = steps_of(pairs, block.batch_size, steps=block.steps, epochs=block.epochs)
    return f"{steps} steps: {steps * block.batch_size:,} pairs of up to {size} tokens"


def rows_of(folder: pathlib.Path, method: str, value: float) -> list[dict]:
    """Return a row for each evaluation of a run; none if the run has not begun."""
    from dpo_jax.training.metrics import read_rows

    if not (folder / "metrics.jsonl").exists():
        return []
    seed = value if method == "preferred_ft" else 0
    label = SWEEP[method][2].format(value)
    about = dict(panel="imdb", method=method, parameter=label, seed=seed)
    rows = []
    for row in read_rows(folder / "metrics.jsonl"):
        if row["step"] and "frontier/kl" in row:
            measured = {name: row[f"frontier/{name}"] for name in MEASURED}
            rows.append(about | dict(step=row["step"]) | measured)
    return rows


def best_of_n(make_config, folder: pathlib.Path) -> tuple[list[dict], tuple]:
    """Return rows of best of N and the estimated optimum, from the reference's same samples."""
    from dpo_jax.evaluation import frontier
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.workdir import read_lines

    run_stages(make_config("best_of_n"), str(folder))
    rewards = []
    for row in read_lines(folder / "best_of_n" / "completions.jsonl"):
        rewards.append([completion["reward"] for completion in row["completions"]])
    rows = []
    for row in json.loads((folder / "best_of_n" / "best_of_n.json").read_text()):
        about = dict(panel="imdb", method="best_of_n", parameter=f"N={row['n']}", seed=0, step=0)
        rows.append(about | {name: row[name] for name in ("reward", "reward_se", "kl")})
    return rows, frontier.frontier(np.array(rewards))


def run(make_config, workdir: str, names: list[str], dry_run: bool) -> None:
    """Make the runs that are not done and draw the figure; with dry_run only list them.

    make_config: method -> config. names: patterns of the runs to make; ValueError if a pattern
    matches no run.
    """
    from dpo_jax import config as configs
    from dpo_jax import config_checks
    from dpo_jax.console import say
    from dpo_jax.evaluation import plots
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.workdir import write_json

    folder = pathlib.Path(workdir)
    known = [
        run_name(method, value) for method, (_, values, _) in SWEEP.items() for value in values
    ]
    for name in names:
        if not fnmatch.filter(known, name):
            raise ValueError(f"--run={name} matches no run. The runs are: {', '.join(known)}.")
    rows = []
    for method, (_, values, _) in SWEEP.items():
        for value in values:
            config, stage = config_of(make_config, method, value)
            config_checks.validate(config)
            trained = folder / configs.folder_names(config)[stage]
            if any(fnmatch.fnmatch(config.run, name) for name in names):
                done = (trained / "done.json").exists()
                say(f"{config.run:<22}{'done' if done else cost(config, stage)}")
                if not dry_run:
                    attempt(run_stages, config, workdir)
            rows += rows_of(trained, method, value)
    if not dry_run:
        of_reference, optimum = best_of_n(make_config, folder)
        rows += of_reference
        write_json(folder / "frontier.json", rows)
        plots.panels(
            folder / "frontier.png",
            rows,
            {"imdb": optimum},
            {"imdb": "controlled sentiment on IMDb"},
            curve_name="optimum, estimated from the reference",
        )
        say(f"{folder / 'frontier.json'}, {folder / 'frontier.png'}")


def attempt(run_stages, config, workdir: str) -> None:
    """Make a run. One that diverges is drawn as far as it came; the others are still made."""
    from dpo_jax.console import say

    try:
        run_stages(config, workdir)
    except FloatingPointError as error:
        say(f"{config.run}: {error}")


def main():
    from absl import flags

    from dpo_jax import command_line, device_command

    config = command_line.define_config("imdb")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    names = flags.DEFINE_multi_string(
        "run", ["*"], "A run to make, such as dpo_0.1 or ppo_*; may be repeated. Default: all."
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only list the runs and their cost.")
    flags.mark_flags_as_required(["workdir"])

    def make_runs():
        make_config = config_maker(config.choice, config.overrides)
        with in_workdir(workdir.value, dry_run=dry_run.value) as folder:
            run(make_config, folder, names.value, dry_run.value)

    device_command.run(make_runs, __doc__, config=config)


if __name__ == "__main__":
    main()

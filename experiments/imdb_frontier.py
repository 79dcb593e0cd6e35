"""The paper's figure 2, left: python -m experiments.imdb_frontier --config=FILE --workdir=DIR

22 runs over one SFT model and one set of pairs: DPO at 4 betas, unlikelihood at 4 alphas, PPO on
the learned reward and on the true one at 4 target KLs each, Preferred-FT with 6 seeds; each is
evaluated while it trains. Every run is an ordinary run of dpo_jax.train in DIR, so what is finished
is reused and what is not goes on. --dry_run lists the runs, which of them are done, and what each
will cost; --run=NAME, with * for any letters, takes some of them; --config.FIELD=VALUE changes a
field of every run that has it. Writes DIR/frontier.json, a row per run and checkpoint, and
DIR/frontier.png with the estimated optimum (from the reference's own samples, where that estimate
can be trusted).
"""

import fnmatch
import json
import pathlib

import numpy as np

from experiments.commands import config_maker

SWEEP = {  # method -> (field, values, how a value is written)
    "dpo": ("dpo.beta", (0.05, 0.1, 1.0, 5.0), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "ppo_gt": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "ppo": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "preferred_ft": ("preferred_ft.seed", (0, 1, 2, 3, 4, 5), "seed {:g}"),
}


def run_name(method: str, value: float) -> str:
    return f"{method}_{value:g}"


def config_of(make_config, method: str, value: float):
    """One run's config, and the stage that it is about."""
    config = make_config(method)
    stage, _, field = SWEEP[method][0].partition(".")
    config[stage][field] = value
    if stage == "dpo":
        config.dpo.cache_reference = True  # its four runs share it
    config.run = run_name(method, value)
    return config, stage


REVIEWS = 25_000  # in IMDb's train split, a prompt each


def cost(config, stage: str) -> str:
    """What a run has to do after the stages that it shares."""
    block, sampling = config[stage], config.sampling
    if stage == "ppo":
        steps = block.steps or int(block.epochs * REVIEWS / block.batch_size)
        return (
            f"{steps} steps: {steps * block.batch_size:,} completions of up to {sampling.max_new_tokens} "
            f"tokens, {block.inner_epochs} passes over each"
        )
    size = 1 + sampling.max_prefix + sampling.max_new_tokens  # BOS, the prompt, the completion
    pairs = config.pairs.prompts * config.pairs.completions * (config.pairs.completions - 1) // 2
    steps = block.steps or int(block.epochs * pairs / block.batch_size)
    return f"{steps} steps: {steps * block.batch_size:,} pairs of up to {size} tokens"


def rows_of(folder: pathlib.Path, method: str, value: float) -> list[dict]:
    """What a run's evaluations measured; none where it has not begun."""
    from dpo_jax.training.metrics import read_rows

    if not (folder / "metrics.jsonl").exists():
        return []
    label, seed = SWEEP[method][2].format(value), value if method == "preferred_ft" else 0
    return [
        dict(
            panel="imdb",
            method=method,
            parameter=label,
            seed=seed,
            step=row["step"],
            **{
                name: row[f"frontier/{name}"]
                for name in (
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
            },
        )
        for row in read_rows(folder / "metrics.jsonl")
        if row["step"] and "frontier/kl" in row
    ]


def best_of_n(make_config, folder: pathlib.Path) -> tuple[list[dict], tuple]:
    """Rows of best of N, and the estimated frontier of the optimal policies, from the same samples
    of the reference.
    """
    from dpo_jax.evaluation import frontier
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.workdir import read_lines

    run_stages(make_config("best_of_n"), str(folder))
    rewards_PM = np.array(
        [
            [completion["reward"] for completion in row["completions"]]
            for row in read_lines(folder / "best_of_n" / "completions.jsonl")
        ]
    )
    rows = [
        dict(
            panel="imdb",
            method="best_of_n",
            parameter=f"N={row['n']}",
            seed=0,
            step=0,
            reward=row["reward"],
            reward_se=row["reward_se"],
            kl=row["kl"],
        )
        for row in json.loads((folder / "best_of_n" / "best_of_n.json").read_text())
    ]
    return rows, frontier.frontier(rewards_PM)


def run(make_config, workdir: str, names: list[str], dry_run: bool) -> None:
    """Runs what is not done yet and draws the figure of all that is; with dry_run only says what
    would be done.

    make_config: method -> config. names: patterns of the runs to make. ValueError for one that is
    no run's.
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
            raise ValueError(f"--run={name} is none of the runs: {', '.join(known)}.")
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
    """A run that diverges ends there, and is drawn as far as it came; the others go on."""
    from dpo_jax.console import say

    try:
        run_stages(config, workdir)
    except FloatingPointError as error:
        say(f"{config.run}: {error}")


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    config = command_line.define_config("imdb")
    workdir = flags.DEFINE_string("workdir", None, "Where the runs and the results are.")
    names = flags.DEFINE_multi_string(
        "run", ["*"], "Which runs, such as dpo_0.1 or ppo_*; may be repeated."
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only list the runs and their cost.")
    flags.mark_flags_as_required(["workdir"])

    def make_runs():
        make_config = config_maker(config.choice, config.overrides)
        run(make_config, workdir.value, names.value, dry_run.value)

    processes.run(make_runs, __doc__, config=config)


if __name__ == "__main__":
    main()

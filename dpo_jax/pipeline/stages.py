"""The stages of a run, one after the other: those that train, and those that sample, compare and
measure.
"""

import functools
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import config_checks, stage_table
from dpo_jax.console import say
from dpo_jax.evaluation import best_of_n, reward_kl, toy_report
from dpo_jax.models import loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.pipeline import preference_pairs
from dpo_jax.pipeline.run import Run, versions
from dpo_jax.pipeline.train_stage import policy_measure, train_stage
from dpo_jax.rewards import make
from dpo_jax.stage_table import STAGES
from dpo_jax.workdir import finish_stage, lock_folder, start_stage, write_json, write_lines


def pairs_stage(run: Run, stage: str) -> dict:
    """Preference pairs sampled from the model that the stages before made, labelled by the true
    reward.
    """
    initial, block = run.initial(stage), run.config.pairs
    found = run.load_prompts(initial.tokenizer)
    if len(found["train"]) < block.prompts:
        raise ValueError(
            f"config.pairs.prompts = {block.prompts}, but there are {len(found['train'])} training "
            "prompts: lower it, or take more rows (config.data.train_split, config.data.max_rows)."
        )
    run.record_weights(stage, policy=initial, reward=run.reward_model("true"))
    chosen = np.random.default_rng(run.config.seed).permutation(len(found["train"]))[
        : block.prompts
    ]
    held_out = found["eval"].take(range(min(preference_pairs.EVAL_PROMPTS, len(found["eval"]))))
    return preference_pairs.make_pairs(
        run.load(initial),
        dict(train=found["train"].take(chosen), eval=held_out),
        run.reward("true"),
        block.labels,
        run.sampling(n=block.completions),
        run.folder(stage),
    )


def evaluate_stage(run: Run, stage: str) -> dict:
    """The trained policy's reward and KL to where it began."""
    (trained,) = stage_table.policy_stages(run.config)
    start = run.initial(trained)
    if run.config.data.source == "toy":
        beta = run.config[trained].get("beta")
        with jax.set_mesh(run.mesh):
            return toy_report.write(
                run.folder(stage),
                run.folder(trained),
                run.load(start),
                run.config.reward.kind,
                beta,
            )
    end = loading.open_checkpoint(str(run.folder(trained) / "hf"), dtype=run.config.model.dtype)
    measure, reference = policy_measure(run, start), start.load_params(run.mesh)
    values, rows = measure(end.load_params(run.mesh), reference)
    _, before = measure(reference, reference)
    say(reward_kl.side_by_side(rows[: run.config.evaluate.show], before))
    write_lines(run.folder(stage) / "completions.jsonl", rows)
    write_json(run.folder(stage) / "evaluate.json", dict(policy=trained, **values))
    say(reward_kl.table(values))
    return values


def best_of_n_stage(run: Run, stage: str) -> dict:
    """The best of N completions of the model that the stages before made, for each N."""
    initial, block = run.initial(stage), run.config.best_of_n
    held_out = run.eval_prompts(stage, initial.tokenizer)
    run.record_weights(
        stage, policy=initial, reward=run.reward_model(block.reward), true=run.reward_model("true")
    )
    return best_of_n.write(
        run.folder(stage),
        run.load(initial),
        held_out,
        run.reward("true"),
        run.reward(block.reward),
        block.n,
        run.sampling(),
    )


OTHER_STAGES = {  # all that do not train
    "pairs": pairs_stage,
    "best_of_n": best_of_n_stage,
    "evaluate": evaluate_stage,
}


def run_stages(config: ConfigDict, workdir: str) -> None:
    """Runs every stage that is not done yet; ValueError for a wrong config, StageChanged for a
    changed one.
    """
    config_checks.validate(config)
    processes.check_shared(workdir)
    run = Run(config, pathlib.Path(workdir), sharding.make_mesh(**config.mesh))
    ahead = [stage for stage in config.stages if not (run.folder(stage) / "done.json").exists()]
    if any(STAGES[stage].samples for stage in ahead):
        make.check_reward(config.reward.kind, config.reward.path)
    for stage in config.stages:
        folder = run.folder(stage)
        with lock_folder(folder):
            begin = functools.partial(start_stage, run.workdir, config, stage, versions())
            status = processes.from_first(lambda: begin()[1])
            if status == "done":
                say(f"{stage}: done before, in {folder}")
            else:
                run_stage = OTHER_STAGES.get(stage, train_stage)
                finish_stage(folder, **run_stage(run, stage))
    processes.wait_for_all("all stages")  # whose files the others may read
    say(f"all stages done, in {workdir}")

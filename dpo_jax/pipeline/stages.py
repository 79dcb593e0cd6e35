"""A run from its first stage to its last: those that train, and those that sample or measure.

`train_stage.py` has the stages that train; the others are here. What is true of a stage whatever
its settings is in `stage_table.py`.
"""

import datetime
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import config_checks, costs, stage_table
from dpo_jax.console import compile_times, say, warn
from dpo_jax.evaluation import best_of_n, reward_kl, toy_report
from dpo_jax.models import loading
from dpo_jax.parallel import agreement, processes, sharding
from dpo_jax.pipeline import exports, leak_checks, preference_pairs
from dpo_jax.pipeline.run import FUNCTION, Run, versions
from dpo_jax.pipeline.train_stage import policy_measure, train_stage
from dpo_jax.rewards import make
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.stage_table import STAGES
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import address_of, scheme_of
from dpo_jax.training import losses, metric_names
from dpo_jax.workdir import (
    COMPLETIONS,
    REFERENCE_COMPLETIONS,
    StageChanged,
    check_files,
    check_is_only_taker,
    finish_stage,
    is_of_other_rows,
    lock_folder,
    open_workdir,
    runs_of_other_rows,
    stage_status,
    start_date,
    start_stage,
    write_json,
    write_lines,
)


def pairs_stage(run: Run, stage: str) -> dict:
    """Sample from the model that the stages before made, and label pairs by the reward or a judge.

    Each round has prompts of its own, until all have been used.
    """
    initial = run.initial(stage)
    block = run.config.pairs
    prompts = run.load_prompts(initial.tokenizer)
    count = len(prompts["train"])
    if count < block.prompts:
        raise ValueError(
            f"config.pairs.prompts = {block.prompts}, but there are only {count} training prompts. "
            "Lower it, or read more rows (config.data.train_split, config.data.max_rows)."
        )
    # A random choice: the first prompts of a data set may be alike.
    order = np.random.default_rng(run.config.seed + block.seed).permutation(count)
    start = (run.config.rounds - 1) * block.prompts
    chosen = order.take(range(start, start + block.prompts), mode="wrap")
    training = prompts["train"].take(chosen)
    held_out = run.validation_prompts(preference_pairs.EVAL_PROMPTS, initial.tokenizer)
    sampling = run.sampling(run.seed(stage, "sampling"), n=block.completions)
    # First, as a stage that is refused keeps what it has written.
    rollouts.so_far(training.followed_by(held_out), sampling, run.folder(stage))
    splits = dict(train=training.hashes)
    if held_out.hashes is not None:
        splits["eval"] = held_out.hashes
    found = leak_checks.report(run, stage, str(run.folder(stage)), splits)
    found |= leak_checks.prefixes(run, prompts["eval"], prompts["train"])
    leak_checks.check_ahead(run, stage, initial.tokenizer)
    asks_reward = stage_table.asks_reward(run.config, stage)
    reward_model = run.reward_model("true") if asks_reward else None
    run.record_weights(stage, policy=initial, reward=reward_model)

    made = preference_pairs.make_pairs(
        run.load(initial),
        dict(train=training, eval=held_out),
        run.reward("true") if asks_reward else None,
        preference_pairs.labelling_of(block, run.seed(stage, "judging")),
        sampling,
        run.folder(stage),
    )
    leak_checks.add_to_ledger(run.folder(stage), found)
    return made


def evaluate_stage(run: Run, stage: str) -> dict:
    """Measure the trained policy's reward, and its KL to where it began in round 1."""
    (trained,) = stage_table.policy_stages(run.config)
    start = run.first(trained)
    if run.is_measured_exactly():
        numbers = range(1, run.config.rounds + 1)
        with jax.set_mesh(run.mesh):
            return toy_report.write(
                run.folder(stage),
                [run.of_round(number).folder(trained) for number in numbers],
                run.load(start),
                run.config.reward.kind,
                run.config.dpo.beta if stage_table.aims_at_optimum(run.config, trained) else None,
                is_moved=stage_table.reference_of(run.config, trained) == "init",
            )
    # The exported model, not a checkpoint: adapters are merged there. A run that ends with this
    # round rounds its weights, and one that goes on has kept them exact: both measure the same.
    folder = run.folder(trained)
    source = exports.source_dtype(folder)
    rounded_to = exports.dtype_of(run.config, run.is_last_of_round(trained), source)
    dtype = run.config.model.dtype
    end = loading.open_checkpoint(str(folder / "hf"), rounded_to=rounded_to, dtype=dtype)
    held_out = judged_prompts(run, stage, start.tokenizer)
    measure = policy_measure(run, start, held_out, run.measuring(stage))
    reference = start.load_params(run.mesh)
    values, rows = measure(end.load_params(run.mesh), reference)
    # For the table side by side. The same seed, so the two differ by their weights alone.
    _, reference_rows = measure(reference, reference)

    say(reward_kl.side_by_side(rows[: run.config.evaluate.show], reference_rows))
    write_lines(run.folder(stage) / COMPLETIONS, rows)
    write_lines(run.folder(stage) / REFERENCE_COMPLETIONS, reference_rows)
    write_json(run.folder(stage) / "evaluate.json", dict(policy=trained, **values))
    say(reward_kl.table(values))
    return values


def best_of_n_stage(run: Run, stage: str) -> dict:
    """Choose the best of N completions of the model that the stages before made, for each N."""
    initial = run.initial(stage)
    block = run.config.best_of_n
    held_out = judged_prompts(run, stage, initial.tokenizer)
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
        run.measuring(stage),
    )


def judged_prompts(run: Run, stage: str, tokenizer) -> Prompts:
    """Return the test prompts that a stage judges; its ledger says how many are trained on."""
    run.say_of_test_prompts(stage, tokenizer)
    judged = run.test_prompts(stage, tokenizer)
    asked = judged.prompts.spread(run.config[stage].prompts)
    loaded = run.load_prompts(tokenizer)
    leak_checks.warn_of_selection(run, stage, asked, loaded)
    leak_checks.record_judged(run, stage, judged, loaded["train"])
    return asked


OTHER_STAGES = {  # all that do not train
    "pairs": pairs_stage,
    "best_of_n": best_of_n_stage,
    "evaluate": evaluate_stage,
}


def run_stages(
    config: ConfigDict,
    workdir: str,
    *,
    reward: Callable | None = None,
    loss: Callable | None = None,
    allowed: frozenset[str] = frozenset(),
    is_named: bool = True,
) -> None:
    """Run every stage of a config that is not done yet, each in its folder under WORKDIR.

    reward: a function from prompts and completions (lists of n texts) to n numbers, instead of
    config.reward. loss: a function of `losses.Pairs`, beta and label_smoothing, instead of the one
    that config.dpo.loss names. Both are recorded by name, so a stage that was made with another one
    is refused. allowed: fields (dotted names) that a stage which is resumed may change. is_named:
    the user has given config.run, so that no other run is meant. Raises ValueError for a wrong
    config, and StageChanged where a stage's folder was made with another one that differs in other
    fields.
    """
    config_checks.validate(config)
    _check_keep_best(config)
    _check_bucket(config, workdir)
    config = _with_loss(_with_reward(config, reward), loss)
    agreement.check_same(functools.partial(_fields, config), agreement.SAME_COMMAND)
    with open_workdir(workdir) as folder:
        if not is_named:
            processes.from_first(functools.partial(_check_name, config, folder, allowed))
        _run_all(config, folder, reward, loss, allowed)
    processes.wait_for_all("all stages")  # the others may read what process 0 wrote
    say(f"all stages done, in {folder}")


def _run_all(
    config: ConfigDict,
    folder: pathlib.Path,
    reward: Callable | None,
    loss: Callable | None,
    allowed: frozenset[str],
) -> None:
    """Run every stage of a checked config that is not done yet, in a WORKDIR on this machine."""
    run = Run(
        config,
        folder,
        sharding.make_mesh(**config.mesh),
        rounds=config.rounds,
        # Made once, as best_of_n asks whether two rewards are one.
        reward_function=make.from_function(reward) if reward else None,
        loss=loss,
    )

    # A folder that refuses this config, and a reward that cannot be read, are better known before
    # hours of training than after.
    rounds = [run.of_round(number) for number in range(1, run.rounds + 1)]
    processes.from_first(functools.partial(_check_stages, rounds, allowed))
    ahead = processes.from_first(functools.partial(_stages_ahead, rounds))
    if "pairs" in ahead:
        preference_pairs.labelling_of(config.pairs, config.seed)
    if any(stage_table.asks_reward(config, stage) for stage in ahead):
        make.check_reward(config.reward.kind, config.reward.path)
    for in_round in rounds:
        if len(rounds) > 1:
            say(f"--- round {in_round.config.rounds} of {len(rounds)}")
        for stage in _stages_of(in_round):
            _run_stage(in_round, stage, allowed)


def _stages_of(run: Run) -> list[str]:
    """Return the stages of a round: all of them in round 1, and those that repeat in others."""
    if run.config.rounds == 1:
        return list(run.config.stages)
    return [stage for stage in run.config.stages if stage_table.repeats(run.config, stage)]


def _stages_ahead(rounds: list[Run]) -> list[str]:
    """Return the stages of all rounds that are not done yet."""
    ahead = []
    for run in rounds:
        ahead += [stage for stage in _stages_of(run) if not _is_done(run, stage)]
    return ahead


def _check_stages(rounds: list[Run], allowed: frozenset[str]) -> None:
    """Raise StageChanged where the folder of any stage was made with a config that it refuses."""
    for run in rounds:
        for stage in _stages_of(run):
            status, _ = stage_status(run.workdir, run.config, stage, versions(), allowed)
            if status == "unfinished":
                _check_warmup(run, stage)


def _check_warmup(run: Run, stage: str) -> None:
    """Raise StageChanged for a PPO that an earlier version began, with a warm-up in updates."""
    folder = run.folder(stage)
    if stage != "ppo" or not run.config.ppo.warmup_steps or not is_of_other_rows(folder):
        return
    raise StageChanged(
        f"{folder} was begun by an earlier version, which counted config.ppo.warmup_steps = "
        f"{run.config.ppo.warmup_steps} in updates. They are steps now, of several updates each, "
        "so its learning rates would change half-way. Let the version that began the stage finish "
        "it, or give another --workdir."
    )


def _say_of_other_rows(run: Run, stage: str, is_done: bool) -> None:
    """Warn where runs that an earlier version made from other rows stand beside this one's."""
    # The toy makes its own rows, the same as before.
    if run.config.data.source == "toy":
        return
    folder = run.folder(stage)

    def found() -> list[str]:
        if is_done:
            return [folder.name] if is_of_other_rows(folder) else []
        return runs_of_other_rows(folder, stage)

    names = processes.from_first(found)
    if names:
        warn(
            f"{stage}: an earlier version, which chose other rows of the data to train and to "
            f"evaluate on, made {', '.join(names)}: those numbers are not comparable with the ones "
            "of stages that are made now (docs/data.md). Give another --workdir to compare."
        )


def _check_name(config: ConfigDict, workdir: pathlib.Path, allowed: frozenset[str]) -> None:
    """Raise StageChanged where it is not known which of several runs is to be changed."""
    # A later round is the same run as round 1.
    config = configs.of_round(config, 1)
    for stage in stage_table.training_stages(config)[-1:]:
        _, changes = stage_status(workdir, config, stage, versions(), allowed)
        folder = workdir / configs.folder_names(config)[stage]
        check_is_only_taker(folder, config, stage, changes, allowed)


def _fields(config: ConfigDict) -> dict:
    """Return the fields of a config, "config.FIELD" -> value."""
    fields = configs.flat_fields("config", config.to_dict())
    # Last, as it follows from the others where none is given.
    name = fields.pop("config.run")
    return fields | {"config.run": name}


def _is_done(run: Run, stage: str) -> bool:
    return (run.folder(stage) / "done.json").exists()


def _check_keep_best(config: ConfigDict) -> None:
    """Raise ValueError where keep_best names no metric that a checkpoint can be kept by.

    Which of them a stage has is known at its first evaluation, once all has been compiled.
    """
    known = metric_names.kept_by()
    for stage in stage_table.training_stages(config):
        name = config[stage].keep_best
        whole, _ = metric_names.of_subset(name)
        if name and whole not in known:
            raise ValueError(
                f"config.{stage}.keep_best = {name!r}: expected a metric of the evaluation, of "
                f"which more is better, or less for losses; one of {', '.join(known)}, or one of a "
                "subset, as loss/eval/SUBSET."
            )


def _check_bucket(config: ConfigDict, workdir: str) -> None:
    """Raise ValueError for a bucket that cannot keep the checkpoints of this run."""
    scheme = scheme_of(address_of(shadow.place(workdir)))
    if scheme == "s3" and jax.process_count() > 1 and stage_table.training_stages(config):
        raise ValueError(
            f"--workdir={workdir}: several processes cannot keep checkpoints in s3://, as each "
            "writes a part of them. Give a folder that all hosts share, or gs://."
        )


def _run_stage(run: Run, stage: str, allowed: frozenset[str]) -> None:
    """Run a stage unless it is done, alone in its folder."""
    folder = run.folder(stage)
    with lock_folder(folder):
        begin = functools.partial(start_stage, run.workdir, run.config, stage, versions(), allowed)
        # Process 0 decides for all, for it alone writes there.
        status = processes.from_first(lambda: begin()[1])
        if status != "unfinished":
            _say_of_other_rows(run, stage, is_done=status == "done")
        if status == "done":
            gone = functools.partial(exports.is_gone, stage, folder)
            is_last = STAGES[stage].trains and run.is_last(stage)
            outdated = functools.partial(exports.is_out_of_date, run.config, is_last, folder)
            # Where hf/ is written again, the last checkpoint is there, so that nothing is trained.
            if processes.from_first(gone):
                say(f"{stage}: already done; its hf/ is gone, and written again")
            elif processes.from_first(outdated):
                say(f"{stage}: already done; its hf/ is written again, in another type of weights")
            else:
                # What later stages read must be what this one wrote.
                processes.from_first(lambda: check_files(folder))
                say(f"{stage}: already done, in {folder}")
                return
        date = processes.from_first(lambda: start_date(folder).isoformat())
        run.date = datetime.date.fromisoformat(date)
        make_result = OTHER_STAGES.get(stage, train_stage)
        with costs.measured(folder), compile_times(stage):
            result = make_result(run, stage)
        finish_stage(folder, **result)


def _with_reward(config: ConfigDict, reward: Callable | None) -> ConfigDict:
    """Return the config with the name of a reward function in it, if one is given.

    So it is written down, and a stage that another reward has begun or finished is refused. Raises
    ValueError where a function is given that no stage asks.
    """
    if reward is None:
        return config
    if not any(stage_table.asks_reward(config, stage) for stage in config.stages):
        raise ValueError(
            "the run has no use for a reward: pairs (unless a judge labels them), ppo, best_of_n "
            f"and evaluate ask for one, and its stages are {', '.join(config.stages)}."
        )
    config = config.copy_and_resolve_references()
    config.reward.update(kind=FUNCTION, path=losses.name_of(reward))
    return config


def _with_loss(config: ConfigDict, loss: Callable | None) -> ConfigDict:
    """Return the config with the name of a loss function in it, if one is given.

    It is recorded for the same purpose as a reward's. Raises ValueError where no stage uses it.
    """
    if loss is None:
        return config
    if "dpo" not in config.stages:
        raise ValueError(
            "the run has no use for a loss: dpo alone takes one, and its stages are "
            f"{', '.join(config.stages)}."
        )
    if config.data.margin:
        raise ValueError(
            f"config.data.margin = {config.data.margin!r}: expected empty, as a loss function from "
            "Python takes no margin."
        )
    config = config.copy_and_resolve_references()
    config.dpo.loss = f"{FUNCTION}:{losses.name_of(loss)}"
    return config

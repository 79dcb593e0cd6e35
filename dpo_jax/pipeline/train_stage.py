"""A stage that trains: model, reference and data in, a trained and exported model out."""

import dataclasses
import functools
import json

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.console import say
from dpo_jax.data import dataset
from dpo_jax.evaluation import reward_kl, toy_report
from dpo_jax.models import hf, loading, peft, transformer
from dpo_jax.models import lora as adapters
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.stage_table import STAGES
from dpo_jax.training.data_feed import DataFeed
from dpo_jax.training.loop import Job, train
from dpo_jax.training.ppo import RolloutFeed
from dpo_jax.training.reference_cache import ReferenceCache


def train_stage(run: Run, stage: str) -> dict:
    """Trains, and exports the result to hf/, and adapters to adapter/ besides."""
    block, folder, lora = run.config[stage], run.folder(stage), run.lora()
    initial = run.initial(stage)
    model = dataclasses.replace(initial.config, head=STAGES[stage].head)
    load = functools.partial(_load, run, model, initial)
    load_initial = functools.cache(
        load
    )  # reference, probe and adapters share it; what is trained is another copy
    reference = _reference(run, stage, initial)
    probe = _probe(run, stage, initial, load_initial)
    run.record_weights(
        stage,
        base=initial if lora else None,
        reference=reference,
        start=initial if probe else None,
        reward=run.reward_model(block.reward) if STAGES[stage].samples else None,
    )
    if lora:
        _say_what_is_trained(stage, initial, adapters.abstract(model, lora))
        load = functools.partial(_init_adapters, run, model, lora)
    if (
        reference is initial
    ):  # under adapters, the base through the policy's own program: they start with no effect
        load_reference = load if lora else load_initial
    else:
        load_reference = reference and functools.partial(reference.load_params, run.mesh)
    cache = None
    if stage_table.keeps_reference(run.config, stage):
        cache = ReferenceCache(
            run.workdir, reference, run.mesh, block.microbatch_size or block.batch_size
        )
    job = Job(
        name=stage,
        folder=folder,
        block=block,
        model=model,
        mesh=run.mesh,
        load_init=load,
        load_reference=load_reference if reference and not cache else lambda: None,
        log=run.config.log,
        config=json.loads(run.config.to_json()),
        probe=probe,
        lora=lora,
        load_base=load_initial if lora else lambda: None,
    )
    params, evaluated = train(job, _feed(run, stage, job, initial, reference, cache))
    if lora:
        peft.save(folder / "adapter", model, initial.hf_config, lora, params, base=initial.path)
        params = adapters.merge(load_initial(), params, lora)
    if model.head == "lm_value":
        model, params = initial.config, _without_value(initial.config, params)
    hf.save(folder / "hf", model, initial.hf_config, params, initial.tokenizer)
    say(f"{stage}: exported to {folder / 'hf'}")
    return dict(evaluation=evaluated)


def _feed(run: Run, stage: str, job: Job, initial, reference, cache: ReferenceCache | None):
    """Where the stage's steps come from: the policy's own completions for ppo, rows of data for all
    others.
    """
    config = run.config
    if STAGES[stage].samples:
        prompts = run.load_prompts(initial.tokenizer)["train"]
        run.record(stage, dict(prompts=len(prompts)), prompts.fingerprint)
        return RolloutFeed(
            job,
            prompts,
            run.reward(job.block.reward),
            tokenizer=initial.tokenizer,
            eos_id=run.eos_id(initial.tokenizer),
            sampling=run.sampling(),
        )
    data = run.load_data(stage, initial.tokenizer)
    initial.check(data.train)
    initial.check(data.eval)
    # Sampled responses may end by their length, without EOS.
    sampled = stage_table.trains_on_samples(config, stage)
    return DataFeed(
        job,
        data,
        seed=config.seed + job.block.get("seed", 0) if config.data.shuffle else None,
        eos_id=None if sampled else run.eos_id(initial.tokenizer),
        reference_is_init=reference is initial,
        reference_log_probs=cache.log_probs if cache else None,
        show_example=lambda index: dataset.show(data.train, initial.tokenizer, [index]),
    )


def _reference(run: Run, stage: str, initial):
    """The reference model of dpo and ppo: the initial weights, none, or those at a path."""
    name = stage_table.reference_of(run.config, stage)
    if name == "none":
        return None
    if name == "init":
        return initial
    other = loading.open_checkpoint(
        name, tokenizer=initial.tokenizer, **configs.model_options(run.config)
    )
    if other.config.vocab != initial.config.vocab:
        raise ValueError(
            f"config.dpo.reference = {name!r} has a vocabulary of "
            f"{other.config.vocab}, the policy one of {initial.config.vocab}: they cannot be compared."
        )
    return other


def _load(run: Run, model, initial) -> dict:
    """The initial weights, with the stage's own head, which starts from 0."""
    params = initial.load_params(run.mesh)
    if model.head == "lm":
        return params
    placed = sharding.param_shardings(run.mesh, transformer.abstract(model))["head"]["scalar"]
    head = {"scalar": jax.device_put(np.zeros(model.width, np.float32), placed)}
    return params | {"head": head | (params.get("head", {}) if model.head == "lm_value" else {})}


def _init_adapters(run: Run, model, lora: Lora) -> dict:
    """What is trained instead of the weights: the same numbers on any mesh."""
    return sharding.shard_params(run.mesh, adapters.init(model, lora, run.config.seed))


def _say_what_is_trained(stage: str, initial, shapes) -> None:
    size, whole = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, initial.shapes)
    )
    say(
        f"{stage}: LoRA trains {size:,} numbers over the {whole:,} of {initial.path} "
        f"(sha256 {initial.fingerprint()[:16]})"
    )


def _without_value(model, params):
    """A policy's weights without PPO's value head."""
    shapes = transformer.abstract(model)
    return {
        name: params[name]
        if name != "head"
        else {part: params["head"][part] for part in shapes["head"]}
        for name in shapes
    }


def _probe(run: Run, stage: str, initial, load_initial):
    """What is measured of a policy at each evaluation where an `evaluate` stage follows, or
    None.
    """
    if "evaluate" not in run.config.stages or not STAGES[stage].is_policy:
        return None
    if run.config.data.source == "toy":
        with jax.set_mesh(run.mesh):
            return toy_report.probe(initial.model(load_initial(), run.mesh), run.config.reward.kind)
    measure = policy_measure(run, initial)
    return lambda params: measure(params, load_initial())[0]


def policy_measure(run: Run, initial: loading.Checkpoint):
    """(policy's weights, reference's) -> (values, rows) on the held-out prompts of the evaluate
    stage.
    """
    held_out = run.eval_prompts("evaluate", initial.tokenizer)
    reward = run.reward("true")

    def measure(params, reference):
        model = initial.model(params, run.mesh, append_eos=run.config.data.append_eos)
        return reward_kl.evaluate(model, reference, held_out, reward, run.sampling())

    return measure

"""The rehearsal of a run: a step of each training stage on the real devices, kept nowhere.

Weights are random but of the real size, and examples are made up, all of the longest lengths that
the config allows. So neither weights nor data are read, and no step of the run itself takes more
time. Memory lacks one thing: the initial weights that the stage `evaluate` may keep beside those of
the reference. A step of PPO is whole, but for the reward, which costs no time here.
"""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import stage_table
from dpo_jax.console import compile_times, say
from dpo_jax.models import experts, transformer
from dpo_jax.models import lora as adapters
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import sharding
from dpo_jax.planning import groups, planner, rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.stage_table import STAGES
from dpo_jax.training import objectives
from dpo_jax.training.loop import Job, stage_programs
from dpo_jax.training.ppo import RolloutFeed
from dpo_jax.training.step import Frozen, copy_params

GIB = 2**30
SCALE = 0.02  # of the random weights
REHEARSED_STAGES = tuple(name for name, stage in STAGES.items() if stage.trains)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a stage's step takes on this machine's devices."""

    stage: str
    mesh: dict[str, int]
    examples: int  # of a step
    tokens: int  # that it reads
    compile_seconds: float | None  # None: the first step compiles its programs itself
    first_seconds: float
    step_seconds: float  # of the second step
    hbm_gib: float | None  # of a device, by the compiler; None: of several programs
    peak_gib: float | None  # that a device of this host has held so far; None on a CPU
    capacity_gib: float | None  # that jax may take of a device; None on a CPU


def rehearse_all(config: ConfigDict) -> list[Rehearsal]:
    """Make a step of each training stage of a config, and say what it takes.

    Raises ValueError if there is no training stage.
    """
    stages = stage_table.training_stages(config)
    if not stages:
        raise ValueError(
            f"--rehearse: no stage of config.stages = {', '.join(config.stages)} can be rehearsed. "
            f"Those that can are {', '.join(REHEARSED_STAGES)}."
        )
    found = []
    for stage in stages:
        with compile_times(stage):
            rehearsal = rehearse_ppo(config) if stage == "ppo" else rehearse(config, stage)
        say(told(rehearsal))
        found.append(rehearsal)
    say("rehearsed with random weights and made-up examples; nothing was written")
    return found


def rehearse(config: ConfigDict, stage: str) -> Rehearsal:
    """Make two steps of a stage on the run's mesh; return what they took."""
    block = config[stage]
    mesh = sharding.make_mesh(**config.mesh)
    model = planner.model_config(config, stage)
    _, batches = planner.lay_out(config, stage, model, mesh, sharding.platform_of(mesh))
    lora = Lora(**config.model.lora) if config.model.lora.rank else None
    programs = stage_programs(stage, block, model, mesh, lora=lora)

    with jax.set_mesh(mesh):
        params, base = _trained(config, model, mesh, lora)
        reference = _reference(config, stage, model, mesh, params)
        state = programs.init_state(params)
        hyper = objectives.numbers(block, steps=1)
        if lora:
            hyper["lora_scale"] = np.float32(lora.scale)
        hyper = jax.device_put(hyper, sharding.replicated(mesh))
        batch = sharding.shard_batch(mesh, _in_vocabulary(batches[0], model.vocab), axis=1)

        started = time.monotonic()
        arguments = (state, reference, hyper, batch, base)
        compiled = programs.train_step.lower(*arguments).compile()
        compile_seconds = time.monotonic() - started
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            state, metrics = compiled(state, reference, hyper, batch, base)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - started)

    peak, capacity = _peak(mesh)
    first_seconds, step_seconds = seconds
    return Rehearsal(
        stage=stage,
        mesh=dict(mesh.shape),
        examples=block.batch_size,
        tokens=batches.tokens(0),
        compile_seconds=compile_seconds,
        first_seconds=first_seconds,
        step_seconds=step_seconds,
        hbm_gib=_bytes_used(compiled.memory_analysis()) / GIB,
        peak_gib=peak,
        capacity_gib=capacity,
    )


class _NoWords:
    """A tokenizer's stand-in by which all tokens are the empty text."""

    def batch_decode(self, ids, skip_special_tokens: bool = True) -> list[str]:
        return [""] * len(ids)


def _no_reward(prompts, completions, tokens, conversations) -> list[float]:
    return [0.0] * len(completions)


def rehearse_ppo(config: ConfigDict) -> Rehearsal:
    """Make two steps of PPO on the run's mesh, each with its samples and updates.

    All completions are as long as is allowed. A reward model is held, not run.
    """
    block = config.ppo.copy_and_resolve_references()
    block.update(steps=2, warmup_steps=0)
    mesh = sharding.make_mesh(**config.mesh)
    model = planner.model_config(config, "ppo")
    experts.check_mesh(model, mesh)
    group = groups.group_of(config, "ppo", planner.Assumptions())
    lora = Lora(**config.model.lora) if config.model.lora.rank else None
    job = Job(
        name="ppo",
        folder=pathlib.Path(),  # nothing is written
        block=block,
        model=model,
        mesh=mesh,
        load_init=None,
        load_reference=None,
        log=config.log,
        config={},
        lora=lora,
    )
    ids = np.arange(block.batch_size * group.prompt_tokens) % model.vocab
    prompts = Prompts(
        list(ids.reshape(block.batch_size, -1).astype(np.int32)), [""] * block.batch_size
    )
    feed = RolloutFeed(
        job,
        prompts,
        _no_reward,
        tokenizer=_NoWords(),
        eos_id=None,
        sampling=Sampling(group.response_tokens, batch_size=config.sampling.batch_size),
    )

    with jax.set_mesh(mesh):
        params, base = _trained(config, model, mesh, lora)
        reference = _reference(config, "ppo", model, mesh, params)
        rewarder = None
        reward_model = rollouts.rewarder(config, model)
        if reward_model:
            rewarder = _random(mesh, transformer.abstract(reward_model))
        state = job.programs.init_state(params, feed.controls)
        hyper = objectives.numbers(block, feed.total, feed.updates_per_step)
        if lora:
            hyper["lora_scale"] = np.float32(lora.scale)
        hyper = jax.device_put(hyper, sharding.replicated(mesh))
        feed.start(Frozen(hyper, reference, base), 0)
        seconds = []
        for step in range(feed.total):
            started = time.monotonic()
            state, metrics = feed.run(state, step)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - started)
        peak, capacity = _peak(mesh)
        del rewarder  # held until here, as beside the run's own steps
    first_seconds, step_seconds = seconds
    return Rehearsal(
        stage="ppo",
        mesh=dict(mesh.shape),
        examples=block.batch_size,
        tokens=block.batch_size * (group.prompt_tokens + group.response_tokens),
        compile_seconds=None,
        first_seconds=first_seconds,
        step_seconds=step_seconds,
        hbm_gib=None,
        peak_gib=peak,
        capacity_gib=capacity,
    )


def told(rehearsal: Rehearsal) -> str:
    """Return lines that say what a stage's step takes."""
    per_second = rehearsal.tokens / rehearsal.step_seconds
    compiling = "with compiling"
    if rehearsal.compile_seconds is not None:
        compiling = f"after {rehearsal.compile_seconds:.3g} s of compiling"
    lines = [
        f"{rehearsal.stage}: a step of {rehearsal.examples} examples, {rehearsal.tokens:,} tokens, "
        f"on {sharding.told(rehearsal.mesh)}",
        f"  time: {rehearsal.step_seconds:.3g} s a step, {per_second:,.0f} tokens a second; the "
        f"first {rehearsal.first_seconds:.3g} s, {compiling}",
    ]
    memory = []
    if rehearsal.hbm_gib is not None:
        memory.append(f"{rehearsal.hbm_gib:.3g} GiB by the compiler")
    if rehearsal.peak_gib is not None:
        memory.append(
            f"at most {rehearsal.peak_gib:.3g} GiB were taken so far, of "
            f"{rehearsal.capacity_gib:.3g} GiB that jax may take"
        )
    if memory:
        lines.append(f"  memory of a device: {'; '.join(memory)}")
    return "\n".join(lines)


def _random(mesh, shapes: dict) -> dict:
    """Return random values of such shapes, each device making its own part."""

    def random_weights():
        leaves, tree = jax.tree.flatten(shapes)
        made = [_hashed(number, leaf) for number, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, made)

    placed = sharding.param_shardings(mesh, shapes)
    return jax.jit(random_weights, out_shardings=placed)()


def _hashed(seed: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return numbers in [-SCALE, SCALE), a hash of the seed and their place.

    jax.random would take several times the memory of its result, on a GPU, and so more than the
    step that is measured.
    """
    hashed = jnp.full(leaf.shape, seed + 1, jnp.uint32)
    for axis in range(len(leaf.shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        hashed = (hashed ^ place) * jnp.uint32(0x85EBCA6B)
        hashed ^= hashed >> 13
    return (SCALE * (hashed.astype(jnp.float32) / 2.0**31 - 1)).astype(leaf.dtype)


def _trained(config: ConfigDict, model, mesh, lora: Lora | None) -> tuple[dict, dict | None]:
    """Return what is trained, and the frozen weights under it, if it is adapters."""
    if not lora:
        return _random(mesh, transformer.abstract(model)), None
    return _random(mesh, adapters.abstract(model, lora)), _frozen(config, model, mesh)


def _frozen(config: ConfigDict, model, mesh) -> dict:
    return _random(mesh, transformer.abstract(model, config.model.frozen_dtype))


def _reference(config: ConfigDict, stage: str, model, mesh, params: dict):
    """Return the live reference's weights or adapters, in arrays of their own, or None."""
    name = stage_table.reference_of(config, stage)
    if name == "none" or stage_table.keeps_reference(config, stage):
        return None
    is_adapters = config.model.lora.rank and name == "init"
    if is_adapters or stage_table.moves_reference(config[stage]):
        return copy_params(params)
    return _frozen(config, model, mesh)


def _in_vocabulary(batch, size: int):
    """Return a made-up batch whose texts are of tokens that the model has."""
    mismatched = batch.mismatched and _in_vocabulary(batch.mismatched, size)
    tokens, targets = batch.tokens % size, batch.targets % size
    return dataclasses.replace(batch, tokens=tokens, targets=targets, mismatched=mismatched)


def _bytes_used(analysis) -> int:
    """Return the bytes that a compiled program takes of a device, with its arguments."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def _peak(mesh) -> tuple[float | None, float | None]:
    """Return the most GiB that a device of this host has held, and those that jax may take."""
    peak, capacity = 0, 0
    for device in mesh.local_devices:
        found = device.memory_stats()
        if not found or "peak_bytes_in_use" not in found:  # as on a CPU
            return None, None
        peak = max(peak, found["peak_bytes_in_use"])
        capacity = max(capacity, found.get("bytes_limit", 0))
    return peak / GIB, capacity / GIB

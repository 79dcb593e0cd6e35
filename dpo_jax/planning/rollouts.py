"""PPO beside its updates: samples, their rewards, and what is measured on them.

The updates are compiled, or estimated, as those of every other stage. The rest is estimated from
sizes, with completions that are all of the greatest length.
"""

import dataclasses
import functools
import math

import jax
from ml_collections import ConfigDict

from dpo_jax.data.batches import Batches, microbatch_size_of, update_size_of
from dpo_jax.models import families, flops, hf, loading, transformer
from dpo_jax.models import lora as adapters
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import BATCH
from dpo_jax.planning import roofline
from dpo_jax.planning.report import Report
from dpo_jax.planning.roofline import Work
from dpo_jax.planning.topologies import Topology

GIB = 2**30


def with_rollout(
    update: Report,
    config: ConfigDict,
    model: TransformerConfig,
    batches: Batches,
    mesh: jax.sharding.Mesh,
    topology: Topology,
) -> Report:
    """Return the report of a whole step.

    update: that of one update. model: the policy with its value head. batches: of the updates.
    """
    block = config.ppo
    size = block.batch_size
    minibatches = size // update_size_of(block)
    updates = block.inner_epochs * minibatches
    works, taken = _works(update, config, model, batches, topology)
    memory = dict(update.hbm_gib)
    for kind, held in resident(config, model, mesh).items():
        memory[kind] = held / GIB
    # Updates wait for the samples, so that the two take their memory in turn.
    memory["sampling"] = max(0.0, taken / GIB - memory.get("temporaries", 0.0))

    # Forward passes over all completions: while they are sampled, under policy and reference, and
    # of the reward model if its shape is known.
    of_update = batches.contents(0)
    forward = sum(flops.forward(model, of_update).values()) * minibatches
    needed = 3 * forward + updates * update.needed_flops_per_step
    done = 3 * forward + updates * update.flops_per_step
    if "rewarding" in works:
        rewarding = works["rewarding"].flops * topology.chips
        needed += rewarding
        done += rewarding

    found = dict(
        hbm_gib=memory,
        flops_per_step=done,
        needed_flops_per_step=needed,
        updates_per_step=updates,
        counts_reward="rewarding" in works,
    )
    if update.seconds:
        phases = {}
        for name, work in works.items():
            # A reward model computes in float32, whatever the policy's type.
            dtype = "float32" if name == "rewarding" else model.dtype
            phases[name] = roofline.seconds(topology, dtype, work)
        of_updates = {part: updates * seconds for part, seconds in update.seconds.items()}
        phases["updates"] = of_updates
        found["phases"] = phases
        found["seconds"] = {
            part: sum(seconds[part] for seconds in phases.values()) for part in of_updates
        }
        found["collectives"] = _collectives(update, works, updates)
    return dataclasses.replace(update, **found)


def _works(
    update: Report,
    config: ConfigDict,
    model: TransformerConfig,
    batches: Batches,
    topology: Topology,
) -> tuple[dict[str, Work], int]:
    """Return a device's work before the updates, by phase, and the bytes that sampling takes."""
    block = config.ppo
    size = block.batch_size
    mesh = update.mesh
    shards = math.prod(mesh[axis] for axis in BATCH)
    at_a_time = min(config.sampling.batch_size, size)
    calls = math.ceil(size / at_a_time)
    minibatches = size // update_size_of(block)
    of_update = batches.contents(0)
    forward = sum(flops.forward(model, of_update).values()) * minibatches / topology.chips
    sampled, taken = roofline.sampling(
        model,
        mesh,
        topology,
        calls=calls,
        rows=math.ceil(at_a_time / shards),
        prompt=update.prompt_tokens,
        new=update.response_tokens,
        flops=forward,
    )
    # Under the policy and under the reference.
    passes = 2 * size // microbatch_size_of(block)
    works = {
        "sampling": sampled,
        "measuring": roofline.forward(model, mesh, passes, topology, flops=2 * forward),
    }
    reward_model = rewarder(config, model)
    if reward_model:
        once = sum(flops.forward(reward_model, of_update).values()) * minibatches / topology.chips
        passes = math.ceil(size / config.reward.batch_size)
        works["rewarding"] = roofline.forward(reward_model, mesh, passes, topology, flops=once)
    return works, taken


def resident(config: ConfigDict, model: TransformerConfig, mesh) -> dict[str, int]:
    """Return bytes on a device of the models that updates do not read, by kind."""
    # The reference has the value head too, at zero.
    reference = transformer.abstract(model, config.model.frozen_dtype)
    if config.model.lora.rank:
        # The reference is another copy of the adapters, over the same base.
        reference = adapters.abstract(model, Lora(**config.model.lora))
    found = dict(reference=_bytes(reference, mesh))
    reward_model = rewarder(config, model)
    if reward_model:
        found["reward model"] = _bytes(transformer.abstract(reward_model), mesh)
    return found


def rewarder(config: ConfigDict, model: TransformerConfig) -> TransformerConfig | None:
    """Return the config of the reward model that PPO asks; None where it is not known.

    The run's own starts from the weights of the policy. Of one at reward.path the config alone is
    read; a classifier, and other rewards, have no config of ours.
    """
    kind = "rm" if config.ppo.reward == "rm" else config.reward.kind
    if kind == "rm":
        return dataclasses.replace(model, head="reward", dtype="float32")
    return _rewarder_at(config.reward.path) if kind == "model" else None


@functools.cache
def _rewarder_at(path: str) -> TransformerConfig | None:
    """Return the config of a reward model at a path; None where there is none that we can read."""
    try:
        folder, _ = loading.find(path, weights=False)
        return families.from_hf(hf.read_config(folder), head="reward")
    except (OSError, ValueError):
        return None


def _bytes(shapes: dict, mesh) -> int:
    """Return the bytes of weights on a device of a mesh."""
    placed = sharding.param_shardings(mesh, shapes)
    total = 0
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True):
        total += leaf.dtype.itemsize * math.prod(where.shard_shape(leaf.shape))
    return total


def _collectives(update: Report, works: dict[str, Work], updates: int) -> dict[str, dict]:
    """Return a step's collectives: count and GiB received by a device, by kind."""
    total = {}
    for kind, received in update.collectives.items():
        count, gib = updates * received["count"], updates * received["gib"]
        total[kind] = dict(count=count, gib=gib)
    for work in works.values():
        for kind, (_, size) in work.collectives.items():
            if size:
                # How many there are is the compiler's choice.
                known = total.setdefault(kind, dict(count=0, gib=0.0))
                known["gib"] += size / GIB
    return total

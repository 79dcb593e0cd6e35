"""A stage's train step from shapes alone: the program that a plan compiles or counts."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dpo_jax import stage_table
from dpo_jax.models import lora as lora_lib
from dpo_jax.models import transformer
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.stage_table import STAGES
from dpo_jax.training import losses, objectives, optim
from dpo_jax.training.step import TrainState, abstract_state, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step that is not compiled yet, and its arguments: shapes placed on a mesh."""

    step: Callable
    state: TrainState
    reference: dict | None
    hyper: dict
    batch: object
    base: dict | None  # the frozen weights under adapters
    mesh: jax.sharding.Mesh

    def trace(self):
        """Trace the step over its arguments' shapes."""
        with jax.set_mesh(self.mesh):
            return self.step.trace(self.state, self.reference, self.hyper, self.batch, self.base)

    def argument_bytes(self) -> dict[str, int]:
        """Bytes that the arguments take on one device, by kind."""
        kinds = dict(
            params=[self.state.params, self.base],
            optimizer=self.state.opt_state,
            reference=self.reference,
            batch=self.batch,
        )
        return {kind: bytes_on_device(x) for kind, x in kinds.items()}


def make_program(
    config: ConfigDict,
    stage: str,
    model: TransformerConfig,
    mesh: jax.sharding.Mesh,
    batch,
    objective: Callable | None = None,
) -> Program:
    """Return the step that the training loop would run on such a batch.

    objective: one to plan instead of the stage's own.
    """
    block = config[stage]
    lora = Lora(**config.model.lora) if config.model.lora.rank else None
    weights = transformer.abstract(model)
    trained = lora_lib.abstract(model, lora) if lora else weights
    base = None
    if lora:
        base = frozen_weights(config, model, mesh)

    optimizer = optim.make(block.optimizer, block.weight_decay)
    shardings = state_shardings(mesh, optimizer, trained)
    state = _placed_state(abstract_state(optimizer, trained, {}), shardings, mesh)
    reference = _reference(config, stage, model, mesh, state)

    routing_pass = None
    if objective is None:
        objectives.check_balance(stage, block, model)
        loss = block.get("loss", "")
        objective = objectives.make(stage, model, loss, losses.choices_of(block))
        routing_pass = objectives.make_routing_pass(stage, model, loss)
    first_pass = objectives.make_first_pass(stage, model)
    step = make_train_step(
        objective, optimizer, block.schedule, shardings, first_pass, routing_pass
    )

    hyper = objectives.numbers(block, steps=1)
    if lora:
        hyper |= {"lora_scale": np.float32(1)}
    whole = sharding.replicated(mesh)
    split = NamedSharding(mesh, P(None, sharding.BATCH))  # microbatches first, then shards
    hyper = jax.tree.map(lambda x: _placed(x, whole), hyper)
    batch = jax.tree.map(lambda x: _placed(x, split), batch)
    return Program(step, state, reference, hyper, batch, base, mesh)


def _placed_state(state: TrainState, shardings: TrainState, mesh) -> TrainState:
    return TrainState(
        _placed(state.step, sharding.replicated(mesh)),
        jax.tree.map(_placed, state.params, shardings.params),
        jax.tree.map(_placed, state.opt_state, shardings.opt_state),
        {},
    )


def frozen_weights(config: ConfigDict, model: TransformerConfig, mesh) -> dict:
    """Return weights that a step reads and does not change."""
    weights = transformer.abstract(model, config.model.frozen_dtype)
    return jax.tree.map(_placed, weights, sharding.param_shardings(mesh, weights))


def kept_bytes(config: ConfigDict, stage: str, model: TransformerConfig, mesh) -> dict[str, int]:
    """Bytes on a device of what lies beside a step's arguments and is none of them, by kind.

    `evaluate` measures the KL to the initial policy: a copy beside a reference that moves. Under
    adapters it is their base.
    """
    moves_reference = stage_table.moves_reference(config[stage])
    if not moves_reference or "evaluate" not in config.stages or config.model.lora.rank:
        return {}
    return {"initial": bytes_on_device(frozen_weights(config, model, mesh))}


def _reference(
    config: ConfigDict, stage: str, model: TransformerConfig, mesh, state: TrainState
) -> dict | None:
    """Return the live reference's weights; None if a step reads none, or kept log-probs."""
    reference = stage_table.reference_of(config, stage)
    if reference == "none" or stage_table.keeps_reference(config, stage):
        return None
    # PPO's updates learn from log-probs that were measured with the samples.
    if STAGES[stage].samples:
        return None
    # One that moves to the policy is held as it is. Under adapters the initial policy is another
    # copy of them; a model at a path comes whole.
    is_adapters = config.model.lora.rank and reference == "init"
    if is_adapters or stage_table.moves_reference(config[stage]):
        return state.params
    return frozen_weights(config, model, mesh)


def _placed(x, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)


def bytes_on_device(tree) -> int:
    """Return the bytes that placed shapes take on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return total

"""The dry run of a training stage: its step compiled from shapes alone, and what that takes on
chips that are not there.

The real TPU compiler makes the program; for GPUs all is estimated.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.data.batches import Batches
from dpo_jax.models import attention, families, flops, hf, transformer
from dpo_jax.models import lora as lora_lib
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import sharding
from dpo_jax.planning import hlo, presets, roofline
from dpo_jax.planning.roofline import Work
from dpo_jax.planning.topologies import Topology
from dpo_jax.training import optim
from dpo_jax.training.objectives import OBJECTIVES, numbers
from dpo_jax.training.step import TrainState, abstract_state, make_train_step, state_shardings

GIB = 2**30
STAGES = tuple(
    stage for stage in configs.TRAINING_STAGES if stage != "ppo"
)  # those whose steps are on rows of data


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a plan takes for granted in the place of data and of a model's folder; 0 and "": what
    the config says.
    """

    prompt: int = 0  # tokens of each
    response: int = 0  # tokens of each
    rows: int = 0  # of training data
    model: str = ""  # a name of models/known.py, or a config.json


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step, not compiled yet, and what it is given: shapes, placed on a mesh."""

    step: Callable
    state: TrainState
    reference: dict | None
    hyper: dict
    batch: dict
    base: dict | None  # the weights under adapters
    mesh: jax.sharding.Mesh

    def trace(self):
        with jax.set_mesh(self.mesh):
            return self.step.trace(self.state, self.reference, self.hyper, self.batch, self.base)

    def memory(self) -> dict[str, int]:
        """Bytes that the arguments take on a device, by kind."""
        return {
            kind: sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in jax.tree.leaves(tree)
            )
            for kind, tree in dict(
                params=[self.state.params, self.base],
                optimizer=self.state.opt_state,
                reference=self.reference,
                batch=self.batch,
            ).items()
        }


def model_of(config: ConfigDict, stage: str, name: str = ""):
    """Our config of the model that a stage trains; `name`: another than the run's own."""
    path = pathlib.Path(name or config.model.path)
    options = dict(head="score" if stage == "rm" else "lm", **configs.model_options(config))
    if not (name or config.model.path):
        hf_config = hf.make_config(config.model.scratch.to_dict())
    elif path.is_file():
        hf_config = hf.read_config(path)
    elif not path.is_dir() and (fields := presets.find(str(path))):
        hf_config = hf.make_config(fields)
    else:
        hf_config = hf.read_config(hf.fetch(path, weights=False))
    return families.from_hf(hf_config, **options)


def lengths_of(config: ConfigDict, stage: str, assumed: Assumed) -> tuple[int, int]:
    """Tokens of each prompt and response: as assumed, or the longest that the config lets
    through.
    """
    data = config.data
    if "pairs" in config.stages and stage in configs.PAIR_STAGES:
        longest = (
            config.sampling.max_prefix or data.max_prompt_length,
            config.sampling.max_new_tokens,
        )
    else:
        longest = data.max_prompt_length, data.max_length - data.max_prompt_length
    prompt, response = assumed.prompt or longest[0], assumed.response or longest[1]
    if prompt + response > data.max_length:
        raise ValueError(
            f"a prompt of {prompt} tokens and a response of {response} are more than config.data."
            f"max_length = {data.max_length}, to which rows are cut: lower --prompt_tokens or "
            "--response_tokens, or raise it."
        )
    return prompt, response


def rows_and_steps(config: ConfigDict, stage: str, assumed: Assumed) -> tuple[int, int]:
    """Training rows and optimiser steps of a stage; 0 where nobody says how many there are."""
    block, data = config[stage], config.data
    rows = assumed.rows or presets.ROWS.get(
        data.sft_path if stage == "sft" and data.sft_path else data.path, 0
    )
    if "pairs" in config.stages and stage in configs.PAIR_STAGES:
        rows = config.pairs.prompts * math.comb(config.pairs.completions, 2)
    elif data.max_rows:
        rows = min(rows or data.max_rows, data.max_rows)
    return rows, block.steps or int(block.epochs * rows / block.batch_size)


def batches_of(config: ConfigDict, stage: str, mesh, lengths: tuple[int, int]) -> Batches:
    """One batch of rows of these lengths, laid down as the run lays down its own."""
    block, (prompt, response) = config[stage], lengths
    responses = 1 if stage in ("sft", "preferred_ft") else 2
    row = (np.zeros(prompt, np.int32), (np.zeros(response, np.int32),) * responses)
    cached = stage == "dpo" and block.cache_reference
    return Batches(
        [row] * block.batch_size,
        np.arange(block.batch_size)[None],
        shards=sharding.batch_shards(mesh),
        microbatches=block.batch_size // (block.microbatch_size or block.batch_size),
        per_response={"reference_logps": np.zeros((block.batch_size, 2), np.float32)}
        if cached
        else None,
    )


def program_of(
    config: ConfigDict, stage: str, model, mesh, batch: dict, objective: Callable | None = None
) -> Program:
    """The step that `fit.py` runs on such a batch; `objective`: another than the stage's own."""
    block, weights, lora = config[stage], transformer.abstract(model), config.model.lora
    base = (
        jax.tree.map(_placed, weights, sharding.param_shardings(mesh, weights))
        if lora.rank
        else None
    )
    params = lora_lib.abstract(model, Lora(**lora)) if lora.rank else weights
    optimizer = optim.make(block.optimizer, block.weight_decay)
    shardings = state_shardings(mesh, optimizer, params)
    state, whole = abstract_state(optimizer, params, {}), sharding.replicated(mesh)
    split = NamedSharding(mesh, P(None, sharding.BATCH))
    state = TrainState(
        _placed(state.step, whole),
        jax.tree.map(_placed, state.params, shardings.params),
        jax.tree.map(_placed, state.opt_state, shardings.opt_state),
        {},
    )
    live = stage == "dpo" and block.reference != "none" and not block.cache_reference
    reference = (
        base if base and live and block.reference != "init" else state.params
    )  # at a path: a whole model
    objective = objective or functools.partial(OBJECTIVES[stage], model, block.get("loss", ""))
    step = make_train_step(objective, optimizer, block.schedule, shardings)
    hyper = numbers(block, steps=1) | ({"lora_scale": np.float32(1)} if base else {})
    return Program(
        step,
        state,
        reference if live else None,
        jax.tree.map(lambda x: _placed(x, whole), hyper),
        jax.tree.map(lambda x: _placed(x, split), batch),
        base,
        mesh,
    )


def plan(
    config: ConfigDict,
    topology: Topology,
    stage: str,
    assumed: Assumed = Assumed(),
    instead: Callable | None = None,
) -> dict:
    """What a stage costs on a topology: the report, as --json prints it.

    Times are those of the roofline, so the least possible; None where the program does not fit, as
    then there is none. instead: (model, batch) -> (objective, batch), to plan in the place of the
    stage's own.
    """
    config_checks.validate(config)
    if stage not in STAGES or stage not in config.stages:
        raise ValueError(
            f"--stage={stage}: expected one of {', '.join(s for s in config.stages if s in STAGES)} "
            "(of a ppo stage, most time is sampling, which is not planned)."
        )
    attention.check(config.model.attention, "tpu" if topology.chip.torus else "gpu")
    model, mesh = model_of(config, stage, assumed.model), _mesh(config, topology)
    model = (
        model if topology.chip.torus else dataclasses.replace(model, attention="xla")
    )  # traced on CPU devices
    batches = batches_of(config, stage, mesh, lengths := lengths_of(config, stage, assumed))
    objective, batch = instead(model, batches[0]) if instead else (None, batches[0])
    program = program_of(config, stage, model, mesh, batch, objective)
    traced = program.trace()
    done = flops.of_program(traced.jaxpr.jaxpr) / topology.chips
    memory, work = (_compiled if topology.chip.torus else _estimated)(
        program, traced, model, batches, topology, done
    )
    parts = work and roofline.seconds(topology, model.dtype, work)
    cells = batches.microbatches * batches.shards
    report = dict(
        stage=stage,
        topology=str(topology),
        chips=topology.chips,
        mesh=dict(mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(model))),
        dtype=model.dtype,
        batch_size=config[stage].batch_size,
        microbatches=batches.microbatches,
        prompt_tokens=lengths[0],
        response_tokens=lengths[1],
        compiled=topology.chip.torus > 0,
        fits=sum(memory.values()) <= topology.chip.hbm_gib * GIB,
        hbm_gib_per_chip=sum(memory.values()) / GIB,
        capacity_gib=topology.chip.hbm_gib,
        hbm_gib={kind: size / GIB for kind, size in memory.items()},
        flops_per_step=done * topology.chips,
        needed_flops_per_step=flops.of_step(
            model,
            batches.shapes[0],
            cells=cells,
            reference=program.reference is not None,
            frozen=program.base is not None,
        ),
        collectives={
            kind: dict(count=count, gib=size / GIB)
            for kind, (count, size) in work.collectives.items()
        }
        if work
        else None,
        seconds=parts,
        step_seconds=parts and max(parts.values()),
        step_seconds_without_overlap=parts and sum(parts.values()),
        bottleneck=parts and max(parts, key=parts.get),
    )
    forward = roofline.forward(
        model,
        dict(mesh.shape),
        batches.microbatches,
        flops=cells * sum(flops.forward(model, batches.shapes[0]).values()) / topology.chips,
    )
    return report | _cost(config, stage, assumed, topology, report, forward)


def _cost(config, stage, assumed, topology, report, forward: Work) -> dict:
    """Hours of the whole stage; with a kept reference, its pass over the rows too, which is
    `forward` for a step's.
    """
    rows, steps = rows_and_steps(config, stage, assumed)
    if not steps or not report["seconds"]:
        return dict(steps=steps, hours=None, chip_hours=None)
    seconds = steps * report["step_seconds"]
    if stage == "dpo" and config.dpo.cache_reference:
        seconds += (
            min(steps, rows / config.dpo.batch_size) if rows else steps
        ) * max(  # each row once
            roofline.seconds(topology, report["dtype"], forward).values()
        )
    return dict(steps=steps, hours=seconds / 3600, chip_hours=seconds / 3600 * topology.chips)


def _compiled(program: Program, traced, _model, _batches, topology: Topology, done: float):
    """Memory by kind, and work on a chip, of the program that the TPU compiler makes; no work where
    it makes none.
    """
    memory = program.memory()
    if sum(memory.values()) > topology.chip.hbm_gib * GIB:
        return memory, None  # without any temporaries, so nothing is to be compiled
    try:
        with jax.set_mesh(program.mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return memory | dict(temporaries=max(_wanted(str(error)) - sum(memory.values()), 0)), None
    found, text = compiled.memory_analysis(), compiled.as_text()
    used = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    return (
        memory | dict(temporaries=used - sum(memory.values())),
        Work(done, hlo.memory_traffic(text), hlo.collectives(text)),
    )


def _estimated(program: Program, _traced, model, batches: Batches, topology, done: float):
    """Likewise by sizes alone."""
    memory = program.memory()
    forwards = (2 if model.remat == "full" else 1) + (program.reference is not None)
    work, temporaries = roofline.estimate(
        model,
        batches.shapes[0],
        dict(program.mesh.shape),
        batches.microbatches,
        flops=done,
        forwards=forwards,
        state=memory["params"] + memory["optimizer"],
        chip=topology.chip,
    )
    return memory | dict(temporaries=temporaries), work


def _wanted(error: str) -> int:
    """Bytes that a program would have needed, as the compiler's refusal says."""
    if total := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+\w* hbm", error):
        number, unit = total.groups()
        return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
    raise RuntimeError(
        f"the TPU compiler refused the program, and this cannot tell by how much: {error}"
    )


def _mesh(config: ConfigDict, topology: Topology):
    """The run's mesh over the topology's devices; what is not compiled is laid out on as many CPU
    devices.
    """
    devices = topology.devices() if topology.chip.torus else jax.devices("cpu")[: topology.chips]
    return sharding.make_mesh(**config.mesh, devices=devices)


def _placed(x, where: NamedSharding):
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)

"""The dry run of a training stage: what its step costs on hardware you do not have.

The step is compiled from shapes alone by the real compiler for TPUs or GPUs, on any machine. Where
the GPU compiler is not installed, the costs are estimated from the sizes.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import config_checks, stage_table
from dpo_jax.data.batches import Batches, steps_of
from dpo_jax.models import attention, experts, families, flops, hf, loading, transformer
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.planning import groups, hlo, presets, rollouts, roofline
from dpo_jax.planning.program import Program, bytes_on_device, kept_bytes, make_program
from dpo_jax.planning.report import Report
from dpo_jax.planning.roofline import Work
from dpo_jax.planning.topologies import MissingCompiler, Topology
from dpo_jax.stage_table import STAGES

GIB = 2**30
PLANNED_STAGES = tuple(name for name, stage in STAGES.items() if stage.trains)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan that has neither data nor a model's folder.

    0 or "" stands for what the config says.
    """

    prompt_tokens: int = 0  # of each example
    response_tokens: int = 0  # of each response
    examples: int = 0  # in the training data
    model: str = ""  # a name in planning/presets.py, or the path of a config.json
    pairs_per_prompt: int = 0
    responses_per_prompt: int = 0  # that the pairs are made of


def plan(
    config: ConfigDict,
    topology: Topology,
    stage: str,
    assumed: Assumptions = Assumptions(),
    instead: Callable | None = None,
) -> Report:
    """Return what a stage costs on a topology.

    instead: (model config, batch) -> (objective, batch), to plan that step instead of the stage's.
    Raises ValueError if the config, the stage or the attention kernel cannot run there.
    """
    config_checks.validate(config)
    _check_stage(config, stage)
    platform = "gpu" if topology.is_gpu else "tpu"
    attention.check(config.model.attention, platform)
    model = model_config(config, stage, assumed.model)
    devices, missing_compiler = _devices(topology)
    if missing_compiler:  # the step is traced on CPU devices, which lack the GPU's kernel
        model = dataclasses.replace(model, attention="xla")
    elif model.attention == "cudnn" and model.head_width > 128:
        # jax asks the GPU of this machine whether it takes them, not the one planned for.
        raise ValueError(
            f"config.model.attention = 'cudnn' with heads of {model.head_width} runs on an H100 or "
            "H200, but is compiled only where there is one. Plan with auto, which takes xla there."
        )
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    group, batches = lay_out(config, stage, model, mesh, platform, assumed)
    objective, batch = instead(model, batches[0]) if instead else (None, batches[0])
    program = make_program(config, stage, model, mesh, batch, objective)

    traced = program.trace()
    flops_per_chip = flops.of_program(traced.jaxpr.jaxpr) / topology.chips
    if missing_compiler:
        memory, work = _estimated(program, model, batches, topology, flops_per_chip)
    else:
        memory, work = _compiled(program, traced, topology, flops_per_chip)
    memory |= kept_bytes(config, stage, model, mesh)

    needed_flops = 0.0
    for step in range(len(batches)):
        needed_flops += flops.of_step(
            model,
            batches.contents(step),
            reference=program.reference is not None,
            frozen=program.base is not None,
            mismatched=batches.mismatched.contents(step) if batches.mismatched else None,
        )
    report = Report(
        stage=stage,
        topology=str(topology),
        chips=topology.chips,
        mesh=dict(mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(model))),
        dtype=model.dtype,
        batch_size=config[stage].batch_size,
        microbatches=batches.microbatches,
        prompt_tokens=group.prompt_tokens,
        response_tokens=group.response_tokens,
        pairs_per_prompt=group.pairs,
        responses_per_prompt=group.responses,
        sharing=groups.sharing(config, stage, model, group, batches),
        compiled=not missing_compiler,
        capacity_gib=topology.chip.hbm_gib,
        hbm_gib={kind: size / GIB for kind, size in memory.items()},
        flops_per_step=flops_per_chip * topology.chips,
        needed_flops_per_step=needed_flops / len(batches),
        collectives=_in_gib(work) if work else None,
        seconds=roofline.seconds(topology, model.dtype, work) if work else None,
        missing_compiler=missing_compiler,
        unsplit=sharding.unsplit(mesh, transformer.abstract(model)),
    )
    cells = batches.microbatches * batches.shards
    forward_flops = sum(flops.forward(model, batches.shapes[0].contents).values())
    forward = roofline.forward(
        model,
        dict(mesh.shape),
        batches.microbatches,
        topology,
        flops=cells * forward_flops / topology.chips,
    )
    if STAGES[stage].samples:
        report = rollouts.with_rollout(report, config, model, batches, mesh, topology)
    return _with_hours(report, config, assumed, topology, forward)


def lay_out(
    config: ConfigDict,
    stage: str,
    model: TransformerConfig,
    mesh: jax.sharding.Mesh,
    platform: str,
    assumed: Assumptions = Assumptions(),
) -> tuple[groups.Group, Batches]:
    """Return the examples that a stage is taken to train on, and its made-up batches on a mesh.

    platform: whose rows they are. Raises ValueError where the mesh does not split the experts.
    """
    experts.check_mesh(model, mesh)
    group = groups.group_of(config, stage, assumed)
    limits = attention.row_limits(model.narrowest_window, platform, mesh.shape["context"])
    return group, groups.lay_out(config, stage, group, sharding.batch_shards(mesh), limits)


def _check_stage(config: ConfigDict, stage: str) -> None:
    planned = [name for name in config.stages if name in PLANNED_STAGES]
    if stage not in planned:
        found = ", ".join(planned) or "a stage that trains, and config.stages has none"
        raise ValueError(f"--stage={stage}: expected one of {found}.")


def model_config(config: ConfigDict, stage: str, name: str = "") -> TransformerConfig:
    """Return the config of the model that a stage trains.

    name: a well-known model or a config.json instead of the run's own model. A folder or a hub
    name is read without its weights.
    """
    hf_config = _hf_config(config, name or config.model.path)
    options = configs.model_options(config)
    return families.from_hf(hf_config, head=STAGES[stage].head, **options)


def _hf_config(config: ConfigDict, wanted: str):
    """Return the Hugging Face config of a folder, a file, a well-known or hub name; "": scratch."""
    if not wanted:
        return hf.make_config(config.model.scratch.to_dict())
    path = pathlib.Path(wanted)
    if path.is_file():
        return hf.read_config(path)
    # A folder of a well-known model's name comes first: it may hold another model.
    preset = None if path.is_dir() else presets.find(str(path))
    if preset:
        return hf.make_config(preset)
    folder, _ = loading.find(wanted, weights=False)
    return hf.read_config(folder)


def examples_and_steps(config: ConfigDict, stage: str, assumed: Assumptions) -> tuple[int, int]:
    """Return the training examples and the optimiser steps of a stage, 0 if they are not known."""
    block = config[stage]
    data = config.data
    path = data.path
    # Prompts to sample from are those of the supervised data.
    if STAGES[stage].data in ("sft", "prompts") and data.sft_path:
        path = data.sft_path
    examples = assumed.examples or presets.EXAMPLES.get(path, 0)
    if stage_table.trains_on_samples(config, stage):
        of_prompt = math.comb(stage_table.completions_in_pairs(config), 2)
        if STAGES[stage].kind == "unpaired":
            of_prompt *= 2
        examples = config.pairs.prompts * of_prompt
    elif data.max_rows:
        examples = min(examples or data.max_rows, data.max_rows)
    steps = steps_of(examples, block.batch_size, steps=block.steps, epochs=block.epochs)
    return examples, steps


def _devices(topology: Topology) -> tuple[list, str]:
    """Return the topology's devices and "", or CPU devices and what to install for GPUs' own.

    Raises MissingCompiler for TPUs, whose costs are never estimated.
    """
    try:
        return topology.devices(), ""
    except MissingCompiler as missing:
        if not topology.is_gpu:
            raise
        return jax.devices("cpu")[: topology.chips], str(missing)


def _compiled(program: Program, traced, topology: Topology, flops_per_chip: float):
    """Compile for the chip; return bytes of its memory by kind, and the work of a step.

    The work is None if the program does not fit, as then there is no program.
    """
    arguments = program.argument_bytes()
    total = sum(arguments.values())
    if total > topology.chip.hbm_gib * GIB:
        return arguments, None  # the arguments alone are too large
    try:
        with jax.set_mesh(program.mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return arguments | dict(temporaries=_refused_temporaries(str(error), total)), None
    analysis = compiled.memory_analysis()
    text = compiled.as_text()
    used = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    memory = arguments | dict(temporaries=used - total)
    # The TPU compiler refuses such a program, the GPU compiler does not.
    if used > topology.chip.hbm_gib * GIB:
        return memory, None
    network = 0.0
    if topology.is_gpu and topology.shape[0] > 1:
        network = hlo.bytes_between_machines(text, topology.shape[-1])
    work = Work(flops_per_chip, hlo.memory_traffic(text), hlo.collectives(text), network)
    return memory, work


def _estimated(
    program: Program,
    model: TransformerConfig,
    batches: Batches,
    topology: Topology,
    flops_per_chip: float,
):
    """Estimate bytes of a chip's memory by kind, and the work of a step, from the sizes alone."""
    arguments = program.argument_bytes()
    forward_passes = 2 if model.remat == "full" else 1
    if program.reference is not None:
        forward_passes += 1
    if batches.mismatched is not None:
        forward_passes += 2  # of rows that are about as long, under policy and reference
    step = (model, batches.shapes[0], dict(program.mesh.shape), batches.microbatches)
    work = roofline.estimate(
        *step,
        flops=flops_per_chip,
        forwards=forward_passes,
        state=arguments["params"] + arguments["optimizer"],
        topology=topology,
    )
    temporaries = roofline.temporaries(
        *step, gradients=bytes_on_device(program.state.params), chip=topology.chip
    )
    return arguments | dict(temporaries=temporaries), work


def _refused_temporaries(error: str, argument_bytes: int) -> int:
    """Read from the compiler's refusal how many bytes of temporaries the program would take."""
    size = r"([\d.]+)([KMGT])"
    if found := re.search(rf"HLO temporaries \({size}\) exceeds", error):
        return _in_bytes(*found.groups())
    if found := re.search(rf"Used {size} of [\d.]+\w* hbm", error):
        return max(_in_bytes(*found.groups()) - argument_bytes, 0)
    raise RuntimeError(
        f"the compiler refused the program without saying how much memory it needs: {error}"
    )


def _in_bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def _in_gib(work: Work) -> dict[str, dict]:
    return {
        kind: dict(count=count, gib=size / GIB) for kind, (count, size) in work.collectives.items()
    }


def _with_hours(
    report: Report, config: ConfigDict, assumed: Assumptions, topology: Topology, forward: Work
) -> Report:
    """The report with the stage's steps and hours.

    With a kept reference the hours include one forward pass of it over every example.
    """
    examples, steps = examples_and_steps(config, report.stage, assumed)
    if not steps or not report.seconds:
        return dataclasses.replace(report, steps=steps)
    seconds = steps * report.step_seconds
    if stage_table.keeps_reference(config, report.stage):
        batch_size = config[report.stage].batch_size
        passes = min(steps, examples / batch_size) if examples else steps
        seconds += passes * max(roofline.seconds(topology, report.dtype, forward).values())
    return dataclasses.replace(report, steps=steps, hours=seconds / 3600)

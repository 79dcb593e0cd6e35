"""Flags that make a stage fit, and a comparison of meshes: plans of changed configs."""

import copy
import math
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from dpo_jax import config_checks, config_files, stage_table
from dpo_jax.data.batches import microbatch_size_of, update_size_of
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.planning.report import Advice, Report

GPUS_PER_MACHINE = 8  # tensor parallelism stays within a machine
LONG_ROW = 2048  # tokens, from which on splitting a row is worth its traffic


def remedies(
    config: ConfigDict, stage: str, chips: int, model: TransformerConfig
) -> Iterator[dict]:
    """Yield changes that save memory, each made on top of those before: dotted field -> value.

    config: with the changes so far. model: what the stage trains.
    """
    block = config[stage]
    chips = _left_chips(config, chips)
    # fsdp first: it splits weights, their state and the batch, at less traffic than tensor. What
    # the batch does not divide is left to tensor, and what heads do not divide to context.
    experts = config.mesh.expert  # shards of the batch too
    fsdp = math.gcd(chips, update_size_of(block) // experts)
    tensor = math.gcd(chips // fsdp, model.heads)
    context = config.mesh.context * (chips // (fsdp * tensor))
    if chips > 1:
        yield _mesh(fsdp, context, tensor)
    yield {"model.remat": "full"}
    if stage_table.can_keep_reference(config, stage):
        yield {f"{stage}.cache_reference": True}
    yield {"model.dtype": "bfloat16"}
    # Rounded to it, frozen weights are those that products are made of anyway.
    if config.model.lora.rank or _has_live_reference(config, stage):
        yield {"model.frozen_dtype": "bfloat16"}
    size = microbatch_size_of(block)
    # Smaller microbatches give the same update in more turns, but must still split over fsdp.
    while size % 2 == 0 and size // 2 % (fsdp * experts) == 0:
        size //= 2
        yield {f"{stage}.microbatch_size": size}
    if stage_table.STAGES[stage].samples:
        # The same completions, fewer at a time.
        sampled = config.sampling.batch_size
        while sampled % 2 == 0 and sampled // 2 % (fsdp * experts) == 0:
            sampled //= 2
            yield {"sampling.batch_size": sampled}
    # Fewer rows at a time, each over more devices.
    while config.data.max_length >= LONG_ROW and chips > 1:
        if fsdp % 2 == 0:
            fsdp //= 2
            size = size // 2 if size % 2 == 0 else size
        elif tensor % 2 == 0:
            tensor //= 2
        else:
            break
        context *= 2
        yield _mesh(fsdp, context, tensor) | {f"{stage}.microbatch_size": size}
    if config.model.path and not config.model.lora.rank:
        # Last, because it is another way to train.
        yield {"model.lora.rank": 16}
        yield {"model.frozen_dtype": "bfloat16"}


def _mesh(fsdp: int, context: int, tensor: int) -> dict:
    return {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.context": context, "mesh.tensor": tensor}


def _has_live_reference(config: ConfigDict, stage: str) -> bool:
    """Return whether a step reads the weights of a reference that does not move."""
    if stage_table.reference_of(config, stage) == "none":
        return False
    is_kept = stage_table.keeps_reference(config, stage)
    return not is_kept and not stage_table.moves_reference(config[stage])


def advise(
    config: ConfigDict,
    stage: str,
    report: Report,
    replan: Callable[[ConfigDict], Report],
    model: TransformerConfig,
    *,
    quiet: bool = False,
) -> Advice:
    """Try the remedies one on top of the other until the stage fits.

    Those that the run cannot take are left out, and those that take more memory. report: the plan
    that does not fit. replan: config -> its report. model: what the stage trains. quiet: show no
    line of each try.
    """
    config = copy.deepcopy(config)
    flags = {}
    tries = []
    for remedy in remedies(config, stage, report.chips, model):
        # What the config says already needs no plan of its own.
        change = {}
        for name, value in remedy.items():
            if config_files.value_of(config, name) != value:
                change[name] = value
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(change)
        if not change or not _is_valid(changed):
            continue
        found = replan(changed) if quiet else _replan(replan, changed, change)
        # Two microbatches may take more than one: there is a sum of their gradients, too.
        if found.hbm_gib_per_chip > report.hbm_gib_per_chip:
            continue
        report = found
        config.update_from_flattened_dict(change)
        flags |= change
        tries.append(
            dict(
                flags=_as_flags(flags),
                fits=report.fits,
                hbm_gib_per_chip=report.hbm_gib_per_chip,
            )
        )
        if report.fits:
            break
    return Advice(report.fits, _as_flags(flags), tries)


def _is_valid(config: ConfigDict) -> bool:
    """Return whether a run takes a config: not adapters beside a mix of references, for one."""
    try:
        config_checks.validate(config)
    except ValueError:
        return False
    return True


def meshes(config: ConfigDict, stage: str, chips: int, model: TransformerConfig) -> Iterator[dict]:
    """Yield every mesh of the chips that splits a microbatch, and the model's heads, evenly.

    `context` and `expert` stay as they are.
    """
    chips = _left_chips(config, chips)
    microbatch_size = microbatch_size_of(config[stage])
    for tensor in (1, 2, 4, GPUS_PER_MACHINE):
        if model.heads % tensor:
            continue
        for fsdp in range(1, chips + 1):
            splits_chips = chips % (fsdp * tensor) == 0
            shards = chips // tensor * config.mesh.expert
            if splits_chips and microbatch_size % shards == 0:
                data = chips // (fsdp * tensor)
                yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def _left_chips(config: ConfigDict, chips: int) -> int:
    """Return the chips that the axes `data`, `fsdp` and `tensor` share."""
    return chips // (config.mesh.context * config.mesh.expert)


def sweep_mesh(
    config: ConfigDict,
    stage: str,
    chips: int,
    replan: Callable[[ConfigDict], Report],
    model: TransformerConfig,
) -> list[Report]:
    """Return the report of each mesh; ValueError if no mesh splits the microbatch evenly."""
    changes = list(meshes(config, stage, chips, model))
    if not changes:
        size = microbatch_size_of(config[stage])
        raise ValueError(
            f"no mesh of {chips} chips splits a microbatch of {size} examples evenly. Make "
            f"config.{stage}.microbatch_size (or batch_size) a multiple of {chips}."
        )
    reports = []
    for change in changes:
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(change)
        reports.append(_replan(replan, changed, change))
    return reports


def _replan(replan: Callable[[ConfigDict], Report], config: ConfigDict, change: dict) -> Report:
    """Plan a changed config, and show a line of progress: a plan takes half a minute or more."""
    report = replan(config)
    needed = f"{report.hbm_gib_per_chip:.2f} GiB of {report.capacity_gib:.2f}"
    print(f"tried {_as_flags(change)}: {needed}", file=sys.stderr, flush=True)
    return report


def _as_flags(change: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in change.items())

"""What would make a stage fit, and which mesh is the fastest: plans of changed configs."""

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict


def remedies(config: ConfigDict, stage: str, chips: int) -> Iterator[dict]:
    """Changes, each besides those before it, that make a stage take less memory: dotted field ->
    value.
    """
    block, fsdp = config[stage], math.gcd(chips, config[stage].batch_size)
    yield {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": chips // fsdp}
    yield {"model.remat": "full"}
    if stage == "dpo" and block.reference != "none":
        yield {"dpo.cache_reference": True}
    yield {"model.dtype": "bfloat16"}
    size = block.microbatch_size or block.batch_size
    while size % 2 == 0 and size // 2 % fsdp == 0:
        size //= 2
        yield {f"{stage}.microbatch_size": size}
    if config.model.path and not config.model.lora.rank:
        yield {"model.lora.rank": 16}  # the last, as it is another way to train


def advise(config: ConfigDict, stage: str, report: dict, again: Callable) -> dict:
    """Tries remedies, one besides the other, until the stage fits; `again`: config -> its report.

    Returns the flags that make it fit, or, where none do, all of them, with what each try needed.
    """
    config, flags, tries = copy.deepcopy(config), {}, []
    for change in remedies(config, stage, report["chips"]):
        change = {
            name: value for name, value in change.items() if config_value(config, name) != value
        }
        if not change:
            continue
        config.update_from_flattened_dict(change)
        flags |= change
        report = _tried(again, config, change)
        tries.append(
            dict(
                flags=_flags(flags),
                fits=report["fits"],
                hbm_gib_per_chip=report["hbm_gib_per_chip"],
            )
        )
        if report["fits"]:
            break
    return dict(fits=report["fits"], flags=_flags(flags), tries=tries)


def _tried(again: Callable, config: ConfigDict, change: dict) -> dict:
    """A report, and a line of progress, which takes half a minute and more to come."""
    report = again(config)
    found = f"{report['hbm_gib_per_chip']:.2f} GiB of {report['capacity_gib']:.2f}"
    print(f"tried {_flags(change)}: {found}", file=sys.stderr, flush=True)
    return report


def meshes(config: ConfigDict, stage: str, chips: int) -> Iterator[dict]:
    """Every mesh over the chips whose shards split a microbatch evenly; tensor within a machine of
    8.
    """
    size = config[stage].microbatch_size or config[stage].batch_size
    for tensor in (1, 2, 4, 8):
        for fsdp in (n for n in range(1, chips + 1) if chips % (n * tensor) == 0):
            if size % (chips // tensor) == 0:
                yield {
                    "mesh.data": chips // (fsdp * tensor),
                    "mesh.fsdp": fsdp,
                    "mesh.tensor": tensor,
                }


def sweep_mesh(config: ConfigDict, stage: str, chips: int, again: Callable) -> list[dict]:
    """The report of each mesh; ValueError where there is none."""
    changes = list(meshes(config, stage, chips))
    if not changes:
        raise ValueError(
            f"no mesh of {chips} chips splits config.{stage}'s microbatch evenly: make it a multiple."
        )
    reports = []
    for change in changes:
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(change)
        reports.append(_tried(again, changed, change))
    return reports


def config_value(config: ConfigDict, name: str):
    """The value of a dotted field."""
    return functools.reduce(lambda block, part: block[part], name.split("."), config)


def _flags(change: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in change.items())

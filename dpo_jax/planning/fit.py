"""Whether a stage's step fits the devices at hand: asked before anything is loaded or compiled.

The arguments of the step are counted exactly, and its temporaries are estimated, as `plan` does
where no compiler tells them, for rows of the greatest length.
"""

import dataclasses

from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax.console import warn
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import hardware, sharding
from dpo_jax.planning import advice, planner, rollouts, roofline
from dpo_jax.planning.program import bytes_on_device, kept_bytes, make_program
from dpo_jax.stage_table import STAGES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Fit:
    """The memory of a step on a device, and that of the device."""

    chips: int
    capacity_gib: float
    hbm_gib: dict[str, float]  # by kind
    least_gib: float  # without which there is no step: the arguments and the gradients

    @property
    def hbm_gib_per_chip(self) -> float:
        return sum(self.hbm_gib.values())

    @property
    def fits(self) -> bool:
        return self.hbm_gib_per_chip <= self.capacity_gib


def check(config: ConfigDict, stage: str, model: TransformerConfig) -> None:
    """Say which flags make a stage fit, where its step does not fit the run's devices.

    model: what the stage trains. Raises ValueError where the step's arguments and gradients alone
    are too large. Warns where the estimate is, which rows shorter than the greatest length may
    prove wrong.
    """
    mesh = sharding.make_mesh(**config.mesh)
    capacity = hardware.memory_limit(mesh)
    if capacity is None:
        return
    found = estimate(config, stage, model, capacity)
    if found.fits:
        return

    def again(changed: ConfigDict) -> Fit:
        options = configs.model_options(changed)
        return estimate(changed, stage, dataclasses.replace(model, **options), capacity)

    told = _told(advice.advise(config, stage, found, again, model, quiet=True))
    kinds = ", ".join(f"{kind} {size:.2f}" for kind, size in found.hbm_gib.items())
    of_device = f"of a device's {found.capacity_gib:.2f} GiB"
    if found.least_gib > found.capacity_gib:
        raise ValueError(
            f"{stage} does not fit: weights, gradients and what else a step is given take "
            f"{found.least_gib:.2f} {of_device} ({kinds}, as estimated). {told}"
        )
    warn(
        f"{stage} may not fit: with rows of the greatest length a step is estimated to take "
        f"{found.hbm_gib_per_chip:.2f} {of_device} ({kinds}). {told}"
    )


def estimate(config: ConfigDict, stage: str, model: TransformerConfig, capacity: int) -> Fit:
    """Return the memory of a stage's step on the run's devices.

    capacity: bytes that each of them holds.
    """
    mesh = sharding.make_mesh(**config.mesh)
    _, batches = planner.lay_out(config, stage, model, mesh, sharding.platform_of(mesh))
    program = make_program(config, stage, model, mesh, batches[0])
    memory = program.argument_bytes() | kept_bytes(config, stage, model, mesh)
    if STAGES[stage].samples:
        memory |= rollouts.resident(config, model, mesh)
    gradients = bytes_on_device(program.state.params)
    least = sum(memory.values()) + gradients
    memory["temporaries"] = roofline.temporaries(
        model,
        batches.shapes[0],
        dict(mesh.shape),
        batches.microbatches,
        gradients=gradients,
        chip=hardware.chip_of(mesh.devices.flat[0]),
    )
    in_gib = {kind: size / GIB for kind, size in memory.items()}
    return Fit(mesh.size, capacity / GIB, in_gib, least / GIB)


def _told(found: advice.Advice) -> str:
    if found.fits:
        needed = found.tries[-1]["hbm_gib_per_chip"]
        return f"To make it fit, add: {found.flags} ({needed:.2f} GiB a device by estimate)"
    if found.flags:
        return f"Even with {found.flags} it takes more or larger devices."
    return "It takes more or larger devices, and nothing is left to try."

"""Advice: what would make a stage fit, and which meshes there are."""

import math
import types

from dpo_jax.planning import advice, planner
from tests.helpers.tiny_runs import scratch_config

MODEL = planner.model_config(scratch_config(), "dpo")


def test_advise_until_it_fits():
    config = scratch_config(batch_size=64)
    needs = iter([30.0, 31.0, 20.0, 15.0])
    asked = []

    def again(config):
        asked.append((config.mesh.fsdp, config.model.remat, config.dpo.cache_reference))
        need = next(needs)
        return types.SimpleNamespace(fits=need <= 16, hbm_gib_per_chip=need, capacity_gib=16.0)

    report = types.SimpleNamespace(chips=8, hbm_gib_per_chip=40.0)
    advised = advice.advise(config, "dpo", report, again, MODEL)
    # What takes more memory is not kept.
    assert asked == [(8, "none", False), (8, "full", False), (8, "none", True), (8, "none", True)]
    assert advised.fits and advised.flags == (
        "--config.mesh.data=1 --config.mesh.fsdp=8 --config.dpo.cache_reference=True "
        "--config.model.dtype=bfloat16"
    )
    assert config.mesh.fsdp == 1, "the run's own config is left as it is"
    assert list(advice.remedies(config, "dpo", 8, MODEL))[-3:] == [
        {"dpo.microbatch_size": size} for size in (32, 16, 8)
    ]
    config.model.path = "a model to put adapters over"
    assert list(advice.remedies(config, "dpo", 8, MODEL))[-2:] == [
        {"model.lora.rank": 16},
        {"model.frozen_dtype": "bfloat16"},
    ]


def test_advise_holds_frozen_weights_in_16_bits():
    """Where a step reads them: not those of a kept reference, and last over adapters."""

    def of(**fields):
        config = scratch_config(**fields)
        never = types.SimpleNamespace(fits=False, hbm_gib_per_chip=9.0, capacity_gib=1.0)
        report = types.SimpleNamespace(chips=1, hbm_gib_per_chip=9.0)
        return advice.advise(config, "dpo", report, lambda _: never, MODEL, quiet=True).flags

    frozen = "--config.model.frozen_dtype=bfloat16"
    assert frozen not in of() and "cache_reference=True" in of()
    # LD-DPO needs its reference in each step.
    needed = of(ld_alpha=0.5)
    assert frozen in needed and "cache_reference" not in needed
    assert frozen not in of(reference_every=4)
    assert "mesh" not in of()


def test_meshes_split_the_batch():
    config = scratch_config(batch_size=8)
    shapes = [tuple(change.values()) for change in advice.meshes(config, "dpo", 16, MODEL)]
    assert all(math.prod(shape) == 16 and 8 % (shape[0] * shape[1]) == 0 for shape in shapes)
    assert (1, 8, 2) in shapes and (2, 2, 4) in shapes and (1, 16, 1) not in shapes
    assert MODEL.heads == 4 and (2, 1, 8) not in shapes


def test_meshes_leave_context_as_it_is():
    config = scratch_config(batch_size=8)
    config.mesh.context = 4
    shapes = [tuple(change.values()) for change in advice.meshes(config, "dpo", 16, MODEL)]
    assert shapes and all(math.prod(shape) == 4 for shape in shapes)
    assert next(advice.remedies(config, "dpo", 16, MODEL)) == {
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.context": 4,
        "mesh.tensor": 1,
    }


def test_long_rows_go_over_more_devices():
    """Fewer at a time, before there are adapters; and no more tensor than heads."""
    config = scratch_config(batch_size=4)
    config.model.path = "a model to put adapters over"
    first, *short = advice.remedies(config, "dpo", 16, MODEL)
    assert tuple(first.values()) == (1, 4, 1, 4)  # data, fsdp, context, tensor
    config.data.max_length = 16384
    _, *long = advice.remedies(config, "dpo", 16, MODEL)
    assert long[:-6] == short[:-2] and long[-2:] == short[-2:]
    of_mesh = [tuple(remedy.values()) for remedy in long[-6:-2]]
    # data, fsdp, context, tensor, and the size of a microbatch
    assert of_mesh == [(1, 2, 2, 4, 2), (1, 1, 4, 4, 1), (1, 1, 8, 2, 1), (1, 1, 16, 1, 1)]

    config.dpo.batch_size = 1
    assert tuple(next(advice.remedies(config, "dpo", 8, MODEL)).values()) == (1, 1, 2, 4)
    assert not any("mesh.context" in remedy for remedy in advice.remedies(config, "dpo", 1, MODEL))

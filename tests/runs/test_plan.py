"""The plan command, and steps compiled for TPUs and GPUs."""

import importlib.util
import json

import pytest

from dpo_jax.parallel.hardware import CHIPS
from dpo_jax.planning import planner, topologies
from dpo_jax.planning.planner import Assumptions
from tests.helpers.tiny_runs import SCRATCH, command, scratch_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu (no TPU)"
)

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the GPU compiler, jax-cuda12-plugin and what it loads (no GPU)",
)


@needs_libtpu
@pytest.mark.slow
def test_plan_command_gives_advice():
    """Llama 3 8B on four chips of 16 GB never does: all is tried, and more chips are asked for."""
    done = command(
        "plan",
        "--config=configs/dpo.py",
        "--config.data.path=PAIRS",
        "--config.model.path=llama-3-8b",
        "--topology=v5e:2x2",
        "--rows=640",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["fits"] and not report["advice"]["fits"] and report["chip_hours"] is None
    assert "--config.mesh.fsdp=4" in report["advice"]["flags"]
    assert len(report["advice"]["tries"]) == 9


@needs_libtpu
def test_plan_command_compiles_for_tpu():
    config = scratch_config(batch_size=8)
    config.mesh.update(data=1, fsdp=4)
    config.model.dtype = "bfloat16"
    report = planner.plan(config, topologies.parse("v5e:2x2"), "dpo", Assumptions(examples=80))
    assert report.compiled and report.fits and report.capacity_gib == 15.75
    params = 4 * report.parameters / 2**30
    # Norms alone are whole on each chip.
    assert params / 4 <= report.hbm_gib["params"] < params / 3.5
    gathered = sum(kind["gib"] for kind in report.collectives.values())
    # Weights in bfloat16, forward, reference, backward; from three others.
    assert gathered > 3 * params / 2 * 3 / 4
    assert report.bottleneck in report.seconds and report.chip_hours > 0


@needs_gpu_compiler
def test_plan_command_compiles_for_gpus():
    """The collectives of a step: those of one machine, with weights split over all its GPUs."""
    config = scratch_config(batch_size=8)
    config.mesh.update(data=1, fsdp=8)
    config.model.dtype = "bfloat16"
    report = planner.plan(config, topologies.parse("h100:8"), "dpo", Assumptions(examples=80))
    assert report.compiled and not report.missing_compiler and report.fits
    counts = {kind: found["count"] for kind, found in report.collectives.items()}
    # So few weights come in one gather for all passes. The embedding's rows go to where they were
    # looked up: for policy and reference, and once backward.
    assert counts == {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 3, "all-to-all": 3}
    # Weights of both but the embedding's, in bfloat16, from seven others.
    embedding = SCRATCH["vocab_size"] * SCRATCH["hidden_size"]
    gathered = 2 * 2 * (report.parameters - embedding) * 7 / 8 / 2**30
    assert report.collectives["all-gather"]["gib"] == pytest.approx(gathered, rel=0.02)
    # cuDNN's attention counts as products too, though whole squares of it.
    assert 0.9 < report.needed_flops_per_step / report.flops_per_step < 1


@needs_gpu_compiler
def test_plan_command_refuses_wide_heads_by_cudnn():
    config = scratch_config()
    config.model.scratch.update(head_dim=256)
    config.model.update(dtype="bfloat16", attention="cudnn")
    with pytest.raises(ValueError, match="'cudnn' with heads of 256 .* Plan with auto"):
        planner.plan(config, topologies.parse("h100:1"), "dpo")


@needs_gpu_compiler
def test_plan_command_compiles_for_machines_of_gpus():
    config = scratch_config(batch_size=8)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.model.dtype = "bfloat16"
    report = planner.plan(config, topologies.parse("h100:2x4"), "dpo", Assumptions(examples=80))
    assert report.compiled
    received = sum(kind["gib"] for kind in report.collectives.values()) * 2**30
    # Sums of gradients between the machines, at the rate of a GPU's network card.
    assert report.seconds["interconnect"] > received / CHIPS["h100"].link


@pytest.mark.parametrize(
    ("flag", "least"), [("--pairs_per_prompt=-1", 1), ("--responses_per_prompt=1", 2)]
)
def test_plan_command_refuses_too_few(flag, least):
    done = command("plan", "--config=imdb", "--topology=h200:8", flag)
    assert done.returncode == 2
    expected = f"an integer in the range [{least}, 100000]"
    assert f"error: {flag}: expected {expected}." in done.stderr

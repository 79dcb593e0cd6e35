"""The plan command, and a step compiled for a TPU."""

import importlib.util
import json

import pytest

from dpo_jax.planning import planner, topologies
from dpo_jax.planning.planner import Assumptions
from tests.helpers.tiny_runs import command, scratch_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu (no TPU)"
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


@pytest.mark.parametrize(
    ("flag", "least"), [("--pairs_per_prompt=-1", 1), ("--responses_per_prompt=1", 2)]
)
def test_plan_command_refuses_too_few(flag, least):
    done = command("plan", "--config=imdb", "--topology=h200:8", flag)
    assert done.returncode == 2
    expected = f"an integer in the range [{least}, 100000]"
    assert f"error: {flag}: expected {expected}." in done.stderr

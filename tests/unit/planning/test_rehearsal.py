"""Rehearsals: a step of the real size on the real mesh, of which nothing is left."""

import jax
import numpy as np
import pytest

from dpo_jax.config import default
from dpo_jax.parallel import sharding
from dpo_jax.planning import groups, planner, rehearsal
from dpo_jax.planning.program import make_program
from tests.helpers.tiny_runs import SCRATCH, command, on_devices, scratch_config


def planned_gib(config, stage, mesh):
    """Return the memory of a device, compiled from shapes alone."""
    model = planner.model_config(config, stage)
    group = groups.group_of(config, stage, planner.Assumptions())
    batch = groups.lay_out(config, stage, group, sharding.batch_shards(mesh))[0]
    program = make_program(config, stage, model, mesh, batch)
    with jax.set_mesh(mesh):
        compiled = program.trace().lower().compile()
    return rehearsal._bytes_used(compiled.memory_analysis()) / rehearsal.GIB


def test_rehearsal_on_a_mesh(tmp_path, monkeypatch):
    """The program is the one that `plan` compiles, with a live reference; no file is written."""
    monkeypatch.chdir(tmp_path)
    config = scratch_config(batch_size=8)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    (found,) = rehearsal.rehearse_all(config)
    assert found.stage == "dpo" and sharding.told(found.mesh) == "data 2 x fsdp 2 x tensor 2"
    # A prompt of 16 tokens and two responses of 16 each.
    assert found.examples == 8 and found.tokens == 8 * 48
    assert found.step_seconds > 0 and found.first_seconds > 0 and found.compile_seconds > 0
    mesh = sharding.make_mesh(2, 2, 2)
    assert found.hbm_gib == pytest.approx(planned_gib(config, "dpo", mesh), rel=0.01)
    assert not list(tmp_path.iterdir())


def test_rehearsal_of_adapters():
    """The reference is another model, whole beside the frozen weights."""
    config = scratch_config(batch_size=8, reference="ANOTHER")
    config.model.lora.rank = 2
    with on_devices(1):
        found = rehearsal.rehearse(config, "dpo")
        assert found.hbm_gib == pytest.approx(
            planned_gib(config, "dpo", sharding.make_mesh()), rel=0.01
        )
    text = rehearsal.told(found)
    assert "8 examples, 384 tokens" in text and "GiB by the compiler" in text
    assert "at most" not in text, "a CPU does not say what it has held"


def test_rehearsal_of_ppo():
    """Samples and updates of the real size, by adapters; completions do not end early."""
    config = default(("ppo",))
    config.model.scratch.update(SCRATCH)
    config.model.lora.rank = 2
    config.data.update(max_length=32, max_prompt_length=16)
    config.sampling.update(max_new_tokens=4, batch_size=4)
    config.ppo.update(batch_size=8, minibatch_size=4, inner_epochs=1)
    with on_devices(1):
        found = rehearsal.rehearse_ppo(config)
    assert found.examples == 8 and found.tokens == 8 * (16 + 4)
    assert found.first_seconds > found.step_seconds > 0
    text = rehearsal.told(found)
    assert "s, with compiling" in text and "by the compiler" not in text


def test_random_weights_differ():
    shapes = dict(kernel=jax.ShapeDtypeStruct((64, 32), np.float32))
    kernel = np.asarray(
        rehearsal._random(sharding.make_mesh(), dict(head=shapes))["head"]["kernel"]
    )
    assert abs(kernel.mean()) < 0.002 and kernel.std() == pytest.approx(0.02 / 3**0.5, rel=0.1)
    assert len(np.unique(kernel)) > 0.99 * kernel.size


def test_rehearsal_says_what_devices_held():
    found = rehearsal.Rehearsal(
        stage="sft",
        mesh=dict(data=1, fsdp=8, tensor=1),
        examples=64,
        tokens=32_000,
        compile_seconds=60.0,
        first_seconds=3.0,
        step_seconds=2.0,
        hbm_gib=12.0,
        peak_gib=13.0,
        capacity_gib=59.6,
    )
    assert rehearsal.told(found).splitlines() == [
        "sft: a step of 64 examples, 32,000 tokens, on data 1 x fsdp 8 x tensor 1",
        "  time: 2 s a step, 16,000 tokens a second; the first 3 s, after 60 s of compiling",
        "  memory of a device: 12 GiB by the compiler; at most 13 GiB were taken so far, of 59.6 "
        "GiB that jax may take",
    ]


def test_rehearsal_needs_a_stage():
    config = scratch_config()
    config.stages = ("evaluate",)
    with pytest.raises(ValueError, match="--rehearse: no stage of config.stages = evaluate"):
        rehearsal.rehearse_all(config)


def test_rehearse_command_refuses_what_it_has_no_use_for(tmp_path):
    flags = ("--push=owner/name", "--allow_change=lr", f"--workdir={tmp_path}")
    done = command("train", "--config=toy", "--rehearse", *flags)
    assert done.returncode == 2
    said = "error: --rehearse and --push=owner/name and --allow_change=lr: a rehearsal leaves"
    assert said in done.stdout + done.stderr


def test_rehearse_command_leaves_nothing(tmp_path):
    workdir = tmp_path / "run"
    done = command(
        "train",
        "--config=toy:ppo",
        "--config.stages=rm,ppo",
        "--config.ppo.batch_size=8",
        "--config.ppo.minibatch_size=8",
        "--rehearse",
        f"--workdir={workdir}",
    )
    assert done.returncode == 0, done.stderr
    assert "ppo: a step of 8 examples" in done.stdout and "rm: a step of 256" in done.stdout
    assert not workdir.exists()

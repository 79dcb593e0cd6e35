"""The dry run: steps, memory against what arrays take, and the report."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.models import families, flops, hf, transformer
from dpo_jax.models.log_probs import response_log_probs
from dpo_jax.parallel import sharding
from dpo_jax.planning import advice, groups, hlo, planner, rollouts, topologies
from dpo_jax.planning import report as report_lib
from dpo_jax.planning.groups import Group
from dpo_jax.planning.planner import Assumptions
from dpo_jax.planning.program import make_program
from dpo_jax.training import optim
from dpo_jax.training.step import init_state, state_shardings
from tests.helpers.tiny_runs import SCRATCH, scratch_config, tiny_hf_config

GIB = 2**30
pytestmark = pytest.mark.usefixtures("without_gpu_compiler")


def test_plan_counts_remat():
    config = scratch_config(microbatch_size=4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batches = groups.lay_out(config, "dpo", Group(16, 16), sharding.batch_shards(mesh))
    again = {}

    def forwards(remat, reference="init"):
        """Products of a step, in those of a forward pass; in `again`, what of the layers a backward
        pass needs.
        """
        config.model.remat, config.dpo.reference = remat, reference
        model = planner.model_config(config, "dpo")
        parts = flops.forward(model, batches.shapes[0].contents)
        forward = flops.of_program(
            jax.jit(lambda params, batch: response_log_probs(model, params, batch))
            .trace(transformer.abstract(model), jax.tree.map(lambda x: x[0], batches[0]))
            .jaxpr.jaxpr
        )
        down = 2 * model.layers * model.width * model.mlp_width * batches.shapes[0].tokens
        # No one asks for a layer's own output.
        again["layers"] = 1 - batches.shards * (parts["head"] + down) / forward
        program = make_program(config, "dpo", model, mesh, batches[0])
        return flops.of_program(program.trace().jaxpr.jaxpr) / (forward * batches.microbatches)

    # Sums over tokens are products too.
    assert forwards("none", "none") == pytest.approx(3, rel=0.02)
    assert forwards("none") == pytest.approx(4, rel=0.02)
    assert forwards("full") == pytest.approx(4 + again["layers"], rel=0.02)


def test_plan_state_memory():
    config = scratch_config(optimizer="adamw")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = planner.model_config(config, "dpo")
    batch = groups.lay_out(config, "dpo", Group(16, 16), sharding.batch_shards(mesh))[0]
    program = make_program(config, "dpo", model, mesh, batch)
    planned = program.argument_bytes()
    optimizer = optim.make("adamw", 0.0)
    shardings = state_shardings(mesh, optimizer, transformer.abstract(model))
    params = jax.device_put(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.abstract(model)),
        shardings.params,
    )
    state = init_state(optimizer, params, {}, shardings)

    def on_a_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert planned["params"] == planned["reference"] == on_a_device(state.params)
    assert planned["optimizer"] == on_a_device(state.opt_state) > 1.9 * planned["params"]
    assert planned["batch"] == on_a_device(sharding.shard_batch(mesh, batch, axis=1))
    with jax.set_mesh(mesh):
        compiled = program.trace().lower().compile()
    numbers = 4 * (1 + len(program.hyper))  # the step's number, and the traced ones
    unused = (batch.last_token.nbytes + batch.token_counts.nbytes) // 4
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(
        sum(planned.values()) + numbers - unused, abs=64
    )
    found = hlo.collectives(compiled.as_text())
    assert {"all-gather", "all-reduce"} <= found.keys()


def test_plan_kept_reference_cost():
    config = scratch_config(steps=10, batch_size=8)
    plans = {}
    for config.dpo.cache_reference in (False, True):
        plans[config.dpo.cache_reference] = planner.plan(config, topologies.parse("h200:8"), "dpo")
    live, kept = plans[False], plans[True]
    assert live.hours == pytest.approx(10 * live.step_seconds / 3600)
    beyond = kept.hours - 10 * kept.step_seconds / 3600
    assert 0 < beyond < 10 * live.step_seconds / 3600
    # Four epochs of them, kept once.
    again = planner.plan(config, topologies.parse("h200:8"), "dpo", Assumptions(examples=20))
    assert again.hours - 10 * again.step_seconds / 3600 == pytest.approx(beyond / 4)


def test_plan_steps():
    config = scratch_config(steps=0, epochs=2.0)
    assert planner.examples_and_steps(config, "dpo", Assumptions()) == (0, 0)
    assert planner.examples_and_steps(config, "dpo", Assumptions(examples=100)) == (100, 25)
    config = configs.default(("sft", "dpo"))
    config.data.update(
        path="CarperAI/openai_summarize_comparisons", sft_path="CarperAI/openai_summarize_tldr"
    )
    assert [
        planner.examples_and_steps(config, stage, Assumptions())[0] for stage in config.stages
    ] == [
        116_722,
        92_534,
    ]
    config.data.sft_path = ""
    assert planner.examples_and_steps(config, "sft", Assumptions())[0] == 92_534


def test_plan_gpus_by_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SCRATCH))
    config = scratch_config(steps=0, batch_size=8)
    report = planner.plan(
        config,
        topologies.parse("h200:8"),
        "dpo",
        Assumptions(examples=80, model=str(tmp_path / "config.json")),
    )
    assert (
        report.fits and report.capacity_gib == pytest.approx(131.3, abs=0.1) and not report.compiled
    )
    assert report.steps == 10 and report.step_seconds == max(report.seconds.values())
    assert report.seconds[report.bottleneck] == report.step_seconds
    assert report.chip_hours == pytest.approx(8 * 10 * report.step_seconds / 3600)
    assert report.hbm_gib_per_chip == pytest.approx(sum(report.hbm_gib.values()))
    text = report_lib.table(report)
    assert "estimated" in text and "10 steps" in text and "<- bottleneck" in text
    assert "pip install the GPU compiler" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    small = dataclasses.replace(report, capacity_gib=0.0)
    lines = report_lib.sweep_table([small, report]).splitlines()
    assert [line.split()[4] for line in lines[1:]] == ["yes", "no"]


def test_plan_machines_by_sizes():
    """Across machines, weights and gradients also go over each GPU's network card."""
    config = scratch_config(batch_size=8)
    config.mesh.update(data=1, fsdp=4, tensor=2)
    seconds = {}
    for name in ("h100:8", "h100:2x4"):
        seconds[name] = planner.plan(config, topologies.parse(name), "dpo").seconds
    assert seconds["h100:2x4"]["interconnect"] > seconds["h100:8"]["interconnect"]
    assert seconds["h100:2x4"]["compute"] == seconds["h100:8"]["compute"]


def test_plan_adapters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SCRATCH))
    config, topology = scratch_config(batch_size=8), topologies.parse("h200:8")
    config.model.path, config.model.scratch, config.dpo.optimizer = (
        str(tmp_path / "config.json"),
        {},
        "rmsprop",
    )
    whole = planner.plan(config, topology, "dpo", Assumptions(examples=80))
    config.model.lora.rank = 2
    report = planner.plan(config, topology, "dpo", Assumptions(examples=80))
    trained = report.hbm_gib["reference"]  # another copy of the adapters
    assert 0 < trained < 0.2 * whole.hbm_gib["params"]
    assert report.hbm_gib["params"] == pytest.approx(whole.hbm_gib["params"] + trained)
    assert report.hbm_gib["optimizer"] == pytest.approx(trained, rel=0.1)
    # 3 of 4, but for attention.
    assert 0.7 < report.needed_flops_per_step / whole.needed_flops_per_step < 0.8
    config.dpo.reference = "ANOTHER"  # which is no adapters
    report = planner.plan(config, topologies.parse("h200:8"), "dpo")
    assert report.hbm_gib["reference"] == pytest.approx(whole.hbm_gib["params"])


def test_plan_moved_reference():
    """The reference that moves is beside the initial policy, which evaluate's KL is to."""
    topology = topologies.parse("h200:8")
    config = scratch_config(batch_size=8, reference_every=4)
    alone = planner.plan(config, topology, "dpo").hbm_gib
    config = configs.default(("dpo", "evaluate"))
    config.update(scratch_config(batch_size=8, reference_every=4))
    config.stages = ("dpo", "evaluate")
    measured = planner.plan(config, topology, "dpo").hbm_gib
    assert measured == alone | dict(initial=alone["params"])
    config.dpo.reference_every = 0
    assert planner.plan(config, topology, "dpo").hbm_gib == alone


def ppo_config():
    """Return the config of PPO on a reward model, from random weights of a small Llama."""
    base = scratch_config()
    config = configs.default(("rm", "ppo"))
    config.model, config.data = base.model, base.data
    config.ppo.update(
        batch_size=64, minibatch_size=16, microbatch_size=8, inner_epochs=3, steps=0, epochs=2.0
    )
    config.reward.update(kind="rm", path="")
    config.sampling.update(max_new_tokens=12, batch_size=32)
    return config


def of_one_completion(config):
    """Return the contents of a single completion of the planned lengths."""
    alone = config.copy_and_resolve_references()
    alone.ppo.update(batch_size=1, minibatch_size=1, microbatch_size=1)
    return groups.lay_out(alone, "ppo", Group(16, 12), 1).contents(0)


def test_plan_ppo():
    """All that a step holds and does: the updates, as often as they are made, and the rollout."""
    config, topology = ppo_config(), topologies.parse("h200:8")
    config.mesh.update(data=1, fsdp=4, tensor=2)
    report = planner.plan(config, topology, "ppo", Assumptions(examples=160))
    assert report.updates_per_step == 3 * 64 // 16 and report.steps == 5
    assert (report.prompt_tokens, report.response_tokens) == (16, 12)

    # The reward model lacks the head of the language model.
    model = planner.model_config(config, "ppo")
    rewarder = dataclasses.replace(model, head="reward")
    assert report.hbm_gib["reference"] == report.hbm_gib["params"]
    assert 0 < report.hbm_gib["reward model"] < report.hbm_gib["reference"]

    assert report.phases.keys() == {"sampling", "measuring", "rewarding", "updates"}
    for part in ("compute", "memory", "interconnect"):
        parts = [seconds[part] for seconds in report.phases.values()]
        assert report.seconds[part] == pytest.approx(sum(parts)) and min(parts) > 0
    least = sum(max(seconds.values()) for seconds in report.phases.values())
    assert report.step_seconds == pytest.approx(least)
    assert report.hours == pytest.approx(5 * least / 3600)
    # A forward pass over each completion as it is sampled, one under policy and reference each, one
    # of the reward model, and three epochs of three, the backward pass being as much as two.
    contents = of_one_completion(config)
    of_policy = sum(flops.forward(model, contents).values())
    of_rewarder = sum(flops.forward(rewarder, contents).values())
    needed = 64 * ((3 + 3 * 3) * of_policy + of_rewarder)
    assert report.needed_flops_per_step == pytest.approx(needed)
    assert 0.3 < report.needed_flops_per_step / report.flops_per_step <= 1

    lines = report_lib.table(report).splitlines()
    assert lines[1].startswith("64 completions a step, 12 updates, each in 2 microbatches; assumed")
    assert any(line.startswith("  sampling ") and " limited by " in line for line in lines)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["updates_per_step"] == 12 and values["phases"]["updates"]


def test_plan_ppo_on_a_reward_model_of_ones_own(tmp_path):
    """Its config is read, as another one than the policy's; a reward that is not known is told."""
    config = ppo_config()
    config.stages = ("ppo",)
    config.ppo.reward = "true"
    config.reward.update(kind="model", path=str(tmp_path))
    topology = topologies.parse("h200:1")
    unknown = planner.plan(config, topology, "ppo")
    assert "reward model" not in unknown.hbm_gib and "rewarding" not in unknown.phases
    told = "  reward: not counted, neither its work nor its memory"
    assert told in report_lib.table(unknown).splitlines()
    rollouts._rewarder_at.cache_clear()
    hf_config = tiny_hf_config().to_dict() | dict(num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    known = planner.plan(config, topology, "ppo")
    assert told not in report_lib.table(known).splitlines()
    shape = families.from_hf(hf.read_config(tmp_path), head="reward")
    sizes = [leaf.size for leaf in jax.tree.leaves(transformer.abstract(shape))]
    assert known.hbm_gib["reward model"] == pytest.approx(4 * sum(sizes) / GIB)
    more = known.needed_flops_per_step - unknown.needed_flops_per_step
    of_one = sum(flops.forward(shape, of_one_completion(config)).values())
    assert more == pytest.approx(64 * of_one)


def test_plan_ppo_memory_of_sampling():
    """It is beside the weights what the updates' temporaries are, and they take turns."""
    config, topology = ppo_config(), topologies.parse("h200:1")
    few = planner.plan(config, topology, "ppo").hbm_gib
    config.ppo.batch_size = config.sampling.batch_size = 2048
    many = planner.plan(config, topology, "ppo").hbm_gib
    assert many["sampling"] > few["sampling"] >= 0
    assert {kind: size for kind, size in many.items() if kind != "sampling"} == {
        kind: size for kind, size in few.items() if kind != "sampling"
    }
    # So fewer completions at a time are tried, where a plan does not fit.
    tries = list(advice.remedies(config, "ppo", 1, planner.model_config(config, "ppo")))
    assert {"sampling.batch_size": 1024} in tries and {"ppo.microbatch_size": 4} in tries


def test_plan_refuses_other_stage():
    with pytest.raises(ValueError, match="--stage=sft: expected one of dpo"):
        planner.plan(scratch_config(), topologies.parse("h200:8"), "sft")


def test_plan_attention_of_chips():
    """For GPUs a step is traced on CPU devices, which have no cuDNN."""
    config, gpus = scratch_config(), topologies.parse("h200:8")
    expected = planner.plan(config, gpus, "dpo")
    config.model.attention = "cudnn"
    assert planner.plan(config, gpus, "dpo") == expected
    for kernel, topology, message in (
        ("splash", gpus, "cpu and tpu, not on gpu"),
        ("cudnn", topologies.parse("v5p:2x2x1"), "on gpu, not on tpu"),
    ):
        config.model.attention = kernel
        with pytest.raises(ValueError, match=message):
            planner.plan(config, topology, "dpo")


@pytest.mark.parametrize(
    ("refusal", "temporaries"),
    [
        ("the total memory required for HLO temporaries (3.5G) exceeds available HBM (1G).", 3.5),
        ("Used 6.5G of 15.75G hbm. Exceeded hbm capacity", 4.5),
    ],
)
def test_refused_temporaries_are_read_from_the_compiler(refusal, temporaries):
    assert planner._refused_temporaries(refusal, 2 * 2**30) == temporaries * 2**30


def test_refused_temporaries_without_a_number():
    with pytest.raises(RuntimeError, match="without saying how much memory"):
        planner._refused_temporaries("RESOURCE_EXHAUSTED", 0)

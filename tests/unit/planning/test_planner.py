"""The dry run: counts against independent ones, memory against what arrays take, and a compile for
a TPU.
"""

import dataclasses
import importlib.util
import json
import math
import types

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import packing
from dpo_jax.models import families, flops, hf, transformer
from dpo_jax.models.log_probs import response_logprobs
from dpo_jax.parallel import sharding
from dpo_jax.planning import advice, hlo, planner, presets, roofline, topologies
from dpo_jax.planning import report as report_lib
from dpo_jax.planning.planner import Assumptions
from dpo_jax.planning.program import make_program
from dpo_jax.training import optim
from dpo_jax.training.step import init_state, state_shardings
from tests.helpers.tiny import tiny_config
from tests.helpers.tiny_runs import SCRATCH, command, scratch_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu (no TPU)"
)


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as the hub's pages give them
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-large", 774_030_080),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("EleutherAI/gpt-j-6b", 6_050_882_784),
        ("EleutherAI/pythia-70m", 70_426_624),
        ("EleutherAI/pythia-1b", 1_011_781_632),
        ("EleutherAI/pythia-2.8b-deduped", 2_775_208_960),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
        ("EleutherAI/pythia-12b", 11_846_072_320),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-0.6B", 596_049_920),
    ],
)
def test_known_models_have_the_published_number_of_parameters(name, count):
    config = families.from_hf(hf.make_config(presets.find(name)))
    assert sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(config))) == count


def test_models_that_are_not_known():
    assert presets.find("someone/of-their-own") is None


@pytest.mark.parametrize(
    ("text", "name", "chips", "links"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 6),
        ("v5p-16", "v5p:2x2x2", 8, 3),
        ("v4-32", "v4:2x2x4", 16, 3),
        ("v5e-16", "v5e:4x4", 16, 2),
        ("v5litepod-64", "v5e:8x8", 64, 2),
        ("v5e-256", "v5e:16x16", 256, 4),
        ("V5P-256", "v5p:4x4x8", 128, 6),
        ("v6e:2x4", "v6e:2x4", 8, 2),
        ("h200:8", "h200:8", 8, 1),
    ],
)
def test_topologies_by_every_name(text, name, chips, links):
    topology = topologies.parse(text)
    assert (str(topology), topology.chips, topology.interconnect / topology.chip.link) == (
        name,
        chips,
        links,
    )


@pytest.mark.parametrize(
    "text", ["v5p", "v9:2x2", "v5e:2x2x2", "h200:16", "h200-8", "v5p-10", "v5p:0x2x2", "v5p:2x"]
)
def test_topologies_that_there_are_not(text):
    with pytest.raises(ValueError, match="--topology="):
        topologies.parse(text)


PAIRS = [
    (np.arange(p), (np.arange(c), np.arange(r))) for p, c, r in [(5, 7, 3), (9, 2, 6), (4, 4, 4)]
]


def forward_jaxpr(config, shape):
    batch = packing.pack(PAIRS, shape)
    batch = jax.tree.map(lambda x: x[None], batch)
    return jax.jit(lambda params: response_logprobs(config, params, batch)).trace(
        transformer.abstract(config)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(gated=False, parallel=True, shared_norm=True),
        dict(tied=True, kv_heads=4),
        dict(learned_positions=True, rope_width=0, qk_norm=True),
    ],
)
def test_what_the_model_needs_is_what_its_program_does(fields):
    config = tiny_config(width=32, mlp_width=64, head_width=8, **fields)
    shape = packing.shape_of(PAIRS)
    parts, done = (
        flops.forward(config, shape),
        flops.of_program(forward_jaxpr(config, shape).jaxpr.jaxpr),
    )
    # A row shorter than a block of queries is computed whole; of that square, causal attention
    # needs a half.
    square = sum(count * length**2 for count, length in shape.rows)
    whole = 4 * config.layers * config.heads * config.head_width * square
    assert done == parts["dense"] + parts["head"] + whole
    assert whole / 2 < parts["attention"] < whole


def test_a_window_bounds_what_attention_needs():
    seen = [min(t + 1, 5) for t in range(12)]
    assert (
        flops._seen(12, 5) == sum(seen) and flops._seen(4, 5) == 10 and flops._seen(12, None) == 78
    )


def test_products_are_counted_as_xla_counts_them():
    """XLA counts a loop's body once, so the layers are unrolled; it counts what is not a product
    too.
    """
    config = tiny_config(width=128, mlp_width=256, head_width=32, unroll=2)
    traced = forward_jaxpr(config, packing.shape_of(PAIRS))
    counted = traced.lower().compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flops.of_program(traced.jaxpr.jaxpr), rel=0.06)


def test_a_step_is_counted_with_what_remat_does_again():
    config = scratch_config(microbatch_size=4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batches = planner.one_batch(config, "dpo", mesh, 16, 16)
    again = {}

    def forwards(remat, reference="init"):
        """Products of a step, in those of a forward pass; in `again`, what of the layers a backward
        pass needs.
        """
        config.model.remat, config.dpo.reference = remat, reference
        model = planner.model_config(config, "dpo")
        parts = flops.forward(model, batches.shapes[0])
        forward = flops.of_program(
            jax.jit(lambda params, batch: response_logprobs(model, params, batch))
            .trace(transformer.abstract(model), jax.tree.map(lambda x: x[0], batches[0]))
            .jaxpr.jaxpr
        )
        down = 2 * model.layers * model.width * model.mlp_width * batches.shapes[0].tokens
        again["layers"] = (
            1 - batches.shards * (parts["head"] + down) / forward
        )  # no one asks for a layer's own output
        program = make_program(config, "dpo", model, mesh, batches[0])
        return flops.of_program(program.trace().jaxpr.jaxpr) / (forward * batches.microbatches)

    assert forwards("none", "none") == pytest.approx(
        3, rel=0.02
    )  # sums over tokens are products too
    assert forwards("none") == pytest.approx(4, rel=0.02)
    assert forwards("full") == pytest.approx(4 + again["layers"], rel=0.02)


def test_memory_of_the_state_is_what_its_arrays_take_on_a_device():
    config = scratch_config(optimizer="adamw")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = planner.model_config(config, "dpo")
    batch = planner.one_batch(config, "dpo", mesh, 16, 16)[0]
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
    unused = sum(leaf.nbytes for name, leaf in batch.items() if name == "ends") // 4
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(
        sum(planned.values()) + numbers - unused, abs=64
    )
    found = hlo.collectives(compiled.as_text())
    assert {"all-gather", "all-reduce"} <= found.keys()


HLO = """HloModule step, entry_computation_layout={()->f32[]}

%scatter (input: f32[8,4]) -> f32[2,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%sum, %input, %input), dynamic_slice_sizes={2,4}
}

%slice_of (whole: f32[6,16], at: s32[]) -> f32[16] {
  %whole = f32[6,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %one = f32[1,16]{1,0} dynamic-slice(%whole, %at, %at), dynamic_slice_sizes={1,16}
}

%condition (carry.1: (s32[], f32[6,16])) -> pred[] {
  %six = s32[] constant(6)
  %carry.1 = (s32[], f32[6,16]{1,0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%count.1, %six), direction=LT
}

%body (carry: (s32[], f32[6,16])) -> (s32[], f32[6,16]) {
  %two = s32[] constant(2)
  %carry = (s32[], f32[6,16]{1,0:T(8,128)}) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %layers = f32[6,16]{1,0} get-tuple-element(%carry), index=1
  %layer = f32[1,16]{1,0:T(8,128)S(1)} fusion(%layers, %count), kind=kLoop, calls=%slice_of
  %gathered = f32[4,16]{1,0} all-gather(%layer), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %next = s32[] add(%count, %two)
  ROOT %carried = (s32[], f32[6,16]{1,0}) tuple(%next, %layers)
}

ENTRY %main (start: (s32[], f32[6,16]), grad: f32[8,4]) -> f32[2,4] {
  %start = (s32[], f32[6,16]{1,0}) parameter(0)
  %grad = f32[8,4]{1,0} parameter(1)
  %loop = (s32[], f32[6,16]{1,0}) while(%start), condition=%condition, body=%body
  %moved = bf16[8,4]{1,0} collective-permute(%grad), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %mine = f32[2,4]{1,0} fusion(%grad), kind=kCustom, calls=%scatter
}
"""


def test_a_program_is_read_with_its_loops():
    """Three rounds of a loop to 6 by 2; a gather of 64 bytes from three others; a sum of which each
    keeps a quarter.
    """
    assert hlo.collectives(HLO) == {
        "all-gather": (3, 3 * 3 * 64.0),
        "collective-permute": (1, 128.0),
        "reduce-scatter": (1, 128 * 0.75),
    }
    in_the_loop = 3 * (
        64 + 4 + 256 + 4 + 4 + 4
    )  # a layer and its number; what is gathered; adding to the counter
    assert hlo.memory_traffic(HLO) == in_the_loop + (128 + 64) + (128 + 32)


ASYNCHRONOUS = """HloModule step

%begin (part: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %part = f32[2,4]{1,0} parameter(0)
  %gather.1 = f32[8,4]{1,0} all-gather(%part), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begun = (f32[2,4]{1,0}, f32[8,4]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (part.1: f32[2,4], whole.1: f32[8,4], x.1: f32[16]) -> (f32[16], f32[2,4], f32[8,4]) {
  %part.1 = f32[2,4]{1,0} parameter(0)
  %whole.1 = f32[8,4]{1,0} parameter(1)
  %x.1 = f32[16]{0} parameter(2)
  %gather.2 = f32[8,4]{1,0} all-gather(%part.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  %twice = f32[16]{0} add(%x.1, %x.1)
  ROOT %on = (f32[16]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%twice, %part.1, %gather.2)
}

%end (part.2: f32[2,4], whole.2: f32[8,4]) -> f32[8,4] {
  %part.2 = f32[2,4]{1,0} parameter(0)
  %whole.2 = f32[8,4]{1,0} parameter(1)
  %gather.3 = f32[8,4]{1,0} all-gather(%part.2), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %ended = f32[8,4]{1,0} custom-call(%part.2, %whole.2, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (carry: (s32[], f32[16], f32[2,4], f32[8,4])) -> (s32[], f32[16], f32[2,4], f32[8,4]) {
  %carry = (s32[], f32[16], f32[2,4], f32[8,4]) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %x = f32[16]{0} get-tuple-element(%carry), index=1
  %a = f32[2,4]{1,0} get-tuple-element(%carry), index=2
  %b = f32[8,4]{1,0} get-tuple-element(%carry), index=3
  %doing = (f32[16]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%a, %b, %x), kind=kLoop, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%meanwhile
  ROOT %again = (s32[], f32[16], f32[2,4], f32[8,4]) tuple(%count, %x, %a, %b)
}

%condition (seen: (s32[], f32[16], f32[2,4], f32[8,4])) -> pred[] {
  %seen = (s32[], f32[16], f32[2,4], f32[8,4]) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (mine: f32[2,4]) -> f32[8,4] {
  %mine = f32[2,4]{1,0} parameter(0)
  %started = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%mine), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %all = (s32[], f32[16], f32[2,4], f32[8,4]) tuple(%started)
  %loop = (s32[], f32[16], f32[2,4], f32[8,4]) while(%all), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  %c = f32[2,4]{1,0} get-tuple-element(%loop), index=2
  %d = f32[8,4]{1,0} get-tuple-element(%loop), index=3
  ROOT %result = f32[8,4]{1,0} fusion(%c, %d), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""


def test_a_collective_that_goes_on_during_a_loop_is_counted_once():
    """Begun before six rounds and ended after them; each round reads and writes 64 bytes of its
    own.
    """
    assert hlo.collectives(ASYNCHRONOUS) == {"all-gather": (1, 3 * 32.0)}
    assert hlo.memory_traffic(ASYNCHRONOUS) == (32 + 128) + 6 * (64 + 64)


MOVES = """HloModule step

%one (layers: f32[6,1,16], at: s32[]) -> f32[16] {
  %layers = f32[6,1,16]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %flat = f32[6,16]{1,0} bitcast(%layers)
  %row = f32[1,16]{1,0} dynamic-slice(%flat, %at, %at), dynamic_slice_sizes={1,16}
  ROOT %layer = f32[16]{0} bitcast(%row)
}

%add_one (stack: f32[6,1,16], x: f32[16], where: s32[]) -> f32[16] {
  %stack = f32[6,1,16]{2,1,0} parameter(0)
  %x = f32[16]{0} parameter(1)
  %where = s32[] parameter(2)
  %mine = f32[16]{0} fusion(%stack, %where), kind=kLoop, calls=%one
  ROOT %sum = f32[16]{0} add(%mine, %x)
}

%put (stack.1: f32[6,16], new: f32[1,16], to: s32[]) -> f32[6,1,16] {
  %stack.1 = f32[6,16]{1,0} parameter(0)
  %new = f32[1,16]{1,0} parameter(1)
  %to = s32[] parameter(2)
  %updated = f32[6,16]{1,0} dynamic-update-slice(%stack.1, %new, %to, %to)
  ROOT %shaped = f32[6,1,16]{2,1,0} bitcast(%updated)
}

ENTRY %main (a: f32[6,1,16], b: f32[16], c: s32[], d: f32[6,16], e: f32[1,16]) -> f32[16] {
  %a = f32[6,1,16]{2,1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %c = s32[] parameter(2)
  %d = f32[6,16]{1,0} parameter(3)
  %e = f32[1,16]{1,0} parameter(4)
MOVED
}
"""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        (
            "%s = f32[16]{0} fusion(%a, %b, %c), kind=kLoop, calls=%add_one",
            64 + 64 + 4 + 64,
        ),  # a slice in an inner fusion
        (
            "%s = f32[6,1,16]{2,1,0} fusion(%d, %e, %c), kind=kLoop, calls=%put",
            64 + 4 + 64,
        ),  # updated in place
        (
            "%s = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%b), source_target_pairs={{0,1}}",
            64 + 64 + 4,
        ),
        (
            "%s = (f32[16]{0:S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%b)",
            64,
        ),  # to or from on-chip memory
        (
            "%s = ((f32[6,16]{1,0}), f32[2,16]{1,0:S(1)}, s32[]) slice-start(%d), slice={[0:2], [0:16]}",
            128,
        ),
        (
            "%s = ((f32[6,16]{1,0}), f32[2,16]{1,0}, s32[]) slice-start(%d), slice={[0:2], [0:16]}",
            128 + 128,
        ),
        ("%s = f32[2,16]{1,0} gather(%d, %c), offset_dims={1}, slice_sizes={1,16}", 128 + 128),
        ('%s = f32[6,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_only_what_is_touched_is_moved(line, moved):
    assert hlo.memory_traffic(MOVES.replace("MOVED", f"  ROOT {line}")) == moved


@pytest.mark.parametrize(
    ("attributes", "devices"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=64], device_ids=([64,2]T(1,0)) {'axis_1'}", 64),
    ],
)
def test_groups_of_devices_are_read_in_every_form(attributes, devices):
    assert hlo._group(attributes) == devices


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot be read: channel_id=3, replica_groups="):
        hlo._group("channel_id=3, replica_groups={}")


def test_a_kept_reference_costs_a_forward_pass_over_every_row():
    config = scratch_config(steps=10, batch_size=8)
    plans = {}
    for config.dpo.cache_reference in (False, True):
        plans[config.dpo.cache_reference] = planner.plan(config, topologies.parse("h200:8"), "dpo")
    live, kept = plans[False], plans[True]
    assert live.hours == pytest.approx(10 * live.step_seconds / 3600)
    beyond = kept.hours - 10 * kept.step_seconds / 3600
    assert 0 < beyond < 10 * live.step_seconds / 3600
    again = planner.plan(
        config, topologies.parse("h200:8"), "dpo", Assumptions(examples=20)
    )  # four epochs of them, kept once
    assert again.hours - 10 * again.step_seconds / 3600 == pytest.approx(beyond / 4)


def test_the_roofline_by_hand():
    topology = topologies.parse("v5e:4x4")
    collectives = {"all-gather": (1, 250e9), "all-reduce": (2, 50e9)}
    work = roofline.Work(flops=197e12, memory=2 * 819e9, collectives=collectives)
    assert roofline.seconds(topology, "bfloat16", work) == dict(
        compute=1.0, memory=2.0, interconnect=3.0
    )
    assert roofline.seconds(topology, "float32", work)["compute"] == pytest.approx(6.0)


def test_steps_and_lengths_come_from_the_config_or_are_assumed():
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
    config = scratch_config(steps=0, epochs=2.0)
    assert planner.example_tokens(config, "dpo", Assumptions()) == (16, 16)
    assert planner.example_tokens(
        config, "dpo", Assumptions(prompt_tokens=20, response_tokens=5)
    ) == (20, 5)
    with pytest.raises(
        ValueError, match="make 33, but examples are cut to config.data.max_length = 32"
    ):
        planner.example_tokens(config, "dpo", Assumptions(prompt_tokens=20, response_tokens=13))


def test_gpus_are_planned_by_sizes_alone_and_the_report_adds_up(tmp_path):
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
    assert "estimated, not compiled" in text and "10 steps" in text and "<- bottleneck" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    small = dataclasses.replace(report, capacity_gib=0.0)
    lines = report_lib.sweep_table([small, report]).splitlines()
    assert [line.split()[4] for line in lines[1:]] == ["yes", "no"]


def test_adapters_are_planned_over_a_base_that_has_no_optimiser(tmp_path):
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
    assert (
        0.7 < report.needed_flops_per_step / whole.needed_flops_per_step < 0.8
    )  # 3 of 4, but for attention
    config.dpo.reference = "ANOTHER"  # which is no adapters
    report = planner.plan(config, topologies.parse("h200:8"), "dpo")
    assert report.hbm_gib["reference"] == pytest.approx(whole.hbm_gib["params"])


def test_a_stage_that_is_not_planned_is_refused():
    with pytest.raises(ValueError, match="--stage=sft: expected one of dpo"):
        planner.plan(scratch_config(), topologies.parse("h200:8"), "sft")


def test_a_plan_is_for_the_attention_that_the_chips_have():
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


@needs_libtpu
@pytest.mark.slow
def test_the_command_says_what_makes_a_stage_fit():
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


def test_remedies_come_one_after_the_other_until_it_fits():
    config = scratch_config(batch_size=64)
    needs = iter([30.0, 20.0, 15.0])
    asked = []

    def again(config):
        asked.append((config.mesh.fsdp, config.model.remat, config.dpo.cache_reference))
        need = next(needs)
        return types.SimpleNamespace(fits=need <= 16, hbm_gib_per_chip=need, capacity_gib=16.0)

    advised = advice.advise(config, "dpo", types.SimpleNamespace(chips=8), again)
    assert asked == [(8, "none", False), (8, "full", False), (8, "full", True)]
    assert advised.fits and advised.flags == (
        "--config.mesh.data=1 --config.mesh.fsdp=8 --config.model.remat=full "
        "--config.dpo.cache_reference=True"
    )
    assert config.mesh.fsdp == 1, "the run's own config is left as it is"
    assert list(advice.remedies(config, "dpo", 8))[-3:] == [
        {"dpo.microbatch_size": size} for size in (32, 16, 8)
    ]
    config.model.path = "a model to put adapters over"
    assert list(advice.remedies(config, "dpo", 8))[-1] == {"model.lora.rank": 16}


def test_meshes_are_those_whose_shards_split_the_batch():
    config = scratch_config(batch_size=8)
    shapes = [tuple(change.values()) for change in advice.meshes(config, "dpo", 16)]
    assert all(math.prod(shape) == 16 and 8 % (shape[0] * shape[1]) == 0 for shape in shapes)
    assert (1, 8, 2) in shapes and (2, 1, 8) in shapes and (1, 16, 1) not in shapes


def test_libtpu_of_another_jax_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install --no-deps "libtpu=='):
        topologies.check_libtpu()


@needs_libtpu
def test_a_step_is_compiled_for_a_tpu():
    config = scratch_config(batch_size=8)
    config.mesh.update(data=1, fsdp=4)
    config.model.dtype = "bfloat16"
    report = planner.plan(config, topologies.parse("v5e:2x2"), "dpo", Assumptions(examples=80))
    assert report.compiled and report.fits and report.capacity_gib == 15.75
    params = 4 * report.parameters / 2**30
    assert (
        params / 4 <= report.hbm_gib["params"] < params / 3.5
    )  # norms alone are whole on each chip
    gathered = sum(kind["gib"] for kind in report.collectives.values())
    assert (
        gathered > 3 * params / 2 * 3 / 4
    )  # weights in bfloat16, forward, reference, backward; from three others
    assert report.bottleneck in report.seconds and report.chip_hours > 0

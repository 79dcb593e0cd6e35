"""Reading a compiled program, whose text has lines of any length."""
# ruff: noqa: E501

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.planning import hlo

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


def test_parse_program_with_loops():
    """Three rounds of a loop to 6 by 2; a gather of 64 bytes from three others; a sum of which each
    keeps a quarter.
    """
    assert hlo.collectives(HLO) == {
        "all-gather": (3, 3 * 3 * 64.0),
        "collective-permute": (1, 128.0),
        "reduce-scatter": (1, 128 * 0.75),
    }
    # A layer and its number; what is gathered; adding to the counter.
    in_the_loop = 3 * (64 + 4 + 256 + 4 + 4 + 4)
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


def test_collectives_asynchronous_in_loop():
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
        # A slice in an inner fusion.
        ("%s = f32[16]{0} fusion(%a, %b, %c), kind=kLoop, calls=%add_one", 64 + 64 + 4 + 64),
        # Updated in place.
        ("%s = f32[6,1,16]{2,1,0} fusion(%d, %e, %c), kind=kLoop, calls=%put", 64 + 4 + 64),
        (
            "%s = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%b), source_target_pairs={{0,1}}",
            64 + 64 + 4,
        ),
        # To or from on-chip memory.
        ("%s = (f32[16]{0:S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%b)", 64),
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
def test_memory_traffic_of_instruction(line, moved):
    assert hlo.memory_traffic(MOVES.replace("MOVED", f"  ROOT {line}")) == moved


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", [[0, 1, 2], [3, 4, 5]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "01 23 45 67"),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", "02 13 46 57"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", "0145 2367"),
    ],
)
def test_members_in_every_form(attributes, groups):
    if isinstance(groups, str):
        groups = [[int(device) for device in group] for group in groups.split()]
    assert hlo._members(attributes) == groups
    size = 1 if "pairs" in attributes else len(groups[0])
    assert hlo._group(attributes) == size


def test_members_refuse_unknown_form():
    with pytest.raises(ValueError, match="cannot be read: channel_id=3, replica_groups="):
        hlo._members("channel_id=3, replica_groups={}")


@pytest.mark.parametrize(
    ("collective", "received"),
    [
        # Within each machine of four.
        ("all-gather(%x), replica_groups=[2,4]<=[8]", 0),
        # Each machine receives the four parts of 64 bytes of the other one, over four cards.
        ("all-gather(%x), replica_groups=[1,8]<=[8]", 64),
        # Pairs across machines: no other GPU of the machine receives the same.
        ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 64),
        # An eighth of 64 bytes from each of four GPUs elsewhere.
        ("all-to-all(%x), replica_groups=[1,8]<=[8]", 32),
        ("collective-permute(%x), source_target_pairs={{0,4},{4,0}}", 64),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 0),
    ],
)
def test_bytes_between_machines(collective, received):
    text = f"""HloModule step

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %moved = f32[128]{{0}} {collective}
}}
"""
    assert hlo.bytes_between_machines(text, gpus=4) == received


def test_branches_count_in_part():
    """Three turns of a loop, each of which takes one of two branches."""

    def turn(x, kind):
        return jax.lax.switch(kind, [jnp.sin, jnp.cos], x), None

    def turns(x, kinds):
        return jax.lax.scan(turn, x, kinds)[0]

    text = jax.jit(turns).lower(jnp.ones(4), jnp.array([0, 1, 0])).compile().as_text()
    computations, entry = hlo.parse(text)
    branches = [times for times in hlo.trips(computations, entry).values() if times == 1.5]
    assert len(branches) == 2

"""Where the time of a step goes, from a program's text and a profile's events."""

import pytest

from experiments.benchmark import step_profile
from experiments.benchmark.step_profile import Event

# Shortened from what XLA writes. %dot.2 and %ynn have lost their names.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true

%fused_mlp (p0: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  ROOT %tanh = f32[8,4]{1,0} tanh(%p0), metadata={op_name="jit(train_step)/jvp(T)/layers/mlp/tanh"}
}

%fused_product (p1: f32[8,4]) -> f32[8,8] {
  %p1 = f32[8,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p1, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (p2: (f32[8,4])) -> (f32[8,4]) {
  %p2 = (f32[8,4]{1,0}) parameter(0)
  %gte = f32[8,4]{1,0} get-tuple-element(%p2), index=0
  %ynn = f32[8,8]{1,0} fusion(%gte), kind=kCustom, calls=%fused_product
  %exp = f32[8,4]{1,0} exponential(%gte), metadata={op_name="jit(f)/jvp(reference)/head/exp"}
  ROOT %tuple = (f32[8,4]{1,0}) tuple(%exp)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %mlp = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused_mlp
  %dot.2 = f32[8,8]{1,0} dot(%mlp, %mlp), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %rows = f32[8,4]{1,0} gather(%a), metadata={op_name="jit(train_step)/layers/attention/gather"}
  %q = f32[8,4]{1,0} dot(%rows), metadata={op_name="transpose(jvp(T))/layers/attention/q/dot"}
  %loop = (f32[8,4]{1,0}) while(%tuple.1), condition=%cond, body=%body
  ROOT %add = f32[8,4]{1,0} add(%a, %a), metadata={op_name="jit(train_step)/optimizer/add"}
}
"""


def test_kinds_of_work():
    kinds = step_profile.kinds(step_profile.read_program(PROGRAM))
    assert kinds["mlp"] == "MLP"
    assert kinds["dot.2"] == "MLP, products"  # told by what it reads
    assert kinds["rows"] == "attention, gathers"
    assert kinds["q"] == "attention, its linear layers, products"
    assert kinds["exp"] == "reference: head"
    assert kinds["ynn"] == "reference: head, products"  # told by the loop that it is in
    assert kinds["add"] == "optimizer"
    assert "loop" not in kinds


def test_times_are_split_among_threads_and_gaps_are_products():
    second = 1e9
    kind_of = {"add": "optimizer", "dot": "head, products", "exp": "head"}
    events = [
        Event("a", "loop", 0, 10 * second),
        Event("a", "add", 0, 2 * second),
        Event("b", "exp", 1 * second, 4 * second),
        # A product that goes on elsewhere: its event is only how it began.
        Event("a", "dot", 4 * second, 5 * second),
        Event("a", "exp", 8 * second, 10 * second),
        # Nothing is at work between steps.
        Event("a", "add", 20 * second, 21 * second),
    ]
    found = step_profile.times(events, kind_of)
    assert found == pytest.approx({"optimizer": 2.5, "head": 4.5, "head, products": 4.0})


def test_table_has_the_most_first():
    lines = step_profile.table({"MLP": 1.0, "head": 3.0}).splitlines()
    assert [line.split() for line in lines] == [
        ["head", "3.000", "s", "75.0%"],
        ["MLP", "1.000", "s", "25.0%"],
        ["all", "4.000", "s"],
    ]

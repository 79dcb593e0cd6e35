"""The roofline by hand."""

import pytest

from dpo_jax.planning import roofline, topologies


def test_seconds_by_hand():
    topology = topologies.parse("v5e:4x4")
    collectives = {"all-gather": (1, 250e9), "all-reduce": (2, 50e9)}
    work = roofline.Work(flops=197e12, memory=2 * 819e9, collectives=collectives)
    assert roofline.seconds(topology, "bfloat16", work) == dict(
        compute=1.0, memory=2.0, interconnect=3.0
    )
    assert roofline.seconds(topology, "float32", work)["compute"] == pytest.approx(6.0)

"""Topologies by name, and the TPU compiler's version."""

import importlib.util

import pytest

from dpo_jax.planning import topologies


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
def test_parse_every_name(text, name, chips, links):
    topology = topologies.parse(text)
    assert (str(topology), topology.chips, topology.interconnect / topology.chip.link) == (
        name,
        chips,
        links,
    )


@pytest.mark.parametrize(
    "text", ["v5p", "v9:2x2", "v5e:2x2x2", "h200:16", "h200-8", "v5p-10", "v5p:0x2x2", "v5p:2x"]
)
def test_parse_refuses_unknown(text):
    with pytest.raises(ValueError, match="--topology="):
        topologies.parse(text)


def test_check_libtpu_refuses_other_version(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install --no-deps "libtpu=='):
        topologies.check_libtpu()

"""Topologies by name, and the versions of their compilers."""

import importlib.metadata
import importlib.util

import jax
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
        ("h100:4x8", "h100:4x8", 32, 1),
        ("a100-80:1x4", "a100-80:4", 4, 1),
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
    "text",
    [
        "v5p",
        "v9:2x2",
        "v5e:2x2x2",
        "h200:16",
        "h200-8",
        "h100:2x16",
        "h100:2x2x4",
        "h100:0x8",
        "v5p-10",
        "v5p:0x2x2",
        "v5p:2x",
    ],
)
def test_parse_refuses_unknown(text):
    with pytest.raises(ValueError, match="--topology="):
        topologies.parse(text)


def test_check_libtpu_refuses_other_version(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install --no-deps "libtpu=='):
        topologies.check_libtpu()


def test_check_gpu_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install = f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=="
    with pytest.raises(topologies.MissingCompiler, match=f"needs no GPU: {install}"):
        topologies.check_gpu_compiler()


def test_check_gpu_compiler_refuses_other_version(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    message = f"jax_cuda12_plugin 0.0.1 does not belong to jax {jax.__version__}: pip install"
    with pytest.raises(topologies.MissingCompiler, match=message):
        topologies.check_gpu_compiler()

"""Paths of the repository, of the model that comes with the tests, and of real data."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
# A trained Llama of 260 thousand weights, with its tokenizer; its licence is beside it.
STORIES = ROOT / "tests" / "assets" / "stories260k"
# On PYTHONPATH it hides torch from a command, which starts a third sooner.
WITHOUT_TORCH = ROOT / "tests" / "helpers" / "without_torch"
# Not part of the repository: tests that read it are skipped where it is not.
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real data in ../shared/data"
)


def python_path(*folders) -> str:
    """Return PYTHONPATH of a command that sees no torch, with folders before what is there."""
    found = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.pathsep.join([str(WITHOUT_TORCH), *map(str, folders), *found])

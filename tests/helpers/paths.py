"""Paths of the repository, of the model that comes with the tests, and of real data."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
# A trained Llama of 260 thousand weights, with its tokenizer; its licence is beside it.
STORIES = ROOT / "tests" / "assets" / "stories260k"
# Not part of the repository: tests that read it are skipped where it is not.
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real data in ../shared/data"
)

"""Where the repository is, and the real data beside it."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real data in ../shared/data"
)

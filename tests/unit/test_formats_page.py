"""docs/formats.md: its rows are read as the page says, and it has every shape."""

import json
import re

import pytest

from dpo_jax.data.shapes import SHAPES, local
from dpo_jax.data.sources import SOURCES
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "formats.md").read_text()
# A name in bold, a sentence or none, and a row.
ROWS = re.findall(r"^\*\*([^*]+)\*\*(?:(?!\n\*\*|```).)*?\n```json\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.parametrize("name, text", ROWS, ids=[name for name, _ in ROWS])
def test_row_has_the_shape(name, text):
    row = local(json.loads(text))
    assert row.shape.startswith(name)
    assert all(row.responses)
    assert row.pairs or row.label or len(row.responses) == 1


def test_page_has_every_shape():
    named = set(re.findall(r"\*\*([^*]+)\*\*", PAGE))
    assert {shape.name for shape in SHAPES} <= named
    assert len(ROWS) >= len(SHAPES) - 2  # conversations of three names stand together


def test_page_has_every_source():
    for name in SOURCES:
        assert name == "local" or f"| `{name}` |" in PAGE, name

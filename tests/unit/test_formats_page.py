"""docs/formats.md: its rows are read as the page says, and it has every shape."""

import json
import re

import pytest

from dpo_jax.data.shapes import SHAPES, local, parse_columns
from dpo_jax.data.sources import SOURCES
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "formats.md").read_text()
# A name in bold, a sentence or none, a row, and perhaps a command.
ROWS = re.findall(
    r"^\*\*([^*]+)\*\*(?:(?!\n\*\*|```).)*?\n```json\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?",
    PAGE,
    re.M | re.S,
)


@pytest.mark.parametrize("name, text, command", ROWS, ids=[name for name, _, _ in ROWS])
def test_row_has_the_shape(name, text, command):
    """As it stands, or with the columns that the command maps."""
    columns = re.search(r"--config\.data\.columns=(\S+)", command)
    row = local(json.loads(text), parse_columns(columns[1] if columns else ""))
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

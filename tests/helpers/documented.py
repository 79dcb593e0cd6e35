"""The metrics that docs/metrics.md explains."""

import re

from tests.helpers.paths import ROOT


def documented_metrics() -> set[str]:
    """Return the names in the first column of the tables of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}

"""The pages of docs/: the metrics that they explain, and their headings."""

import pathlib
import re

from tests.helpers.paths import ROOT


def documented_metrics() -> set[str]:
    """Return the names in the first column of the tables of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

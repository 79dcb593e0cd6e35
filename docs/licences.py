"""Write docs/licences.md from what is installed: python docs/licences.py

The packages that requirements.txt names, those of the extras judge, ngram, gcs and s3, and all
that these need in turn, with the licences that they declare. Run it in an environment with these
packages.
"""

import importlib.metadata
import pathlib
import re
import sys
from collections import Counter

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
EXTRAS = ("openai", "rouge-score", "scikit-learn", "tensorboardX", "gcsfs", "s3fs")
COPYLEFT = re.compile(
    r"\b(A|L)?GPL|General Public|MPL|Mozilla|EPL|Eclipse|CDDL|EUPL", re.IGNORECASE
)
INTRO = """\
# Licences of dependencies

<!-- Written by `python docs/licences.py` from what is installed. Do not edit. -->

dpo_jax is under the [MIT licence](../LICENSE). It contains no code of the packages below; they are
installed beside it. Licences are those that the packages declare themselves. The extra `cuda13`
installs NVIDIA's libraries and `tpu` Google's libtpu, which are under their owners' own terms.
"""


def direct() -> list[str]:
    """Return the names of the packages that dpo_jax imports."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [Requirement(line).name for line in lines if line and not line.startswith("#")]
    return [*required, *EXTRAS]


def all_needed(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the packages of these names, and all that they need, by normal name."""
    found = {}
    waiting = list(names)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in map(_normal, names):
                sys.exit(f"{name} is not installed: pip install -r requirements-dev.txt")
            continue  # of another system, or optional
        for text in found[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(package: importlib.metadata.Distribution) -> str:
    """Return the licence that a package declares, in a few words."""
    metadata = package.metadata
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    declared = []
    for classifier in metadata.get_all("Classifier") or ():
        if classifier.startswith("License :: "):
            declared.append(classifier.rpartition(" :: ")[2])
    declared = [words for words in declared if words != "OSI Approved"]
    if declared:
        return " or ".join(declared)
    # Some have the whole text of their licence in the field; its first line is the name.
    text = (metadata.get("License") or "").strip()
    return text.splitlines()[0] if text else "not declared"


def page() -> str:
    """Return the page as Markdown."""
    needed = all_needed(direct())
    licences = {name: licence_of(package) for name, package in sorted(needed.items())}
    own = {_normal(name) for name in direct()}
    others = {name: licence for name, licence in licences.items() if name not in own}
    lines = ["## What dpo_jax imports", "", "| package | licence |", "|---|---|"]
    lines += [f"| {name} | {licences[name]} |" for name in sorted(own)]
    lines += ["", f"## What these need: {len(others)} further packages", ""]
    lines += ["| licence | packages |", "|---|---|"]
    for licence, count in Counter(others.values()).most_common():
        names = ", ".join(name for name in others if others[name] == licence)
        lines.append(f"| {licence} ({count}) | {names} |")
    copyleft = [name for name, licence in licences.items() if COPYLEFT.search(licence)]
    told = [f"{name} ({licences[name]})" for name in copyleft]
    lines += ["", "## Copyleft", "", f"{', '.join(told) or 'None'}."]
    if copyleft:
        lines += ["", "They are imported as they are, unchanged, which these licences allow."]
    return "\n".join([INTRO, *lines]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

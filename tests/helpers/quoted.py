"""Which numbers a page quotes, and which of them nobody has accounted for."""

import functools
import json
import math
import re

from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments" / "results"
# What may have been measured: a number with decimals, or one with a unit.
NUMBER = re.compile(
    r"(?<![\w.])\d[\d,]*\.\d+"
    r"|(?<![\w.])\d[\d,]*(?= ?(?:ms|s|GB|GiB|MB|kB|minutes|seconds|hours|times|%|nats)\b)"
)
PLAIN = re.compile(r"\d[\d,]*(?:\.\d+)?")


def at_most(value: float, digits: int) -> str:
    """Return an upper bound as a page writes it: rounded up, so that it still is one."""
    scale = 10**digits
    return f"{math.ceil(value * scale) / scale:.{digits}f}"


@functools.cache
def measured(name: str):
    """Return what a JSON file under experiments/results holds; of .jsonl a list of its rows."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


@functools.cache
def at_least(value: float, digits: int) -> str:
    """Return a lower bound as a page writes it: rounded down, so that it still is one."""
    scale = 10**digits
    return f"{math.floor(value * scale) / scale:.{digits}f}"


def page(name: str) -> str:
    """Return a page's text on one line, without code and the addresses of its links."""
    text = (ROOT / name).read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # Signs for bold text are left out, so that a quotation need not know what is bold.
    return " ".join(text.replace("**", "").split())


def unaccounted(name: str, accounted: list[str]) -> list[str]:
    """Return the numbers of a page, with their surroundings, that stand in no fragment of it."""
    text = page(name)
    taken = bytearray(len(text))
    for fragment in accounted:
        start = text.find(fragment)
        while start >= 0:
            taken[start : start + len(fragment)] = b"x" * len(fragment)
            start = text.find(fragment, start + 1)
    left = []
    for found in NUMBER.finditer(text):
        if not all(taken[found.start() : found.end()]):
            left.append(text[max(0, found.start() - 60) : found.end() + 40])
    return left


def numbers(text: str) -> list[str]:
    """Return all numbers of a text, as they are written."""
    return [number.rstrip(",") for number in PLAIN.findall(text)]


def paragraph(record: str, words: str) -> str:
    """Return the one paragraph, or row of a table, of a committed record that has these words.

    AssertionError if there is none, or several.
    """
    found = []
    for block in (ROOT / record).read_text().split("\n\n"):
        parts = block.splitlines() if block.startswith("|") else [block]
        found += [part for part in parts if words in " ".join(part.split())]
    assert len(found) == 1, f"{record} has {len(found)} paragraphs with {words!r}"
    return " ".join(found[0].split())

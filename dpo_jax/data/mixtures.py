"""Mixtures of data sets: what `data.mix` says, and which rows of each set are drawn.

A mixture is a list of sets, separated by commas, each with the amount of it to train on:

    helpful.jsonl=1000, hh@Anthropic/hh-rlhf=50%, owner/name:subset[train_prefs]

that is, [SOURCE@]PATH[:SUBSET][[SPLIT]][=ROWS or =SHARE%]. Without an amount, a set is taken whole.

Rows are drawn by a hash of what they say, so the same ones are drawn whatever the order of a file
or of the sets, and a larger amount contains the smaller one. No prompt is trained on that any of
the sets evaluates on.
"""

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GRAMMAR = "[SOURCE@]PATH[:SUBSET][[SPLIT]][=ROWS or =SHARE%]"
SET = re.compile(r"(?:(?P<source>\w+)@)?(?P<path>[^=,\[\]]+?)\s*(?:\[(?P<split>[^\[\]]+)\])?")
# What an amount that is written with commas falls into.
AMOUNT_ENDS = re.compile(r"=\s*\d{1,3}\s*$")
THOUSANDS = re.compile(r"\s*\d{3}\s*")
DECIMALS = re.compile(r"\s*\d+\s*%\s*")
AMOUNT = re.compile(r"(?P<rows>\d+)|(?P<percent>\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Ingredient:
    """A set of a mixture, and how much of it is trained on: rows, or a share, or else all."""

    name: str  # as it is written, without the amount
    source: str  # "": the config's
    path: str
    split: str  # "": the config's
    rows: int | None = None
    share: float = 1.0


def parse(mix: str, sources: Collection[str]) -> list[Ingredient]:
    """Return the sets of a mixture, as `data.mix` says them.

    sources: the known ones. An empty mixture has no sets. Raises ValueError naming the entry that
    is wrong.
    """
    ingredients = []
    entries = mix.split(",") if mix.strip() else []
    for number, entry in enumerate(entries):
        if number and AMOUNT_ENDS.search(entries[number - 1]):
            _refuse_comma(entries[number - 1].strip(), entries[number:])
        ingredient = _ingredient(entry.strip(), sources)
        for other in ingredients:
            if _overlap(ingredient, other):
                name = "" if ingredient.name == other.name else f", also as {other.name!r}"
                raise _wrong(entry, f"this set is named twice{name}")
        ingredients.append(ingredient)
    return ingredients


def _refuse_comma(before: str, following: list[str]) -> None:
    """Raise ValueError where an amount is parted by a comma of its own: =1,000 or =12,5%."""
    if THOUSANDS.fullmatch(following[0]):
        groups = itertools.takewhile(THOUSANDS.fullmatch, following)
        digits = [group.strip() for group in groups]
        whole = ",".join([before, *digits])
        raise _wrong(whole, f"write the number without commas: {before}{''.join(digits)}")
    if DECIMALS.fullmatch(following[0]):
        share = following[0].strip()
        raise _wrong(f"{before},{share}", f"write the share with a point: {before}.{share}")


def short_names(ingredients: list[Ingredient]) -> list[str]:
    """Return names of the sets without their folders, each different: names of subsets."""
    names = []
    for ingredient in ingredients:
        last = ingredient.path.rstrip("/").rpartition("/")[2]
        is_file = Path(ingredient.path).expanduser().is_file()
        names.append(last.partition(".")[0] or last if is_file else last)
    if len(set(names)) == len(names):
        return names
    # As they are written, with slashes that part the names of no metric.
    return [ingredient.name.replace("/", "_") for ingredient in ingredients]


def _overlap(one: Ingredient, other: Ingredient) -> bool:
    """Return whether two sets are the same rows, however their path is written."""
    if _place(one.path) != _place(other.path):
        return False
    if Path(one.path).expanduser().is_file():
        return True  # a file has one split, whatever it is called
    # Without a split, the training split is meant.
    splits = set((one.split or "train").split("+"))
    return not splits.isdisjoint((other.split or "train").split("+"))


def _place(path: str) -> tuple[str, str]:
    """Return the file or folder that a path leads to, and the subset of it."""
    folder, _, subset = path.rpartition(":")
    for name, part in ((path, ""), (folder, subset)):
        if name and Path(name).expanduser().exists():
            return str(Path(name).expanduser().resolve()), part
    return path, ""


def _ingredient(entry: str, sources: Collection[str]) -> Ingredient:
    name, has_amount, amount = (part.strip() for part in entry.partition("="))
    found = SET.fullmatch(name)
    if not found:
        raise _wrong(entry, "a path with none of , = [ ] is expected; rename it or make a link")
    source = found["source"] or ""
    if source and source not in sources:
        raise _wrong(entry, f"{source!r} is none of the sources {', '.join(sources)}")
    ingredient = dict(name=name, source=source, path=found["path"], split=found["split"] or "")
    if not has_amount:
        return Ingredient(**ingredient)
    said = AMOUNT.fullmatch(amount)
    if not said:
        raise _wrong(
            entry,
            "the amount is a number of rows (=1000) or a share (=50%), in digits alone",
        )
    if said["rows"]:
        rows = int(said["rows"])
        if not rows:
            raise _wrong(entry, "0 rows are none: leave the set out")
        return Ingredient(**ingredient, rows=rows)
    share = float(said["percent"]) / 100
    if not 0 < share <= 1:
        raise _wrong(entry, "a share is more than 0% and at most 100%")
    return Ingredient(**ingredient, share=share)


def _wrong(entry: str, reason: str) -> ValueError:
    return ValueError(
        f"data.mix: {entry.strip()!r}: {reason}. Sets are separated by commas, each {GRAMMAR}."
    )


@dataclass
class Draw:
    """Which rows are taken, by their hashes: those below `limit`, and some of those at it."""

    limit: int
    at_limit: int  # how many more of those whose hash is `limit`: copies of the same row

    def takes(self, row_hash: int) -> bool:
        """Return whether a row is taken; each is to be asked for once."""
        if row_hash == self.limit and self.at_limit:
            self.at_limit -= 1
            return True
        return row_hash < self.limit


def draw(row_hashes: np.ndarray, ingredient: Ingredient) -> Draw:
    """Return which of a set's rows are trained on.

    row_hashes: uint64, of all that may be. Raises ValueError where they are too few, or where none
    is in the share.
    """
    if ingredient.rows is None:
        limit = int(ingredient.share * 2**64)
        if ingredient.share < 1 and len(row_hashes) and not (row_hashes < limit).any():
            raise ValueError(
                f"data.mix: {ingredient.share:.6%} of {ingredient.name} are none of its "
                f"{len(row_hashes)} rows to train on. Ask for a number of rows, as in "
                f"{ingredient.name}=1, or leave the set out."
            )
        return Draw(limit, 0)
    if ingredient.rows > len(row_hashes):
        raise ValueError(
            f"data.mix: {ingredient.name} has {len(row_hashes)} rows to train on, without those "
            f"that are dropped or held out; {ingredient.rows} were asked for."
        )
    return smallest(row_hashes, ingredient.rows)


def smallest(hashes: np.ndarray, count: int) -> Draw:
    """Return the draw of the `count` smallest hashes."""
    limit = np.partition(hashes, count - 1)[count - 1]
    return Draw(int(limit), count - int((hashes < limit).sum()))

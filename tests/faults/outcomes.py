"""How a command may end under a fault, and the tries of a part counted."""

import collections
import concurrent.futures
import dataclasses
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable

from tests.faults import jobs, load
from tests.helpers import goldens

SAME = "same bits"  # in the end the right result, bit for bit
TOLD = "told"  # the same, but for rows of metrics, and a line says that these are lost
CLEAR = "clear refusal"  # exit status 2, and one paragraph
SILENT = "silent"  # another result as if it were right, or an end without a word
DEEP = "deep"  # a traceback, or a message that does not say what is wrong and what to do
HANGING = "hanging"  # it did not end in time, or took too much memory
OUTCOMES = (SAME, TOLD, CLEAR, SILENT, DEEP, HANGING)
BAD = (SILENT, DEEP, HANGING)

# How a command may end that was stopped from outside, or whose reader has gone.
REFUSED = 2
LONGEST_PARAGRAPH = 1500  # characters


@dataclasses.dataclass(frozen=True)
class Try:
    """One fault tried, and how it ended.

    part: of the whole harness. what: the row of the table that it counts in. detail: the moment of
    the fault, or its name, and what was wrong.
    """

    part: str
    what: str
    outcome: str
    seconds: float
    detail: str = ""


def judge(ended: jobs.Ended, found: dict, expected: dict) -> tuple[str, str]:
    """Return the outcome of a command, and what is wrong with it.

    found, expected: what it left, and what an uninterrupted run leaves.
    """
    if ended.hanging:
        return HANGING, f"no end in {jobs.HANGING:.0f} s: {last_lines(ended.text)}"
    if has_traceback(ended.text):
        return DEEP, last_lines(ended.text)
    if not any(ended.statuses):
        wrong = goldens.differences(expected, found)
        return (SILENT, "; ".join(wrong)[:500]) if wrong else (SAME, "")
    if set(ended.statuses) <= {0, REFUSED} and is_paragraph(ended.text):
        return CLEAR, last_lines("error: " + ended.text.rpartition("error: ")[2])
    return SILENT, f"status {ended.statuses}, {last_lines(ended.text) or 'no word'}"


def has_traceback(text: str) -> bool:
    return "Traceback (most recent call last)" in text


def is_paragraph(text: str) -> bool:
    """Return whether a command's last words are one error, and not a long one."""
    _, found, message = text.rpartition("error: ")
    return bool(found) and text.count("\nerror: ") <= 1 and len(message) < LONGEST_PARAGRAPH


def last_lines(text: str, most: int = 400) -> str:
    """Return the end of what a command printed, in one line."""
    return re.sub(r"\s+", " ", text.strip())[-most:]


class Tries:
    """Runs the tries of a part, a few at once, and shows how far it is."""

    def __init__(
        self,
        folder: pathlib.Path,
        workers: int,
        keep: Callable[[str, list[Try], int], None] = lambda part, tries, planned: None,
    ):
        """folder: in which each try has a folder of its own, which goes if it ends well.

        keep: is given a part's tries so far after each, and how many there will be.
        """
        self._folder = folder
        self._workers = workers
        self._keep = keep
        self.done: list[Try] = []
        self.measured: list[load.Result] = []

    def run(self, part: str, planned: Iterable[tuple[str, Callable[[pathlib.Path], Try]]]) -> None:
        """Run the tries of a part; each is a name and a function of its folder."""
        planned = list(planned)
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            waiting = []
            for number, (name, function) in enumerate(planned):
                folder = self._folder / f"{part}-{number:03d}"
                waiting.append(pool.submit(self._one, part, name, function, folder))
            for count, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                found = future.result()
                self.done.append(found)
                self.keep(part, len(planned))
                minutes = (time.monotonic() - began) / 60
                left = minutes / count * (len(planned) - count)
                print(
                    f"{part} {count}/{len(planned)}  {found.outcome:13} {found.what}: "
                    f"{found.detail[:150]}  {count / minutes:.1f} a minute, {left:.1f} min left",
                    flush=True,
                )

    def add(self, part: str, made: Iterable[Iterable[Try]]) -> None:
        """Take the tries of a part that are made elsewhere, in groups."""
        for group in made:
            self.done += group
            self.keep(part, len(self._of(part)) + 1)  # one more at least, until all are there
        self.keep(part, len(self._of(part)))

    def keep(self, part: str, planned: int) -> None:
        """Have the tries of a part so far kept."""
        self._keep(part, self._of(part), planned)

    def _of(self, part: str) -> list[Try]:
        return [one for one in self.done if one.part == part]

    def _one(self, part, name, function, folder) -> Try:
        began = time.monotonic()
        try:
            outcome, detail = function(folder)
        except Exception as error:  # of the harness itself: the other tries go on
            outcome, detail = SILENT, f"the try could not be judged: {error!r}"
        # Where the folders are says nothing to a reader.
        detail = detail.replace(str(folder), "DIR")
        found = Try(part, name, outcome, round(time.monotonic() - began, 1), detail)
        if outcome not in BAD:
            shutil.rmtree(folder, ignore_errors=True)
        return found


def counts(tries: Iterable[Try]) -> dict[str, collections.Counter]:
    """Count the outcomes of each row of a part's table, in the order in which the rows came."""
    found = {}
    for one in tries:
        found.setdefault(one.what, collections.Counter())[one.outcome] += 1
    return found

"""The one rule for hostile input: it is taken, or refused in one paragraph, and within seconds."""

import copy
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable

from absl import flags

from dpo_jax import command_line
from tests.helpers.signals import signals_as_before

SECONDS = 30
MOST_MEMORY = 2 << 30  # bytes that an input may add
LONGEST = 3_000  # characters of a message for a person

# What an input may be expected to be.
REFUSED = "refused"
TAKEN = "taken"
EITHER = "either"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case.

    verdict: "taken" or "refused" where it is right; "silent": taken, but not rightly; "unclear": a
    refusal that is no paragraph or does not name what is wrong; "deep": an exception that is not
    for people; "slow", "large": it took more than SECONDS, or than MOST_MEMORY. words: the refusal,
    or what is wrong.
    """

    verdict: str
    words: str

    @property
    def is_right(self) -> bool:
        return self.verdict in (TAKEN, REFUSED)


def judge(call: Callable[[], object], expected: str = EITHER, names: Iterable[str] = ()) -> Verdict:
    """Give an input to a call, and judge what comes of it.

    expected: REFUSED, TAKEN or EITHER. names: a refusal must have one of them.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    words = ""
    try:
        call()
    except Exception as error:  # whatever it is, it is judged
        words = str(error)
        verdict = verdict_on(error, names)
    else:
        verdict = TAKEN
    if time.monotonic() - began > SECONDS:
        return Verdict("slow", words)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MOST_MEMORY:
        return Verdict("large", words)
    if expected == REFUSED and verdict == TAKEN:
        return Verdict("silent", "it was taken")
    if expected == TAKEN and verdict == REFUSED:
        return Verdict("unclear", f"a usual input was refused: {words}")
    return Verdict(verdict, words)


def verdict_on(error: Exception, names: Iterable[str] = ()) -> str:
    """Return "refused", "unclear" or "deep", for the exception that an input was refused with."""
    if not command_line.is_for_people(error):
        return "deep"
    words = str(error)
    if not is_paragraph(words):
        return "unclear"
    names = tuple(names)
    is_named = not names or any(name in words for name in names)
    return REFUSED if is_named else "unclear"


def is_paragraph(words: str) -> bool:
    """Return whether a message is one that a person would read."""
    stripped = words.strip()
    is_long = len(words) > LONGEST
    return bool(stripped) and not is_long and "\n\n" not in stripped and "Traceback" not in words


def refusal_of(call: Callable[[], object]) -> str:
    """Return the words with which a call was refused, "" if it was taken.

    Raises AssertionError where it ended in any other way, or took too long.
    """
    verdict = judge(call)
    assert verdict.is_right, verdict
    return verdict.words


def status_of(main: Callable[[], None], *arguments: str) -> int:
    """Run a command in this process as the shell would; return its exit status."""
    values = flags.FLAGS.__dict__
    before = {name: copy.copy(value) for name, value in values.items()}
    argv = sys.argv
    sys.argv = ["dpo-jax command", *arguments]
    with signals_as_before():
        try:
            main()
        except SystemExit as ended:
            return ended.code
        finally:
            sys.argv = argv
            # The next command defines its own.
            values.clear()
            values.update(before)
    raise AssertionError("a command ends by sys.exit")

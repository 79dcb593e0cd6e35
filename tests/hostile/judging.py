"""The one rule for hostile input: it is taken, or refused in one paragraph, and within seconds."""

import contextlib
import copy
import signal
import sys
import time
from collections.abc import Callable

from absl import flags

from dpo_jax import command_line, stopping

SECONDS = 30
LONGEST = 3_000  # characters of a message for a person


def refusal_of(call: Callable[[], object]) -> str:
    """Return the words with which a call was refused, "" if it was taken.

    Raises AssertionError where it ended in any other way, or took too long.
    """
    began = time.monotonic()
    refusal = ""
    try:
        call()
    except Exception as error:  # whatever it is, it is judged
        assert command_line.is_for_people(error), f"{type(error).__name__}: {error}"
        refusal = str(error)
        check_words(refusal)
    assert time.monotonic() - began < SECONDS
    return refusal


def check_words(refusal: str) -> None:
    """Raise AssertionError where a message is none that a person would read."""
    assert refusal.strip()
    assert len(refusal) <= LONGEST, refusal[:LONGEST]
    assert "\n\n" not in refusal.strip() and "Traceback" not in refusal, refusal


def status_of(main: Callable[[], None], *arguments: str) -> int:
    """Run a command in this process as the shell would; return its exit status."""
    values = flags.FLAGS.__dict__
    before = {name: copy.copy(value) for name, value in values.items()}
    argv = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["dpo-jax command", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = argv
        # The next command defines its own.
        values.clear()
        values.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        stopping._State.may_leave = False  # a signal to the tests is not the command's
    raise AssertionError("a command ends by sys.exit")


@contextlib.contextmanager
def refused(capsys):
    """Check that what runs within says one paragraph on stderr; yield a list that it goes into."""
    capsys.readouterr()
    said = []
    yield said
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith("\n"), text
    check_words(text)
    said.append(text)

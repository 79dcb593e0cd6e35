"""SIGTERM and Ctrl-C: a command ends with one line, and status 128 + the signal's number.

    while it is imported     at once: nothing is open yet
    while it works           by the exception Stopped, so that drafts are removed on its way out
    while a step is trained  after the step, which is saved (`delayed`)

A kill may come anywhere as well, and loses nothing that was written: a command that is told to stop
need only be quick. Imports nothing of the project, and no jax.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C asked the program to stop."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def words(signum: int) -> str:
    """Return the line that a command ends with."""
    return "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"


def end_at_once() -> None:
    """From here on, let a signal end the process where it is: imports, and the end itself."""

    def leave(signum, _frame):
        with contextlib.suppress(OSError):
            os.write(2, f"{words(signum)}\n".encode())
        os._exit(128 + signum)

    _handle(leave)


def end_by_exception() -> None:
    """From here on, let a signal raise Stopped."""
    _handle(_stop)


def _stop(signum, _frame):
    raise Stopped(signum)


def _handle(handler) -> None:
    # Python calls handlers in the main thread, and lets no other one set them.
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in SIGNALS:
        # A shell ignores Ctrl-C for what it starts in the background.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


class Signals:
    """The signals that came while they were delayed."""

    def __init__(self):
        self._caught: int | None = None
        self._raises = False

    @property
    def caught(self) -> int | None:
        """The first signal that came; None if none did."""
        return self._caught

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped within, or on entry where a signal has come already."""
        if self._caught is not None:
            raise Stopped(self._caught)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def catch(self, signum, _frame) -> None:
        """Handle a signal."""
        self._caught = self._caught or signum
        if self._raises:
            self._raises = False  # once: what follows is the way out
            raise Stopped(signum)
        # A step may take long, and a person who presses Ctrl-C again will not wait for its end.
        signal.signal(signal.SIGINT, _stop)


@contextlib.contextmanager
def delayed(active: bool = True) -> Iterator[Signals]:
    """Keep signals for the caller to ask for; a second Ctrl-C raises Stopped at once.

    active: False changes nothing, and no signal is ever caught.
    """
    signals = Signals()
    if not active or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _handle(signals.catch)
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

"""SIGTERM and Ctrl-C: a command ends with one line, and status 128 + the signal's number.

    while it is imported     at once: nothing is open yet
    while it works           by the exception Stopped, so that drafts are removed on its way out;
                             where that does not get through, at once after GRACE seconds
    while a step is trained  after the step, which is saved (`delayed`)
    while Python ends        not at all: everything is done

A kill may come anywhere as well, and loses nothing that was written: a command that is told to stop
need only be quick. Imports nothing of the project, and no jax.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 2.0  # seconds for a command to end by the exception


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C asked the program to stop."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StoppedTogether(Stopped):
    """Several processes have agreed to stop here: it is raised in all of them."""


class _State:
    """Where the process stands."""

    may_leave = False  # the process may be ended wherever it is: there is nothing to save
    is_leaving = False  # what there is to say has been said
    is_watched = False
    is_registered = False
    tell = staticmethod(lambda text, status: None)  # tells others that work with this process
    ask = staticmethod(lambda: None)  # returns the signal to stop by, once others stop too


def words(signum: int) -> str:
    """Return the line that a command ends with."""
    return "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"


def end_at_once() -> None:
    """From here on, let a signal end the process where it is: imports, and the end itself."""

    def leave(signum, _frame):
        _leave(signum)

    _handle(leave)
    if not _State.is_registered:
        _State.is_registered = True
        atexit.register(_ignore)  # before jax is imported, so that it is called after jax's own


def _ignore() -> None:
    """Let signals do nothing more: as Python ends, it takes its handlers away."""
    _handle(signal.SIG_IGN)


def said() -> None:
    """Note that the command has said why it ends: nothing more is said."""
    _State.is_leaving = True


def tell(others) -> None:
    """Let other processes know before a signal ends this one: others(line, exit status)."""
    _State.tell = others


def _leave(signum: int) -> None:
    if not _State.is_leaving:
        with contextlib.suppress(OSError):
            os.write(2, f"{words(signum)}\n".encode())
    _State.tell(words(signum), 128 + signum)
    os._exit(128 + signum)


def end_by_exception() -> None:
    """From here on, let a signal raise Stopped."""
    _handle(_stop)
    _State.is_leaving = False
    _State.may_leave = True
    if not _State.is_watched and _is_main_thread():
        _State.is_watched = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reading,), daemon=True).start()
        sys.unraisablehook = _say_unraisable


def _say_unraisable(unraisable, say=sys.unraisablehook) -> None:
    """Say nothing of a Stopped that Python dropped: `_watch` ends the process."""
    if unraisable.exc_type is not Stopped:
        say(unraisable)


def _watch(reading: int) -> None:
    """End the process GRACE seconds after a signal whose exception did not end it.

    The main thread may be in a library for long, as while XLA compiles, or have been in a callback
    whose exceptions Python drops, as in the garbage collector's.
    """
    while True:
        signum = os.read(reading, 1)[0]
        if signum not in SIGNALS:
            continue
        time.sleep(GRACE)
        if _State.may_leave:
            _leave(signum)


def _stop(signum, _frame):
    raise Stopped(signum)


def _handle(handler) -> None:
    # Python calls handlers in the main thread, and lets no other one set them.
    if not _is_main_thread():
        return
    for signum in SIGNALS:
        # A shell ignores Ctrl-C for what it starts in the background.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def asked_between(ask: Callable[[], int | None]) -> Iterator[None]:
    """Within, let `may_stop` ask for the signal to stop by."""
    before, _State.ask = _State.ask, ask
    try:
        yield
    finally:
        _State.ask = before


def may_stop() -> None:
    """Raise StoppedTogether if several processes have agreed to: between batches of long work.

    A lone process needs no such place: its signal is raised wherever it is.
    """
    signum = _State.ask()
    if signum is not None:
        raise StoppedTogether(signum)


class Signals:
    """The signals that came while they were delayed."""

    def __init__(self, note: Callable[[], None] | None = None):
        """note: is called when a signal was caught, so that other processes know."""
        self.caught: int | None = None  # the first one
        self._raises = False
        self._note = note

    @contextlib.contextmanager
    def at_once(self, *, saves: bool) -> Iterator[None]:
        """Raise Stopped within, or on entry where a signal has come already.

        saves: whether the caller then has something to save, and so may not be ended otherwise.
        """
        if self.caught is not None:
            raise Stopped(self.caught)
        could_leave = _State.may_leave
        self._raises = True
        _State.may_leave = not saves
        try:
            yield
        finally:
            self._raises = False
            _State.may_leave = could_leave

    def catch(self, signum, _frame) -> None:
        """Handle a signal."""
        self.caught = self.caught or signum
        if self._raises:
            self._raises = False  # once: what follows is the way out
            raise Stopped(signum)
        if self._note:
            self._note()
        # A step may take long, and a person who presses Ctrl-C again will not wait for its end.
        signal.signal(signal.SIGINT, _stop)


@contextlib.contextmanager
def delayed(note: Callable[[], None] | None = None) -> Iterator[Signals]:
    """Keep signals for the caller to ask for; a second Ctrl-C raises Stopped at once.

    note: is called when a signal was caught, so that other processes know.
    """
    signals = Signals(note)
    if not _is_main_thread():
        yield signals
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    could_leave = _State.may_leave
    _handle(signals.catch)
    _State.may_leave = False
    try:
        yield signals
    finally:
        _State.may_leave = could_leave
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if signals.caught is not None:  # after the caller asked for the last time
        raise Stopped(signals.caught)

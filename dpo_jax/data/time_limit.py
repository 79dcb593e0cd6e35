"""A time limit for a program that a user's file holds, such as a chat template.

It works on any thread, unlike a signal: a second thread waits for the time to pass, and then raises
an exception in the one that is late. Python delivers it before the next instruction of Python code,
which a template's loop is made of.
"""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

CHECK_EVERY = 0.25  # seconds


class OutOfTime(BaseException):
    """The time is over. No Exception, so that nothing that is run under the limit catches it."""


class _Watch:
    """The thread that looks at all limits that are being waited for."""

    def __init__(self):
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # thread -> when its time is over
        self._thread: threading.Thread | None = None

    def begin(self, thread: int, seconds: float) -> None:
        with self._lock:
            self._ends[thread] = time.monotonic() + seconds
            # A fork keeps the object and loses its thread.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="time-limit", daemon=True)
                self._thread.start()

    def end(self, thread: int) -> bool:
        """Stop waiting for a thread; return whether its time was over."""
        with self._lock:
            return self._ends.pop(thread, None) is None

    def _run(self) -> None:
        while True:
            time.sleep(CHECK_EVERY)
            with self._lock:
                now = time.monotonic()
                for thread in [thread for thread, end in self._ends.items() if end < now]:
                    del self._ends[thread]
                    _raise_in(thread, ctypes.py_object(OutOfTime))


def _raise_in(thread: int, exception) -> None:
    """Raise an exception in a thread; None takes back one that has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


_watch = _Watch()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs within, once the time is over. Limits do not nest."""
    thread = threading.get_ident()
    is_late = False
    try:
        _watch.begin(thread, seconds)
        try:
            yield
        finally:
            is_late = _watch.end(thread)
            if is_late:
                _raise_in(thread, None)
    except OutOfTime:
        is_late = True
    if is_late:
        raise TimeoutError(f"not done within {seconds:g} seconds")

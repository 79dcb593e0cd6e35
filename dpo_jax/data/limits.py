"""Limits of time and memory for a program that a user's file holds, such as a chat template.

They work on any thread, unlike a signal: a second thread looks at what has passed, and raises an
exception in the one that is over a limit. Python delivers it before the next instruction of Python
code, which a template's loop is made of.
"""

import contextlib
import ctypes
import dataclasses
import os
import threading
import time
from collections.abc import Iterator

CHECK_EVERY = 0.1  # seconds


class OutOfTime(BaseException):
    """The time is over. No Exception, so that nothing that is run under the limit catches it."""


class OutOfMemory(BaseException):
    """The memory is used up. No Exception, for the same reason."""


@dataclasses.dataclass
class _Limit:
    """What one thread may use."""

    end: float  # when its time is over
    memory: int  # bytes
    most: int | None = None  # bytes that the process may hold, once it has been looked at

    def passed(self) -> type[BaseException] | None:
        """Return the exception for the limit that has been passed, if one has."""
        # Measured first at a look, a tenth of a second late: most of what is run is done by then.
        held = _memory_held()
        if self.most is None:
            self.most = held + self.memory
        if held > self.most:
            return OutOfMemory
        return OutOfTime if time.monotonic() > self.end else None


class _Watch:
    """The thread that looks at all limits that are being waited for."""

    def __init__(self):
        self._lock = threading.Lock()
        self._limits: dict[int, _Limit] = {}  # by thread
        self._thread: threading.Thread | None = None

    def begin(self, thread: int, limit: _Limit) -> None:
        with self._lock:
            self._limits[thread] = limit
            # A fork keeps the object and loses its thread.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="limits", daemon=True)
                self._thread.start()

    def end(self, thread: int) -> bool:
        """Stop looking at a thread; return whether it had passed its limit."""
        with self._lock:
            return self._limits.pop(thread, None) is None

    def _run(self) -> None:
        while True:
            time.sleep(CHECK_EVERY)
            with self._lock:
                for thread, limit in list(self._limits.items()):
                    passed = limit.passed()
                    if passed:
                        del self._limits[thread]
                        _raise_in(thread, ctypes.py_object(passed))


def _raise_in(thread: int, exception) -> None:
    """Raise an exception in a thread; None takes back one that has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


def _memory_held() -> int:
    """Return the bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, pages, *_ = file.read().split()
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


_watch = _Watch()


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Raise TimeoutError or MemoryError in what runs within, once it has passed a limit.

    memory: bytes by which the process may grow meanwhile. Limits do not nest.
    """
    thread = threading.get_ident()
    is_over = False
    try:
        _watch.begin(thread, _Limit(time.monotonic() + seconds, memory))
        try:
            yield
        finally:
            is_over = _watch.end(thread)
            if is_over:
                _raise_in(thread, None)
    except OutOfMemory:
        raise MemoryError(f"more than {memory:,} bytes") from None
    except OutOfTime:
        is_over = True
    if is_over:
        raise TimeoutError(f"not done within {seconds:g} seconds")

"""Signals as they were before a command ran in this process."""

import contextlib
import signal

from dpo_jax import stopping


@contextlib.contextmanager
def signals_as_before():
    """Let signals do after a command what they did before: it would end this process by them."""
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        yield
    finally:
        stopping._State.may_leave = stopping._State.is_leaving = False
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""Limits of the system for a test, which any user may set for a process."""

import contextlib
import resource


@contextlib.contextmanager
def file_size(size: int):
    """Let no file grow beyond a size, in bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

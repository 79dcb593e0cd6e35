"""What a process is started with: its streams, and its home folder.

Neither is the user's mistake, and neither may end a day's training: output that cannot be written
is dropped, a character that a terminal lacks is written as its number, and without a home folder
libraries get an empty one. Imports nothing of the project, and no jax.
"""

import os
import sys
import tempfile


def prepare() -> None:
    """Make the streams and the home folder such that every library can work with them."""
    _open_streams()
    _find_home()


def _open_streams() -> None:
    """Open what was closed, and make both streams take every character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process
        stream = getattr(sys, name)
        # Others' streams, as a notebook's, have no such method.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _find_home() -> None:
    """Give the process an empty home folder where it has none that could be named.

    Libraries would write to a folder that is called ~.
    """
    if os.path.expanduser("~") == "~":  # no HOME, and no entry in the list of users
        os.environ["HOME"] = tempfile.mkdtemp(prefix="dpo_jax-home-")


def drop_output(stream) -> None:
    """Throw away what is written to a stream from now on: its reader has gone, or its disk is full.

    Python would otherwise write what is left at exit, and complain.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

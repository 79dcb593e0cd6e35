"""Surroundings of a command that lack what a process usually has."""

import pathlib

from tests.helpers import tiny_runs
from tests.helpers.paths import ROOT

# Python runs it first of all.
SITE = """
import errno, fcntl, os, pwd

def nobody(*_):
    raise KeyError("getpwuid(): uid not found")

def unlockable(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

pwd.getpwuid = nobody
fcntl.flock = unlockable
"""


def environment(folder: pathlib.Path, devices: int = 1) -> dict[str, str]:
    """Return an environment without a home, a list of users, locks and UTF-8; write to a folder."""
    (folder / "sitecustomize.py").write_text(SITE)
    found = tiny_runs.environment(devices) | dict(
        PYTHONPATH=f"{folder}:{ROOT}", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0"
    )
    found.pop("HOME", None)
    return found

"""Hide torch from a command: requirements.txt has none, and transformers imports it if it is there.

Python imports this file as it starts where this folder is on PYTHONPATH (tests/conftest.py).
"""

import importlib.machinery
import sys


class Finder(importlib.machinery.PathFinder):
    """Find every module but torch."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname == "torch":
            return None
        return super().find_spec(fullname, path, target)


place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Finder

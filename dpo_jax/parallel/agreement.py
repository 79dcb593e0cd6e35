"""Checks that all processes have the same settings, rows, tokens and weights, before they use them.

Each host reads its own files, and a copy that differs on one host would be mixed in unnoticed.
Every process calls these functions, and all raise the same error.
"""

import hashlib
import json
import pathlib
import socket
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import warn
from dpo_jax.contents import file_hashes
from dpo_jax.parallel import processes
from dpo_jax.storage.addresses import is_address, shown

NAMED = 8  # further values that an error names
SAME_COMMAND = "Start all of them with the same command."
SAME_FILES = "Give a folder that all hosts share, or copy the same files to each."
SAME_ROWS = f"{SAME_FILES} Where they are the same files, the tokenizers are not."


def check_same(values: Callable[[], dict], remedy: str) -> None:
    """Check that values are the same in all processes.

    values: returns name -> what JSON holds; it is not called in a lone process. Raises ValueError
    with the names of those that differ, and where.
    """
    if jax.process_count() == 1:
        return
    mine = {shown(name): value for name, value in values().items()}
    if not _is_same(mine):
        raise ValueError(f"{_difference(mine)} All processes must have the same. {remedy}")


def check_same_files(files: dict[str, pathlib.Path]) -> None:
    """Check that files hold the same in all processes.

    On storage that all share they are the same files, and are not read. files: the name of each in
    an error -> its path. Raises ValueError with one that differs, and where.
    """
    if jax.process_count() == 1:
        return
    states = {}
    for name, path in files.items():
        stat = path.stat()
        # Each host has its own path to a copy of what a bucket holds.
        states[shown(name)] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if _is_same(states):
        return

    def hashes():
        found = zip(files, file_hashes(list(files.values())), strict=True)
        return {name: f"sha256 {sha256[:16]}" for name, sha256 in found}

    check_same(hashes, SAME_FILES)


def say_own_caches() -> None:
    """Say so where hosts keep compiled programs in folders of their own: process 0 alone writes."""
    if jax.process_count() == 1:
        return
    folder = jax.config.jax_compilation_cache_dir
    is_local = bool(folder) and not is_address(folder)
    # Where process 0 keeps none, that has been said.
    if not processes.from_first(lambda: is_local):
        return
    if not processes.who_sees(folder).all():
        warn(
            f"compiled programs are kept by process 0 alone, in its own {folder}, so at each start "
            "the other hosts compile anew. Name a folder that all hosts share in "
            "JAX_COMPILATION_CACHE_DIR, or one in a bucket, gs://BUCKET/compiled."
        )


def _is_same(values: dict) -> bool:
    """Return whether values are the same in all processes."""
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(values, default=str).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    return bool((digests == digests[0]).all())


def _difference(mine: dict) -> str:
    """Say how the first process that differs from process 0 does."""
    sent = json.dumps(dict(host=socket.gethostname(), values=mine), default=str)
    first, *others = [json.loads(text) for text in processes.gathered(sent.encode())]
    number, other = next(
        (number, other)
        for number, other in enumerate(others, 1)
        if other["values"] != first["values"]
    )
    return difference(first, other, number)


def difference(first: dict, other: dict, number: int) -> str:
    """Say which values of a process differ from those of process 0; each has a host and values."""
    absent = "(absent)"
    # By the order of process 0, as the first is the one that is shown.
    differing = []
    for name in {**first["values"], **other["values"]}:
        if other["values"].get(name, absent) != first["values"].get(name, absent):
            differing.append(name)
    name, *more = differing
    its, expected = (each["values"].get(name, absent) for each in (other, first))
    told = (
        f"{name}: {its!r} in process {number} on {other['host']}, but {expected!r} in process 0 on "
        f"{first['host']}."
    )
    if more:
        told += f" Also different: {', '.join(more[:NAMED])}{' and more' * (len(more) > NAMED)}."
    return told

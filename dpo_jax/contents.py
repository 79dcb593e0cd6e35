"""What files and folders hold, known again by its sha256, whatever they are called."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib

from dpo_jax.console import say
from dpo_jax.data import mixtures
from dpo_jax.data.sources import SOURCES
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import is_address, repository_of

LONG_READ = 4 * 10**9  # bytes, several seconds of work
# Weights in formats that are never read here, and cards, which lie beside what is read.
_UNREAD = (".bin", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".ot", ".pt", ".pth")
# Of a folder of data: rows, perhaps compressed, and what says which files are of which split. A
# folder of other things may hold data too, and runs with their checkpoints.
_DATA = (".arrow", ".csv", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".tsv")

# (path, size, time, inode) -> sha256: a model may be a stage's result, the start of the next one
# and its reference, and the runs of a sweep share stages.
_hashes: dict[tuple, str] = {}


def file_hashes(paths: list[pathlib.Path]) -> list[str]:
    """Return the sha256 of each file, "" for what is none; each state of a file is read once.

    Says so where that takes long.
    """
    states = [_state(path) for path in paths]
    unread = [state for state in states if state and state not in _hashes]
    size = sum(size for _, size, *_ in unread)
    if size > LONG_READ:
        path, *_ = unread[0]
        say(f"reading {size / 1e9:.0f} GB in {path.parent}, to know it by its sha256")
    # Large files are in a few pieces, and hashing lets go of the interpreter.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        _hashes.update(zip(unread, pool.map(_hash, unread), strict=True))
    return [_hashes[state] if state else "" for state in states]


def _state(path: pathlib.Path) -> tuple | None:
    """Return what is another once a file is written again; None for what is no file."""
    if not path.is_file():
        return None
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ino


def _hash(state: tuple) -> str:
    path, *_ = state
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents_of(field: str, value: str) -> str:
    """Return the sha256 of what a path in the config leads to; "" where that is not known.

    field: one of `changes.PATHS`. Known are files and folders, here and in buckets; names on the
    hub are not.
    """
    is_data = field.startswith("data.")
    if field != "data.mix":
        return _contents_of_path(value, is_data=is_data)
    sets = []
    for ingredient in mixtures.parse(value, SOURCES):
        # A name on the hub stands for what it holds.
        held = _contents_of_path(ingredient.path, is_data=is_data) or ingredient.path
        sets.append(dataclasses.asdict(ingredient) | dict(name="", path=held))
    return _sha256_of(sets) if sets else ""


def _contents_of_path(path: str, *, is_data: bool) -> str:
    """Return the sha256 of a file or folder, "" where there is none; data may end in :SUBSET."""
    whole, _, subset = path.rpartition(":")
    for name, part in ((path, ""), (whole, subset)):
        found = _here(name, is_data)
        if found is None:
            continue
        held = _contents_of_folder(found, is_data) if found.is_dir() else file_hashes([found])
        return _sha256_of([held, part])
    return ""


def _here(path: str, is_data: bool) -> pathlib.Path | None:
    """Return the file or folder of a path; what is in a bucket is copied here before."""
    if not path:
        return None
    if not is_address(path):
        found = pathlib.Path(path).expanduser()
        return found if found.exists() else None
    if repository_of(path):
        return None
    try:
        wanted = functools.partial(_is_read, is_data=is_data)
        return shadow.fetch(path, lambda name, _: wanted(pathlib.PurePosixPath(name)))
    except FileNotFoundError:  # said by what reads it
        return None


def _contents_of_folder(folder: pathlib.Path, is_data: bool) -> list:
    """Return name and sha256 of each file in a folder that may be read."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if _is_read(name, is_data=is_data) and path.is_file():
            names.append(name.as_posix())
    return [names, file_hashes([folder / name for name in names])]


def _is_read(name: pathlib.PurePath, *, is_data: bool) -> bool:
    if not name.parts:  # the one file that an address stands for
        return True
    # Hidden are caches, and what tools have left.
    if any(part.startswith(".") for part in name.parts):
        return False
    if is_data:
        return any(suffix.lower() in _DATA for suffix in name.suffixes)
    # In folders of a model's are other things, such as a trainer's checkpoints.
    return len(name.parts) == 1 and name.suffix not in _UNREAD


def _sha256_of(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

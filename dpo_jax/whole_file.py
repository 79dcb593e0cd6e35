"""Files that are written whole or not at all, and known again. This file imports no jax."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield the path of a draft, which takes the file's place once it is written.

    A kill or an error leaves the old file, or none.
    """
    path = pathlib.Path(path)
    # Two processes may be about to make the same file, so each writes a draft of its own.
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        with naming(path):
            yield draft
        os.replace(draft, path)  # a rename within a folder is atomic
    finally:
        draft.unlink(missing_ok=True)


def append(path: str | os.PathLike, data: bytes) -> None:
    """Append to a file; a kill may leave a part of the data there, a full disk leaves none."""
    with naming(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(data)
        try:
            while rest:
                written = file.write(rest)
                rest = rest[written:]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give errors of writing to a file its name, which that of a full disk does not have."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def parse_object(line: bytes) -> dict | None:
    """Return the JSON object in a line of a file; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # JSON's own error, and that of UTF-8
        return None
    return value if isinstance(value, dict) else None


def parse_sealed(line: bytes) -> dict | None:
    """Return the object in a line that was written by `with_sha256`, without its sha256.

    None where the line is not what was written. An object without a sha256 is taken as it is.
    """
    value = parse_object(line)
    if value is None or ("sha256" in value and value.pop("sha256") != _sha256_of(value)):
        return None
    return value


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Rename a damaged file to NAME.damaged, or NAME.damaged2 and so on; return the new path."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.damaged{number}")
        number += 1
    path.rename(aside)
    return aside


def with_sha256(record: dict) -> dict:
    """Return a JSON object with its own sha256 in it, by which `read_record` knows it again."""
    return record | dict(sha256=_sha256_of(record))


def read_record(path: str | os.PathLike, remedy: str, **fields: type) -> dict:
    """Return the JSON object in a file, without its sha256.

    fields: types of those that are used. An object without a sha256 is of an earlier version, and
    may lack fields. Raises ValueError that ends with `remedy` where the file is not what was
    written.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    found = ""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        found = "it is empty" if not data else f"its {len(data):,} bytes are not JSON"
        value = {}
    if not isinstance(value, dict):
        found = f"it holds {type(value).__name__} in place of an object"
    elif "sha256" in value and value.pop("sha256") != _sha256_of(value):
        found = "its content is not that of its sha256"
    else:
        found = found or _wrong_field(value, fields)
    if found:
        raise ValueError(f"{path} is not what was written there: {found}. {remedy}")
    return value


def _wrong_field(value: dict, fields: dict[str, type]) -> str:
    """Say which field of an object is of another type than it was written with; "" for none."""
    for name, expected in fields.items():
        if name in value and not isinstance(value[name], expected):
            found = type(value[name]).__name__
            return f"its {name!r} is {found} in place of {expected.__name__}"
    return ""


def _sha256_of(value: dict) -> str:
    """Return the sha256 of what JSON keeps of an object, whatever the order of its keys."""
    # Through a file, keys become text and tuples lists.
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

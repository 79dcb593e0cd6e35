"""Files that are written whole or not at all, and known again. This file imports no jax."""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Iterator


class IsoDate(str):
    """The kind of a field that is the text of a date, as 2026-01-31."""


# What a field of a record was written as: a type or one of several, or an object with fields, which
# has all of them.
Kind = type | types.UnionType | dict[str, "Kind"]


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
    return None if value is None else without_sha256(value)


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


def without_sha256(record: dict) -> dict | None:
    """Return an object without its sha256, if it has one; None where it is not that of its content.

    The object itself is left as it is.
    """
    content = {name: value for name, value in record.items() if name != "sha256"}
    if "sha256" in record and record["sha256"] != _sha256_of(content):
        return None
    return content


def read_record(path: str | os.PathLike, remedy: str, **fields: Kind) -> dict:
    """Return the JSON object in a file, without its sha256.

    fields: types of those that are used. An object without a sha256 is of an earlier version, and
    may lack fields. Raises ValueError that ends with `remedy` where the file is not what was
    written.
    """
    data = pathlib.Path(path).read_bytes()
    record, found = _content_of(data)
    found = found or _wrong_field(record, fields)
    if found:
        raise ValueError(f"{path} is not what was written there: {found}. {remedy}")
    return record


def _content_of(data: bytes) -> tuple[dict, str]:
    """Return the object in a file without its sha256, and what is wrong with it; "" for nothing."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}, f"its {len(data):,} bytes are not JSON" if data else "it is empty"
    if not isinstance(value, dict):
        return {}, f"it holds {type(value).__name__} in place of an object"
    content = without_sha256(value)
    if content is None:
        return {}, "its content is not that of its sha256"
    return content, ""


def _wrong_field(value: dict, fields: dict[str, Kind]) -> str:
    """Say which field of an object is of another type than it was written with; "" for none."""
    for name, kind in fields.items():
        if name not in value:
            continue
        found = value[name]
        expected = dict if isinstance(kind, dict) else kind
        if kind is IsoDate:
            if not _is_date(found):
                return f"its {name!r} is {found!r} in place of a date, as 2026-01-31"
        elif not isinstance(found, expected):
            is_one = isinstance(expected, type)
            wanted = expected.__name__ if is_one else str(expected)
            return f"its {name!r} is {type(found).__name__} in place of {wanted}"
        elif isinstance(kind, dict):
            lacking = [inner for inner in kind if inner not in found]
            wrong = f"there is no {lacking[0]!r}" if lacking else _wrong_field(found, kind)
            if wrong:
                return f"in its {name!r}, {wrong}"
    return ""


def _is_date(value) -> bool:
    try:
        datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _sha256_of(value: dict) -> str:
    """Return the sha256 of what JSON keeps of an object, whatever the order of its keys."""
    # Through a file, keys become text and tuples lists.
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

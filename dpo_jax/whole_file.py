"""Files that are written whole or not at all. This file imports no jax."""

import contextlib
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
        yield draft
        os.replace(draft, path)  # a rename within a folder is atomic
    finally:
        draft.unlink(missing_ok=True)

"""Buckets: list, read, write and remove objects, and explain refusals.

Through fsspec, with gcsfs for gs://, s3fs for s3:// and huggingface_hub for hf://. Each object is
written whole or not at all. Imports no jax.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import re
import secrets

from dpo_jax.storage.addresses import bucket_of, scheme_of

# Scheme -> the package that reads it, and what to install.
PACKAGES = {
    "gs": ("gcsfs", "pip install gcsfs"),
    "s3": ("s3fs", "pip install s3fs"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
}
# Scheme -> how a machine gets leave.
CREDENTIALS = {
    "gs": "gcloud auth application-default login, or a service account with the role "
    "roles/storage.objectAdmin on the bucket, and roles/storage.legacyBucketReader for "
    "storage.buckets.get",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, or the machine's role",
    "hf": "HF_TOKEN, for what is not public",
}
# Fields by which an object is known again, one of which each kind of bucket has.
_VERSIONS = ("generation", "ETag", "etag", "blob_id", "md5Hash", "mtime")


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object: its size in bytes, and what tells it from others that were there before it."""

    size: int
    version: str


def find(address: str) -> dict[str, Stored]:
    """Return what is under an address, by names relative to it; "" for the object itself.

    Empty where nothing is there. Raises OSError where the bucket refuses.
    """
    with _explained(address, "listed"):
        files = _files(scheme_of(address))
        base = files._strip_protocol(address)
        listed = files.find(base, detail=True)
        if not listed:
            # A bucket that does not exist looks empty to some.
            files.ls(files._strip_protocol(bucket_of(address)))
    found = {}
    for path, info in listed.items():
        # Some tools mark folders by empty objects.
        is_inside = path == base or path.startswith(base + "/")
        if is_inside and not path.endswith("/"):
            found[path[len(base) + 1 :]] = _stored(info)
    return found


def stored(address: str) -> Stored | None:
    """Return an object's size and version; None where there is none."""
    try:
        with _explained(address, "read"):
            return _stored(_files(scheme_of(address)).info(address))
    except FileNotFoundError:
        return None


def read(address: str) -> bytes:
    """Return what an object holds; FileNotFoundError where there is none."""
    with _explained(address, "read"):
        return _files(scheme_of(address)).cat_file(address)


def download(address: str, path: pathlib.Path) -> None:
    """Copy an object to a path of this machine."""
    with _explained(address, "read"):
        _files(scheme_of(address)).get_file(address, str(path))


def upload(path: pathlib.Path, address: str) -> None:
    """Copy a file of this machine to an object."""
    with _explained(address, "written"):
        _files(scheme_of(address)).put_file(str(path), address)


def write(address: str, data: bytes, *, new: bool = False) -> None:
    """Write an object. new: raise FileExistsError where there is one."""
    with _explained(address, "written"):
        _files(scheme_of(address)).pipe_file(address, data, mode="create" if new else "overwrite")


def remove(address: str) -> None:
    """Remove an object, which may be gone already."""
    with contextlib.suppress(FileNotFoundError), _explained(address, "removed"):
        _files(scheme_of(address)).rm_file(address)


def check(address: str) -> None:
    """Raise OSError, with what to do, where a folder of a bucket cannot be written and listed."""
    files = _files(scheme_of(address))
    # In containers all processes may have the same number.
    probe = f"{address}/.probe-{secrets.token_hex(4)}"
    with _explained(address, "written"):
        files.pipe_file(probe, b"")
        files.rm_file(probe)
    if scheme_of(address) == "gs":
        # Orbax asks for the bucket itself, when it removes a checkpoint.
        with _explained(bucket_of(address), "described"):
            _files("gs").info(bucket_of(address))


def prepare_clients() -> None:
    """Set what clients read from the environment; to be called before any of them is imported."""
    # gcsfs would ask for a bucket's kind by another protocol, which emulators and proxies lack.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # It prints a traceback of each refusal, which is then told in a paragraph.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


@functools.cache
def _files(scheme: str):
    """Return fsspec's file system for a scheme, which keeps no listings: others write there too."""
    prepare_clients()
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def _stored(info: dict) -> Stored:
    version = next((info[name] for name in _VERSIONS if info.get(name)), info["size"])
    return Stored(int(info["size"] or 0), str(version))


@contextlib.contextmanager
def _explained(address: str, verb: str):
    """Raise what a bucket answers as an OSError that says what to do."""
    scheme = scheme_of(address)
    try:
        yield
    except ImportError as error:
        package, command = PACKAGES[scheme]
        raise ImportError(f"{address}: {scheme}:// needs {package}: {command}") from error
    except (FileExistsError, MemoryError):
        raise
    except FileNotFoundError as error:
        bucket = bucket_of(address)
        if address != bucket and verb in ("read", "removed"):
            raise FileNotFoundError(f"{address} does not exist.") from error
        raise FileNotFoundError(
            f"{address} cannot be {verb}: there is no bucket {bucket}, or you may not see it. "
            "Check the name, or make the bucket first."
        ) from error
    except Exception as error:  # noqa: BLE001 - clients and their credentials have many
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # of this machine's disk
        if _may_pass(error, scheme):
            raise TimeoutError(
                f"{address} cannot be {verb} at present ({type(error).__name__}: "
                f"{_first_line(error)}), although it was tried several times. Run the same command "
                "again later."
            ) from error
        raise OSError(_refusal(address, verb, error)) from error


def _may_pass(error: Exception, scheme: str) -> bool:
    """Return whether a bucket was not reached or too busy, which its client has tried again."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if scheme == "gs":
        from gcsfs.retry import is_retriable
        from google.auth.exceptions import RefreshError

        # Credentials that have expired do not come back by waiting.
        return is_retriable(error) and not isinstance(error, RefreshError)
    if scheme == "s3":
        from botocore.exceptions import ConnectionError as Unreached
        from botocore.exceptions import HTTPClientError

        is_busy = isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO)
        return is_busy or isinstance(error, Unreached | HTTPClientError)
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _refusal(address: str, verb: str, error: Exception) -> str:
    named = re.search(r"\b(?:storage\.(?!googleapis)\w+\.\w+|s3:\w+)", str(error))
    # Where a permission is named, it stands at the end of a long text.
    missing = f" The permission that is missing is {named[0]}." if named else ""
    return (
        f"{address} cannot be {verb} ({type(error).__name__}: {_first_line(error)}).{missing} See "
        "that the bucket exists and that this machine may use it: "
        f"{CREDENTIALS[scheme_of(address)]}."
    )

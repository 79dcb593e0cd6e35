"""Addresses in buckets, and the place of their copies on this machine.

    gs://BUCKET/run/dpo/done.json  <->  SHADOW/gs/BUCKET/run/dpo/done.json

SHADOW is ~/.cache/dpo_jax/shadow, or what DPO_JAX_SHADOW names. Imports no jax.
"""

import os
import pathlib
import re

SHADOW = "~/.cache/dpo_jax/shadow"
SCHEMES = ("gs", "s3", "hf")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/{1,2}(?=[^/])(.*)", re.DOTALL)


def is_address(path: str | os.PathLike) -> bool:
    """Return whether a path is an address in a bucket, such as gs://BUCKET/run."""
    return _ADDRESS.fullmatch(str(path)) is not None


def normal(path: str | os.PathLike) -> str:
    """Return an address as SCHEME://BUCKET/KEY; ValueError for a scheme that is not known.

    pathlib turns the two slashes into one, as a person may.
    """
    scheme, rest = _ADDRESS.fullmatch(str(path)).groups()
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(
            f"{path}: expected a path on this machine, or one that begins with {known}."
        )
    if ".." in parts:
        raise ValueError(f"{path}: expected an address without '..'.")
    return f"{scheme}://{'/'.join(parts)}"


def scheme_of(address: str) -> str:
    """Return gs, s3 or hf."""
    return address.partition("://")[0]


def repository_of(path: str | os.PathLike) -> str:
    """Return the name of the hub's repository that an address is; "" for any other address."""
    scheme, _, rest = normal(path).partition("://")
    parts = rest.removeprefix("datasets/").split("/")
    return "/".join(parts) if scheme == "hf" and len(parts) <= 2 else ""


def bucket_of(address: str) -> str:
    """Return the address of the bucket alone."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def local_path(address: str) -> pathlib.Path:
    """Return where the copy of what is at an address is, or would be."""
    scheme, _, rest = address.partition("://")
    return shadow_root() / scheme / rest


def address_of(path: str | os.PathLike) -> str:
    """Return the address whose copy a path is; "" for a path that is no copy."""
    path = pathlib.Path(path)
    root = shadow_root()
    if not path.is_relative_to(root):
        return ""
    scheme, *parts = path.relative_to(root).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if scheme in SCHEMES and parts else ""


def shadow_root() -> pathlib.Path:
    """Return the folder of all copies; ValueError where there is no home folder to put it in."""
    folder = os.path.expanduser(os.environ.get("DPO_JAX_SHADOW") or SHADOW)
    if folder.startswith("~"):
        raise ValueError(
            "there is no home folder for the copies of files in buckets: name a folder in "
            "DPO_JAX_SHADOW."
        )
    return pathlib.Path(folder).absolute()


def shown(text: str) -> str:
    """Return a text for a person, with addresses in place of the paths of their copies."""
    try:
        root = shadow_root()
    except ValueError:
        return text
    return re.sub(rf"{re.escape(str(root))}/({'|'.join(SCHEMES)})/", r"\1://", text)

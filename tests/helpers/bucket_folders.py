"""Buckets that are folders of this machine: what dpo_jax.storage asks of one, without a server."""

import pathlib

from fsspec.implementations.local import LocalFileSystem

from dpo_jax.storage import buckets, lease, shadow


class BucketFolders(LocalFileSystem):
    """A file system in which s3://BUCKET/KEY is ROOT/BUCKET/KEY."""

    cachable = False
    root: pathlib.Path

    @classmethod
    def _strip_protocol(cls, path):
        text = str(path)
        if "://" in text:
            text = f"{cls.root}/{text.partition('://')[2]}"
        return super()._strip_protocol(text)


def use(monkeypatch, root: pathlib.Path, shadow_folder: pathlib.Path) -> None:
    """Let buckets be folders under a root, and copies be in a folder, as on an empty machine."""
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    folders = type("Folders", (BucketFolders,), {"root": root})(auto_mkdir=True)
    monkeypatch.setattr(buckets, "_files", lambda scheme: folders)
    monkeypatch.setenv("DPO_JAX_SHADOW", str(shadow_folder))
    monkeypatch.setattr(shadow, "_own", set())
    monkeypatch.setattr(lease, "_lost", set())
    monkeypatch.setattr(lease, "SETTLE", 0)

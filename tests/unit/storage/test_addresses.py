"""Addresses and the places of their copies."""

import pathlib

import pytest

from dpo_jax.storage import addresses, shadow


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "gs:/bucket/run", "gs://bucket//run/", "gs://bucket/./run"]
)
def test_address_is_understood(path):
    assert addresses.is_address(path)
    assert addresses.normal(path) == "gs://bucket/run"
    # pathlib takes one of the slashes.
    assert addresses.normal(pathlib.Path(path)) == "gs://bucket/run"


@pytest.mark.parametrize("path", ["run", "/run", "./gs/run", "C:run", "a:b/c", "owner/name"])
def test_path_is_no_address(path):
    assert not addresses.is_address(path)


@pytest.mark.parametrize("path", ["ftp://host/run", "https://host/run", "gs://bucket/../other"])
def test_other_addresses_are_refused(path):
    with pytest.raises(ValueError, match="expected"):
        addresses.normal(path)


def test_copies_are_told_by_their_address(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_JAX_SHADOW", str(tmp_path))
    copy = addresses.local_path("gs://bucket/run/done.json")
    assert copy == tmp_path / "gs" / "bucket" / "run" / "done.json"
    assert addresses.address_of(copy) == "gs://bucket/run/done.json"
    assert addresses.address_of(tmp_path / "other") == addresses.address_of("runs/toy") == ""
    assert addresses.shown(f"{copy} is gone") == "gs://bucket/run/done.json is gone"


def test_hub_cannot_be_written_to():
    with pytest.raises(ValueError, match="can be read alone"):
        shadow.place("hf://owner/name/run")
    assert addresses.repository_of("hf://datasets/owner/name") == "owner/name"
    assert addresses.repository_of("hf://datasets/owner/name/rows.jsonl") == ""

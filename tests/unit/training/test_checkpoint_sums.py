"""Sums of bits: exact, the same on any mesh, and different after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.training.checkpoint_sums import sums


def values(dtype):
    return np.random.default_rng(0).normal(size=(8, 4)).astype(jnp.dtype(dtype))


def by_hand(array):
    """The first sum in plain numpy, and the second one number at a time."""
    bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize]).ravel().tolist()
    mixed = 0
    for place, number in enumerate(bits):
        both = ((number ^ (place * 0x9E3779B9)) & 0xFFFFFFFF) * 0x85EBCA6B & 0xFFFFFFFF
        mixed += both ^ (both >> 15)
    return [sum(bits) % 2**32, mixed % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_sums_are_those_of_the_bits(dtype):
    assert sums({"a": {"b": jnp.asarray(values(dtype))}}) == {"a/b": by_hand(values(dtype))}


def test_sums_are_the_same_on_any_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    array = values("float32")
    wanted = sums([jnp.asarray(array)])
    for spec in (PartitionSpec(), PartitionSpec("x"), PartitionSpec("y", "x")):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert sums([placed]) == wanted


def test_sums_show_each_bit_and_each_place():
    array = values("float32")
    seen = [sums([jnp.asarray(array)])["0"]]
    for bit in range(32):
        changed = array.copy()
        changed.view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
        seen.append(sums([jnp.asarray(changed)])["0"])
    swapped = array.copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    seen.append(sums([jnp.asarray(swapped)])["0"])
    # The numbers are the same ones.
    assert seen[-1][0] == seen[0][0]
    assert len({tuple(pair) for pair in seen}) == len(seen)

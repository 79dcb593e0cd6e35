"""Sums of a state's bits, by which a checkpoint is known to be what was saved.

They are integers modulo 2^32, so they are exact and the same on any mesh and in any number of
processes. Computing them reads the state once: 12 bytes a parameter with AdamW, 8 with RMSprop, at
the speed of the device's memory.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Unsigned integers of the same width as a number, by its bytes.
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Odd constants of well-known integer hashes: Fibonacci hashing, and MurmurHash3's last step.
_GOLDEN = np.uint32(0x9E3779B9)
_MURMUR = np.uint32(0x85EBCA6B)


def sums(tree) -> dict[str, list[int]]:
    """Return two sums for each array of a tree, by its path: {"params/embed/tokens": [3, 7]}.

    The first adds up the bits of all numbers, so any change of one number shows. The second mixes
    each number with its position, so numbers that changed places show too.
    """
    paths = [_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    values = np.asarray(_sums(jax.tree.leaves(tree)))
    return dict(zip(paths, values.tolist(), strict=True))


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sums_of_one(leaf) for leaf in leaves])


def _sums_of_one(values: jax.Array) -> jax.Array:
    """Return both sums of an array, uint32 [2]."""
    unsigned = _UNSIGNED[values.dtype.itemsize]
    if values.dtype == bool:
        bits = values.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(values, unsigned).astype(jnp.uint32)
    mixed = (bits ^ (_positions(values.shape) * _GOLDEN)) * _MURMUR
    mixed = mixed ^ (mixed >> 15)
    both = [bits.sum(dtype=jnp.uint32), mixed.sum(dtype=jnp.uint32)]
    return jnp.stack(both)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """Return the place of each number in an array, modulo 2^32."""
    positions = jnp.zeros(shape, jnp.uint32)
    stride = 1
    # From the last axis, along which neighbours lie.
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        positions += along * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return positions


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

"""What the devices at hand can do: FLOP/s of matrix products, by data sheet or measured."""

import functools
import time

import jax
import jax.numpy as jnp

from dpo_jax.topologies import chip_of


def flops_per_second(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Of all devices of the mesh: their peak, or of CPUs and unknown chips what a square product reaches."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return measured_flops_per_second(dtype) * jax.process_count()  # a process's devices share its cores
    chip = chip_of(device)
    if chip is None:
        return measured_flops_per_second(dtype) * mesh.size
    return (chip.flops if dtype == "bfloat16" else chip.float32_flops) * mesh.size


@functools.cache
def measured_flops_per_second(dtype: str, size: int = 0) -> float:
    """Of the fastest of five products of square matrices on one device."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    product = jax.jit(jnp.matmul)
    a = jnp.full((size, size), 0.5, dtype)
    seconds = []
    for _ in range(6):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])

"""Measure the device of a side that runs on jax.

A peer's Python imports this too, so it imports nothing of dpo_jax that needs more than jax.
"""

import jax

from dpo_jax.parallel.hardware import measured_flops_per_second
from experiments.benchmark.worker import peak_resident_bytes

CPU = jax.default_backend() == "cpu"


def ceiling(dtype: str) -> float:
    """Return the FLOP/s of the fastest of five square matrix products."""
    measure_anew = measured_flops_per_second.__wrapped__  # the function itself keeps its answer
    return measure_anew(dtype, 2048 if CPU else 8192)


def peak_bytes() -> int:
    """Return the most memory held so far: the process's on a CPU, else the device's."""
    if CPU:
        return peak_resident_bytes()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

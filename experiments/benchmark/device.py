"""What a side that runs on jax measures of its device. Imports no more of dpo_jax than a peer's
Python can.
"""

import jax

from dpo_jax.parallel.hardware import measured_flops_per_second
from experiments.benchmark.worker import peak_resident_bytes

CPU = jax.default_backend() == "cpu"


def ceiling(dtype: str) -> float:
    """FLOP/s of the fastest of five square matrix products, measured anew at each call."""
    return measured_flops_per_second.__wrapped__(dtype, 2048 if CPU else 8192)


def peak_bytes() -> int:
    """The most memory held so far: the process's on a CPU, else the device's."""
    return peak_resident_bytes() if CPU else jax.devices()[0].memory_stats()["peak_bytes_in_use"]

"""Chips: their data sheets, which one a device is, and what matrix products reach on it."""

import functools
import os
import pathlib
import platform
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Chip:
    hbm_gib: float  # that a program may use
    flops: float  # products of bfloat16 a second, with float32 sums, two operations each
    float32_flops: float  # of float32 products that are not rounded
    bandwidth: float  # of its memory, bytes a second
    link: float  # to a neighbour, one way, bytes a second; of a GPU to all others
    torus: int = 0  # dimensions of the network; 0: a switch joins all chips of a machine
    wraps: int = 1  # a dimension of a multiple of this many chips is closed to a ring
    cores: int = 1  # per chip, in its name at Google Cloud
    # Of a GPU's share of its machine's network, one way, bytes a second; 0: none is known.
    network: float = 0


# Peak rates, bandwidths and links as docs.cloud.google.com/tpu and nvidia.com give them (a TPU's
# figure for its interconnect, halved for one way and divided by its ports); memory as the TPU
# compiler and the GPU data sheets do. A TPU makes a float32 product of six of bfloat16. A machine
# of GPUs has a network card for each: of 200 Gbit/s (DGX A100) or 400 (DGX H100).
CHIPS = {
    "v4": Chip(30.75, 275e12, 275e12 / 6, 1228e9, 50e9, torus=3, wraps=4, cores=2),
    "v5e": Chip(15.75, 197e12, 197e12 / 6, 819e9, 50e9, torus=2, wraps=16),
    "v5p": Chip(95.74, 459e12, 459e12 / 6, 2765e9, 100e9, torus=3, wraps=4, cores=2),
    "v6e": Chip(31.25, 918e12, 918e12 / 6, 1638e9, 100e9, torus=2, wraps=16),
    "a100-40": Chip(40e9 / 2**30, 312e12, 19.5e12, 1555e9, 300e9, network=25e9),
    "a100-80": Chip(80e9 / 2**30, 312e12, 19.5e12, 2039e9, 300e9, network=25e9),
    "h100": Chip(80e9 / 2**30, 989e12, 67e12, 3350e9, 450e9, network=50e9),
    "h200": Chip(141e9 / 2**30, 989e12, 67e12, 4800e9, 450e9, network=50e9),
}
# A part of jax's name of a device -> a key of CHIPS, or None where it is another chip. The first
# that fits counts.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "MIG": None,
    "GH200": None,
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100": "a100-80",
    "H100 PCIe": None,
    "H100 NVL": None,
    "H100": "h100",
    "H200": "h200",
}

# With this in the environment malloc asks Linux for huge pages (glibc 2.35 or newer), which saves a
# CPU's steps most of their page faults. It is read when the process starts.
HUGE_PAGES = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
HUGE_PAGES_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def chip_of(device) -> Chip | None:
    """Return the chip that a jax device is; None for a CPU and for what is not listed here."""
    for part, kind in KINDS.items():
        if part in device.device_kind:
            return CHIPS.get(kind)
    return None


def memory_limit(mesh: jax.sharding.Mesh) -> int | None:
    """Return the bytes that jax may take of a device of the mesh; None where it is not told.

    It is not on CPUs, whose memory is the host's.
    """
    limits = []
    for device in mesh.local_devices:
        stats = None if device.platform == "cpu" else device.memory_stats()
        limits.append((stats or {}).get("bytes_limit"))
    return None if None in limits else min(limits)


def flops_per_second(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Return the peak FLOP/s of all devices of the mesh together.

    For CPUs and unknown chips it is what a product of square matrices reaches.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # The devices of a process share its cores.
        return measured_flops_per_second(dtype) * jax.process_count()
    chip = chip_of(device)
    if chip is None:
        return measured_flops_per_second(dtype) * mesh.size
    return (chip.flops if dtype == "bfloat16" else chip.float32_flops) * mesh.size


@functools.cache
def measured_flops_per_second(dtype: str, size: int = 0) -> float:
    """Return the best FLOP/s over five matrix products on one device."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    product = jax.jit(jnp.matmul)
    a = jnp.full((size, size), 0.5, dtype)
    seconds = []
    for _ in range(6):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def lacks_huge_pages() -> bool:
    """Return whether malloc could use huge pages here, and was not told to (HUGE_PAGES)."""
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return False
    if "glibc.malloc.hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    # Under [always] Linux gives them without being asked, under [never] it does not.
    return HUGE_PAGES_MODE.exists() and "[madvise]" in HUGE_PAGES_MODE.read_text()

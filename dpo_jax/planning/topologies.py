"""Slices of TPUs and machines of GPUs that a run can be planned for, and their compilers.

A topology is written v5p:4x4x4 (a slice's shape in chips), v5p-128 (as Google Cloud names it: by
cores on v4 and v5p, by chips on v5e and v6e), h200:8 (one machine of GPUs), or h100:4x8 (4 machines
of 8).
"""

import fnmatch
import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace

import jax

from dpo_jax.parallel.hardware import CHIPS, Chip

# Dimensions of the network -> chips -> the usual shape of a slice.
SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
        1024: "8x8x16",
        2048: "8x16x16",
    },
}
MACHINE = 8  # GPUs joined by a switch
KIB = 2**10
MIB = 2**20
GIB = 2**30


class MissingCompiler(RuntimeError):
    """A compiler is not installed, or does not belong to this jax; the message says what to do."""


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that its compiler asks for, beside those of `Chip`."""

    name: str  # as its driver gives it
    capability: tuple[int, int]  # of CUDA
    cores: int  # multiprocessors, and of each of them:
    units: int  # float32 units
    shared_memory: int  # bytes
    block_memory: int  # bytes of it that one block of threads may take
    l2_cache: int  # bytes
    clock: float  # GHz, boosted


# A key of CHIPS -> the rest of its data sheet (nvidia.com: white papers on A100 and H100, and the
# table of compute capabilities in the CUDA programming guide).
_A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * KIB, 163 * KIB, 40 * MIB, 1.41)
_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * KIB, 227 * KIB, 50 * MIB, 1.98)
GPUS = {
    "a100-40": replace(_A100, name="NVIDIA A100-SXM4-40GB"),
    "a100-80": _A100,
    "h100": _H100,
    "h200": replace(_H100, name="NVIDIA H200"),
}
# What the GPU compiler consists of, beside jax's plugin; 2.8 GB unpacked.
CUDA_PACKAGES = (
    "nvidia-cudnn-cu12",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cublas-cu12",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-nvjitlink-cu12",
)


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, and how they are joined."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]  # of GPUs: machines, and GPUs in each

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def interconnect(self) -> float:
        """Bytes per second that a chip can receive in a collective over all chips.

        A dimension that closes to a ring delivers from two sides. An open one has chips at its
        ends that receive from one side only.
        """
        if not self.chip.torus:
            return self.chip.link
        rings = [size % self.chip.wraps == 0 for size in self.shape]
        if self.chip.torus == 3:
            # The network joins the faces of 4x4x4 cubes, so a part of a cube has no ring at all.
            rings = [all(rings)] * 3
        sides = 0
        for size, ring in zip(self.shape, rings, strict=True):
            if size > 1:
                sides += 2 if ring else 1
        return self.chip.link * sides

    def __str__(self):
        # A single machine of GPUs is written without the 1.
        sizes = self.shape[1:] if self.is_gpu and self.shape[0] == 1 else self.shape
        return f"{self.kind}:{'x'.join(map(str, sizes))}"

    def devices(self) -> list:
        """Return the devices to compile for, which need not be here; their compiler must be.

        Raises MissingCompiler with what to install, ValueError if the compiler knows no such slice.
        """
        return self._gpus() if self.is_gpu else self._tpus()

    def _gpus(self) -> list:
        check_gpu_compiler()
        from jax.experimental import topologies

        machines, gpus = self.shape
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=_target_config(self.kind),
            topology=f"1x{machines}x{gpus}",  # slices, machines in each, GPUs in each
        )
        return found.devices

    def _tpus(self) -> list:
        check_libtpu()
        # Ask no metadata server for a TPU, and take no lock that another process may hold. The type
        # changes nothing in what is compiled; without one libtpu prints a warning.
        quiet = dict(
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v5litepod-8",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options = {}
        if self.chip.cores == 2:
            options["chip_config_name"] = "megacore"
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"--topology={self}: the TPU compiler knows no such slice ({error})."
            ) from error
        return found.devices


def parse(text: str) -> Topology:
    """Return the topology of a name; ValueError lists the forms that exist."""
    found = re.fullmatch(r"(.+)([:-])([1-9]\d*(?:x[1-9]\d*)*)", text.strip().lower())
    kind, separator, size = found.groups() if found else ("", "", "")
    if kind == "v5litepod":  # Google Cloud's name
        kind = "v5e"
    if kind not in CHIPS:
        raise ValueError(
            f"--topology={text!r}: expected a kind of chip and how many, such as v5p:4x4x4, "
            "v5p-128 (Google Cloud's name), h200:8 or h100:4x8 (4 machines of 8 GPUs). Chips: "
            f"{', '.join(CHIPS)}."
        )
    chip = CHIPS[kind]
    if kind in GPUS:
        *machines, gpus = map(int, size.split("x"))
        if separator == "-" or len(machines) > 1 or gpus > MACHINE:
            raise ValueError(
                f"--topology={text!r}: expected GPUs of one machine, at most {kind}:{MACHINE}, or "
                f"machines x GPUs in each, such as {kind}:4x{MACHINE}."
            )
        return Topology(kind, (*machines, gpus) if machines else (1, gpus))
    if "x" not in size:
        chips = int(size)
        if separator == "-":
            chips //= chip.cores
        if chips not in SHAPES[chip.torus]:
            raise ValueError(
                f"--topology={text!r}: there is no usual slice of {chips} chips. Give its shape, "
                f"such as {kind}:{SHAPES[chip.torus][64]}."
            )
        size = SHAPES[chip.torus][chips]
    shape = tuple(map(int, size.split("x")))
    if len(shape) != chip.torus:
        raise ValueError(f"--topology={text!r}: a slice of {kind} has {chip.torus} dimensions.")
    return Topology(kind, shape)


def _target_config(kind: str) -> str:
    """Return the description of a GPU that XLA compiles for: a GpuTargetConfigProto as text."""
    chip = CHIPS[kind]
    gpu = GPUS[kind]
    major, minor = gpu.capability
    # The limits without a name here are the same from the A100 to the H200.
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.units}
          clock_rate_ghz: {gpu.clock}
          device_memory_size: {int(chip.hbm_gib * GIB)}
          memory_bandwidth: {int(chip.bandwidth)}
          l2_cache_size: {gpu.l2_cache}
          shared_memory_per_core: {gpu.shared_memory}
          shared_memory_per_block: {48 * KIB}
          shared_memory_per_block_optin: {gpu.block_memory}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """


def check_gpu_compiler() -> None:
    """Raise MissingCompiler if the GPU compiler is missing or belongs to another jax."""
    # The user's jax for GPUs may be of either version of CUDA.
    for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin"):
        if importlib.util.find_spec(plugin) is None:
            continue
        found = importlib.metadata.version(plugin.replace("_", "-"))
        if found != jax.__version__:
            raise MissingCompiler(
                f"{plugin} {found} does not belong to jax {jax.__version__}: {_install_cuda()}"
            )
        return
    raise MissingCompiler(f"the GPU compiler is not installed. It needs no GPU: {_install_cuda()}")


def _install_cuda() -> str:
    plugin = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    return f"pip install --no-deps {plugin} {' '.join(CUDA_PACKAGES)}"


def check_libtpu() -> None:
    """Raise MissingCompiler if the TPU compiler is missing or belongs to another jax."""
    wanted = _libtpu_version()
    install = f'pip install --no-deps "libtpu=={wanted or "(of jax[tpu])"}"'
    if importlib.util.find_spec("libtpu") is None:
        raise MissingCompiler(f"the TPU compiler is not installed. It needs no TPU: {install}")
    found = importlib.metadata.version("libtpu")
    if wanted and not fnmatch.fnmatch(found, wanted):
        raise MissingCompiler(
            f"libtpu {found} does not belong to jax {jax.__version__}, which cannot read what it "
            f"compiles: {install}"
        )


def _libtpu_version() -> str | None:
    """The version of libtpu that this jax asks for; None if it does not say."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*==\s*([\d.*]+)", requirement):
            return found[1]
    return None

"""Accelerators that a run can be planned for: what a chip holds and does, and how chips are joined.

A topology is written v5p:4x4x4 (a slice's shape in chips), v5p-128 (as Google Cloud sells it: by cores on v4 and v5p,
by chips on v5e and v6e), or h200:8 (one machine of GPUs).
"""

import fnmatch
import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax


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


# Peak rates, bandwidths and links as docs.cloud.google.com/tpu and nvidia.com give them (a TPU's figure for its
# interconnect, halved for one way and divided by its ports); memory as the TPU compiler and the GPU data sheets do. A
# TPU makes a float32 product of six of bfloat16.
CHIPS = {
    "v4": Chip(30.75, 275e12, 275e12 / 6, 1228e9, 50e9, torus=3, wraps=4, cores=2),
    "v5e": Chip(15.75, 197e12, 197e12 / 6, 819e9, 50e9, torus=2, wraps=16),
    "v5p": Chip(95.74, 459e12, 459e12 / 6, 2765e9, 100e9, torus=3, wraps=4, cores=2),
    "v6e": Chip(31.25, 918e12, 918e12 / 6, 1638e9, 100e9, torus=2, wraps=16),
    "a100-40": Chip(40e9 / 2**30, 312e12, 19.5e12, 1555e9, 300e9),
    "a100-80": Chip(80e9 / 2**30, 312e12, 19.5e12, 2039e9, 300e9),
    "h100": Chip(80e9 / 2**30, 989e12, 67e12, 3350e9, 450e9),
    "h200": Chip(141e9 / 2**30, 989e12, 67e12, 4800e9, 450e9),
}
KINDS = {  # part of jax's name of a device -> a key of CHIPS, or none, where it is another; the first that fits
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "MIG": None, "GH200": None, "A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "A100": "a100-80",
    "H100 PCIe": None, "H100 NVL": None, "H100": "h100", "H200": "h200"}
SHAPES = {  # chips -> the usual shape of a slice, by the dimensions of its network
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16"},
}
MACHINE = 8  # GPUs that a switch joins


@dataclass(frozen=True)
class Topology:
    kind: str  # a key of CHIPS
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def interconnect(self) -> float:
        """Bytes a second that a chip can receive of a collective over all chips.

        A dimension that is closed to a ring brings them from two sides; of an open one, a chip at its end has one.
        """
        if not self.chip.torus:
            return self.chip.link
        rings = [size % self.chip.wraps == 0 for size in self.shape]
        if self.chip.torus == 3:  # made of cubes of 4x4x4, whose faces are joined; parts of one have no rings
            rings = [all(rings)] * 3
        return self.chip.link * sum(1 + ring for size, ring in zip(self.shape, rings, strict=True) if size > 1)

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list:
        """The devices of a TPU slice to compile for, without one; needs libtpu, in the version of this jax.

        Raises RuntimeError with what to install.
        """
        check_libtpu()
        # No metadata server is asked for a TPU, and none that another process may hold is locked.
        for name, value in dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
                                ALLOW_MULTIPLE_LIBTPU_LOAD="1").items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies
        options = dict(chip_config_name="megacore") if self.chip.cores == 2 else {}
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology={self}: the TPU compiler knows no such slice ({error}).") from error


def chip_of(device) -> Chip | None:
    """What a device of jax's is; None: a CPU, or not known here."""
    return next((CHIPS.get(kind) for part, kind in KINDS.items() if part in device.device_kind), None)


def parse(text: str) -> Topology:
    """The topology of its name; ValueError with the forms that there are."""
    found = re.fullmatch(r"(.+)([:-])([1-9]\d*(?:x[1-9]\d*)*)", text.strip().lower())
    kind, separator, size = found.groups() if found else ("", "", "")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    if kind not in CHIPS:
        raise ValueError(f"--topology={text!r}: expected a chip and how many, as v5p:4x4x4, v5p-128 (as Google Cloud "
                         f"names it) or h200:8; chips: {', '.join(CHIPS)}.")
    chip = CHIPS[kind]
    if not chip.torus:
        if separator == "-" or "x" in size or int(size) > MACHINE:
            raise ValueError(f"--topology={text!r}: GPUs are planned within one machine, as {kind}:{MACHINE} at most.")
        return Topology(kind, (int(size),))
    if "x" not in size:
        chips = int(size) // (chip.cores if separator == "-" else 1)
        if chips not in SHAPES[chip.torus]:
            raise ValueError(f"--topology={text!r}: no usual slice of {chips} chips; give its shape, as "
                             f"{kind}:{SHAPES[chip.torus][64]}.")
        size = SHAPES[chip.torus][chips]
    shape = tuple(map(int, size.split("x")))
    if len(shape) != chip.torus:
        raise ValueError(f"--topology={text!r}: a slice of {kind} has {chip.torus} dimensions.")
    return Topology(kind, shape)


def check_libtpu() -> None:
    """RuntimeError where the TPU compiler is missing, or is another than this jax's."""
    wanted = next((found[1] for line in importlib.metadata.requires("jax") or ()
                   if (found := re.match(r"libtpu\s*==\s*([\d.*]+)", line))), None)
    install = f'pip install --no-deps "libtpu=={wanted or "(of jax[tpu])"}"'
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"the TPU compiler is not installed. It needs no TPU: {install}")
    found = importlib.metadata.version("libtpu")
    if wanted and not fnmatch.fnmatch(found, wanted):
        raise RuntimeError(f"libtpu {found} is not the one of jax {jax.__version__}, which cannot read what it "
                           f"compiles: {install}")

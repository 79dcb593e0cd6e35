"""Slices of TPUs and machines of GPUs that a run can be planned for.

A topology is written v5p:4x4x4 (a slice's shape in chips), v5p-128 (as Google Cloud names it: by
cores on v4 and v5p, by chips on v5e and v6e), or h200:8 (one machine of GPUs).
"""

import fnmatch
import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, and how they are joined."""

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
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list:
        """Return the devices of a TPU slice to compile for; no TPU is needed, libtpu is.

        Raises RuntimeError with what to install, ValueError if the compiler knows no such slice.
        """
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
            f"v5p-128 (Google Cloud's name) or h200:8. Chips: {', '.join(CHIPS)}."
        )
    chip = CHIPS[kind]
    if not chip.torus:
        if separator == "-" or "x" in size or int(size) > MACHINE:
            raise ValueError(
                f"--topology={text!r}: GPUs are planned within one machine, at most "
                f"{kind}:{MACHINE}."
            )
        return Topology(kind, (int(size),))
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


def check_libtpu() -> None:
    """Raise RuntimeError if the TPU compiler is missing or belongs to another jax."""
    wanted = _libtpu_version()
    install = f'pip install --no-deps "libtpu=={wanted or "(of jax[tpu])"}"'
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"the TPU compiler is not installed. It needs no TPU: {install}")
    found = importlib.metadata.version("libtpu")
    if wanted and not fnmatch.fnmatch(found, wanted):
        raise RuntimeError(
            f"libtpu {found} does not belong to jax {jax.__version__}, which cannot read what it "
            f"compiles: {install}"
        )


def _libtpu_version() -> str | None:
    """The version of libtpu that this jax asks for; None if it does not say."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*==\s*([\d.*]+)", requirement):
            return found[1]
    return None

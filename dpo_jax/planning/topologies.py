"""Accelerators that a run can be planned for: what a chip holds and does, and how chips are joined.

A topology is written v5p:4x4x4 (a slice's shape in chips), v5p-128 (as Google Cloud sells it: by
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

SHAPES = {  # chips -> the usual shape of a slice, by the dimensions of its network
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

        A dimension that is closed to a ring brings them from two sides; of an open one, a chip at
        its end has one.
        """
        if not self.chip.torus:
            return self.chip.link
        rings = [size % self.chip.wraps == 0 for size in self.shape]
        if (
            self.chip.torus == 3
        ):  # made of cubes of 4x4x4, whose faces are joined; parts of one have no rings
            rings = [all(rings)] * 3
        return self.chip.link * sum(
            1 + ring for size, ring in zip(self.shape, rings, strict=True) if size > 1
        )

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list:
        """The devices of a TPU slice to compile for, without one; needs libtpu, in the version of
        this jax.

        Raises RuntimeError with what to install.
        """
        check_libtpu()
        # No metadata server is asked for a TPU, and none that another process may hold is locked.
        for name, value in dict(
            TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
        ).items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options = dict(chip_config_name="megacore") if self.chip.cores == 2 else {}
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=str(self), **options
            ).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"--topology={self}: the TPU compiler knows no such slice ({error})."
            ) from error


def parse(text: str) -> Topology:
    """The topology of its name; ValueError with the forms that there are."""
    found = re.fullmatch(r"(.+)([:-])([1-9]\d*(?:x[1-9]\d*)*)", text.strip().lower())
    kind, separator, size = found.groups() if found else ("", "", "")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    if kind not in CHIPS:
        raise ValueError(
            f"--topology={text!r}: expected a chip and how many, as v5p:4x4x4, v5p-128 (as Google Cloud "
            f"names it) or h200:8; chips: {', '.join(CHIPS)}."
        )
    chip = CHIPS[kind]
    if not chip.torus:
        if separator == "-" or "x" in size or int(size) > MACHINE:
            raise ValueError(
                f"--topology={text!r}: GPUs are planned within one machine, as {kind}:{MACHINE} at most."
            )
        return Topology(kind, (int(size),))
    if "x" not in size:
        chips = int(size) // (chip.cores if separator == "-" else 1)
        if chips not in SHAPES[chip.torus]:
            raise ValueError(
                f"--topology={text!r}: no usual slice of {chips} chips; give its shape, as "
                f"{kind}:{SHAPES[chip.torus][64]}."
            )
        size = SHAPES[chip.torus][chips]
    shape = tuple(map(int, size.split("x")))
    if len(shape) != chip.torus:
        raise ValueError(f"--topology={text!r}: a slice of {kind} has {chip.torus} dimensions.")
    return Topology(kind, shape)


def check_libtpu() -> None:
    """RuntimeError where the TPU compiler is missing, or is another than this jax's."""
    wanted = next(
        (
            found[1]
            for line in importlib.metadata.requires("jax") or ()
            if (found := re.match(r"libtpu\s*==\s*([\d.*]+)", line))
        ),
        None,
    )
    install = f'pip install --no-deps "libtpu=={wanted or "(of jax[tpu])"}"'
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"the TPU compiler is not installed. It needs no TPU: {install}")
    found = importlib.metadata.version("libtpu")
    if wanted and not fnmatch.fnmatch(found, wanted):
        raise RuntimeError(
            f"libtpu {found} is not the one of jax {jax.__version__}, which cannot read what it "
            f"compiles: {install}"
        )

"""The least time that a step can take on a chip: what it computes, moves in memory and receives,
each at its peak.

Of a step that was compiled, `hlo.py` reads bytes from the program. For chips without a compiler at
hand, `estimate` takes them from the model's sizes; so does `forward` for the kept reference's pass,
on every chip.
"""

import dataclasses

import jax
import numpy as np

from dpo_jax.data.packing import Shape
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import chunk_logits
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.planning.topologies import Chip, Topology

PARTS = {"compute": "products", "memory": "memory bandwidth", "interconnect": "interconnect"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in a step."""

    flops: float
    memory: float  # bytes it reads and writes
    collectives: dict  # kind -> (count, bytes it receives)


def seconds(topology: Topology, dtype: str, work: Work) -> dict[str, float]:
    """Part -> the least time for it; overlapped perfectly, a step takes the longest, and not at
    all, their sum.
    """
    chip = topology.chip
    return dict(
        compute=work.flops / (chip.flops if dtype == "bfloat16" else chip.float32_flops),
        memory=work.memory / chip.bandwidth,
        interconnect=sum(size for _, size in work.collectives.values()) / topology.interconnect,
    )


def estimate(
    config: TransformerConfig,
    shape: Shape,
    mesh: dict,
    microbatches: int,
    *,
    flops: float,
    forwards: int,
    state: int,
    chip: Chip,
) -> tuple[Work, int]:
    """A step's work on a device by the sizes alone, and bytes of its temporaries; the compiler may
    do worse.

    mesh: the size of each axis; forwards: passes of the policy and of the reference over a
    microbatch, with what remat computes again; state: bytes of weights and optimiser state on a
    device.
    """
    width = _itemsize(config)
    sizes = [leaf.size for leaf in jax.tree.leaves(transformer.abstract(config))]
    weights, split, tensor = sum(sizes), mesh["fsdp"] * mesh["tensor"], mesh["tensor"]
    activation = shape.tokens * config.width * width  # of one layer's input
    saved = config.layers * activation * (1 if config.remat == "full" else _kept(config))
    passes = forwards + 2  # the backward pass reads a layer's weights for both of its products
    once, collectives = forward(config, mesh, microbatches, flops=flops), {}
    if mesh["fsdp"] > 1:
        _, gathered = once.collectives["all-gather"]
        collectives["all-gather"] = (0, (forwards + 1) * gathered)
        collectives["reduce-scatter"] = (0, gathered)  # gradients, as large as the weights
    reduced = 0.0
    if mesh["data"] > 1:
        reduced += microbatches * 2 * weights * 4 / split * (1 - 1 / mesh["data"])
    if tensor > 1:  # after attention and after the MLP, and their like in the backward pass
        reduced += (
            microbatches * 2 * (forwards + 1) * config.layers * 2 * activation * (1 - 1 / tensor)
        )
    if reduced:
        collectives["all-reduce"] = (0, reduced)
    moved = passes * once.memory + microbatches * 4 * saved + 2 * state + 12 * weights / split
    temporaries = saved + 4 * weights / split * (1 + (microbatches > 1))  # gradients, and their sum
    temporaries += 2 * (weights / config.layers) * width / tensor  # two layers' gathered weights
    logits = 4 * min(chunk_logits(chip), shape.scored * config.vocab)  # bytes of a chunk
    temporaries += 3 * logits + _rows(config, shape, width) / tensor
    return Work(flops, moved, collectives), int(temporaries)


def forward(config: TransformerConfig, mesh: dict, microbatches: int, *, flops: float) -> Work:
    """A forward pass's work on a device, by the sizes alone: each microbatch gathers the weights
    and reads them.
    """
    weights = sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(config)))
    read = microbatches * weights * _itemsize(config) / mesh["tensor"]
    return Work(flops, read, {"all-gather": (0, read * (1 - 1 / mesh["fsdp"]))})


def _itemsize(config: TransformerConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return np.dtype("uint16" if config.dtype == "bfloat16" else "float32").itemsize


def _kept(config: TransformerConfig) -> float:
    """What a layer keeps for the backward pass without remat, in widths of its input."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    return 4 + (2 * heads + (3 if config.gated else 2) * config.mlp_width) / config.width


def _rows(config: TransformerConfig, shape: Shape, width: int) -> float:
    """Bytes of queries, keys, values and outputs in attention's rows, with their gradients."""
    places = sum(count * length for count, length in shape.rows)
    return 2 * places * (2 * config.heads + 2 * config.kv_heads) * config.head_width * width

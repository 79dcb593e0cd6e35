"""The roofline: the least time a step can take, with products, memory and network at their peaks.

For a compiled step, `hlo.py` reads the bytes from the program. Where the GPU compiler is not
installed, `estimate` derives them from the model's sizes. `forward` and `sampling` do so for what
no plan compiles: the pass of a kept reference, and the completions of PPO.
"""

import dataclasses

import jax
import numpy as np

from dpo_jax.data.packing import Shape
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import chunk_logits
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel.hardware import Chip
from dpo_jax.parallel.sharding import AXES
from dpo_jax.planning.topologies import Topology

# Part of a step's time -> its name in tables.
PARTS = {"compute": "products", "memory": "memory bandwidth", "interconnect": "interconnect"}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a step."""

    flops: float
    memory: float  # bytes read and written
    collectives: dict  # kind -> (count, bytes received)
    network: float = 0.0  # bytes that a GPU's share of its machine's network receives


def seconds(topology: Topology, dtype: str, work: Work) -> dict[str, float]:
    """Return the least time of each part, in seconds.

    A step takes as long as the longest part if the parts overlap perfectly, and as long as their
    sum if they do not overlap at all.
    """
    chip = topology.chip
    peak = chip.flops if dtype == "bfloat16" else chip.float32_flops
    received = sum(size for _, size in work.collectives.values())
    # A chip alone has no link.
    interconnect = received / topology.interconnect if received else 0.0
    if work.network:
        # Within a machine and between machines, GPUs receive at the same time.
        interconnect = max(interconnect, work.network / chip.network)
    return dict(
        compute=work.flops / peak,
        memory=work.memory / chip.bandwidth,
        interconnect=interconnect,
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
    topology: Topology,
) -> Work:
    """Estimate a step's work on a GPU, from sizes alone.

    mesh: the size of each axis. forwards: forward passes of policy and reference per microbatch,
    with those that remat repeats. state: bytes of weights and optimiser state on a device. The
    compiler may do worse.
    """
    itemsize = _itemsize(config)
    weights = _weights(config)
    context, tensor, data = mesh["context"], mesh["tensor"], mesh["data"]
    fsdp = mesh["fsdp"] * context  # both split the weights
    split = fsdp * tensor  # devices that share the weights
    # A device's tokens: the batch is split over data and fsdp into shards, and those by context.
    layer_input = shape.tokens / context * config.width * itemsize
    saved = _saved(config, shape) / context

    once = forward(config, mesh, microbatches, topology, flops=flops)
    shares = _between_machines(mesh, topology)
    collectives = {}
    network = 0.0
    if fsdp > 1:
        # fsdp splits the weights, so each pass gathers them, and the backward pass once more. 0:
        # how many collectives that takes is the compiler's choice; only bytes are estimated.
        _, gathered = once.collectives["all-gather"]
        collectives["all-gather"] = (0, (forwards + 1) * gathered)
        collectives["reduce-scatter"] = (0, gathered)  # the gradients are as large as the weights
        network += shares["fsdp"] * (forwards + 2) * gathered
    if context > 1:
        # Keys and values are gathered in each pass, and their gradients scattered.
        of_token = 2 * config.layers * config.kv_heads * config.head_width * itemsize / tensor
        keys = microbatches * shape.tokens * of_token * (1 - 1 / context)
        for kind, times in (("all-gather", forwards), ("reduce-scatter", 1)):
            _, received = collectives[kind]
            collectives[kind] = (0, received + times * keys)
        network += shares["context"] * (forwards + 1) * keys
    reduced = 0.0
    if data > 1:
        # float32 gradients, 4 bytes each. An all-reduce receives twice its size: it scatters the
        # sums, then gathers them.
        gradients_received = microbatches * 2 * weights * 4 / split * (1 - 1 / data)
        reduced += gradients_received
        network += shares["data"] * gradients_received
    if tensor > 1:
        # After attention and after the MLP, forward and backward.
        sums = microbatches * 2 * (forwards + 1) * config.layers
        sums_received = sums * 2 * layer_input * (1 - 1 / tensor)
        reduced += sums_received
        network += shares["tensor"] * sums_received
    if reduced:
        collectives["all-reduce"] = (0, reduced)

    passes = forwards + 2  # the backward pass reads a layer's weights for both of its products
    # Each array is counted as often as it is written or read. Kept activations 4 times: they and
    # their gradients, out and in. The state twice: the update rewrites it. Float32 gradients 3
    # times, 12 bytes a weight: made, then read for their norm and by the update.
    moved = passes * once.memory + microbatches * 4 * saved + 2 * state + 12 * weights / split
    return Work(flops, moved, collectives, network)


def temporaries(
    config: TransformerConfig,
    shape: Shape,
    mesh: dict,
    microbatches: int,
    *,
    gradients: int,
    chip: Chip | None,
) -> int:
    """Estimate the bytes of a step's temporaries on a device, from sizes alone.

    gradients: bytes of all gradients on a device. The other arguments are those of `estimate`.
    """
    itemsize = _itemsize(config)
    tensor = mesh["tensor"]
    gradients *= 1 + (microbatches > 1)  # and their sum over microbatches
    # Two layers are there at a time.
    gathered_layers = 2 * (_weights(config) / config.layers) * itemsize / tensor
    # float32, 4 bytes each. Three arrays of this size are counted: the logits, the softmax's own,
    # and the gradient.
    context = mesh["context"]
    logits = 4 * min(chunk_logits(chip), shape.completion_tokens / context * config.vocab)
    rows = _rows(config, shape, itemsize, context) / tensor
    saved = _saved(config, shape) / context
    return int(saved + gradients + gathered_layers + 3 * logits + rows)


def _saved(config: TransformerConfig, shape: Shape) -> float:
    """Return the bytes that all layers keep for the backward pass of a shard's tokens."""
    layer_input = shape.tokens * config.width * _itemsize(config)
    # With full remat a layer keeps its input alone, and computes the rest again.
    kept_inputs = 1 if config.remat == "full" else _kept(config)
    return config.layers * layer_input * kept_inputs


def forward(
    config: TransformerConfig, mesh: dict, microbatches: int, topology: Topology, *, flops: float
) -> Work:
    """Estimate the work of a forward pass: each microbatch gathers and reads the weights."""
    # Every device reads all layers' gathered weights, which only `tensor` keeps split.
    read = microbatches * _weights(config) * _itemsize(config) / mesh["tensor"]
    gathered = read * (1 - 1 / (mesh["fsdp"] * mesh["context"]))
    network = _between_machines(mesh, topology)["fsdp"] * gathered
    return Work(flops, read, {"all-gather": (0, gathered)}, network)


def sampling(
    config: TransformerConfig,
    mesh: dict,
    topology: Topology,
    *,
    calls: int,
    rows: int,
    prompt: int,
    new: int,
    flops: float,
) -> tuple[Work, int]:
    """Estimate a device's work in sampling, and the bytes that it takes beside the weights.

    calls: batches, one after the other. rows: completions of a batch on a device, each of a prompt
    of so many tokens and so many new ones; none ends early. flops: of all calls, on a device.
    """
    tensor = mesh["tensor"]
    itemsize = _itemsize(config)
    # Each pass gathers and reads the weights: one of the prompts, and one for every new token.
    once = forward(config, mesh, calls * (1 + new), topology, flops=flops)

    split_heads = tensor if config.kv_heads % tensor == 0 else 1
    of_token = 2 * config.layers * config.kv_heads * config.head_width * itemsize / split_heads
    cache = rows * (prompt + new) * of_token
    # Attention looks at all slots, and masks those that are still empty.
    moved = once.memory + calls * new * cache

    # The prompts' own keys and values are there while they are copied to where there is room.
    copied = rows * prompt * of_token
    # float32, 4 bytes each: the logits, what is drawn from, and the sums of that.
    logits = 3 * 4 * rows * config.vocab / tensor
    gathered_layers = 2 * _weights(config) / config.layers * itemsize / tensor
    # Compiled for a CPU, the loop has a second cache, that each token's is written into.
    taken = int(2 * cache + copied + logits + gathered_layers)
    return dataclasses.replace(once, memory=moved), taken


def _between_machines(mesh: dict, topology: Topology) -> dict[str, float]:
    """Return the share of an axis' traffic that comes to a GPU over its own network card.

    What several GPUs of a machine receive along an axis comes to the machine once.
    """
    shares = {}
    stride = 1  # between neighbours on the axis; the last axis is the innermost
    for axis in reversed(AXES):
        size = mesh[axis]
        within = size == 1 or stride * size <= topology.shape[-1]
        if within or not topology.is_gpu:
            shares[axis] = 0.0
        else:
            here = max(topology.shape[-1] // stride, 1)
            shares[axis] = (size / here - 1) / (size - 1)
        stride *= size
    return shares


def _weights(config: TransformerConfig) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(config)))


def _itemsize(config: TransformerConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return np.dtype("uint16" if config.dtype == "bfloat16" else "float32").itemsize


def _kept(config: TransformerConfig) -> float:
    """Widths of a layer's input that it keeps for the backward pass without remat."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    # A token has a copy for each of its experts.
    inner = config.mlp_width * max(config.experts_per_token, 1)
    copies = config.experts_per_token
    # About 4 arrays of the input's own width; queries, keys, values and outputs twice; and the
    # MLP's inner arrays: up, its activation and, in a gated one, the gate.
    return 4 + copies + (2 * heads + (3 if config.gated else 2) * inner) / config.width


def _rows(config: TransformerConfig, shape: Shape, itemsize: int, context: int = 1) -> float:
    """Return the bytes of queries, keys, values and outputs in attention's rows, with gradients.

    context: devices that share the queries.
    """
    queries = 0  # tokens that attend
    keys = 0  # tokens that they see
    for bucket in shape.rows:
        responses = bucket.rows * bucket.responses
        queries += bucket.rows * bucket.prompt + responses * bucket.response
        # Kernels give each response its own copy of the prompt's keys and values.
        keys += bucket.rows * bucket.prompt + responses * (bucket.prompt + bucket.response)
    places = 2 * config.heads * queries / context + 2 * config.kv_heads * keys
    # Twice: for the gradients.
    return 2 * places * config.head_width * itemsize

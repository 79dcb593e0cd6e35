"""The roofline: the least time a step can take, with products, memory and network at their peaks.

For a compiled step, `hlo.py` reads the bytes from the program. Where the GPU compiler is not
installed, `estimate` derives them from the model's sizes. `forward` and `sampling` do so for what
no plan compiles: the pass of a kept reference, and the completions of PPO.
"""

import dataclasses
import math

import jax
import numpy as np

from dpo_jax.data.packing import Shape
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import chunk_logits
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel.hardware import Chip
from dpo_jax.parallel.sharding import AXES, SPLIT, path_name
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
    context, tensor, data = mesh["context"], mesh["tensor"], mesh["data"]
    fsdp, expert = mesh["fsdp"], mesh["expert"]
    of_experts, others = _weights(config)
    # A device's own part of the weights: fsdp splits all, expert the experts, context the others.
    held = (of_experts / expert + others / context) / (fsdp * tensor)
    # A device's tokens: the batch is split over data, fsdp and expert into shards, and those by
    # context.
    layer_input = shape.tokens / context * config.width * itemsize
    saved = _saved(config, shape) / context

    once = forward(config, mesh, microbatches, topology, flops=flops)
    collectives = {}
    # Split weights are gathered in each pass, and in the backward pass once more; the gradients
    # that are scattered are as large.
    _, of_weights = once.collectives["all-gather"]
    gathered, scattered = (forwards + 1) * of_weights, of_weights
    network = (forwards + 2) * once.network
    if context > 1:
        # Keys and values are gathered in each pass, and their gradients scattered.
        of_token = 2 * config.layers * config.kv_heads * config.head_width * itemsize / tensor
        keys = microbatches * shape.tokens * of_token * (1 - 1 / context)
        gathered += forwards * keys
        scattered += keys
        network += _share(mesh, topology, "context") * (forwards + 1) * keys
    if of_experts and expert > 1:
        # Devices that split the experts gather each other's tokens, and scatter what their own
        # experts gave for them; the backward pass has both the other way round.
        tokens = microbatches * (forwards + 1) * config.layers * (expert - 1) * layer_input
        gathered += tokens
        scattered += tokens
        network += _share(mesh, topology, "expert") * 2 * tokens
    if gathered:
        # 0: how many collectives that takes is the compiler's choice; only bytes are estimated.
        collectives = {"all-gather": (0, gathered), "reduce-scatter": (0, scattered)}
    reduced = 0.0
    if data > 1:
        # float32 gradients, 4 bytes each. An all-reduce receives twice its size: it scatters the
        # sums, then gathers them.
        gradients_received = microbatches * 2 * held * 4 * (1 - 1 / data)
        reduced += gradients_received
        network += _share(mesh, topology, "data") * gradients_received
    if tensor > 1:
        # After attention and after the MLP, forward and backward.
        sums = microbatches * 2 * (forwards + 1) * config.layers
        sums_received = sums * 2 * layer_input * (1 - 1 / tensor)
        reduced += sums_received
        network += _share(mesh, topology, "tensor") * sums_received
    if reduced:
        collectives["all-reduce"] = (0, reduced)

    passes = forwards + 2  # the backward pass reads a layer's weights for both of its products
    # Each array is counted as often as it is written or read. Kept activations 4 times: they and
    # their gradients, out and in. The state twice: the update rewrites it. Float32 gradients 3
    # times, 12 bytes a weight: made, then read for their norm and by the update.
    moved = passes * once.memory + microbatches * 4 * saved + 2 * state + 12 * held
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
    gathered_layers = 2 * (_gathered_weights(config, mesh) / config.layers) * itemsize
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
    # Every device reads all layers' gathered weights.
    size = microbatches * _itemsize(config)
    read = size * _gathered_weights(config, mesh)
    # What a device does not hold itself. fsdp splits all weights, and context all but the experts.
    fsdp, context, expert, tensor = [mesh[axis] for axis in ("fsdp", "context", "expert", "tensor")]
    of_experts, others = _weights(config)
    experts_received = size * of_experts / (expert * tensor) * (1 - 1 / fsdp)
    others_received = size * others / tensor * (1 - 1 / (fsdp * context))
    network = _share(mesh, topology, "fsdp") * experts_received
    network += _share(mesh, topology, *SPLIT) * others_received
    gathered = experts_received + others_received
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
    gathered_layers = 2 * _gathered_weights(config, mesh) / config.layers * itemsize
    # Compiled for a CPU, the loop has a second cache, that each token's is written into.
    taken = int(2 * cache + copied + logits + gathered_layers)
    return dataclasses.replace(once, memory=moved), taken


def _share(mesh: dict, topology: Topology, *axes: str) -> float:
    """Return the share of traffic along axes that comes to a GPU over its own network card.

    axes: neighbours, as one. What several GPUs of a machine receive along them comes to the machine
    once.
    """
    size = math.prod(mesh[axis] for axis in axes)
    # Between neighbours on the axes; the last axis is the innermost.
    stride = math.prod(mesh[axis] for axis in AXES[AXES.index(axes[-1]) + 1 :])
    of_machine = topology.shape[-1]
    if not topology.is_gpu or size == 1 or stride * size <= of_machine:
        return 0.0
    here = max(of_machine // stride, 1)
    return (size / here - 1) / (size - 1)


def _weights(config: TransformerConfig) -> tuple[int, int]:
    """Return the number of parameters of all experts, and that of all others."""
    of_experts, others = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(transformer.abstract(config)):
        if "/experts/" in path_name(path):
            of_experts += leaf.size
        else:
            others += leaf.size
    return of_experts, others


def _gathered_weights(config: TransformerConfig, mesh: dict) -> float:
    """Return of how many weights a device makes products, once those that fsdp splits are gathered.

    Only `tensor` keeps them split, and `expert` the experts.
    """
    of_experts, others = _weights(config)
    return (others + of_experts / mesh["expert"]) / mesh["tensor"]


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

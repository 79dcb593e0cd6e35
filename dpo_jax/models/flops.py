"""Floating-point operations of matrix products, two for each multiplication with its addition.

`forward` says what a model needs, from its sizes; `of_program` counts what a traced program does,
with what it computes again in the backward pass.
"""

import math

import jax
import numpy as np

from dpo_jax.data.packing import Shape
from dpo_jax.models import transformer
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel.sharding import path_name


def forward(config: TransformerConfig, shape: Shape) -> dict[str, int]:
    """Of one shard's forward pass by part: dense, on its tokens; attention, on its rows; head,
    where it predicts.

    Attention is counted as causal: a token sees itself and those before it, within the window.
    """
    kernels = {
        path_name(path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(transformer.abstract(config))
    }
    layers = sum(
        size
        for name, size in kernels.items()
        if name.startswith("layers/") and name.endswith("kernel")
    )
    count_R, length_R = np.array(shape.rows).T
    seen = int(count_R @ _seen(length_R, config.window))
    return dict(
        dense=2 * layers * shape.tokens,
        attention=4 * config.layers * config.heads * config.head_width * seen,
        head=2
        * config.width
        * (1 if config.head == "reward" else config.vocab)
        * shape.completion_tokens,
    )


def of_step(
    config: TransformerConfig,
    shape: Shape,
    *,
    cells: int = 1,
    reference: bool = False,
    frozen: bool = False,
) -> int:
    """That a training step needs: a forward pass, a backward pass of twice that, and the live
    reference's forward.

    cells: shards x microbatches of that shape. frozen: under adapters, whose own work is left out,
    weights have no gradient. What remat computes again is no need of the model's, and not in it.
    """
    return cells * sum(
        (3 + reference - (frozen and part != "attention")) * size
        for part, size in forward(config, shape).items()
    )


def of_program(jaxpr) -> int:
    """Of all matrix products of a jaxpr, the body of a loop as often as it runs, on all devices
    together.

    Of a Pallas kernel all blocks are counted, those too that a mask leaves out.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(sizes[axis] for axis in contracted)
            )
        inner = [
            of_program(found) for value in equation.params.values() for found in _jaxprs(value)
        ]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * _times(equation)
    return total


def _times(equation) -> int:
    """How often what is inside an equation runs: steps of a loop, devices of a shard_map, blocks of
    a kernel.
    """
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "shard_map":
            return equation.params["mesh"].size
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
    return 1


def _seen(length_R, window: int | None):
    """Pairs of a token and one that it sees, in each row."""
    window_R = np.minimum(window or length_R, length_R)
    return window_R * (window_R + 1) // 2 + (length_R - window_R) * window_R


def _jaxprs(value) -> list:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return (
        [found for item in value for found in _jaxprs(item)]
        if isinstance(value, list | tuple)
        else []
    )

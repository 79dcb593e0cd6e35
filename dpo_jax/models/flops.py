"""Floating-point operations (FLOPs) of matrix products: two for a multiplication and its addition.

`forward` and `of_step` say what a model needs, from its sizes. `of_program` counts what a traced
program does, with what it computes again in the backward pass.
"""

import collections
import math

import jax
import numpy as np

from dpo_jax.data.examples import Example
from dpo_jax.data.packing import Contents
from dpo_jax.models import transformer
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel.sharding import path_name


def forward(config: TransformerConfig, contents: Contents) -> dict[str, int]:
    """Return the FLOPs of a forward pass over some contents: dense, attention and head.

    Attention is counted as causal: a token sees itself and those before it, within the window.
    """
    layers = 0  # the weights that multiply a token
    for path, leaf in jax.tree_util.tree_leaves_with_path(transformer.abstract(config)):
        name = path_name(path)
        # Norms and biases are left out: they are no products.
        if not (name.startswith("layers/") and name.endswith("kernel")):
            continue
        # A token is multiplied by the kernels of its own experts alone.
        is_of_experts = "/experts/" in name
        layers += (
            leaf.size * config.experts_per_token // config.experts if is_of_experts else leaf.size
        )
    # Two products, queries with keys and weights with values, of 2 FLOPs each: 4 for every pair.
    pairs = 0  # of a token and one that it sees, in all layers
    windows = collections.Counter(config.kind(layer).window for layer in range(config.layers))
    for window, count in windows.items():
        seen = _seen(contents.prompt, window).sum()
        # Of a response alone: its prompt's own are counted once for all.
        seen += _seen(contents.context + contents.response, window).sum()
        pairs += count * int(seen - _seen(contents.context, window).sum())
    return dict(
        dense=2 * layers * contents.tokens,
        attention=4 * config.heads * config.head_width * pairs,
        head=2
        * config.width
        * (1 if config.head == "reward" else config.vocab)
        * contents.completion_tokens,
    )


def contents_of(examples: list[Example]) -> Contents:
    """Return what is read where each example, of one response, is read by itself."""
    prompt_E = np.array([len(example.prompt) for example in examples])
    response_E = np.array([len(example.responses[0]) for example in examples])
    return Contents(
        tokens=int((prompt_E + response_E).sum()),
        completion_tokens=int(response_E.sum()),
        prompt=prompt_E,
        context=prompt_E,
        response=response_E,
    )


def of_step(
    config: TransformerConfig,
    contents: Contents,
    *,
    cells: int = 1,
    reference: bool = False,
    frozen: bool = False,
    mismatched: Contents | None = None,
) -> int:
    """Return the FLOPs that one training step needs.

    They are a forward pass, a backward pass of twice that, and the live reference's forward pass.
    cells: shards x microbatches of such contents. frozen: under adapters, weights have no gradient;
    the work of the adapters themselves is left out. mismatched: what KTO's policy and reference
    both read for its KL. What remat computes again is not counted.
    """
    read = 0 if mismatched is None else 2 * sum(forward(config, mismatched).values())
    return cells * read + cells * sum(
        # Frozen weights save one of the three: their own gradient. Attention has no weights to save
        # on.
        (3 + reference - (frozen and part != "attention")) * size
        for part, size in forward(config, contents).items()
    )


def of_program(jaxpr, sharing: int = 1) -> int:
    """Return the FLOPs of all matrix products of a jaxpr, on all devices together.

    The body of a loop counts as often as it runs. All blocks of an attention kernel count, also
    those that a mask leaves out. sharing: devices that gather the same tokens, each for its own
    experts, and are taken to have equally many.
    """
    total = 0
    for equation in jaxpr.eqns:
        # cuDNN's kernel is a primitive of its own, of queries [B, T, H, C] and keys [B, U, K, C].
        if equation.primitive.name.startswith("dot_product_attention_"):
            queries, keys = (variable.aval.shape for variable in equation.invars[:2])
            # Forward: scores and outputs. Backward: scores again, and the gradients of weights,
            # queries, keys and values.
            products = 5 if "bwd" in equation.primitive.name else 2
            total += products * 2 * math.prod(queries) * keys[1]
        # Each row is multiplied by one group's kernel.
        if equation.primitive.name == "ragged_dot_general":
            rows, contracted = equation.invars[0].aval.shape
            total += 2 * rows * contracted * equation.outvars[0].aval.shape[-1] // sharing
        # So is it in the gradient of the kernels, whose blocks are as many as the rows need.
        if equation.primitive.name == "pallas_call" and _has_dynamic_grid(equation):
            x, grad = [variable.aval for variable in equation.invars if variable.aval.ndim == 2]
            total += 2 * x.size * grad.shape[1] // sharing
            continue
        if equation.primitive.name == "dot_general":
            # 2 FLOPs for each number of the result and each term of its sum.
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(sizes[axis] for axis in contracted)
            )
        if equation.primitive.name == "shard_map":
            sharing = equation.params["mesh"].shape.get("expert", 1)
        inner = [
            of_program(found, sharing)
            for value in equation.params.values()
            for found in _jaxprs(value)
        ]
        # One branch runs; the dearest is counted.
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * _times(equation)
    return total


def _has_dynamic_grid(equation) -> bool:
    return not all(isinstance(size, int) for size in equation.params["grid_mapping"].grid)


def _times(equation) -> int:
    """Return how often the body of an equation runs.

    That is the steps of a loop, the devices of a shard_map, or the blocks of a kernel.
    """
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "shard_map":
            return equation.params["mesh"].size
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
    return 1


def _seen(lengths, window: int | None):
    """Return the number of pairs of a token and one that it sees, in sequences of such lengths."""
    # The first tokens see 1, 2, 3, ... up to the window; all later ones see the whole window.
    seen_at_most = np.minimum(window or lengths, lengths)
    later = lengths - seen_at_most
    return seen_at_most * (seen_at_most + 1) // 2 + later * seen_at_most


def _jaxprs(value) -> list:
    """Return the jaxprs in a parameter of an equation."""
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    found = []
    if isinstance(value, list | tuple):
        for item in value:
            found += _jaxprs(item)
    return found

"""LoRA (Hu et al. 2021): low-rank adapters of the layers' kernels, then the only weights that are
trained.

A kernel W acts as W + alpha / rank * A B. The adapters are a tree of their own, with `lora_a` [L,
inputs, r] and `lora_b` [L, r, outputs] where the weights have `kernel`. `join` lays them beside the
kernels of the base, which stays as it is: in `transformer.Linear` they act on the activations, so
neither W + A B nor a gradient of W is ever made.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dpo_jax.models import transformer
from dpo_jax.models.transformer import TransformerConfig

LAYERS = {  # target -> its layer, and how many axes of the kernel are inputs
    "q": ("attention/q", 1),
    "k": ("attention/k", 1),
    "v": ("attention/v", 1),
    "out": ("attention/out", 2),
    "gate": ("mlp/gate", 1),
    "up": ("mlp/up", 1),
    "down": ("mlp/down", 1),
}
DRAWN = {"b_zero": "/lora_a", "a_zero": "/lora_b"}  # init -> the factor that is not 0


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which adapters there are: config.model.lora."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()  # keys of LAYERS; (): all that the model has
    init: str = "b_zero"  # which factor starts from 0, so that the product does: b_zero or a_zero

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def kernels(self, config: TransformerConfig) -> dict[str, tuple[tuple[int, ...], int]]:
        """Path of each target's layer -> the shape of its kernel in one layer, and how many axes of
        it are inputs.

        Raises ValueError for a target that this model does not have.
        """
        weights = _flat(transformer.abstract(config))
        found = {
            name: (f"layers/{path}", inputs)
            for name, (path, inputs) in LAYERS.items()
            if f"layers/{path}/kernel" in weights
        }
        if unknown := [name for name in self.targets if name not in found]:
            raise ValueError(
                f"config.model.lora.targets = {self.targets!r}: this model has no {', '.join(unknown)}; "
                f"it has {', '.join(found)}."
            )
        return {
            path: (weights[f"{path}/kernel"].shape[1:], inputs)
            for name, (path, inputs) in found.items()
            if name in (self.targets or found)
        }


def abstract(config: TransformerConfig, lora: Lora) -> dict:
    """The shapes and dtypes of what is trained: adapters, and the stage's own head."""
    shapes = {}
    for path, (kernel, inputs) in lora.kernels(config).items():
        shapes[f"{path}/lora_a"] = (config.layers, *kernel[:inputs], lora.rank)
        shapes[f"{path}/lora_b"] = (config.layers, lora.rank, *kernel[inputs:])
    if config.head != "lm":
        shapes["head/scalar"] = (config.width,)
    return _tree({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})


def init(config: TransformerConfig, lora: Lora, seed: int) -> dict:
    """What is trained, before the first step, on the host: adapters whose product is 0, and a head
    that is 0.

    The factor that is not 0 is normal, A's of deviation 1 / sqrt(inputs), B's of 1 / sqrt(rank).
    """
    rng, values = np.random.default_rng(seed), {}
    for path, leaf in _flat(abstract(config, lora)).items():
        values[path] = np.zeros(leaf.shape, np.float32)
        if path.endswith(DRAWN[lora.init]):
            summed = (
                math.prod(leaf.shape[1:-1]) if lora.init == "b_zero" else lora.rank
            )  # terms of each of its outputs
            values[path] = rng.standard_normal(leaf.shape, np.float32) / np.float32(
                math.sqrt(summed)
            )
    return _tree(values)


def join(base: dict, params: dict, scale) -> dict:
    """The weights to run: the base's, with the adapters beside the kernels, and what else `params`
    holds in its place.

    No weight of the base is copied. scale: `Lora.scale`, which may be traced.
    """
    return _tree(
        _flat(base)
        | {
            path: value * scale if path.endswith("/lora_b") else value
            for path, value in _flat(params).items()
        }
    )


def merge(base: dict, params: dict, lora: Lora) -> dict:
    """Plain weights, as of a model that was trained whole: W + scale * A B, in float32, placed as
    the base.
    """
    weights, params = _flat(base), _flat(params)
    for path, a in params.items():
        layer, _, name = path.rpartition("/")
        if name == "lora_a":
            kernel = weights[f"{layer}/kernel"]
            add = jax.jit(_add_product, out_shardings=kernel.sharding)
            weights[f"{layer}/kernel"] = add(kernel, a, params[f"{layer}/lora_b"], lora.scale)
        elif name != "lora_b":
            weights[path] = a
    return _tree(weights)


def _add_product(kernel, a, b, scale):
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(a, b)
    return kernel + scale * product


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def _tree(flat) -> dict:
    return traverse_util.unflatten_dict(flat, sep="/")

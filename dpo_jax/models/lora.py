"""LoRA (Hu et al. 2021): low-rank adapters of the layers' kernels, which alone are trained.

A kernel W acts as W + alpha / rank * A B. The adapters are a tree of their own, with `lora_a` [L,
inputs, r] and `lora_b` [L, r, outputs] where the weights have `kernel`. `join` lays them beside the
kernels of the base, which stays as it is: in `linear.Linear` they act on the activations, so
neither W + A B nor a gradient of W is ever made.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dpo_jax.models import linear, transformer
from dpo_jax.models.transformer import TransformerConfig

# target -> its layer
LAYERS = {
    "q": "attention/q",
    "k": "attention/k",
    "v": "attention/v",
    "out": "attention/out",
    "gate": "mlp/gate",
    "up": "mlp/up",
    "down": "mlp/down",
}
DRAWN = {"b_zero": "/lora_a", "a_zero": "/lora_b"}  # init -> the factor that is not 0


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model, as config.model.lora says."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()  # keys of LAYERS; (): all that the model has
    init: str = "b_zero"  # which factor starts from 0, so that the product does: b_zero or a_zero

    @property
    def scale(self) -> float:
        """The factor that the product is multiplied by."""
        return self.alpha / self.rank

    def kernels(self, config: TransformerConfig) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return, by path of each target's layer, its kernel's shape and number of input axes.

        The shape is that of one layer. Raises ValueError for a target that this model does not
        have, and for a rank above its width, at which adapters are larger than what they adapt.
        """
        weights = _flat(transformer.abstract(config))
        # Not every model has all of them: GPT-2's MLP has no gate.
        there = [name for name, path in LAYERS.items() if f"layers/{path}/kernel" in weights]
        unknown = [name for name in self.targets if name not in there]
        if unknown:
            note = " Experts have no adapters here." if config.experts else ""
            raise ValueError(
                f"config.model.lora.targets = {self.targets!r}: this model has no "
                f"{', '.join(unknown)}; it has {', '.join(there)}.{note}"
            )
        if self.rank > config.width:
            raise ValueError(
                f"config.model.lora.rank = {self.rank}: expected at most {config.width}, the width "
                "of this model."
            )
        found = {}
        for name in there:
            if self.targets and name not in self.targets:
                continue
            path = f"layers/{LAYERS[name]}"
            input_axes, _ = linear.AXES[name]
            found[path] = (weights[f"{path}/kernel"].shape[1:], len(input_axes))
        return found


def abstract(config: TransformerConfig, lora: Lora) -> dict:
    """Return shapes and dtypes of what is trained: adapters, and the stage's own head."""
    shapes = {}
    for path, (kernel, inputs) in lora.kernels(config).items():
        shapes[f"{path}/lora_a"] = (config.layers, *kernel[:inputs], lora.rank)
        shapes[f"{path}/lora_b"] = (config.layers, lora.rank, *kernel[inputs:])
    # A scalar head starts from 0, with nothing to adapt: it is trained itself.
    if config.head != "lm":
        shapes["head/scalar"] = (config.width,)
    return _tree({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})


def init(config: TransformerConfig, lora: Lora, seed: int) -> dict:
    """Return what is trained as it is before the first step, on the host.

    The product of the adapters is 0, and so is the head. The factor that is not 0 is normal: A has
    the deviation 1 / sqrt(inputs), B 1 / sqrt(rank).
    """
    rng = np.random.default_rng(seed)
    values = {}
    for path, leaf in _flat(abstract(config, lora)).items():
        values[path] = np.zeros(leaf.shape, np.float32)
        if path.endswith(DRAWN[lora.init]):
            # The number of terms in each of its outputs.
            terms = math.prod(leaf.shape[1:-1]) if lora.init == "b_zero" else lora.rank
            normal = rng.standard_normal(leaf.shape, np.float32)
            values[path] = normal / np.float32(math.sqrt(terms))
    return _tree(values)


def join(base: dict, params: dict, scale) -> dict:
    """Return the weights to run: the base's, with the adapters beside its kernels.

    What else `params` holds, a head, takes the base's place. No weight of the base is copied.
    scale: `Lora.scale`, which may be traced.
    """
    joined = _flat(base)
    for path, value in _flat(params).items():
        # The scale goes into B, so that `Linear` needs to know of none.
        joined[path] = value * scale if path.endswith("/lora_b") else value
    return _tree(joined)


def merge(base: dict, params: dict, lora: Lora) -> dict:
    """Return plain weights W + scale * A B, in float32, placed as the base."""
    merged = _flat(merge_by_layer(base, params, lora))
    for path, value in merged.items():
        if isinstance(value, MergedKernel):
            merged[path] = value.whole()
    return _tree(merged)


def merge_by_layer(base: dict, params: dict, lora: Lora) -> dict:
    """Return plain weights as `merge` does, each kernel as a `MergedKernel`, to be exported.

    The whole of them would take more memory than training did.
    """
    weights = _flat(base)
    params = _flat(params)
    for path, a in params.items():
        layer, _, name = path.rpartition("/")
        if name == "lora_a":
            kernel, b = weights[f"{layer}/kernel"], params[f"{layer}/lora_b"]
            weights[f"{layer}/kernel"] = MergedKernel(kernel, a, b, lora.scale)
        elif name != "lora_b":
            weights[path] = a
    return _tree(weights)


@dataclasses.dataclass(frozen=True)
class MergedKernel:
    """The kernels of all layers, merged with their adapters, in float32, where they are asked for.

    The sum is in float32 also where the base is held in fewer bits.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float

    def whole(self) -> jax.Array:
        """Return the kernels of all layers, placed as the base's are."""
        # Each device adds its own part.
        add = jax.jit(jax.vmap(_add_product, (0, 0, 0, None)), out_shardings=self.kernel.sharding)
        return add(self.kernel, self.a, self.b, self.scale)

    def __getitem__(self, place: tuple[int, ...]) -> jax.Array:
        return _merged_at(self.kernel, self.a, self.b, self.scale, place)


@jax.jit
def _merged_at(kernel, a, b, scale, place):
    return _add_product(kernel[place], a[place], b[place], scale)


def _add_product(kernel, a, b, scale):
    # At the highest precision, for this product is part of the weights for good.
    return kernel + scale * jnp.tensordot(a, b, 1, precision="highest")


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def _tree(flat) -> dict:
    return traverse_util.unflatten_dict(flat, sep="/")

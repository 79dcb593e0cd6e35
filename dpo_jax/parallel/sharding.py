"""The mesh, and where each array lives on it.

Five axes: `data` holds copies of the weights, `fsdp` splits both the batch and the weights,
`context` splits both the tokens of each shard of the batch and the weights other than experts,
`expert` splits both the batch and the experts of a layer, and `tensor` splits heads, feed-forward
width and vocabulary. Weights are placed by the first rule whose
pattern matches their path; a weight that no rule matches is an error. A dimension that its axes do
not divide is left whole.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.data import packing

# The outermost first: neighbours along the last one are closest to each other.
AXES = ("data", "fsdp", "context", "expert", "tensor")
WHERE_USED = ("context", "expert")  # axes that are only named where there are several devices
# The axes that split a batch into shards. `fsdp` is last: embeddings, which it splits by width when
# they are looked up, then go to its devices in one exchange.
BATCH = ("data", "expert", "fsdp")
TOKENS = (*BATCH, "context")  # those that split all of its tokens
# The axes that split weights for memory alone. Devices that share the tokens of a shard share
# weights, too.
SPLIT = ("fsdp", "context")
NAMED = 3  # weights that a message names

# Batches are made of plain numpy arrays by data/, which imports no jax. They come to devices here,
# so here jax is told, once, that it may map over their fields.
jax.tree_util.register_dataclass(packing.RolloutTargets)
jax.tree_util.register_dataclass(packing.Batch)

# Path -> spec of the weight itself; weights under `layers/` have one more, unsplit, leading axis.
#
# `tensor` splits what a layer makes inside (heads, feed-forward width) and the vocabulary: q, k, v,
# gate and up by their outputs, out and down by their inputs. So all that a layer sends along it are
# the sums of partial results after `out` and after `down`. `fsdp` splits the other large axis, for
# memory alone, and so does `context`: it is gathered before use. Norms and biases along the width
# are small, and whole.
RULES = (
    (r"embed/tokens$", P("tensor", SPLIT)),
    (r"embed/positions$", P(None, SPLIT)),
    (r"attention/[qkv]/kernel$", P(SPLIT, "tensor", None)),
    (r"attention/[qkv]/bias$", P("tensor", None)),
    (r"attention/out/kernel$", P("tensor", None, SPLIT)),
    (r"mlp/(gate|up)/kernel$", P(SPLIT, "tensor")),
    (r"mlp/(gate|up)/bias$", P("tensor")),
    (r"mlp/down/kernel$", P("tensor", SPLIT)),
    (r"router/kernel$", P(SPLIT, None)),
    (r"experts/(gate|up)/kernel$", P("expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", P("expert", "tensor", "fsdp")),
    # Adapters: inputs and outputs are split as the kernel's, the rank is whole.
    (r"(q|k|v|gate|up)/lora_a$", P(SPLIT)),
    (r"(q|k|v|gate|up)/lora_b$", P(None, "tensor")),
    (r"(out|down)/lora_a$", P("tensor")),
    (r"(out|down)/lora_b$", P(None, SPLIT)),
    (r"head/kernel$", P(SPLIT, "tensor")),
    (r"head/bias$", P("tensor")),
    (r"head/scalar$", P(SPLIT)),
    # All that is left: norms, and the biases of `out` and `down`.
    (r"(scale|bias)$", P(None)),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    context: int = 1,
    expert: int = 1,
    devices=None,
) -> jax.sharding.Mesh:
    """Return the device mesh; one size may be -1, which takes all the devices that are left.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(data=data, fsdp=fsdp, context=context, expert=expert, tensor=tensor)
    left = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(left) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"the mesh {told(sizes)}: at most one size may be -1, the others are 1 or more."
        )
    # Where the others do not divide the devices, -1 stays, and the message below shows it.
    if left and len(devices) % given == 0:
        sizes[left[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"the mesh {told(sizes)} does not make up the {len(devices)} devices found. Change one "
            "of the sizes, or set one to -1."
        )
    # Auto: the compiler chooses layouts between the ones that `constrain` pins.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(arrange(tuple(sizes.values()), devices), AXES, axis_types=types)


def with_all_axes(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Return a mesh of the same devices with all of AXES; those that it lacks have size 1.

    Raises ValueError where it has another axis.
    """
    given = mesh.axis_names
    if not set(given) <= set(AXES):
        raise ValueError(
            f"the mesh has the axes {', '.join(given)}: expected only some of {', '.join(AXES)}."
        )
    ordered = mesh.devices.transpose([given.index(axis) for axis in AXES if axis in given])
    sizes = [mesh.shape.get(axis, 1) for axis in AXES]
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(ordered.reshape(sizes), AXES, axis_types=types)


def told(sizes: dict[str, int]) -> str:
    """Return the sizes of a mesh as text: data 4 x fsdp 2 x tensor 1."""
    return " x ".join(f"{axis} {sizes[axis]}" for axis in shown_axes(sizes))


def shown_axes(sizes: dict[str, int]) -> list[str]:
    """Return the axes to show of a mesh: `context` and `expert` only where they are used."""
    # Plans that were kept before there were these two do not have them.
    return [axis for axis in AXES if axis not in WHERE_USED or sizes.get(axis, 1) != 1]


def arrange(sizes: tuple[int, ...], devices) -> np.ndarray:
    """Return the devices as an array of these sizes, neighbours along an axis close to each other.

    TPU slices, or hosts with GPUs, are far apart. The first axis that can is split over them, and
    the next over what is left: copies of the weights, along `data`, talk once a step, while
    `tensor` talks most. Raises ValueError where the sizes cannot be split so.
    """
    # CPUs and single TPU slices have no such attribute.
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # The outermost axis takes as many of the slices as it can.
    left = len(slices)
    outer = []  # over how many slices each axis goes
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        raise ValueError(
            f"a mesh of {list(sizes)} cannot be laid over the slices or hosts of the "
            f"{len(devices)} devices: make one of the sizes, data's at best, a multiple of their "
            "number."
        )
    inner = [size // far for size, far in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def define_flags(axes: tuple[str, ...] = ("fsdp", "tensor")) -> Callable[[], jax.sharding.Mesh]:
    """Define a command's flags for axes of the mesh.

    The result makes the mesh, once the flags are parsed.
    """
    from absl import flags

    found = {}
    for axis in axes:
        least = 1 if axis in WHERE_USED else -1  # as in the config
        found[axis] = flags.DEFINE_integer(
            axis, 1, f"As config.mesh.{axis}.", lower_bound=least, upper_bound=1_000_000
        )
    return lambda: make_mesh(**{axis: flag.value for axis, flag in found.items()})


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Return how many shards a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def whole_shards(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """Return the batch size rounded up to a multiple of the mesh's shards."""
    shards = batch_shards(mesh)
    return -(-batch_size // shards) * shards


def context_size() -> int:
    """Return how many devices share the tokens of a shard; asked while a program is traced."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def device():
    """Return a device that the step is compiled for.

    It is one of the mesh's, which need not be at hand (a dry run compiles for others), or else of
    the default ones.
    """
    # Asked while the step is traced: a kernel is chosen for the device it will run on.
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform_of(mesh: jax.sharding.Mesh) -> str:
    """Return the platform of a mesh's devices: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Pin an activation to a spec inside jit; without a mesh, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, P(*spec), x.shape))


def fitting(mesh, spec: P, shape: tuple[int, ...]) -> P:
    """Return the spec without the axes that do not divide their dimension."""
    # A spec may be shorter than the shape: the axes it leaves out are whole.
    missing = len(shape) - len(spec)
    found = []
    for axes, size in zip((*spec, *(None,) * missing), shape, strict=True):
        divides = size % math.prod(mesh.shape[name] for name in _names(axes)) == 0
        found.append(axes if divides else None)
    return P(*found)


def _names(axes) -> tuple[str, ...]:
    """Return the mesh axes of a dimension, which may be split by several together, as by BATCH."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def path_name(path) -> str:
    """Return a pytree path as text: layers/attention/q/kernel."""
    names = []
    for key in path:  # of a dict, a sequence, or a dataclass
        names.append(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))))
    return "/".join(names)


def spec_of(name: str, shape: tuple[int, ...], mesh) -> P:
    """Return the PartitionSpec of a weight by its path; ValueError where no rule matches."""
    return fitting(mesh, _rule(name, shape), shape)


def _rule(name: str, shape: tuple[int, ...]) -> P:
    """Return the PartitionSpec that a weight has where all its axes divide their dimensions."""
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return P(None, *spec) if name.startswith("layers/") else spec
    raise ValueError(
        f"no sharding rule matches the parameter {name!r} of shape {shape}; "
        "add one to RULES in dpo_jax/parallel/sharding.py."
    )


def param_shardings(mesh, params):
    """Return the NamedSharding of each weight in a tree of arrays or ShapeDtypeStructs."""

    def sharding_of(path, leaf):
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def unsplit(mesh, params) -> list[str]:
    """Return a line for each axis that leaves weights whole, with the bytes that it costs.

    params: a tree of arrays or ShapeDtypeStructs.
    """
    lines = []
    for axis, devices in mesh.shape.items():
        excess = 0  # bytes on each device
        whole = []  # (bytes, weight, dimension) of those that the axis does not divide
        is_split = False
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = path_name(path)
            wanted = [_names(axes) for axes in _rule(name, leaf.shape)]
            found = [_names(axes) for axes in spec_of(name, leaf.shape, mesh)]
            dimension = next((d for d, names in enumerate(wanted) if axis in names), None)
            if devices == 1 or dimension is None:
                continue
            if axis in found[dimension]:
                is_split = True
                continue
            parts = math.prod(mesh.shape[other] for other in sum(found, ()))
            held = leaf.size * leaf.dtype.itemsize // parts
            excess += held - held // devices
            whole.append((held, name, leaf.shape[dimension]))
        if not excess:
            continue
        # The largest ones come first.
        whole.sort(reverse=True)
        named = ", ".join(f"{name} ({dimension})" for _, name, dimension in whole[:NAMED])
        if len(whole) > NAMED:
            named += f" and {len(whole) - NAMED} more"
        does = "does not divide" if is_split else "splits no weight; it does not divide"
        lines.append(
            f"mesh.{axis} = {devices} {does} {named}: each device holds {_bytes(excess)} of "
            "weights more than if it did; in training, their gradients and moments come on top."
        )
    return lines


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def shard_params(mesh, values):
    """Return host arrays, the same on every process, on the mesh as weights of their names are."""
    return jax.tree.map(
        lambda x, placed: jax.make_array_from_callback(x.shape, placed, lambda index: x[index]),
        values,
        param_shardings(mesh, values),
    )


def per_shard(params, shards: int):
    """Return the weights with a leading axis of shards, whole on each but for the tensor axis.

    What is computed from them needs no other shard, and the gradient of each stays with its shard
    until they are added up: one gather before a loop and one reduction after it, instead of both in
    each of its turns.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def copies(path, x):
        spec = () if mesh.empty else spec_of(path_name(path), x.shape, mesh)
        # Gathered over fsdp, but still split by `tensor`, along which logits are split too.
        tensor_only = [axis if axis == "tensor" else None for axis in spec]
        return constrain(jnp.broadcast_to(x, (shards, *x.shape)), TOKENS, *tensor_only)

    return jax.tree_util.tree_map_with_path(copies, params)


def replicated(mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def shard_batch(mesh, batch, *, axis: int):
    """Put a host batch (the same on every process) on the mesh, split along `axis`.

    Every process takes the part that its own devices hold, so nothing crosses between hosts.
    """
    sharding = NamedSharding(mesh, P(*(None,) * axis, BATCH))

    def put(x):
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: x[index])

    return jax.tree.map(put, batch)

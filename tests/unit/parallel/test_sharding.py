"""Meshes and sharding rules."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.models import lora, transformer
from dpo_jax.parallel import sharding
from tests.helpers.tiny import tiny_config


def test_make_mesh_takes_remaining_devices():
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, context=1, expert=1, tensor=2)
    assert sharding.told(mesh.shape) == "data 2 x fsdp 2 x tensor 2"
    mesh = sharding.make_mesh(data=1, context=-1, tensor=2)
    assert sharding.told(mesh.shape) == "data 1 x fsdp 1 x context 4 x tensor 2"
    assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, context=1, expert=1, tensor=1)


def fake(number: int, hosts: int, platform="gpu", **fields):
    """A device as jax shows those of several hosts, of a slice each."""
    return types.SimpleNamespace(
        id=number,
        platform=platform,
        device_kind=platform,
        process_index=number // 8,
        slice_index=number // 8 if hosts > 1 else 0,
        **fields,
    )


@pytest.mark.parametrize(
    "sizes, hosts_along", [((4, 8, 1), 0), ((1, 32, 1), 1), ((8, 2, 2), 0), ((2, 16, 1), None)]
)
def test_make_mesh_splits_hosts_by_first_axis(sizes, hosts_along):
    """Four hosts with eight GPUs each."""
    hosts = np.vectorize(lambda device: device.process_index)(
        sharding.arrange(sizes, [fake(number, hosts=4) for number in range(32)])
    )
    assert hosts.shape == sizes and len(set(hosts.ravel())) == 4
    for axis in range(3):
        # Who are neighbours along it are on one host.
        inside = (hosts == np.take(hosts, [0], axis)).all()
        assert inside == (axis != hosts_along if hosts_along is not None else axis == 2)


def test_make_mesh_refuses_unsplittable_hosts():
    devices = [fake(number, hosts=3) for number in range(24)]
    assert sharding.arrange((3, 8, 1), devices).shape == (3, 8, 1)
    with pytest.raises(
        ValueError, match="cannot be laid over the slices or hosts of the 16 devices"
    ):
        sharding.arrange((16, 1, 1), [fake(number * 3 % 24, hosts=3) for number in range(16)])


def test_make_mesh_leaves_devices_where_unused_axes_are():
    """A mesh without `context` and `expert` has the order of devices of its other axes alone."""
    devices = [fake(number, hosts=4) for number in range(32)]
    for data, fsdp, tensor in [(4, 8, 1), (1, 32, 1), (8, 2, 2)]:
        np.testing.assert_array_equal(
            sharding.arrange((data, fsdp, 1, 1, tensor), devices).ravel(),
            sharding.arrange((data, fsdp, tensor), devices).ravel(),
        )


@pytest.mark.parametrize("sizes", [(1, 32, 2), (32, 2, 1), (16, 2, 2)])
def test_make_mesh_part_of_torus(sizes):
    """64 chips of a v5p, 4 x 4 x 4."""
    chips = [
        fake(number, hosts=1, platform="tpu", coords=coords, core_on_chip=0)
        for number, coords in enumerate(np.ndindex(4, 4, 4))
    ]
    assert sharding.arrange(sizes, chips).shape == sizes


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1)])
def test_make_mesh_refuses_wrong_size(sizes):
    with pytest.raises(ValueError, match="does not make up the 8 devices"):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1)])
def test_make_mesh_refuses_meaningless_sizes(sizes):
    with pytest.raises(ValueError, match="at most one size may be -1"):
        sharding.make_mesh(*sizes)


FULL = dict(norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        FULL,
        dict(learned_positions=True, tied=True, kv_heads=4),
        dict(qk_norm="head"),
        dict(qk_norm="width", norm_before=False, norm_after=True),
    ],
)
def test_rules_cover_and_split_parameters(fields):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = transformer.abstract(tiny_config(**fields))
    for path, placed in jax.tree_util.tree_leaves_with_path(sharding.param_shardings(mesh, params)):
        if sharding.path_name(path).endswith(("kernel", "tokens")):
            assert {("fsdp", "context"), "tensor"} <= set(placed.spec), path


def test_rules_split_adapters_as_kernels():
    mesh, config = sharding.make_mesh(data=2, fsdp=2, tensor=2), tiny_config()
    kernels = sharding.param_shardings(mesh, transformer.abstract(config))["layers"]
    for room, layers in sharding.param_shardings(mesh, lora.abstract(config, lora.Lora(2)))[
        "layers"
    ].items():
        for layer, placed in layers.items():
            kernel, split = kernels[room][layer]["kernel"].spec, len(placed["lora_a"].spec) - 1
            assert tuple(placed["lora_a"].spec) == (*kernel[:split], None)
            assert tuple(placed["lora_b"].spec) == (None, None, *kernel[split:])


def test_rules_refuse_unknown_parameter():
    with pytest.raises(
        ValueError, match="no sharding rule matches the parameter 'layers/router/table'"
    ):
        sharding.spec_of("layers/router/table", (2, 4, 4), sharding.make_mesh())


def test_rules_keep_odd_dimension_whole():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.spec_of("embed/tokens", (41, 16), mesh) == P(None, ("fsdp", "context"))


def test_shard_batch_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    x = np.arange(24).reshape(2, 4, 3)
    placed = sharding.shard_batch(mesh, {"x": x}, axis=1)["x"]
    np.testing.assert_array_equal(placed, x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        # Keys and values of 1,024 bytes each: fsdp halves them, tensor leaves the halves whole.
        (
            (1, 2, 4),
            "mesh.tensor = 4 does not divide layers/attention/v/kernel (2), "
            "layers/attention/k/kernel (2): each device holds 768 bytes of weights more",
        ),
        ((1, 1, 6), "mesh.tensor = 6 splits no weight; it does not divide layers/mlp/"),
        ((1, 3, 1), "mesh.fsdp = 3 splits no weight; it does not divide layers/mlp/"),
    ],
)
def test_unsplit_says_what_an_axis_costs(sizes, said):
    """Weights of width 16, with four heads, two of them of keys and values."""
    shapes = transformer.abstract(tiny_config())
    devices = jax.devices()[: np.prod(sizes)]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    (line,) = sharding.unsplit(mesh, shapes)
    assert line.startswith(said)


def test_context_splits_weights_as_fsdp_does():
    shapes = transformer.abstract(tiny_config())
    split = sharding.param_shardings(sharding.make_mesh(1, 8), shapes)
    for axes in (dict(fsdp=2, context=4), dict(fsdp=1, context=8)):
        mesh = sharding.make_mesh(data=1, **axes)
        for one, other in zip(
            *map(jax.tree.leaves, (split, sharding.param_shardings(mesh, shapes))), strict=True
        ):
            assert one.shard_shape((8, 8, 8, 8)) == other.shard_shape((8, 8, 8, 8))


def test_unsplit_is_silent_where_all_is_split():
    shapes = transformer.abstract(tiny_config())
    for sizes in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
        assert sharding.unsplit(sharding.make_mesh(*sizes), shapes) == []

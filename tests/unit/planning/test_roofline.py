"""The roofline by hand."""

import jax
import pytest

from dpo_jax.data import packing
from dpo_jax.data.packing import RowLimits
from dpo_jax.models import transformer
from dpo_jax.planning import groups, planner, roofline, topologies
from tests.helpers.tiny_runs import SCRATCH, scratch_config


def test_seconds_by_hand():
    topology = topologies.parse("v5e:4x4")
    collectives = {"all-gather": (1, 250e9), "all-reduce": (2, 50e9)}
    work = roofline.Work(flops=197e12, memory=2 * 819e9, collectives=collectives)
    assert roofline.seconds(topology, "bfloat16", work) == dict(
        compute=1.0, memory=2.0, interconnect=3.0
    )
    assert roofline.seconds(topology, "float32", work)["compute"] == pytest.approx(6.0)


def test_seconds_of_a_chip_alone():
    work = roofline.Work(flops=918e12, memory=0.0, collectives={})
    found = roofline.seconds(topologies.parse("v6e:1x1"), "bfloat16", work)
    assert found == dict(compute=1.0, memory=0.0, interconnect=0.0)


def test_sampling_by_hand():
    """Two batches of 3 completions on a device, of 16 tokens and 12 new ones, over fsdp 4."""
    model = planner.model_config(scratch_config(), "dpo")
    mesh = dict(data=1, fsdp=4, context=1, expert=1, tensor=1)
    topology = topologies.parse("h100:4")
    work, taken = roofline.sampling(
        model, mesh, topology, calls=2, rows=3, prompt=16, new=12, flops=7.0
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(model)))
    # Keys and values of 2 heads of 16 numbers in 2 layers, in float32.
    of_token = 2 * 2 * 2 * 16 * 4
    cache = 3 * (16 + 12) * of_token
    passes = 2 * (1 + 12)
    assert work.flops == 7.0
    assert work.memory == passes * 4 * weights + 2 * 12 * cache
    assert work.collectives == {"all-gather": (0, passes * 4 * weights * 3 / 4)}
    logits = 3 * 4 * 3 * SCRATCH["vocab_size"]
    assert taken == int(2 * cache + 3 * 16 * of_token + logits + 2 * (weights / 2) * 4)


def test_weights_of_context_are_gathered_between_machines():
    """Sixteen devices along context, on two machines of eight: half of all weights come by card."""
    model = planner.model_config(scratch_config(), "dpo")
    weights = sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(model)))
    topology = topologies.parse("h100:2x8")
    gathered = 4 * weights * 15 / 16  # in float32
    for sizes in (dict(fsdp=1, context=16), dict(fsdp=2, context=8), dict(fsdp=16, context=1)):
        mesh = dict(data=1, expert=1, tensor=1) | sizes
        once = roofline.forward(model, mesh, 1, topology, flops=0.0)
        assert once.memory == 4 * weights
        assert once.collectives == {"all-gather": (0, gathered)}
        # A machine gets what the other holds once, an eighth of it over each card.
        assert once.network == pytest.approx(4 * weights / 2 / 8)

        [shape] = groups.lay_out(scratch_config(), "dpo", groups.Group(16, 16), shards=1).shapes
        work = roofline.estimate(
            model, shape, mesh, 1, flops=0.0, forwards=2, state=0, topology=topology
        )
        # Keys and values of 2 heads of 16 numbers in 2 layers: two passes, and their gradients.
        context = sizes["context"]
        keys = shape.tokens * 2 * 2 * 2 * 16 * 4 * (1 - 1 / context)
        assert work.collectives["all-gather"] == (0, 3 * gathered + 2 * keys)
        assert work.collectives["reduce-scatter"] == (0, gathered + keys)
        of_keys = {1: 0, 8: 0, 16: 1 / 15}[context]
        assert work.network == pytest.approx(4 * once.network + of_keys * 3 * keys)


def test_experts_that_are_split_by_hand():
    """A device gathers its own half of the experts, and the tokens of the other device."""
    config = scratch_config()
    config.model.scratch.update(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    model = planner.model_config(config, "dpo")
    weights = sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(model)))
    of_experts = 2 * 4 * 3 * 64 * 96  # layers, experts, kernels
    others = weights - of_experts
    mesh = dict(data=1, fsdp=2, context=2, expert=2, tensor=1)
    topology = topologies.parse("h100:8")
    once = roofline.forward(model, mesh, 1, topology, flops=0.0)
    assert once.memory == 4 * (others + of_experts / 2)
    gathered = 4 * (others * 3 / 4 + of_experts / 2 / 2)
    assert once.collectives == {"all-gather": (0, gathered)} and once.network == 0

    [shape] = groups.lay_out(config, "dpo", groups.Group(16, 16), shards=4).shapes
    work = roofline.estimate(
        model, shape, mesh, 1, flops=0.0, forwards=2, state=0, topology=topology
    )
    keys = shape.tokens * 2 * 2 * 2 * 16 * 4 / 2
    tokens = 3 * 2 * (shape.tokens / 2) * 64 * 4  # passes, layers, a device's tokens, their width
    assert work.collectives["all-gather"] == (0, 3 * gathered + 2 * keys + tokens)
    assert work.collectives["reduce-scatter"] == (0, gathered + keys + tokens)


def test_rows_in_two_parts_by_hand():
    """A prompt of 64 tokens with four responses of 32, as two parts and as whole rows of 96."""
    config = scratch_config(batch_size=6, data__order="prompts")
    model = planner.model_config(config, "dpo")
    group = groups.Group(64, 32, pairs=6, responses=4)
    [shape] = groups.lay_out(config, "dpo", group, shards=1).shapes
    assert shape.rows == (packing.RowShape(1, 64, 4, 32),)
    heads, kv_heads = SCRATCH["num_attention_heads"], SCRATCH["num_key_value_heads"]
    queries = 64 + 4 * 32
    keys = 64 + 4 * (64 + 32)
    numbers = 2 * heads * queries + 2 * kv_heads * keys
    assert roofline._rows(model, shape, 4) == 2 * numbers * 16 * 4

    [whole] = groups.lay_out(config, "dpo", group, shards=1, limits=RowLimits(window=80)).shapes
    assert whole.rows == (packing.RowShape(4, 0, 1, 96),)
    assert roofline._rows(model, whole, 4) == 2 * (2 * heads + 2 * kv_heads) * 4 * 96 * 16 * 4

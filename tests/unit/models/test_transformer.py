"""The decoder: packed against separate rows, windows, remat, a published text."""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.packing import Rows
from dpo_jax.models import families, hf, transformer
from dpo_jax.models.attention import Layout
from dpo_jax.models.rope import Rope, rotary_angles
from dpo_jax.models.transformer import LayerKind
from dpo_jax.parallel import sharding
from tests.helpers import tiny_models
from tests.helpers.paths import STORIES
from tests.helpers.tiny import tiny_config


def one_device(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.param_shardings(mesh, transformer.abstract(config))


def test_logits_of_published_story():
    folder = STORIES
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, one_device(config))
    golden = json.loads((folder / "golden_greedy.json").read_text())
    tokens = np.array(golden["tokens"])
    logits = np.asarray(
        jax.jit(transformer.logits, static_argnums=0)(config, params, tokens[None])
    )[0]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = golden["logprob_of_next"]
    assert len(tokens) > 100
    np.testing.assert_array_equal(logits[:-1].argmax(-1), tokens[1:])
    np.testing.assert_allclose(
        log_probs[np.arange(len(tokens) - 1), tokens[1:]], expected, atol=1e-4
    )
    np.testing.assert_allclose(logits[0], golden["first_position_logits"], atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["gpt2", "gptj", "llama-biased", "gemma2", "olmo3", "qwen3-moe"]
)
def test_held_weights_of_16_bits_move_no_bit_of_16_bit_products(variant):
    """So no weight is held in 16 bits that acts in more of them."""
    config = families.from_hf(tiny_models.hf_config(variant), dtype="bfloat16")
    params = jax.tree.map(jnp.asarray, tiny_models.random_params(config))
    narrow = transformer.held(params, "bfloat16")
    assert jax.tree.map(lambda x: x.dtype, narrow) == jax.tree.map(
        lambda x: x.dtype, transformer.abstract(config, "bfloat16")
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 9))
    logits = jax.jit(transformer.logits, static_argnums=0)
    np.testing.assert_array_equal(logits(config, narrow, tokens), logits(config, params, tokens))
    # Vectors are left, of each layer: a small part even of this model.
    wide = [x.size for x in jax.tree.leaves(narrow) if x.dtype == jnp.float32]
    assert sum(wide) < 0.1 * sum(x.size for x in jax.tree.leaves(params))


# Two pairs of prompt, chosen, rejected: lengths 3, 2, 2 and 2, 3, 1; then a token of padding.
SEQUENCES = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11], [7, 8, 12]]
POSITIONS = [0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 3, 4, 2, 0]


def whole_rows(sequences):
    count = len(sequences)
    return Rows(
        prompts=np.zeros((1, count, 0), int),
        prompt_lengths=np.zeros((1, count), int),
        responses=np.array(sequences)[None, :, None],
    )


LAYOUTS = {
    # Two buckets, of rows of 5 and of 3.
    "whole": Layout(
        rows=(whole_rows(SEQUENCES[:3]), whole_rows(SEQUENCES[3:])),
        token_slots=np.array(
            [
                [0, 5],
                [1, 6],
                [2, 7],
                [3, -1],
                [4, -1],
                [8, -1],
                [9, -1],
                [10, 15],
                [11, 16],
                [12, -1],
                [13, -1],
                [14, -1],
                [17, -1],
                [-1, -1],
            ]
        )[None],
    ),
    # One bucket: prompts of up to 3 tokens, two responses of up to 3 each.
    "two parts": Layout(
        rows=(
            Rows(
                prompts=np.array([[[0, 1, 2], [7, 8, 0]]]),
                prompt_lengths=np.array([[3, 2]]),
                responses=np.array([[[[3, 4, 0], [5, 6, 0]], [[9, 10, 11], [12, 0, 0]]]]),
            ),
        ),
        token_slots=np.array([0, 1, 2, 6, 7, 9, 10, 3, 4, 12, 13, 14, 15, -1])[None, :, None],
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def row_hidden(config, params, tokens_T):
    return transformer.hidden(config, params, tokens_T[None], jnp.arange(len(tokens_T))[None])[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def flat_hidden(config, params, tokens_N, layout):
    positions = jnp.array(POSITIONS)[None]
    return transformer.hidden(config, params, tokens_N[None], positions, LAYOUTS[layout])[0]


# Gradients of these blocks compile in half the time.
PLAIN = dict(
    learned_positions=True,
    pattern=(LayerKind(),),
    gated=False,
    activation="relu",
    parallel=True,
    shared_norm=True,
)


def tiny(**fields):
    config = tiny_config(**fields)
    return config, tiny_models.random_params(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_packed_equals_separate_rows(layout):
    config, params = tiny()
    tokens_N = jnp.array(np.random.default_rng(0).permutation(14))
    flat_ND = flat_hidden(config, params, tokens_N, layout)
    for row in map(np.array, SEQUENCES):
        np.testing.assert_allclose(
            flat_ND[row], row_hidden(config, params, tokens_N[row]), atol=1e-5
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def influence(hidden, config, params, tokens_N):
    """[N, N]: how strongly each output depends on each token's embedding; tokens must differ."""

    def outputs(table_VD):
        return hidden(
            config, params | {"embed": params["embed"] | {"tokens": table_VD}}, tokens_N
        ).sum(-1)

    return jnp.abs(jax.jacrev(outputs)(params["embed"]["tokens"])).sum(-1)[:, tokens_N]


def test_window_reaches_back_by_layers():
    config, params = tiny(**PLAIN | dict(pattern=(LayerKind(window=3),)))
    found = influence(row_hidden, config, params, jnp.arange(9))
    distance = np.arange(9)[:, None] - np.arange(9)
    np.testing.assert_array_equal(found > 0, (distance >= 0) & (distance <= 2 * (3 - 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_response_sees_prompt_and_itself(layout):
    config, params = tiny(**PLAIN)
    seen = np.zeros((14, 14), bool)
    for row in map(np.array, SEQUENCES):
        for t in range(len(row)):
            seen[row[t], row[: t + 1]] = True

    def hidden(config, params, tokens_N):
        return flat_hidden(config, params, tokens_N, layout)

    found = influence(hidden, config, params, jnp.arange(14))
    np.testing.assert_array_equal(found[:13] > 0, seen[:13])  # the padding's output is nobody's


@pytest.mark.parametrize(
    ("layers", "unroll", "expected"), [(2, 0, 2), (6, 0, 6), (7, 0, 1), (6, 1, 1), (24, 4, 4)]
)
def test_layers_are_unrolled_on_a_cpu_up_to_a_depth(layers, unroll, expected):
    config = tiny_config(layers=layers, unroll=unroll)
    assert scan_step_layers(config) == expected


def scan_step_layers(config) -> int:
    """Return how many layers the traced trunk runs in a step of its scan."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    trunk = functools.partial(transformer.logits, config)
    (scan,) = [
        equation
        for equation in jax.make_jaxpr(trunk)(transformer.abstract(config), tokens).eqns
        if equation.primitive.name == "scan"
    ]
    return scan.params["unroll"]


@pytest.mark.parametrize(
    ("platform", "layers", "unroll", "expected"),
    [("gpu", 12, 0, 12), ("gpu", 13, 0, 1), ("tpu", 2, 0, 1), ("tpu", 2, 2, 2)],
)
def test_unrolled_layers_of_another_device(monkeypatch, platform, layers, unroll, expected):
    # What a plan compiles for, on a machine that has CPUs alone.
    monkeypatch.setattr(transformer, "device", lambda: SimpleNamespace(platform=platform))
    config = tiny_config(layers=layers, unroll=unroll)
    assert transformer.unrolled_layers(config) == expected


def test_remat_and_unroll_change_nothing():
    config, params = tiny(**PLAIN)
    tokens_BT = jnp.array(np.random.default_rng(0).integers(0, 40, (2, 12)))

    def loss(params, config):
        return jax.nn.log_softmax(transformer.logits(config, params, tokens_BT))[..., 3].sum()

    compiled, products = {}, {}
    for remat, unroll in (("none", 1), ("full", 1), ("dots", 1), ("none", 2)):
        traced = jax.jit(jax.value_and_grad(loss), static_argnums=1).trace(
            params, dataclasses.replace(config, remat=remat, unroll=unroll)
        )
        # With the policy None it is an activation's checkpoint, not a layer's.
        assert bool(re.search("policy=(?!None)", str(traced.jaxpr))) == (remat != "none")
        products[remat] = str(traced.jaxpr).count("dot_general")
        compiled[remat, unroll] = traced.lower().compile()(params)
    # "dots" computes no linear product again.
    assert products["none"] <= products["dots"] < products["full"]
    for found in compiled.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
            found,
            compiled["none", 1],
        )


MIXED = (LayerKind(window=2, rope=Rope(4, 100.0)), LayerKind(rope=Rope(4)), LayerKind(window=3))


@pytest.mark.parametrize("layers", [3, 7])  # unrolled, and scanned
def test_pattern_runs_each_layer_in_its_kind(layers):
    """By branches in a scan: the same as each layer by itself, in a plain loop."""
    config, params = tiny(layers=layers, pattern=MIXED)
    tokens_SN = np.random.default_rng(0).integers(0, config.vocab, (2, 9))
    positions_SN = np.broadcast_to(np.arange(9), (2, 9))

    def by_loop(params):
        embed = transformer.Embed(config)
        x_SND = embed.apply({"params": params["embed"]}, tokens_SN, positions_SN)
        for layer in range(layers):
            # Of a model with this kind alone.
            kind = MIXED[layer % 3]
            block = transformer.Block(dataclasses.replace(config, pattern=(kind,)))
            rotations = [rotary_angles(kind.rope, positions_SN)] if kind.rope else []
            weights = jax.tree.map(lambda x_L, layer=layer: x_L[layer], params["layers"])
            inputs = (positions_SN, rotations, None)
            x_SND, _ = block.apply({"params": weights}, x_SND, inputs, None)
        return transformer.Norm(config).apply({"params": params["norm_final"]}, x_SND)

    def scanned(params):
        return transformer.hidden(config, params, tokens_SN, positions_SN)

    def loss(forward):
        return lambda params: (forward(params) ** 3).sum()

    np.testing.assert_allclose(jax.jit(scanned)(params), jax.jit(by_loop)(params), atol=1e-5)
    found = jax.jit(jax.grad(loss(scanned)))(params)
    expected = jax.jit(jax.grad(loss(by_loop)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        found,
        expected,
    )

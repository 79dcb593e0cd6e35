"""Every family against transformers' own torch model, in both directions; and the decoder against
itself.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file

from dpo_jax.models import families, hf, transformer
from dpo_jax.models.attention import Layout
from dpo_jax.parallel import sharding
from tests.helpers import tiny_models
from tests.helpers.paths import SHARED, needs_shared
from tests.helpers.tiny import tiny_config

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
LLAMA = {
    "embed/tokens": (96, 32),
    "norm_final/scale": (32,),
    "head/kernel": (32, 96),
    "layers/norm_attention/scale": (2, 32),
    "layers/norm_mlp/scale": (2, 32),
    "layers/attention/q/kernel": (2, 32, 4, 8),
    "layers/attention/k/kernel": (2, 32, 2, 8),
    "layers/attention/v/kernel": (2, 32, 2, 8),
    "layers/attention/out/kernel": (2, 4, 8, 32),
    "layers/mlp/gate/kernel": (2, 32, 48),
    "layers/mlp/up/kernel": (2, 32, 48),
    "layers/mlp/down/kernel": (2, 48, 32),
}
GPT_ATTENTION = {
    "layers/attention/q/kernel": (2, 32, 4, 8),
    "layers/attention/k/kernel": (2, 32, 4, 8),
    "layers/attention/v/kernel": (2, 32, 4, 8),
    "layers/attention/out/kernel": (2, 4, 8, 32),
}
GPT_ATTENTION_BIASES = {
    "layers/attention/q/bias": (2, 4, 8),
    "layers/attention/k/bias": (2, 4, 8),
    "layers/attention/v/bias": (2, 4, 8),
    "layers/attention/out/bias": (2, 32),
}
GPT_NORMS = {
    "layers/norm_attention/scale": (2, 32),
    "layers/norm_attention/bias": (2, 32),
    "norm_final/scale": (32,),
    "norm_final/bias": (32,),
}
SECOND_NORM = {"layers/norm_mlp/scale": (2, 32), "layers/norm_mlp/bias": (2, 32)}


def mlp(width):
    return {
        "layers/mlp/up/kernel": (2, 32, width),
        "layers/mlp/up/bias": (2, width),
        "layers/mlp/down/kernel": (2, width, 32),
        "layers/mlp/down/bias": (2, 32),
    }


# Checkpoints and sharding rules go by these: a change here breaks the runs that people have on
# disk.
PINNED = {
    "gpt2": GPT_ATTENTION
    | GPT_ATTENTION_BIASES
    | GPT_NORMS
    | SECOND_NORM
    | mlp(128)
    | {"embed/tokens": (96, 32), "embed/positions": (64, 32)},
    "gptj": GPT_ATTENTION
    | GPT_NORMS
    | mlp(128)
    | {"embed/tokens": (96, 32), "head/kernel": (32, 96), "head/bias": (96,)},
    "neox-parallel": GPT_ATTENTION
    | GPT_ATTENTION_BIASES
    | GPT_NORMS
    | SECOND_NORM
    | mlp(48)
    | {"embed/tokens": (96, 32), "head/kernel": (32, 96)},
    "llama2": LLAMA,
    "mistral-window": LLAMA,
    "qwen2": LLAMA
    | {
        "layers/attention/q/bias": (2, 4, 8),
        "layers/attention/k/bias": (2, 2, 8),
        "layers/attention/v/bias": (2, 2, 8),
    },
    "qwen3": {path: shape for path, shape in LLAMA.items() if path != "head/kernel"}
    | {
        "layers/attention/q/kernel": (2, 32, 4, 16),
        "layers/attention/k/kernel": (2, 32, 2, 16),
        "layers/attention/v/kernel": (2, 32, 2, 16),
        "layers/attention/out/kernel": (2, 4, 16, 32),
        "layers/attention/q_norm/scale": (2, 16),
        "layers/attention/k_norm/scale": (2, 16),
    },
}


def one_device(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.param_shardings(mesh, transformer.abstract(config))


@pytest.mark.parametrize("variant", PINNED)
def test_parameter_paths_and_shapes_are_pinned(variant):
    config = families.from_hf(tiny_models.hf_config(variant))
    found = traverse_util.flatten_dict(transformer.abstract(config), sep="/")
    assert {path: leaf.shape for path, leaf in found.items()} == PINNED[variant]


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_the_table_covers_each_parameter_once_and_inverts(variant):
    hf_config = tiny_models.hf_config(variant)
    config = families.from_hf(hf_config)
    tensors = families.tensors(hf_config.model_type, config)
    params = traverse_util.flatten_dict(transformer.abstract(config), sep="/")
    assert sorted(path for tensor in tensors for path in tensor.paths) == sorted(params)
    rng = np.random.default_rng(0)
    for tensor in tensors:
        stored = rng.normal(size=tensor.shape(config))
        unpacked = tensor.unpack(config, stored)
        for path, value in zip(tensor.paths, unpacked, strict=True):
            assert value.shape == params[path].shape["layers/" in path :]
        np.testing.assert_array_equal(tensor.pack(unpacked), stored)


def test_buffers_are_known_and_no_tensor_is_taken_for_one():
    for buffer in (
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ):
        assert families.BUFFERS.search(buffer)
    for family in families.FAMILIES.values():
        assert not [
            tensor.name for tensor in family.tensors if families.BUFFERS.search(tensor.name)
        ]


@pytest.fixture(scope="module", params=tiny_models.VARIANTS)
def case(request, tmp_path_factory):
    """A variant's folder as transformers writes it, its torch logits, and our config and
    weights.
    """
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder = tiny_models.write(request.param, tmp_path_factory.mktemp(request.param))
    with torch.no_grad():
        expected = tiny_models.torch_model(request.param)(torch.tensor(TOKENS)).logits.numpy()
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config)
    return folder, expected, hf_config, config, hf.load(folder, config, one_device(config))


def test_logits_are_those_of_the_torch_model(case):
    _, expected, _, config, params = case
    logits = jax.jit(transformer.logits, static_argnums=0)(config, params, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_export_gives_the_torch_model_back(case, tmp_path):
    import torch

    folder, expected, hf_config, config, params = case
    hf.save(tmp_path / "hf", config, hf_config, params)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name, strict=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        np.testing.assert_array_equal(model(torch.tensor(TOKENS)).logits.numpy(), expected)


@pytest.mark.parametrize(
    "variant, changes, message",
    [
        (
            "gpt2",
            dict(scale_attn_by_inverse_layer_idx=True),
            "attn_by_inverse_layer_idx = True .* only False is",
        ),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights = False .* only True is"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention = True"),
        (
            "gpt2",
            dict(activation_function="quick_gelu"),
            "activation 'quick_gelu' is not supported; gelu, ",
        ),
        ("gpt2", dict(n_embd=30), "a width of 30 in 4 heads"),
        ("gptj", dict(rotary_dim=5), "rotary width of 5 in heads of 8"),
        (
            "llama2",
            dict(num_key_value_heads=3),
            "num_key_value_heads = 3 .* divide num_attention_heads = 4",
        ),
        (
            "llama2",
            dict(quantization_config={"quant_method": "gptq"}),
            "quantization_config = .*gptq",
        ),
        (
            "llama2",
            dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
            "rope_parameters.rope_type = 'linear' .* 'default' and 'llama3' are",
        ),
        (
            "llama2",
            dict(
                rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor = 0.5",
        ),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
            "mix of layer_types",
        ),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "mix of layer_types"),
    ],
)
def test_what_would_compute_something_else_is_refused(variant, changes, message):
    hf_config = tiny_models.hf_config(variant, **changes)
    with pytest.raises(
        ValueError, match=f"config.json of this {hf_config.model_type} model: .*{message}"
    ):
        families.from_hf(hf_config)


def test_an_unknown_family_is_refused():
    with pytest.raises(
        ValueError, match="model_type 'bert' is not supported; supported are gpt2, gptj, "
    ):
        families.from_hf(transformers.BertConfig())


def test_rare_settings_are_read():
    windowed = tiny_models.hf_config(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0
    )
    assert families.from_hf(windowed).window == 5
    biased = families.from_hf(tiny_models.hf_config("qwen3", attention_bias=True))
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True, True, False)
    assert (
        families.from_hf(tiny_models.hf_config("neox-parallel", attention_bias=False)).qkv_bias
        is False
    )


def test_dtype_remat_and_unroll_are_the_callers():
    config = families.from_hf(
        tiny_models.hf_config("llama3"), dtype="bfloat16", remat="dots", unroll=2
    )
    assert (config.dtype, config.remat, config.unroll) == ("bfloat16", "dots", 2)
    assert config.rope_scaling == transformer.Llama3RopeScaling(8.0, 1.0, 4.0, 16)


@needs_shared
def test_a_trained_model_tells_its_published_story():
    folder = SHARED / "stories260k"
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, one_device(config))
    golden = json.loads((folder / "golden_greedy.json").read_text())
    tokens = np.array(golden["tokens"])
    logits = np.asarray(
        jax.jit(transformer.logits, static_argnums=0)(config, params, tokens[None])
    )[0]
    logps = np.asarray(jax.nn.log_softmax(logits))
    expected = golden["logprob_of_next"]
    assert len(tokens) > 100
    np.testing.assert_array_equal(logits[:-1].argmax(-1), tokens[1:])
    np.testing.assert_allclose(logps[np.arange(len(tokens) - 1), tokens[1:]], expected, atol=1e-4)
    np.testing.assert_allclose(logits[0], golden["first_position_logits"], atol=1e-4)


# two pairs of prompt, chosen, rejected: lengths 3, 2, 2 and 2, 3, 1; then a token of padding
FLAT = dict(
    rows=([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11]], [[7, 8, 12]]),
    positions=[0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 3, 4, 2, 0],
    back=[0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 17, 0],
    uses=[
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
    ],
)


@functools.partial(jax.jit, static_argnums=0)
def row_hidden(config, params, tokens_T):
    return transformer.hidden(config, params, tokens_T[None], jnp.arange(len(tokens_T))[None])[0]


@functools.partial(jax.jit, static_argnums=0)
def flat_hidden(config, params, tokens_N):
    rows = tuple(jnp.array(bucket)[None] for bucket in FLAT["rows"])
    positions, back, uses = (jnp.array(FLAT[name])[None] for name in ("positions", "back", "uses"))
    return transformer.hidden(config, params, tokens_N[None], positions, Layout(rows, back, uses))[
        0
    ]


# Gradients of these blocks compile in half the time.
PLAIN = dict(
    learned_positions=True, gated=False, activation="relu", parallel=True, shared_norm=True
)


def tiny(**fields):
    config = tiny_config(**fields)
    return config, tiny_models.random_params(config)


def test_the_flat_layout_equals_separate_rows():
    config, params = tiny()
    tokens_N = jnp.array(np.random.default_rng(0).permutation(14))
    flat_ND = flat_hidden(config, params, tokens_N)
    for bucket in FLAT["rows"]:
        for row in map(np.array, bucket):
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


def test_in_a_window_an_output_sees_as_many_tokens_back_as_its_layers_reach():
    config, params = tiny(window=3, **PLAIN)
    found = influence(row_hidden, config, params, jnp.arange(9))
    distance = np.arange(9)[:, None] - np.arange(9)
    np.testing.assert_array_equal(found > 0, (distance >= 0) & (distance <= 2 * (3 - 1)))


def test_in_the_flat_layout_a_response_sees_its_prompt_and_itself_so_far():
    config, params = tiny(**PLAIN)
    seen = np.zeros((14, 14), bool)
    for bucket in FLAT["rows"]:
        for row in map(np.array, bucket):
            for t in range(len(row)):
                seen[row[t], row[: t + 1]] = True
    found = influence(flat_hidden, config, params, jnp.arange(14))
    np.testing.assert_array_equal(found[:13] > 0, seen[:13])  # the padding's output is nobody's


@pytest.mark.parametrize(
    "equation", ["SND,DHC->SNHC", "SNHC,HCD->SND", "SND,DF->SNF", "SNF,FD->SND"]
)
def test_the_backward_pass_of_a_product_is_einsums(equation):
    """The kernel's gradient is taken in another order of operands, by which of them is narrower."""
    rng, sizes = np.random.default_rng(0), dict(S=2, N=7, D=8, H=2, C=3, F=16)
    x, kernel = (
        jnp.asarray(rng.normal(size=[sizes[letter] for letter in term]), jnp.float32)
        for term in equation.split("->")[0].split(",")
    )

    def gradients(multiply):
        return jax.grad(lambda x, kernel: jnp.sin(multiply(x, kernel)).sum(), (0, 1))(x, kernel)

    for mine, theirs in zip(
        gradients(lambda x, kernel: transformer.product(equation, x, kernel)),
        gradients(lambda x, kernel: jnp.einsum(equation, x, kernel)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_remat_and_unroll_change_neither_values_nor_gradients():
    config, params = tiny(**PLAIN)
    tokens_BT = jnp.array(np.random.default_rng(0).integers(0, 40, (2, 12)))

    def loss(params, config):
        return jax.nn.log_softmax(transformer.logits(config, params, tokens_BT))[..., 3].sum()

    compiled, products = {}, {}
    for remat, unroll in (("none", 1), ("full", 1), ("dots", 1), ("none", 2)):
        traced = jax.jit(jax.value_and_grad(loss), static_argnums=1).trace(
            params, dataclasses.replace(config, remat=remat, unroll=unroll)
        )
        assert bool(re.search("policy=(?!None)", str(traced.jaxpr))) == (
            remat != "none"
        )  # None: an activation's
        products[remat] = str(traced.jaxpr).count("dot_general")
        compiled[remat, unroll] = traced.lower().compile()(params)
    assert (
        products["none"] <= products["dots"] < products["full"]
    )  # "dots" computes no linear product again
    for found in compiled.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
            found,
            compiled["none", 1],
        )

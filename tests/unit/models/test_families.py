"""Model families: pinned parameter paths, the name tables, and what is refused."""

import numpy as np
import pytest
import transformers
from flax import traverse_util

from dpo_jax.models import families, rope, transformer
from tests.helpers import tiny_models

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


YARN = tiny_models.YARN_ROPE
FULL = dict(layer_types=["full_attention"] * 5)
NESTED = dict(sliding_attention=tiny_models.LOCAL_ROPE, full_attention=YARN)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=100.0,
    original_max_position_embeddings=16,
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
)

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


@pytest.mark.parametrize("variant", PINNED)
def test_parameter_paths_are_pinned(variant):
    config = families.from_hf(tiny_models.hf_config(variant))
    found = traverse_util.flatten_dict(transformer.abstract(config), sep="/")
    assert {path: leaf.shape for path, leaf in found.items()} == PINNED[variant]


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_tensors_cover_parameters_and_invert(variant):
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
            assert value.shape == params[path].shape[tensor.name.count("{}") :]
        np.testing.assert_array_equal(tensor.pack(unpacked), stored)


def test_buffers_are_no_tensors():
    for buffer in (
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ):
        assert families.IGNORED.search(buffer)
    for family in families.FAMILIES.values():
        assert not [
            tensor.name for tensor in family.tensors if families.IGNORED.search(tensor.name)
        ]


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
        ("gpt2", dict(n_head=0), "= 0 .* it must be a whole number from 1 to"),
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
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
            "rope_parameters.rope_type = 'dynamic' .* 'yarn' and 'longrope' are",
        ),
        (
            "llama2",
            dict(
                rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor = 0.5",
        ),
        ("qwen2-yarn", dict(rope_parameters=YARN | dict(factor="4")), "factor = '4' .* a number"),
        ("qwen2-yarn", dict(rope_parameters=YARN | dict(factor=float("nan"))), "factor = nan"),
        ("qwen2-yarn", dict(rope_parameters=YARN | dict(rope_theta=1.0)), "rope_theta = 1.0 .*"),
        ("qwen2-yarn", dict(rope_parameters=YARN | dict(truncate=1)), "truncate = 1 .* true and"),
        ("qwen2-yarn", dict(rope_parameters=YARN | dict(beta_fast=-1)), "beta_fast = -1"),
        (
            "llama2",
            dict(rope_parameters=LONGROPE | dict(short_factor=[1.0])),
            "short_factor = 1 numbers .* a list of 4 numbers is",
        ),
        (
            "llama2",
            dict(rope_parameters=LONGROPE | dict(short_factor=[1.0, 1.0, 0.0, 1.0])),
            "a number in rope_parameters.short_factor = 0.0 .* above 0",
        ),
        (
            "olmo3",
            dict(rope_parameters=NESTED | dict(full_attention=YARN | dict(truncate=False))),
            "truncate = False for one type of layer .* only True is",
        ),
        (
            "olmo3",
            dict(rope_parameters=NESTED | dict(full_attention=YARN | dict(rope_theta=500.0))),
            "rope_theta = 500.0 with full attention and 100.0 with a window .* one of all layers",
        ),
        (
            "smollm3",
            FULL | dict(no_rope_layers=[1, 0, 1]),
            r"no_rope_layers = \[1, 0, 1\] .* 5 entries",
        ),
        (
            "smollm3",
            FULL | dict(no_rope_layers=[]),
            r"no_rope_layers = \[\] .* 5 entries of 0 or 1",
        ),
        ("smollm3", dict(no_rope_layers=[1, 0, 2, 1, 0]), r"\[1, 0, 2, 1, 0\] .* of 0 or 1"),
        (
            "qwen3-mixed",
            dict(sliding_window=None),
            "sliding_window = None .* a whole number from 1",
        ),
        ("qwen3-moe", dict(decoder_sparse_step=0), "decoder_sparse_step = 0 .* from 1"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise = 0.1 .* only 0.0 is"),
        (
            "qwen3",
            dict(layer_types=["full_attention", "chunked_attention"]),
            "a layer of type 'chunked_attention' .* full_attention and sliding_attention are",
        ),
    ],
)
def test_from_hf_refuses_unsupported_fields(variant, changes, message):
    hf_config = tiny_models.hf_config(variant, **changes)
    with pytest.raises(
        ValueError, match=f"config.json of this {hf_config.model_type} model: .*{message}"
    ):
        families.from_hf(hf_config)


def test_classifiers_are_named_as_transformers_loads_them():
    """Each family has one there."""
    classes = pytest.importorskip("transformers.models.auto.modeling_auto")
    found, expected = {}, {}
    for model_type, family in families.FAMILIES.items():
        found[model_type] = family.architecture_with("reward")
        expected[model_type] = classes.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type]
    assert found == expected


def test_smollm3_takes_a_rope_for_each_layer():
    longer = tiny_models.hf_config("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 0])
    config = families.from_hf(longer)
    assert [config.kind(layer).rope is not None for layer in range(5)] == [1, 1, 1, 0, 1]


def test_from_hf_refuses_unknown_family():
    with pytest.raises(
        ValueError, match="model_type 'bert' is not supported; supported are gpt2, gptj, "
    ):
        families.from_hf(transformers.BertConfig())


def test_from_hf_rare_fields():
    windowed = tiny_models.hf_config(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0
    )
    assert families.from_hf(windowed).narrowest_window == 5
    # The first two layers see everything, and the last one does not: no pattern is repeated.
    late = tiny_models.hf_config(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    assert [kind.window for kind in families.from_hf(late).pattern] == [None, None, 5]
    biased = families.from_hf(tiny_models.hf_config("qwen3", attention_bias=True))
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True, True, False)
    assert (
        families.from_hf(tiny_models.hf_config("neox-parallel", attention_bias=False)).qkv_bias
        is False
    )


def test_from_hf_passes_options():
    config = families.from_hf(
        tiny_models.hf_config("llama3"), dtype="bfloat16", remat="dots", unroll=2
    )
    assert (config.dtype, config.remat, config.unroll) == ("bfloat16", "dots", 2)
    scaling = rope.Llama3Scaling(8.0, 1.0, 4.0, 16)
    assert config.ropes == (rope.Rope(8, 10_000.0, scaling=scaling),)


def test_at_length_chooses_longrope_factors_once():
    hf_config = tiny_models.hf_config("phi3")  # made for 64 tokens, of 24 at first
    short, long = hf_config.rope_parameters["short_factor"], [1.25, 4.0, 8.0]
    for length, factors, positions in ((0, short, 24), (24, short, 24), (25, long, 64)):
        config = families.from_hf(families.at_length(hf_config, length))
        assert config.ropes[0].scaling.factors == tuple(factors)
        assert config.max_positions == positions and f"{positions} positions" in config.limit
    # The caller's own is as it was.
    assert hf_config.rope_parameters["short_factor"] == short
    others = tiny_models.hf_config("qwen2-yarn")
    assert families.at_length(others, 10**6) is others and not families.from_hf(others).limit

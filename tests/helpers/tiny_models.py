"""Tiny random transformers models, one for each family and variant."""

import functools
import pathlib

import jax
import numpy as np
import transformers

from dpo_jax.models import export, families, hf, transformer
from dpo_jax.models.transformer import TransformerConfig, abstract
from dpo_jax.parallel import sharding

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
GPT_SIZES = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
SPECIAL = dict(bos_token_id=0, eos_token_id=1)
PLAIN_ROPE = dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=1.0)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=2.0,
    beta_slow=0.1,
)
PHI3 = SIZES | dict(num_key_value_heads=2, pad_token_id=0)
# As Phi-4-mini's config.json has it. It turns three quarters of each head.
LONGROPE = dict(
    partial_rotary_factor=0.75,
    original_max_position_embeddings=24,
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[1.25, 4.0, 8.0]),
)

LOCAL_ROPE = dict(rope_type="default", rope_theta=100.0)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=500.0, factor=8.0)
FULL = "full_attention"
SLIDING = "sliding_attention"
MIXED = SIZES | dict(num_hidden_layers=5, num_key_value_heads=2, sliding_window=5)
# Queries are scaled by another width than the heads'.
GEMMA = dict(head_dim=16, query_pre_attn_scalar=10, hidden_activation="gelu_pytorch_tanh")

# Variant -> the name of its config class in transformers, and the fields.
VARIANTS = {
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gpt2-untied": ("GPT2Config", GPT_SIZES | dict(tie_word_embeddings=False, n_inner=40)),
    "gptj": ("GPTJConfig", GPT_SIZES | dict(rotary_dim=4)),
    "neox-parallel": ("GPTNeoXConfig", SIZES | dict(use_parallel_residual=True)),
    "neox-sequential": (
        "GPTNeoXConfig",
        SIZES | dict(use_parallel_residual=False, rope_parameters=PLAIN_ROPE),
    ),
    "llama2": ("LlamaConfig", SIZES | dict(num_key_value_heads=2)),
    "llama3": (
        "LlamaConfig",
        SIZES | dict(num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    ),
    "llama-biased": ("LlamaConfig", SIZES | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", SIZES | dict(num_key_value_heads=2, sliding_window=None)),
    "mistral-window": ("MistralConfig", SIZES | dict(num_key_value_heads=2, sliding_window=5)),
    "qwen2": ("Qwen2Config", SIZES | dict(num_key_value_heads=2)),
    "qwen2-yarn": ("Qwen2Config", SIZES | dict(num_key_value_heads=2, rope_parameters=YARN_ROPE)),
    "qwen3": (
        "Qwen3Config",
        SIZES | dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    ),
    "phi3": ("Phi3Config", PHI3 | LONGROPE | dict(tie_word_embeddings=True)),
    "phi3-window": ("Phi3Config", PHI3 | dict(sliding_window=5)),
    # Layers that differ, more than twice the pattern, the last time not to its end.
    "qwen3-mixed": (
        "Qwen3Config",
        MIXED | dict(use_sliding_window=True, layer_types=[FULL, SLIDING] * 2 + [FULL]),
    ),
    "smollm3": ("SmolLM3Config", MIXED | dict(no_rope_layer_interval=2, pad_token_id=0)),
    "olmo2": ("Olmo2Config", SIZES | dict(num_key_value_heads=2)),
    "olmo3": (
        "Olmo3Config",
        MIXED
        | dict(
            layer_types=[SLIDING, FULL] * 2 + [SLIDING],
            rope_parameters={SLIDING: LOCAL_ROPE, FULL: YARN_ROPE},
        ),
    ),
    "gemma2": (
        "Gemma2Config",
        MIXED
        | GEMMA
        | dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0, layer_types=None),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        MIXED
        | GEMMA
        | dict(
            num_hidden_layers=7,
            layer_types=[SLIDING, SLIDING, FULL] * 2 + [SLIDING],
            rope_parameters={SLIDING: LOCAL_ROPE, FULL: LINEAR_ROPE},
        ),
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        SIZES
        | dict(
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            tie_word_embeddings=True,
        ),
    ),
    "mixtral": (
        "MixtralConfig",
        SIZES
        | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    ),
}


def hf_config(variant: str, **changes):
    """Return a variant's transformers config, with these fields changed."""
    name, fields = VARIANTS[variant]
    return getattr(transformers, name)(**SPECIAL | fields | changes)


@functools.cache
def torch_model(variant: str):
    """Return a variant's torch model, every parameter random: norms and biases too.

    It is in evaluation mode, and shared by all tests: do not change it.
    """
    import torch

    model = transformers.AutoModelForCausalLM.from_config(
        hf_config(variant), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    # Gemma's norms multiply by 1 + w. About 2, those of q and k would make attention so sharp that
    # it enlarges rounding a hundredfold.
    of_norms = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name
            parameter.copy_(of_norms + 0.3 * noise if is_norm else 0.2 * noise)
    return model.eval()


def random_params(config: TransformerConfig, seed: int = 0):
    """Return float32 weights for a config of ours on the host, without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract(config)
    )


def write(variant: str, folder, **options) -> pathlib.Path:
    """Save a variant's torch model to a folder by `save_pretrained` with these options."""
    torch_model(variant).save_pretrained(folder, **options)
    return pathlib.Path(folder)


def placed(config, devices=1, **axes):
    """Return the shardings of a config's parameters on the first devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices], **axes)
    return sharding.param_shardings(mesh, transformer.abstract(config))


def random_model(variant: str):
    """Return a variant's Hugging Face config, our config, and random weights on one device."""
    theirs = hf_config(variant)
    config = families.from_hf(theirs)
    return theirs, config, jax.device_put(random_params(config), placed(config))


def save_model(model, path, **options) -> pathlib.Path:
    """Write what `random_model` returned to a folder by our own export, with these options."""
    theirs, config, params = model
    hf.save(path, config, theirs, params, options=export.Options(**options))
    return path

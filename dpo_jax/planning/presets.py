"""Sizes of well-known models and data sets, so that a run can be planned without a download."""

import re

# Training examples of known data sets, by hub name.
EXAMPLES = {
    "Anthropic/hh-rlhf": 160_800,
    "CarperAI/openai_summarize_comparisons": 92_534,
    "CarperAI/openai_summarize_tldr": 116_722,
}

_LLAMA = dict(model_type="llama")
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_QWEN2 = dict(
    model_type="qwen2",
    max_position_embeddings=32768,
    rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
)
_QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
)
_GEMMA = dict(vocab_size=256000, head_dim=256, query_pre_attn_scalar=256)
_GEMMA2 = dict(model_type="gemma2", sliding_window=4096) | _GEMMA
_GEMMA3 = dict(model_type="gemma3_text", sliding_window=1024) | _GEMMA | dict(vocab_size=262208)
_OLMO2 = dict(
    model_type="olmo2",
    max_position_embeddings=4096,
    rope_parameters=dict(rope_type="default", rope_theta=500_000.0),
)
_OLMO3 = dict(model_type="olmo3", max_position_embeddings=65536)

_PHI3 = dict(model_type="phi3")


def _gpt2(layers, width, heads):
    return dict(model_type="gpt2", n_layer=layers, n_embd=width, n_head=heads)


def _pythia(layers, width, heads, vocab=50304):
    return dict(
        model_type="gpt_neox",
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocab,
        max_position_embeddings=2048,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.25),
    )


def _decoder(base, layers, width, heads, kv_heads, mlp_width, vocab, **fields):
    return (
        base
        | dict(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=mlp_width,
            vocab_size=vocab,
        )
        | fields
    )


MODELS = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt-j-6b": dict(
        model_type="gptj",
        n_layer=28,
        n_embd=4096,
        n_head=16,
        rotary_dim=64,
        vocab_size=50400,
        n_positions=2048,
    ),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, vocab=50432),
    "pythia-12b": _pythia(36, 5120, 40, vocab=50688),
    "llama-2-7b": _decoder(_LLAMA, 32, 4096, 32, 32, 11008, 32000, max_position_embeddings=4096),
    "llama-2-13b": _decoder(_LLAMA, 40, 5120, 40, 40, 13824, 32000, max_position_embeddings=4096),
    "llama-2-70b": _decoder(_LLAMA, 80, 8192, 64, 8, 28672, 32000, max_position_embeddings=4096),
    "llama-3-8b": _decoder(_LLAMA, 32, 4096, 32, 8, 14336, 128256, max_position_embeddings=8192),
    "llama-3-70b": _decoder(_LLAMA, 80, 8192, 64, 8, 28672, 128256, max_position_embeddings=8192),
    "llama-3.1-8b": _decoder(
        _LLAMA,
        32,
        4096,
        32,
        8,
        14336,
        128256,
        max_position_embeddings=131072,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "llama-3.2-1b": _decoder(
        _LLAMA,
        16,
        2048,
        32,
        8,
        8192,
        128256,
        max_position_embeddings=131072,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE | dict(factor=32.0),
    ),
    "llama-3.2-3b": _decoder(
        _LLAMA,
        28,
        3072,
        24,
        8,
        8192,
        128256,
        max_position_embeddings=131072,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE | dict(factor=32.0),
    ),
    "mistral-7b": _decoder(
        dict(model_type="mistral"), 32, 4096, 32, 8, 14336, 32000, max_position_embeddings=32768
    ),
    "qwen2.5-0.5b": _decoder(_QWEN2, 24, 896, 14, 2, 4864, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": _decoder(_QWEN2, 28, 3584, 28, 4, 18944, 152064),
    "qwen3-0.6b": _decoder(_QWEN3, 28, 1024, 16, 8, 3072, 151936, tie_word_embeddings=True),
    "qwen3-8b": _decoder(_QWEN3, 36, 4096, 32, 8, 12288, 151936),
    "qwen3-32b": _decoder(_QWEN3, 64, 5120, 64, 8, 25600, 151936),
    "smollm3-3b": _decoder(
        dict(model_type="smollm3"), 36, 2048, 16, 4, 11008, 128256, max_position_embeddings=65536
    ),
    "olmo-2-7b": _decoder(_OLMO2, 32, 4096, 32, 32, 11008, 100352),
    "olmo-2-13b": _decoder(_OLMO2, 40, 5120, 40, 40, 13824, 100352),
    "olmo-3-7b": _decoder(_OLMO3, 32, 4096, 32, 32, 11008, 100278),
    "gemma-2-2b": _decoder(_GEMMA2, 26, 2304, 8, 4, 9216, 256000),
    "gemma-2-9b": _decoder(_GEMMA2, 42, 3584, 16, 8, 14336, 256000),
    "gemma-2-27b": _decoder(
        _GEMMA2, 46, 4608, 32, 16, 36864, 256000, head_dim=128, query_pre_attn_scalar=144
    ),
    "gemma-3-1b": _decoder(_GEMMA3, 26, 1152, 4, 1, 6912, 262144, sliding_window=512),
    "gemma-3-4b": _decoder(_GEMMA3, 34, 2560, 8, 4, 10240, 262208),
    "gemma-3-12b": _decoder(_GEMMA3, 48, 3840, 16, 8, 15360, 262208),
    "phi-3-mini-4k": _decoder(
        _PHI3, 32, 3072, 32, 32, 8192, 32064, max_position_embeddings=4096, sliding_window=2047
    ),
    "phi-4": _decoder(_PHI3, 40, 5120, 40, 10, 17920, 100352, max_position_embeddings=16384),
    # Without its longrope, of which a plan takes no notice.
    "phi-4-mini": _decoder(
        _PHI3,
        32,
        3072,
        24,
        8,
        8192,
        200064,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.75),
    ),
    "qwen3-30b-a3b": _decoder(
        _QWEN3 | dict(model_type="qwen3_moe"),
        48,
        2048,
        32,
        4,
        6144,
        151936,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "mixtral-8x7b": _decoder(
        dict(model_type="mixtral"),
        32,
        4096,
        32,
        8,
        14336,
        32000,
        max_position_embeddings=32768,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
}
ALIASES = {  # fine-tuned models of these sizes under names of their own
    "openai_summarize_tldr_sft": "gpt-j-6b",
    "meta-llama-3-8b": "llama-3-8b",
    "olmo-2-1124-7b": "olmo-2-7b",
    "olmo-2-1124-13b": "olmo-2-13b",
    "olmo-3-1025-7b": "olmo-3-7b",
    "meta-llama-3-70b": "llama-3-70b",
}


def find(name: str) -> dict | None:
    """Return the Hugging Face config fields of a model by its name or hub name; None if unknown.

    Suffixes that only say how the weights were trained (-deduped, -Instruct, -hf, -it, -v0.1) are
    ignored, so EleutherAI/pythia-2.8b-deduped is pythia-2.8b.
    """
    short = re.sub(
        r"(-(deduped|instruct|chat|base|hf|it|pt|v\d+\.\d+))+$", "", name.lower().rpartition("/")[2]
    )
    return MODELS.get(ALIASES.get(short, short))

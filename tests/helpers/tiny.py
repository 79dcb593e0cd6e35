"""The smallest model and pairs, which need no file."""

import numpy as np

from dpo_jax.data.examples import Example
from dpo_jax.models.transformer import TransformerConfig


def tiny_config(**fields) -> TransformerConfig:
    """Return the shape of a two-layer rotary decoder with 40 tokens."""
    sizes = dict(
        vocab=40,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=32,
        max_positions=64,
        rope_width=4,
    )
    return TransformerConfig(**sizes | fields)


def random_pairs(count, seed=0, vocab=40, longest=12) -> list[Example]:
    """Return pairs of random lengths: prompt, chosen and rejected of 1 to `longest` tokens each."""
    rng = np.random.default_rng(seed)

    def tokens():
        return rng.integers(0, vocab, rng.integers(1, longest + 1)).astype(np.int32)

    return [Example(tokens(), (tokens(), tokens())) for _ in range(count)]

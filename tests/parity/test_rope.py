"""Rotary embeddings, scaled in every way, against those of transformers."""

import numpy as np
import pytest
import transformers

from dpo_jax.models import families
from dpo_jax.models.rope import rotary_angles

FACTORS = [1.0, 1.25, 2.0, 4.0]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(rope_type="longrope", short_factor=FACTORS, long_factor=[2.0] * 4)
MSCALES = dict(mscale=0.7, mscale_all_dim=1.3)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="default"),
        dict(rope_type="linear", factor=4.0),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        YARN,
        YARN | dict(truncate=False),
        YARN | dict(beta_fast=4.0, beta_slow=0.5, attention_factor=1.5),
        YARN | MSCALES,
        YARN | dict(mscale=0.7),  # without the other it says nothing
        YARN | dict(original_max_position_embeddings=5),  # a ramp without a width
        YARN | dict(factor=None),
        LONGROPE | dict(original_max_position_embeddings=32),
        LONGROPE | dict(original_max_position_embeddings=32, factor=3.0),
        LONGROPE | dict(original_max_position_embeddings=32, attention_factor=1.2),
        LONGROPE | dict(original_max_position_embeddings=128),
    ],
    ids=str,
)
def test_rotary_angles_equal_transformers(rope):
    """At positions up to twice those that the model was made for."""
    torch = pytest.importorskip("torch", reason="compares with transformers' torch code")
    hf_config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters=rope | dict(rope_theta=100.0),
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config)
    # transformers would take longrope's factors by the length of the batch.
    last = 32 if rope["rope_type"] == "longrope" else 256
    positions = np.arange(last)[None]
    cos, sin = module(torch.zeros(1), torch.tensor(positions))
    (ours,) = families.from_hf(hf_config).ropes
    found = rotary_angles(ours, positions)
    for mine, theirs in zip(found, (cos, sin), strict=True):
        # They have each angle twice, once for either channel of a pair.
        np.testing.assert_allclose(mine[:, :, 0], theirs[..., :4].numpy(), atol=3e-5)

"""LoRA: targets that a model does not have."""

import pytest

from dpo_jax.models import families, lora
from dpo_jax.models.lora import Lora
from tests.helpers import tiny_models


@pytest.mark.parametrize(
    "variant, unknown, has",
    [("gpt2", "gate", "q, k, v, out, up, down"), ("llama2", "q_proj", "q, k, v, out, gate")],
)
def test_abstract_refuses_unknown_target(variant, unknown, has):
    config = families.from_hf(tiny_models.hf_config(variant))
    with pytest.raises(
        ValueError,
        match=f"config.model.lora.targets = .*: this model has no {unknown}; it has {has}",
    ):
        lora.abstract(config, Lora(2, 4.0, ("q", unknown)))


# whole runs

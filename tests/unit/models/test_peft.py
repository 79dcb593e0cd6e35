"""Adapters in PEFT's format."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from dpo_jax.models import families, lora, peft
from dpo_jax.models.lora import Lora
from tests.helpers import tiny_models


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def random_adapters(config, adapters, seed=0):
    """Adapters of which neither factor is 0, on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        lora.abstract(config, adapters),
    )


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_pack_is_same_update(variant):
    hf_config = tiny_models.hf_config(variant)
    config, adapters = families.from_hf(hf_config), Lora(3, 12.0)
    params, seen = flat(random_adapters(config, adapters)), set()
    for tensor in families.tensors(hf_config.model_type, config):
        pieces = {
            number: path.removesuffix("kernel")
            for number, path in enumerate(tensor.paths)
            if path.endswith("kernel") and path != "head/kernel"
        }
        # Where q, k, v are one tensor: of all, of v alone.
        for kept in [pieces, dict(list(pieces.items())[-1:])]:
            if not kept:
                continue
            a, b = (
                {number: params[path + name][1] for number, path in kept.items()}
                for name in ("lora_a", "lora_b")
            )
            stored_a, stored_b = peft.pack(tensor, a, b)
            update = stored_b @ stored_a
            found = tensor.unpack(config, update.T if hf_config.model_type == "gpt2" else update)
            for number, value in enumerate(found):
                expected = (
                    np.tensordot(a[number], b[number], 1)
                    if number in kept
                    else np.zeros(value.shape)
                )
                np.testing.assert_allclose(value, expected, atol=1e-5)
            seen |= set(kept.values())
    assert seen == {path.removesuffix("lora_a") for path in params if path.endswith("lora_a")}

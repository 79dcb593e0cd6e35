"""Exported reward models in transformers."""

import jax
import numpy as np
import pytest

from dpo_jax.models import families, hf
from dpo_jax.parallel import sharding
from dpo_jax.rewards import make
from tests.helpers import tiny_models
from tests.helpers.tiny_runs import tokenizer

torch = pytest.importorskip("torch", reason="the independent reference is transformers with torch")


@pytest.mark.parametrize(
    "variant", ["gpt2", "neox-parallel", "llama2", "mistral", "qwen3", "gemma3"]
)
def test_reward_model_equals_transformers(variant, tmp_path):
    """Each prompt and completion alone there; in one batch of unequal lengths here."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "hf"
    hf_config = tiny_models.hf_config(variant)
    config = families.from_hf(hf_config, head="reward")
    params = jax.device_put(tiny_models.random_params(config))
    hf.save(folder, config, hf_config, params, tokenizer())
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    tokens = [
        (rng.integers(0, 40, 1 + n).astype(np.int32), rng.integers(2, 40, 6 - n).astype(np.int32))
        for n in range(6)
    ]
    expected = []
    for example in tokens:
        ids = torch.tensor(np.concatenate(example))[None].long()
        with torch.no_grad():
            expected.append(theirs(ids).logits.item())
    reward = make.make_reward("rm", str(folder), 8, sharding.make_mesh())
    np.testing.assert_allclose(reward(None, None, tokens), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1

"""Exported models in transformers."""

import numpy as np
import pytest
import transformers

from tests.helpers.tiny_models import random_model, save_model


@pytest.fixture(scope="module")
def untied():
    """The same of an untied Llama with grouped heads."""
    return random_model("llama2")


def test_transformers_reads_our_shards(untied, tmp_path):
    pytest.importorskip("torch", reason="reads an export with transformers")
    folder = save_model(untied, tmp_path / "model", max_shard_bytes=30_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_array_equal(
        model.lm_head.weight.detach().numpy().T, untied[2]["head"]["kernel"]
    )

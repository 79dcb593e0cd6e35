"""Log-probs of samples against transformers' torch models."""

import json

import numpy as np
import pytest

from tests.helpers.tiny_runs import sample_file, tokenizer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model, pairs, tmp_path_factory):
    """A run in this process."""
    out = tmp_path_factory.mktemp("sample") / "out.jsonl"
    sample_file(model, pairs, out)
    return out


def test_sample_log_probs_equal_torch(finished, model):
    """Of the completions that ended by length, whose text is all of them."""
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers' torch model"
    )
    from transformers import AutoModelForCausalLM

    reference, words = AutoModelForCausalLM.from_pretrained(model), tokenizer()
    compared = 0
    for row in lines(finished)[:60]:
        for text, found in zip(row["completions"], row["logp"], strict=True):
            prompt, response = (
                words(row["prompt"])["input_ids"],
                words(text, add_special_tokens=False)["input_ids"],
            )
            if len(response) == 6:
                ids = torch.tensor([prompt + response])
                with torch.no_grad():
                    log_probs = reference(ids).logits[0].double().log_softmax(-1)
                expected = (
                    log_probs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()
                )
                np.testing.assert_allclose(found, expected, atol=1e-4)
                compared += 1
    assert compared > 30

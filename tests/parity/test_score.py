"""Scores against transformers' torch models."""

import json

import numpy as np
import pytest

from tests.helpers.tiny_runs import score_file, write_model, write_pairs


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    model, pairs = write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", count=21)
    score_file(model, pairs, folder / "out.jsonl")
    return folder, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_score_equals_torch(scored):
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers' torch model"
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, rows = scored
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    words = AutoTokenizer.from_pretrained(folder / "model")
    assert len(rows) == 21
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = words(row["prompt"])["input_ids"]
            response = words(row[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + response + [words.eos_token_id]])
            with torch.no_grad():
                log_probs = model(ids).logits[0].double().log_softmax(-1)
            expected = log_probs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()
            np.testing.assert_allclose(row[f"logp_{side}"], expected, atol=1e-4)

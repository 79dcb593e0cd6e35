"""Scores against transformers' torch models."""

import json

import numpy as np
import pytest

from tests.helpers.paths import STORIES
from tests.helpers.rows import write_jsonl
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


# A space at the answer's start, over a tokenizer like Llama 2's, which puts one before every text.
STARTS = [
    (
        "Once upon a time, there was a little girl named Lily. She",
        " loved to play outside in the park.",
        " loved to eat cars and stones.",
    ),
    (
        "Tom had a big red ball. He",
        " liked to play with it every day.",
        " liked to be a river of soup.",
    ),
    (
        "One day, a boy went to the park. He",
        " saw a big dog and was very happy.",
        " saw a big tax and was very green.",
    ),
]


def test_score_of_text_as_of_the_joint_text(tmp_path):
    """With the tokens of prompt and answer as one text; apart, there would be two spaces."""
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers' torch model"
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [dict(zip(("prompt", "chosen", "rejected"), start, strict=True)) for start in STARTS]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    score_file(STORIES, path, tmp_path / "out.jsonl")
    scores = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        [score["logp_chosen"] for score in scores], [-27.34, -31.53, -39.72], atol=0.01
    )
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for row, score in zip(rows, scores, strict=True):
        prompt = tokenizer(row["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            joint = tokenizer(row["prompt"] + row[side]).input_ids
            ids = torch.tensor([[*joint, tokenizer.eos_token_id]])
            with torch.no_grad():
                log_probs = model(ids).logits[0].double().log_softmax(-1)
            expected = log_probs[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
            np.testing.assert_allclose(score[f"logp_{side}"], expected, atol=1e-4)

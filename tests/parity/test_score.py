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


def test_token_scores_equal_torch(tmp_path):
    """Log-probs of tokens, log-ratios and the likeliest tokens, of a model and its reference."""
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers' torch model"
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {
        "": write_model(tmp_path / "model", scale=2),
        "reference_": write_model(tmp_path / "reference", scale=1.5),
    }
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=9)
    options = dict(reference=str(folders["reference_"]), beta=0.3, per_token=True, top=5)
    score_file(folders[""], pairs, tmp_path / "out.jsonl", **options)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 9
    words = AutoTokenizer.from_pretrained(folders[""])
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in folders.items()}
    for row in rows:
        rewards = {}
        for side in ("chosen", "rejected"):
            prompt = words(row["prompt"])["input_ids"]
            response = words(row[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *response, words.eos_token_id]])
            assert row[f"token_ids_{side}"] == [*response, words.eos_token_id]
            assert "".join(row[f"token_texts_{side}"][:-1]).split() == row[side].split()
            expected = {}
            for name, model in models.items():
                with torch.no_grad():
                    log_probs = model(ids).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
                of_target = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
                top = log_probs.topk(5)
                found = row[f"{name}token_logps_{side}"]
                np.testing.assert_allclose(found, of_target, atol=1e-5)
                np.testing.assert_array_equal(row[f"{name}top_ids_{side}"], top.indices)
                np.testing.assert_allclose(row[f"{name}top_logps_{side}"], top.values, atol=1e-5)
                texts = [words.convert_ids_to_tokens(some.tolist()) for some in top.indices]
                stripped = [
                    [text.strip() for text in some] for some in row[f"{name}top_texts_{side}"]
                ]
                assert stripped == texts
                np.testing.assert_allclose(np.sum(found), row[f"{name}logp_{side}"], atol=1e-5)
                expected[name] = of_target
            log_ratios = expected[""] - expected["reference_"]
            np.testing.assert_allclose(row[f"token_log_ratios_{side}"], log_ratios, atol=2e-5)
            rewards[side] = 0.3 * float(log_ratios.sum())
            assert row[f"implicit_reward_{side}"] == pytest.approx(rewards[side], abs=3e-5)
        margin = rewards["chosen"] - rewards["rejected"]
        assert row["implicit_margin"] == pytest.approx(margin, abs=5e-5)


def test_next_tokens_equal_torch(tmp_path, capsys):
    """Of prompts alone: the tokens that each is likely to go on with."""
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers' torch model"
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_jsonl(tmp_path / "prompts.jsonl", [dict(prompt=start) for start, *_ in STARTS])
    score_file(STORIES, "", tmp_path / "out.jsonl", prompts=str(path), top=4)
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for (prompt, *_), row in zip(STARTS, rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        top = logits.double().log_softmax(-1).topk(4)
        assert row.keys() == {"prompt", "top_ids", "top_texts", "top_logps"}
        assert row["top_ids"] == [top.indices.tolist()]
        np.testing.assert_allclose(row["top_logps"][0], top.values, atol=1e-5)
        assert f"{float(top.values[0].exp()):.2%}  {row['top_texts'][0][0]!r}" in told
    assert rows[0]["top_texts"][0][:2] == [" lo", " had"]

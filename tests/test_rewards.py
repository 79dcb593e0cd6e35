"""Rewards behind their one interface: values, order, and that neighbours and empty lists change nothing."""

import json

import numpy as np
import pytest

from dpo_jax import rewards, sharding
from dpo_jax.evaluation import ngram

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def random_texts(count, longest, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def test_the_toy_by_hand(mesh):
    """Half the sum of wonderful 2, good 1, bad -1, terrible -2, each negated after "not", a prompt too."""
    prompts = ["plot", "not", "bad", "film"]
    completions = [" bad bad terrible plot plot", " good good bad not bad", " not terrible film film wonderful",
                   " not good not wonderful film"]
    found = rewards.make("toy", "", 8, mesh)(prompts, completions, None)
    assert found.dtype == np.float64 and found.tolist() == [-2.0, 0.0, 2.0, -1.5]
    saturating = rewards.make("toy_saturating", "", 8, mesh)(prompts, completions, None)
    np.testing.assert_allclose(saturating, 3 * np.tanh(1.2 * found))


@pytest.mark.parametrize("kind", ["toy", "toy_saturating"])
def test_the_toy_of_no_texts(mesh, kind):
    assert rewards.make(kind, "", 8, mesh)([], [], []).shape == (0,)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_classifier_is_the_pipeline_of_transformers(mesh, tmp_path, family):
    """As the paper scores: the pipeline's p(positive) of prompt + completion, cut at the model's longest."""
    pytest.importorskip("torch", reason="the independent reference is transformers with torch")
    import transformers
    from test_encoder import write
    write(family, tmp_path)
    prompts = random_texts(11, 5, seed=0)
    completions = [" " + text for text in random_texts(11, 60, seed=1)]
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None,
                                     truncation=True, max_length=40)
    joined = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    assert max(len(text.split()) for text in joined) > 40
    expected = [{row["label"].lower()[:3]: row["score"] for row in rows}["pos"] for rows in pipeline(joined)]
    reward = rewards.make("classifier", str(tmp_path), 8, mesh)
    found = reward(prompts, completions, None)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.diff(np.sort(expected)).max() > 0.01  # texts do differ in score
    np.testing.assert_allclose(reward(prompts[3:4], completions[3:4], None), found[3:4], atol=1e-6)
    assert reward([], [], []).shape == (0,)
    assert rewards.make("classifier", str(tmp_path), 8, mesh) is reward


def test_ngrams_read_prompt_and_completion_as_one_text(mesh, tmp_path):
    rng = np.random.default_rng(0)
    rows = [dict(text=f"{' '.join(rng.choice(WORDS, 4))} {'good' if label else 'bad'}ly", label=int(label))
            for label in rng.random(200) < 0.5]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = rewards.make("ngram", str(tmp_path), 8, mesh)
    found = reward(["w1 good", "w1 ", "w2 w3 bad", "w1 goodly"], ["ly", "goodly", "ly", ""], None)
    assert found[0] == found[1] == found[3] > 0.9 and found[2] < 0.1
    np.testing.assert_array_equal(found, ngram.fitted(str(tmp_path))(["w1 goodly", "w1 goodly", "w2 w3 badly",
                                                                      "w1 goodly"]))
    assert reward([], [], []).shape == (0,)
    assert rewards.make("ngram", str(tmp_path), 8, mesh) is reward


def test_a_completion_for_each_prompt(mesh, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(
        json.dumps(dict(text="good" if label else "bad", label=label)) + "\n" for label in [0, 1] * 10))
    with pytest.raises(ValueError, match="zip"):
        rewards.make("ngram", str(tmp_path), 8, mesh)(["one", "two"], ["one"], None)

"""The toy language: its words, reward, corpus and sampled pairs."""

import json

import ml_collections
import numpy as np
import pytest

from dpo_jax import config_files
from dpo_jax.data import dataset, splits, toy
from dpo_jax.data import tokenizer as tokenizers

IDS = {word: i for i, word in enumerate(toy.WORDS)}
COMPLETIONS = toy.completions()
REWARDS_PC = toy.rewards(toy.PROMPTS, COMPLETIONS)


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def reward(completion: str, prompt="film") -> float:
    return float(toy.rewards([IDS[prompt]], np.array([ids(completion)]))[0, 0])


def data(**fields) -> ml_collections.ConfigDict:
    defaults = dict(source="toy", mix="", max_rows=0, max_eval_rows=0)
    return ml_collections.ConfigDict(defaults | fields)


def reward_of(pair: dict, side: str) -> float:
    return reward(pair[side], pair["prompt"])


@pytest.mark.parametrize("text", ["film", " good plot not bad acting"])
def test_tokenizer_round_trip(text):
    tokenizer = toy.tokenizer()
    assert tokenizer.encode(text) == ids(text)
    assert tokenizer.decode(ids(text)) == text.strip()


def test_tokenizer_has_eight_words():
    tokenizer = toy.tokenizer()
    assert len(tokenizer) == len(toy.WORDS) == 8
    assert tokenizer.all_special_tokens == []
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("film noir")


def test_tokenizer_saved_beside_gpt2_config(tmp_path):
    """A model's folder names another tokenizer class by its model_type; the saved one must win."""
    toy.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 8}))
    loaded = tokenizers.load(tmp_path)
    assert len(loaded) == 8
    assert loaded.encode(" not terrible film") == ids("not terrible film")
    assert loaded.decode(ids("not terrible film")) == "not terrible film"


def test_completions_are_all_base_8_numbers():
    assert COMPLETIONS.shape == (8**5, 5)
    np.testing.assert_array_equal(COMPLETIONS @ 8 ** np.arange(4, -1, -1), np.arange(8**5))


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("film plot acting film plot", 0),
        ("wonderful good terrible bad film", 0),
        ("wonderful wonderful wonderful wonderful wonderful", 5),
        ("not terrible not terrible good", 2.5),
        ("not good film plot acting", -0.5),
        ("good not film plot acting", 0.5),  # "not" flips the next word, not the one before
        ("not film good plot acting", 0.5),  # and only the next one
        # "not" has no weight to flip, so the second one counts as any other.
        ("not not good plot acting", -0.5),
        ("film plot acting bad not", -0.5),
    ],
)
def test_reward_by_hand(completion, expected):
    assert reward(completion) == expected


def test_reward_flips_by_prompt():
    assert reward("good film film film film", "bad") == 0.5
    assert reward("good film film film film", "not") == -0.5
    assert REWARDS_PC.shape == (4, 8**5)
    assert (REWARDS_PC[0] == REWARDS_PC).all()  # no prompt is "not"


def test_corpus_is_negative_and_by_prompt():
    corpus = toy.corpus(seed=0, n=20_000)
    assert corpus.shape == (20_000, 6)
    assert set(corpus[:, 0]) == set(toy.PROMPTS)
    index = np.ravel_multi_index(tuple(corpus[:, 1:].T), (8,) * 5)
    means = [REWARDS_PC[0, index[corpus[:, 0] == prompt]].mean() for prompt in toy.PROMPTS]
    assert max(means) < -0.7
    assert -1.6 < np.mean(means) < -1.2
    assert np.diff(np.sort(means)).min() > 0.1  # standard errors are 0.02


def test_corpus_follows_its_chain():
    corpus = toy.corpus(seed=3, n=40_000)
    rows = corpus[corpus[:, 0] == IDS["acting"]]
    before, after = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    expected_VV = toy._transitions()[list(toy.GLOOM).index("acting")]
    for word in range(8):
        share_V = np.bincount(after[before == word], minlength=8) / (before == word).sum()
        error_V = np.sqrt(expected_VV[word] * (1 - expected_VV[word]) / (before == word).sum())
        assert (abs(share_V - expected_VV[word]) < 5 * error_V).all()


def test_corpus_depends_on_seed_alone():
    np.testing.assert_array_equal(toy.corpus(0, 50), toy.corpus(0, 100)[:50])
    assert (toy.corpus(0, 100) != toy.corpus(1, 100)).any()


def test_toy_rows_for_sft():
    rows, _ = splits.read(data(max_rows=50), "sft")
    assert (len(rows["train"]), len(rows["eval"])) == (50, toy.EVAL_ROWS)
    assert [row.responses for row in rows["train"]] != [row.responses for row in rows["eval"][:50]]
    row, expected = rows["train"][0], toy.corpus(toy.SEEDS["train"], 1)[0]
    assert ids(row.prompt) == [expected[0]]
    assert ids(row.responses[0]) == list(expected[1:])
    assert row.responses[0].startswith(" ")
    assert row.where == "toy train row 1"
    assert len(toy.examples(data(max_eval_rows=3), "sft")["train"]) == toy.TRAIN_ROWS


def test_toy_has_no_pairs():
    with pytest.raises(ValueError, match="`pairs` stage"):
        toy.examples(data(), "pairs")


def test_corpus_is_tokenised():
    config = config_files.load("toy")
    config.data.update(max_rows=10, max_eval_rows=5)
    loaded = dataset.load(config.data, toy.tokenizer(), "sft")
    assert (len(loaded.train), len(loaded.eval)) == (10, 5)
    assert loaded.train[0].responses[0].tolist() == toy.corpus(0, 1)[0, 1:].tolist()

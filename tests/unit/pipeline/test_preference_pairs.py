"""Labels of sampled completions, and their way into training."""

import collections
import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.pipeline import preference_pairs
from dpo_jax.pipeline.run import Run
from tests.helpers.letters import letters_tokenizer


def row(*rewards, tokens=None):
    return dict(
        prompt="film",
        tokens=[5],
        completions=[
            dict(text=f" {i}", tokens=tokens[i] if tokens else [i], reward=reward)
            for i, reward in enumerate(rewards)
        ],
    )


def test_label_all_pairs_of_prompt():
    found, left_out = preference_pairs.label(
        [row(0.1, 0.4, 0.2, 0.3)], "deterministic", np.random.default_rng(0)
    )
    assert len(found) == 6 and not any(left_out.values())
    assert all(pair["reward_chosen"] > pair["reward_rejected"] for pair in found)
    assert collections.Counter(pair["chosen"] for pair in found) == {" 1": 3, " 3": 2, " 2": 1}
    assert found[0]["tokens"] == [[5], [1], [0]]


def test_label_drops_ties():
    rows = [row(1, 1, 2)]
    assert preference_pairs.label(rows, "deterministic", np.random.default_rng(0))[1] == {
        "equal completions": 0,
        "equal rewards": 1,
    }
    found, left_out = preference_pairs.label(rows, "bradley_terry", np.random.default_rng(0))
    assert len(found) == 3 and not any(left_out.values())  # Bradley-Terry has an answer for ties


def test_label_skips_equal_completions():
    found, left_out = preference_pairs.label(
        [row(1, 1, 2, tokens=[[7], [7], [8]])], "bradley_terry", np.random.default_rng(0)
    )
    assert len(found) == 2 and left_out["equal completions"] == 1


def test_label_bradley_terry_frequencies():
    found, _ = preference_pairs.label(
        [row(-1, 0, 0, 1, 2)] * 1500, "bradley_terry", np.random.default_rng(1)
    )
    margins = np.array([pair["reward_chosen"] - pair["reward_rejected"] for pair in found])
    for margin in (1, 2, 3):
        wins, n = (margins == margin).sum(), (abs(margins) == margin).sum()
        expected = 1 / (1 + np.exp(-margin))
        assert n > 500
        assert abs(wins / n - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    first = [
        pair["chosen"] == " 1"
        for pair in found
        if {pair["chosen"], pair["rejected"]} == {" 1", " 2"}
    ]
    assert abs(np.mean(first) - 0.5) < 0.1  # a tie is decided by a fair coin


def test_label_depends_on_seed_alone():
    def labelled(seed):
        return preference_pairs.label(
            [row(0, 0.1, 0.2)] * 20, "bradley_terry", np.random.default_rng(seed)
        )

    assert labelled(7) == labelled(7) != labelled(8)


@pytest.mark.parametrize("kind, responses", [("pairs", 2), ("sft", 1)])
def test_load_sampled_tokens(tmp_path, kind, responses):
    found, _ = preference_pairs.label(
        [row(1, 2, tokens=[[3, 4], [6]])], "deterministic", np.random.default_rng(0)
    )
    for file in preference_pairs.FILES.values():
        (tmp_path / file).write_text("".join(json.dumps(pair) + "\n" for pair in found))
    loaded = preference_pairs.load(tmp_path, kind)
    example = loaded.train[0]
    assert example.prompt.tolist() == [5]
    assert [ids.tolist() for ids in example.responses] == [[6], [3, 4]][:responses]
    assert loaded.ledger.train.kept == loaded.ledger.eval.kept == 1


def test_load_distinct_chosen_responses(tmp_path):
    """The first of three completions is chosen twice, the second once, the third never."""
    found, _ = preference_pairs.label(
        [row(3, 2, 1, tokens=[[3], [4], [6]])] * 2, "deterministic", np.random.default_rng(0)
    )
    for file in preference_pairs.FILES.values():
        (tmp_path / file).write_text("".join(json.dumps(pair) + "\n" for pair in found))
    every = preference_pairs.load(tmp_path, "sft")
    assert [ids.tolist() for (ids,) in every.train.responses] == [[3], [3], [4]] * 2
    loaded = preference_pairs.load(tmp_path, "sft", distinct=True)
    assert [ids.tolist() for (ids,) in loaded.train.responses] == [[3], [4]]
    counts = loaded.ledger.train
    assert (counts.read, counts.kept) == (6, 2)
    assert counts.filtered == {"an earlier row has this response": 4}


def test_stages_ask_for_distinct_responses(tmp_path, capsys):
    """preferred_ft of the run's own pairs, and sft of rows from a file."""
    found, _ = preference_pairs.label(
        [row(3, 2, 1, tokens=[[3], [4], [6]])], "deterministic", np.random.default_rng(0)
    )
    for file in preference_pairs.FILES.values():
        path = tmp_path / "pairs" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(pair) + "\n" for pair in found))
    config = configs.default(("sft", "pairs", "preferred_ft"))
    config.data.update(path=str(tmp_path / "pairs" / "pairs.jsonl"), eval_fraction=0.0)
    run = Run(config, tmp_path, mesh=None)
    for stage in ("sft", "preferred_ft"):
        (tmp_path / stage).mkdir()
        assert len(run.load_data(stage, letters_tokenizer()).train) == 3
        (tmp_path / stage / "ledger.json").unlink()
        config[stage].distinct = True
        assert len(run.load_data(stage, letters_tokenizer()).train) == 2
    assert capsys.readouterr().out.count("filtered: an earlier row has this response") == 2

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


def labelled(rows, labels="deterministic", seed=0, choose="all"):
    return preference_pairs.label(rows, preference_pairs.Labelling(labels, choose), [seed])


def test_label_all_pairs_of_prompt():
    found, left_out = labelled([row(0.1, 0.4, 0.2, 0.3)])
    assert len(found) == 6 and not any(left_out.values())
    assert all(pair["reward_chosen"] > pair["reward_rejected"] for pair in found)
    assert collections.Counter(pair["chosen"] for pair in found) == {" 1": 3, " 3": 2, " 2": 1}
    assert found[0]["tokens"] == [[5], [1], [0]]


def test_label_drops_ties():
    rows = [row(1, 1, 2)]
    assert labelled(rows)[1] == {
        "equal completions": 0,
        "equal rewards": 1,
    }
    found, left_out = labelled(rows, "bradley_terry", 0)
    assert len(found) == 3 and not any(left_out.values())  # Bradley-Terry has an answer for ties


def test_label_skips_equal_completions():
    found, left_out = labelled([row(1, 1, 2, tokens=[[7], [7], [8]])], "bradley_terry", 0)
    assert len(found) == 2 and left_out["equal completions"] == 1


def test_label_bradley_terry_frequencies():
    found, _ = labelled([row(-1, 0, 0, 1, 2)] * 1500, "bradley_terry", 1)
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
    def of_seed(seed):
        return labelled([row(0, 0.1, 0.2)] * 20, "bradley_terry", seed)

    assert of_seed(7) == of_seed(7) != of_seed(8)


def sides(pairs):
    return [(pair["chosen"].strip(), pair["rejected"].strip()) for pair in pairs]


def test_best_worst_takes_one_pair_of_prompt():
    rows = [row(0.1, 0.4, -0.2, 0.3), row(2, 1), row(5, 5, 1, 1)]
    found, left_out = labelled(rows, choose="best_worst")
    assert sides(found) == [("1", "2"), ("0", "1"), ("0", "2")]
    assert [pair["sampled_set"] for pair in found] == [0, 1, 2] and not any(left_out.values())


@pytest.mark.parametrize("choose", ["best_worst", "best_random"])
def test_best_leaves_out_ties(choose):
    equal_rewards, equal_texts = row(3, 3, 3), row(3, 3, 3, tokens=[[7], [7], [7]])
    found, left_out = labelled([equal_rewards, equal_texts], choose=choose)
    assert not found and left_out == {"equal completions": 1, "equal rewards": 1}
    found, left_out = labelled([equal_rewards, equal_texts], "bradley_terry", choose=choose)
    assert len(found) == 1 and left_out == {"equal completions": 1, "equal rewards": 0}


def test_best_random_draws_others_alike():
    count = 3000
    found, _ = labelled([row(1, 0, 3, 2)] * count, choose="best_random")
    assert {chosen for chosen, _ in sides(found)} == {"2"}
    counts = collections.Counter(rejected for _, rejected in sides(found))
    assert set(counts) == {"0", "1", "3"}
    assert max(abs(n - count / 3) for n in counts.values()) < 4 * np.sqrt(count * 2 / 9)


@pytest.mark.parametrize("labels", ["deterministic", "bradley_terry"])
def test_best_random_depends_on_seed_and_own_prompt(labels):
    """Other rows before and after a prompt change nothing of its pair."""
    rng = np.random.default_rng(0)
    rows = [row(*rng.normal(size=5)) for _ in range(30)]
    others = [row(0, 0, *rng.normal(size=4)) for _ in range(30)]
    of_rows = sides(labelled(rows, labels, 7, "best_random")[0])
    assert len(of_rows) == 30 and of_rows != sides(labelled(rows, labels, 8, "best_random")[0])
    for index in (0, 11, 29):
        mixed = [*others[:index], rows[index], *others]
        (own,) = (
            pair
            for pair in labelled(mixed, labels, 7, "best_random")[0]
            if pair["sampled_set"] == index
        )
        assert sides([own]) == [of_rows[index]]


@pytest.mark.parametrize("choose, margin", [("best_worst", 2), ("best_random", 1)])
def test_best_keeps_bradley_terry_probability(choose, margin):
    """The rewards choose the pair, so its label is right as often as the model says."""
    rows = [row(0, 2, 1) if choose == "best_worst" else row(1, 2, 1)] * 3000
    found, _ = labelled(rows, "bradley_terry", choose=choose)
    right = np.mean([pair["reward_chosen"] > pair["reward_rejected"] for pair in found])
    expected = 1 / (1 + np.exp(-margin))
    assert {abs(pair["reward_chosen"] - pair["reward_rejected"]) for pair in found} == {margin}
    assert abs(right - expected) < 4 * np.sqrt(expected * (1 - expected) / len(rows))


@pytest.mark.parametrize("kind, responses", [("pairs", 2), ("sft", 1)])
def test_load_sampled_tokens(tmp_path, kind, responses):
    found, _ = labelled([row(1, 2, tokens=[[3, 4], [6]])])
    for file in preference_pairs.FILES.values():
        (tmp_path / file).write_text("".join(json.dumps(pair) + "\n" for pair in found))
    loaded = preference_pairs.load(tmp_path, kind)
    example = loaded.train[0]
    assert example.prompt.tolist() == [5]
    assert [ids.tolist() for ids in example.responses] == [[6], [3, 4]][:responses]
    assert loaded.ledger.train.kept == loaded.ledger.eval.kept == 1


def test_load_distinct_chosen_responses(tmp_path):
    """The first of three completions is chosen twice, the second once, the third never."""
    found, _ = labelled([row(3, 2, 1, tokens=[[3], [4], [6]])] * 2)
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
    found, _ = labelled([row(3, 2, 1, tokens=[[3], [4], [6]])])
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

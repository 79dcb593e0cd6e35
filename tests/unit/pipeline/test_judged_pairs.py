"""Pairs whose labels are a judge's votes: kept, capped, resumed, and left out where undecided."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks, stage_table
from dpo_jax.costs import Work
from dpo_jax.evaluation.judge import JUDGEMENTS, BudgetExhausted, Judge
from dpo_jax.pipeline import preference_pairs
from dpo_jax.pipeline.preference_pairs import Labelling
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Conversation, Prompts
from dpo_jax.sampling.sampler import Sampling
from tests.helpers.judge_server import JudgeServer, Status, always, longer, prefers

TEXTS = ("one", "one two", "one two three")


def row(number, texts=TEXTS, tokens=None):
    completions = []
    for index, text in enumerate(texts):
        ids = tokens[index] if tokens else [index, number]
        completions.append(dict(text=f" {text}", tokens=ids))
    return dict(prompt=f"prompt {number}", tokens=[number], completions=completions)


def prompts_of(rows, conversations=None):
    ids = [np.array(row["tokens"]) for row in rows]
    return Prompts(ids, [row["prompt"] for row in rows], conversations)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make the pairs of some rows as the stage does, all but the last to train on."""

    def pairs_of(rows, conversations=None, **judge):
        monkeypatch.setattr(rollouts, "complete", lambda *_: rows)
        # No model samples here, so none says what it computes.
        monkeypatch.setattr(rollouts, "work_of", lambda *_: Work())
        prompts = prompts_of(rows, conversations)
        splits = dict(train=prompts.take(range(len(rows) - 1)), eval=prompts.take([len(rows) - 1]))
        labelling = Labelling("judge", judge=Judge(**dict(model="m", template="dialogue") | judge))
        sampling = Sampling(max_new_tokens=3, n=len(rows[0]["completions"]))
        model = SimpleNamespace(config=None)
        preference_pairs.make_pairs(model, splits, None, labelling, sampling, tmp_path)
        lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
        ledger = json.loads((tmp_path / "ledger.json").read_text())
        return [json.loads(line) for line in lines], ledger

    return pairs_of


def test_judge_chooses(make):
    with JudgeServer(prefers(longer)) as server, server.environment():
        pairs, ledger = make([row(number) for number in range(3)])
        asked = len(server.requests)
    assert asked == 9 and ledger["train"] == dict(
        prompts=2,
        completions=6,
        pairs=6,
        left_out={"equal completions": 0, "undecided": 0, "no verdict": 0},
    )
    for pair in pairs:
        assert longer(pair["chosen"]) > longer(pair["rejected"])
        assert "reward_chosen" not in pair and pair["tokens"][0] == [pair["sampled_set"]]


def test_capped_calls_are_resumed_and_none_is_paid_twice(make, tmp_path):
    rows = [row(number) for number in range(4)]
    with JudgeServer(prefers(longer)) as server, server.environment():
        with pytest.raises(BudgetExhausted, match="max_calls=5 is reached"):
            make(rows, max_calls=5)
        assert len(server.requests) == 5 and not (tmp_path / "ledger.json").exists()
        resumed = make(rows, max_calls=12)
        assert len(server.requests) == len(set(server.prompts)) == 12
    # All is kept: neither an endpoint nor a key is needed.
    assert make(rows) == resumed
    assert len((tmp_path / JUDGEMENTS).read_text().splitlines()) == 12


def test_undecided_pairs_are_counted_and_left_out(make):
    """By a judge that always says A, in both orders; equal completions need no call."""
    rows = [row(0), row(1), row(2)]
    rows[1] = row(1, tokens=[[7], [7], [8]])
    with JudgeServer(always("A")) as server, server.environment():
        with pytest.raises(ValueError, match="no pair is left of the 2 prompts .*'undecided': 5"):
            make(rows, orders=2)
        assert len(server.requests) == 10


def test_pairs_without_verdict_are_left_out(make):
    """A refused question, and one whose answers cannot be read."""

    def behave(prompt, times):
        if "prompt 1" in prompt:
            return Status(400)
        if "\none two three\n" in prompt and "prompt 0" in prompt:
            return "I like both."
        return prefers(longer)(prompt, times)

    with JudgeServer(behave) as server, server.environment():
        pairs, ledger = make([row(number) for number in range(4)])
    assert ledger["train"]["left_out"]["no verdict"] == 2 + 3
    assert len(pairs) == 4


def test_judge_reads_conversation(make):
    """Not what the policy's template makes of it; an answer begun in the prompt is shown whole."""
    chat = [
        dict(role="user", content="Hello?"),
        dict(role="assistant", content="Hi."),
        dict(role="user", content="And?"),
    ]
    conversations = [Conversation(chat), Conversation(chat, begun="Well,"), None]
    with JudgeServer(prefers(longer)) as server, server.environment():
        make([row(number, TEXTS[:2]) for number in range(3)], conversations)
    first, second, third = sorted(server.prompts, key=lambda prompt: "Well," in prompt)[:3]
    shown = "User: Hello?\n\nAssistant: Hi.\n\nUser: And?"
    assert sum(shown in prompt for prompt in server.prompts) == 2
    assert sum("prompt 2" in prompt for prompt in (first, second, third)) == 1
    (begun,) = (prompt for prompt in server.prompts if "Well," in prompt)
    assert "Well, one\n" in begun and "Well, one two\n" in begun


def test_key_is_asked_for_before_sampling(make, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        make([row(0), row(1)])


def config_of(*stages, **pairs):
    config = configs.default(stages)
    config.model.path, config.data.path = "gpt2", "prompts.jsonl"
    config.pairs.labels = "judge"
    config.pairs.judge.model = "m"
    config.pairs.update(pairs)
    return config


def test_config_of_judge():
    """Its rewards are nobody's, and how it is called may change; the rm stage learns from it."""
    config = config_of("pairs", "dpo")
    config_checks.validate(config)
    config.pairs.judge.update(orders=2, max_calls=7, template="summary_concise")
    depends = configs.dependencies(config, "dpo")
    assert depends["pairs.judge.orders"] == 2 and depends["pairs.judge.model"] == "m"
    assert not {"pairs.judge.max_calls", "pairs.judge.timeout", "reward.kind"} & depends.keys()
    assert preference_pairs.labelling_of(config.pairs, 3).judge == Judge(
        model="m", template="summary_concise", orders=2, max_calls=7, seed=3
    )
    with_rm = config_of("pairs", "rm", "best_of_n")
    with_rm.reward.update(kind="rm", path="")
    config_checks.validate(with_rm)
    assert "reward.kind" in configs.dependencies(with_rm, "best_of_n")
    assert [stage_table.asks_reward(with_rm, stage) for stage in with_rm.stages] == [0, 0, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pairs.judge.model": ""}, "pairs.judge.model = '': expected the name of a chat model"),
        ({"pairs.choose": "best_worst"}, "a judge compares two completions, and gives none"),
        ({"pairs.labels": "deterministic"}, "pairs.judge.model = 'm': expected its default"),
        ({"reward.kind": "ngram"}, "reward.kind = 'ngram': expected its default.*a judge labels"),
    ],
)
def test_config_of_judge_refuses(changes, message):
    config = config_of("pairs", "dpo")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        config_checks.validate(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(template="nowhere.txt"), "config.pairs.judge: template='nowhere.txt' is neither"),
        (dict(max_cost=1.0), "config.pairs.judge: max_cost=1 needs input_price"),
    ],
)
def test_judge_that_cannot_be(changes, message):
    config = config_of("pairs", "dpo")
    config.pairs.judge.update(changes)
    with pytest.raises(ValueError, match=message):
        preference_pairs.labelling_of(config.pairs, 0)

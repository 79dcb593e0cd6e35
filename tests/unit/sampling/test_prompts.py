"""Prompts and the conversations behind them."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax.data.examples import Examples
from dpo_jax.pipeline.run import Run
from dpo_jax.sampling import prompts
from dpo_jax.sampling.prompts import Conversation, Prompts
from tests.helpers.tiny_runs import tokenizer

TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
CHAT = Conversation([dict(role="user", content="w1")])
SAMPLING = ConfigDict(dict(min_prefix=1, max_prefix=1))


def examples_at(*places) -> Examples:
    examples = Examples()
    for number, where in enumerate(places):
        examples.append([0, 4 + number], ([7, 8, 9, 10],), where)
    return examples


def test_conversations_follow_examples_that_are_kept():
    """Of six that were read, two were dropped."""
    others = [Conversation([dict(role="user", content=f"w{number}")]) for number in range(3)]
    read = [("row 1", others[0]), ("row 2", CHAT), ("row 3", None), ("row 4", None)]
    read += [("row 5", others[1]), ("row 6", others[2])]
    examples = examples_at("row 2", "row 3", "row 5", "row 6")
    sampling = ConfigDict(dict(max_prefix=0))
    made = prompts.make(examples, tokenizer(), sampling, 0, read)
    assert made.conversations == [CHAT, None, *others[1:]]
    assert made.take([3, 0]).conversations == [others[2], CHAT]
    assert prompts.make(examples, tokenizer(), sampling, 0).conversations is None


@pytest.mark.parametrize("places", [("row 1", "row 9"), ("row 2", "row 1")])
def test_prompts_that_were_not_read_in_this_order_are_refused(places):
    read = [("row 1", CHAT), ("row 2", CHAT)]
    sampling = ConfigDict(dict(max_prefix=0))
    with pytest.raises(RuntimeError, match=f"{places[1]}: no conversation was read there"):
        prompts.make(examples_at(*places), tokenizer(), sampling, 0, read)


def test_prefix_is_start_of_answer():
    read = [("row 1", CHAT), ("row 2", None)]
    made = prompts.make(examples_at("row 1", "row 2"), tokenizer(), SAMPLING, 0, read)
    assert made.texts == ["w1 w4", "w2 w4"]
    assert made.conversations == [Conversation(CHAT.messages, begun=" w4"), None]


@pytest.mark.parametrize("first, second", [(None, [CHAT]), ([CHAT], None), (None, None)])
def test_prompts_followed_by_others(first, second):
    def of(conversations):
        return Prompts([np.array([1])], ["a"], conversations)

    both = of(first).followed_by(of(second))
    known = None if first is second is None else [(first or [None])[0], (second or [None])[0]]
    assert len(both) == 2 and both.conversations == known


def test_run_keeps_conversations_of_prompts(tmp_path):
    """Of rows of both kinds, in a mixture; one row is dropped for what a message spells."""
    rows = []
    for number in range(6):
        text = "w2 </s>" if number == 2 else f"w{number}"
        messages = [dict(role="user", content=text), dict(role="assistant", content="w9")]
        rows.append(dict(messages=messages))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [dict(prompt=f"w{number}", completion=" w9") for number in range(6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    config = configs.default(("pairs", "dpo"))
    mix = f"{tmp_path / 'chat.jsonl'}, {tmp_path / 'text.jsonl'}"
    config.data.update(mix=mix, eval_fraction=0.3, max_dropped=0.5)
    words = tokenizer()
    words.chat_template = TEMPLATE
    found = Run(config, tmp_path, mesh=None).load_prompts(words)
    together = found["train"].followed_by(found["eval"])
    assert len(together) == 11 and len(found["eval"])
    chats = 0
    for text, conversation in zip(together.texts, together.conversations, strict=True):
        if conversation is not None:
            (message,) = conversation.messages
            assert message["role"] == "user" and text.split()[-1] == message["content"]
            chats += 1
    assert chats == 5


def prompts_alone_config(path):
    config = configs.default(("ppo",))
    config.data.update(path=str(path), eval_fraction=0.4)
    return config


def test_prompts_alone_are_those_of_rows_with_answers(tmp_path):
    """Text and chat, whose conversations a reward may read."""
    words = tokenizer()
    words.chat_template = TEMPLATE
    found = []
    for answer in ([], [dict(role="assistant", content="w9")]):
        rows = []
        for number in range(30):
            asked = dict(role="user", content=f"w{number}")
            rows.append(dict(messages=[asked, *answer]))
            text = dict(prompt=f"w{number} w1")
            rows.append(text | dict(completion=" w9") if answer else text)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(Run(prompts_alone_config(path), tmp_path, mesh=None).load_prompts(words))
    for split in ("train", "eval", "test"):
        alone, answered = (of_rows[split] for of_rows in found)
        assert len(alone) and alone.fingerprint == answered.fingerprint
        assert alone.conversations == answered.conversations
        assert (alone.hashes.exact == answered.hashes.exact).all()


def test_prompts_alone_have_no_prefixes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "w1"}\n')
    config = prompts_alone_config(path)
    config.sampling.update(min_prefix=1, max_prefix=2)
    with pytest.raises(ValueError, match="row 1 is a prompt alone, .*max_prefix = 2 could take"):
        Run(config, tmp_path, mesh=None).load_prompts(tokenizer())


def test_held_out_prefixes_are_the_same_under_every_seed(tmp_path):
    """And in any order of the rows; a training prefix has a length of its seed's."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in words) for words in rng.integers(0, 30, (150, 10))]
    found = []
    for seed, ordered in ((0, texts), (1, texts), (0, texts[::-1])):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in ordered))
        config = configs.default(("sft", "pairs", "dpo"))
        config.seed = seed
        config.data.update(path=str(path), eval_fraction=0.4)
        config.sampling.update(min_prefix=2, max_prefix=5)
        found.append(Run(config, tmp_path, mesh=None).load_prompts(tokenizer()))
    first, of_other_seed, reversed_rows = found
    for split in ("eval", "test"):
        assert first[split].texts == of_other_seed[split].texts
        assert sorted(first[split].texts) == sorted(reversed_rows[split].texts)
        assert {len(text.split()) for text in first[split].texts} == {2, 3, 4, 5}
    assert len(first["train"]) == len(of_other_seed["train"])
    assert first["train"].texts != of_other_seed["train"].texts

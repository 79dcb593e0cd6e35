"""Which examples a row gives, for SFT and for pairs."""

import json
import os

import pytest

from dpo_jax.data import splits as splits_module
from dpo_jax.data.ledger import Filtered, Malformed
from dpo_jax.data.rows import Row, TextExample
from dpo_jax.data.splits import examples_of, prompt_hash, question
from tests.helpers.rows import assistant, data_config, pairs, read, user, write_jsonl

CHAT = [user("q"), assistant("a"), user("r"), assistant("x")]


@pytest.mark.parametrize("turns, start", [("all", 1), ("last", 3)])
def test_conversation_for_sft(turns, start):
    (example,) = examples_of(Row([], (CHAT,)), "sft", turns, "row 1")
    assert (example.prompt, example.responses) == (CHAT[:start], (CHAT[start:],))


def test_turns_with_weight_0():
    """OpenAI's rows say so of turns that are not trained on; the first ones are context."""
    first, last = assistant("a") | {"weight": 0}, assistant("x") | {"weight": 0}
    chat = [user("q"), first, user("r"), assistant("x")]
    for turns in ("all", "last"):
        (example,) = examples_of(Row([], (chat,)), "sft", turns, "row 1")
        assert (example.prompt, example.responses) == (CHAT[:3], (CHAT[3:],))
    row = Row(chat[:3], ([assistant("x")], [assistant("y")]), pairs=((0, 1),))
    assert examples_of(row, "pairs", "all", "row 1")[0].prompt == CHAT[:3]
    # Between others it stays, for the chat template to refuse.
    chat = [*CHAT[:3], last, user("s"), assistant("y")]
    (example,) = examples_of(Row([], (chat,)), "sft", "all", "row 1")
    assert example.responses == (chat[1:],)


@pytest.mark.parametrize("messages", [[], [assistant("a")], [user("q")], [user("q"), user("r")]])
def test_conversation_without_answer(messages):
    with pytest.raises(Malformed, match="does not end in an assistant's turn"):
        examples_of(Row([], (messages,)), "sft", "all", "row 1")


def test_every_pair_of_row():
    row = Row("p", ("a", "b", "c"), pairs=((0, 1), (0, 2)))
    examples = examples_of(row, "pairs", "all", "row 1")
    assert [example.responses for example in examples] == [("a", "b"), ("a", "c")]
    assert [example.responses for example in examples_of(row, "sft", "all", "row 1")] == [("a",)]


def test_unpaired_rows():
    with pytest.raises(Filtered, match="not liked"):
        examples_of(Row("p", ("a",), label=False), "sft", "all", "row 1")
    assert examples_of(Row("p", ("a",), label=True), "sft", "all", "row 1")
    with pytest.raises(Malformed, match="one completion with a label"):
        examples_of(Row("p", ("a",), label=True), "pairs", "all", "row 1")


SYSTEM = {"role": "system", "content": "Be brief."}
DOCUMENT = {"role": "system", "content": "It rained in London again. " * 20}


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("q", "q"),
        ([user("q")], "q"),
        ([SYSTEM, user("q")], "q"),
        ([{"role": "developer", "content": "Be brief."}, user("q") | {"name": "Tom"}], "q"),
        (
            [user("q"), {"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "9"}],
            "q",
        ),
        ([SYSTEM, *CHAT[:3]], CHAT[:3]),
        ([user("q"), SYSTEM], "q"),
        ([DOCUMENT, user("q")], [DOCUMENT, user("q")]),
        ([assistant("Hello."), user("q")], [assistant("Hello."), user("q")]),
    ],
)
def test_question_in_every_form(prompt, expected):
    assert question(TextExample(prompt, ("a",), "row 1")) == expected


def test_hash_of_text_is_fixed():
    """Which prompts of a set of text are held out never changes."""
    assert prompt_hash(TextExample("q", ("a",), "")) == 0x90EDBA1C9D0BB14E
    assert prompt_hash(TextExample("", ("a",), "")) == 0xAC8D8342BBB2362D


def held_out(path, kind, **changes):
    """Return the first questions of the rows that are held out, and of those trained on."""
    splits, _ = read(path, kind, eval_fraction=0.2, **changes)
    found = []
    for split in ("eval", "train"):
        firsts = set()
        for example in splits[split]:
            prompt = example.prompt
            said = (
                [prompt]
                if isinstance(prompt, str)
                else [turn.get("content", "") for turn in prompt]
            )
            firsts.add(next(text for text in said if text.startswith("q")))
        found.append(firsts)
    return found


def test_sft_holds_out_what_dpo_does(tmp_path):
    """Conversations are held out by one rule, whatever is the prompt in each kind of training."""
    pairs, chats, agents, agent_chats = [], [], [], []
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    calls = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "9"}]
    for number in range(100):
        start = [SYSTEM, user(f"q{number}"), assistant("a"), user(f"r{number}")]
        chosen = [*start, assistant("yes")]
        pairs.append({"chosen": chosen, "rejected": [*start, assistant("no")]})
        chats.append({"messages": chosen})
        # One answer calls a tool, which the other does not.
        chosen = [*start, *calls, assistant("yes")]
        agents.append({"chosen": chosen, "rejected": [*start, assistant("no")]})
        agent_chats.append({"messages": chosen})
    for of_pairs, of_chats in ((pairs, chats), (agents, agent_chats)):
        pairs_path = write_jsonl(tmp_path / "pairs.jsonl", of_pairs)
        chats_path = write_jsonl(tmp_path / "chats.jsonl", of_chats)
        evaluated, trained = held_out(pairs_path, "pairs")
        assert 5 < len(evaluated) < 40 and not evaluated & trained
        for turns in ("all", "last"):
            assert held_out(pairs_path, "sft", turns=turns) == [evaluated, trained]
            assert held_out(chats_path, "sft", turns=turns) == [evaluated, trained]


def test_same_questions_are_held_out_in_every_form(tmp_path):
    texts, replies, with_system = [], [], []
    for number in range(100):
        answers = {"chosen": "yes", "rejected": "no"}
        texts.append({"prompt": f"q{number}", **answers})
        replies.append({"question": f"q{number}", **answers})
        with_system.append({"system": "Be brief.", "question": f"q{number}", **answers})
    paths = []
    for name, rows in (("texts", texts), ("replies", replies), ("system", with_system)):
        paths.append(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    expected = held_out(paths[0], "pairs")
    for path in paths:
        assert held_out(path, "pairs") == held_out(path, "sft") == expected


def test_test_split_without_answers_stops_no_training(tmp_path):
    """Of a shared task, say: prompts alone, or rows of another form."""
    unlabelled = [dict(prompt=row["prompt"]) for row in pairs(30, "t")]
    shared = unlabelled[0]["prompt"]
    validation = [*pairs(20, "v"), dict(prompt=shared, chosen="a", rejected="b")]
    write_jsonl(tmp_path / "train.jsonl", pairs(20))
    write_jsonl(tmp_path / "validation.jsonl", validation)
    write_jsonl(tmp_path / "test.jsonl", [*unlabelled, dict(prompt="t", chosen="a", rejected="b")])
    for on_bad_row in ("error", "drop"):
        found, ledger = read(tmp_path, eval_split="validation", on_bad_row=on_bad_row)
        assert [len(examples) for examples in found.values()] == [20, 20, 1]
        # Prompts alone are prompts to judge.
        assert shared not in [example.prompt for example in found["eval"]]
        assert sum(ledger.test.dropped.values()) == 30
        ledger.train.kept = 20
        ledger.check(0.05, "")
    write_jsonl(tmp_path / "validation.jsonl", unlabelled)
    with pytest.raises(ValueError, match="validation.jsonl row 1: no known shape"):
        read(tmp_path, eval_split="validation")


@pytest.fixture
def passes(monkeypatch):
    """The kind and split of each first pass over a file, as they come."""
    found = []
    find = splits_module._find

    def watched(reading, split, records):
        found.append((reading.kind, split))
        return find(reading, split, records)

    monkeypatch.setattr(splits_module, "_find", watched)
    monkeypatch.setattr(splits_module, "_kept", {})
    return found


def test_same_file_is_surveyed_once(tmp_path, passes):
    """By sft, by evaluate for prompts, and by DPO; again where it has changed, or the settings."""
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    first, ledger = read(path, "sft", eval_fraction=0.2)
    for kind in ("sft", "prompts", "prompts"):
        again, other_ledger = read(path, kind, eval_fraction=0.2)
        assert again == first and other_ledger == ledger
    read(path, "pairs", eval_fraction=0.2)
    assert passes == [("sft", "train"), ("pairs", "train")]
    read(path, "sft", eval_fraction=0.2, turns="last")
    assert len(passes) == 3
    os.utime(path, ns=(1, 1))
    read(path, "sft", eval_fraction=0.2)
    assert len(passes) == 4
    # A row of which only the prompt can be read.
    with path.open("a") as file:
        file.write(json.dumps(dict(prompt="alone")) + "\n")
    dropping = dict(eval_fraction=0.2, on_bad_row="drop")
    _, of_sft = read(path, "sft", **dropping)
    _, of_prompts = read(path, "prompts", **dropping)
    assert (sum(of_sft.train.dropped.values()), of_prompts.train.dropped) == (1, {})


def test_only_drawn_rows_are_parsed_twice(tmp_path, monkeypatch, passes):
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    parsed = []
    examples_of = splits_module.examples_of

    def watched(row, *args):
        parsed.append(row.prompt)
        return examples_of(row, *args)

    monkeypatch.setattr(splits_module, "examples_of", watched)
    found, ledger = read(path, max_rows=4)
    assert parsed[50:] == [example.prompt for example in found["train"]]
    assert len(parsed) == 54 and (ledger.train.read, ledger.train.not_drawn) == (50, 46)


@pytest.mark.parametrize("eval_fraction", [0.0, 0.2])
def test_splits_that_are_not_wanted_are_not_given(tmp_path, eval_fraction):
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    data = data_config(path=str(path), eval_fraction=eval_fraction)
    found, ledger = splits_module.read(data, "pairs", ["eval"])
    assert not found["train"] and not found["test"]
    assert bool(found["eval"]) == bool(eval_fraction) and ledger.train.read == 50


def test_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    find = splits_module._find
    for others in (pairs(49), pairs(50, "other"), [dict(prompt="p")] * 50):

        def changing(*args, others=others):
            found = find(*args)
            write_jsonl(path, others)
            return found

        monkeypatch.setattr(splits_module, "_kept", {})
        monkeypatch.setattr(splits_module, "_find", changing)
        write_jsonl(path, pairs(50))
        with pytest.raises(RuntimeError, match="changed while it was read"):
            read(path, eval_fraction=0.2)

"""Held-out prompts that are trained on: what counts as the same, and what is said of it."""

import json
import random

import numpy as np
import pytest

from dpo_jax.data import leaks, splits
from dpo_jax.data.leaks import Gathered, Hashes, Seen
from dpo_jax.data.rows import TextExample
from tests.helpers.rows import assistant, data_config, user, write_jsonl

NOT_SELECTED = dict(selected_on=0, selected_by={})
WORDS = ["a", "cat", "Straße", "Ünder", "ﬁne", "SAT", "on", "№", "mat", "ß"]


def examples(*prompts) -> list[TextExample]:
    return [TextExample(prompt, (" x",), f"row {i}") for i, prompt in enumerate(prompts)]


def seen(stage: str, train=(), held_out=()) -> Seen:
    splits = dict(train=Hashes.of(examples(*train)), eval=Hashes.of(examples(*held_out)))
    return Seen(stage, f"{stage}.jsonl", splits)


@pytest.mark.parametrize(
    "other",
    [
        "the cat sat",
        " The  CAT\n\tsat ",
        "The\u00a0cat sat",  # a no-break space
        "The ｃａｔ sat",  # full-width letters
        [dict(role="user", content="The cat sat")],
        [dict(role="system", content="Be brief."), dict(role="user", content="the cat sat")],
    ],
)
def test_what_only_looks_different_is_the_same(other):
    leak = leaks.leak("test", Hashes.of(examples("The cat sat")), [seen("dpo", [other])])
    assert (leak.prompts, leak.normalised, leak.by) == (1, 1, {"dpo": 1})
    is_equal = isinstance(other, list) and other[-1]["content"] == "The cat sat"
    assert leak.exact == is_equal


@pytest.mark.parametrize("other", ["The cat sat.", "Thecat sat", "The cat", ""])
def test_other_words_are_another_prompt(other):
    prompts = Hashes.of(examples("The cat sat"))
    assert leaks.leak("test", prompts, [seen("dpo", [other])]).normalised == 0


def test_without_prompt_the_whole_text_counts():
    """As a film review, of which prompts are the first tokens."""
    review = TextExample("", ("A fine film, and long.",), "row 1")
    same_start = TextExample("", ("A fine film, and short.",), "row 2")
    held_out = Hashes.of([review, same_start])
    trained = Seen("sft", "", dict(train=Hashes.of([review])))
    assert leaks.trained(held_out, [trained]).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_sets(seed):
    """Of random texts in several spellings, against sets of Python."""
    rng = random.Random(seed)

    def prompts(count):
        found = []
        for _ in range(count):
            text = " ".join(rng.choices(WORDS, k=2))
            found.append(rng.choice([text, text.upper(), f" {text}", text.replace(" ", "  ")]))
        return found

    held_out, first, second = prompts(30), prompts(40), prompts(40)
    leak = leaks.leak("t", Hashes.of(examples(*held_out)), [seen("a", first), seen("b", second)])
    assert leak.prompts == len(set(held_out))
    assert leak.exact == len(set(held_out) & {*first, *second})

    def nearly(*lists):
        known = {leaks.normalised(text) for texts in lists for text in texts}
        return sum(leaks.normalised(text) in known for text in set(held_out))

    assert leak.normalised == nearly(first, second) >= leak.exact
    by = {"a": nearly(first), "b": nearly(second)}
    assert leak.by == {stage: count for stage, count in by.items() if count}


def test_written_prompts_are_read_again(tmp_path):
    before = seen("round_2/pairs", ["b", "a", "b"], ["c", "A"])
    leaks.write(tmp_path, before)
    after = leaks.load(tmp_path)
    assert (after.stage, after.data) == (before.stage, before.data)
    assert len(after.trained) == 2  # each prompt once
    for mine, theirs in ((before, after), (after, before)):
        for name in ("trained", "held_out"):
            exactly, nearly = getattr(mine, name).are_in(getattr(theirs, name))
            assert exactly.all() and nearly.all()
    assert leaks.load(tmp_path / "none") is None
    path = tmp_path / leaks.FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not what was written there"):
        leaks.load(tmp_path)


def test_examples_that_are_not_used_are_left_out():
    gathered = Gathered()
    for example in examples("a", "b", "a", "c"):
        gathered.add("train", example)
    kept = gathered.hashes("train", kept=["row 0", "row 3"])
    assert np.array_equal(kept.exact, Hashes.of(examples("a", "c")).exact)
    assert not len(gathered.hashes("train", kept=[]))
    assert len(gathered.hashes("train")) == 4 and not len(gathered.hashes("eval"))


@pytest.mark.parametrize("turns, leaked", [("all", ["q", "later"]), ("last", ["later"])])
def test_every_turn_that_is_trained_on_counts(tmp_path, turns, leaked):
    """SFT on two exchanges answers both questions, unless data.turns takes the last alone."""
    chat = [user("q"), assistant("a"), user("r"), assistant("b")]
    data = data_config(path=str(write_jsonl(tmp_path / "chats.jsonl", [dict(messages=chat)])))
    data.turns = turns
    trained = leaks.read(data, "sft", "sft", "").trained
    prompts = dict(q="q", r="r", later=chat[:3])
    found = [name for name, prompt in prompts.items() if is_in(prompt, trained)]
    assert found == leaked
    # Of prompts that are sampled from, the answers in the file are not trained on.
    sampled_from = leaks.read(data, "prompts", "ppo", "").trained
    assert len(sampled_from) == 1


def is_in(prompt, trained: Hashes) -> bool:
    exactly, _ = Hashes.of(examples(prompt)).are_in(trained)
    return bool(exactly.all())


def test_turns_that_are_not_trained_on_do_not_count():
    """Weights of 0, and calls of tools within one answer; an example that is cut is left out."""
    first = [user("q"), assistant("a")]
    further = [user("r"), assistant("b") | {"weight": 0}, user("s"), assistant("c")]
    call = [{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "9"}]
    chat = TextExample(first[:1], ([*first[1:], *further],), "row 1", is_conversation=True)
    with_call = TextExample([user("t")], ([*call, assistant("d")],), "row 2")
    assert splits.answered_questions(chat) == ["q"]
    assert splits.answered_questions(with_call) == []
    gathered = Gathered()
    for example in (chat, with_call):
        gathered.add("train", example)
        gathered.add("eval", example)
    assert len(gathered.trained_on()) == 3 and len(gathered.hashes("eval")) == 2
    assert len(gathered.trained_on(["row 2"])) == 1


def test_report_has_a_line_for_each_held_out_set():
    run = [seen("sft", ["a", "b"], ["c", "D"]), seen("dpo", ["c", "d"], ["e"]), seen("ppo", ["a"])]
    found = leaks.of_run(run)
    assert leaks.to_dict(found) == {
        "held_out": {
            "sft": dict(prompts=2, exact=1, normalised=2, by=dict(dpo=2)) | NOT_SELECTED,
            "dpo": dict(prompts=1, exact=0, normalised=0, by={}) | NOT_SELECTED,
        }
    }
    table = leaks.table(found, ["rm"]).splitlines()
    assert " ".join(table[1].split()) == "held out by sft 2 1 2 0 (dpo trains on 2)"
    assert " ".join(table[2].split()) == "held out by dpo 1 0 0 0"
    assert table[3] == f"nearly: {leaks.NORMALISED}"
    assert table[4].startswith("not known of: rm,")
    json.dumps(leaks.to_dict(found, ["rm"]))
    assert leaks.table([]) == ""


def test_test_prompts_that_another_set_validates_on_are_told():
    """Of two data sets, of which one validates on all its held-out prompts."""
    sft = Seen("sft", "", dict(test=Hashes.of(examples("a", "b", "c"))))
    dpo = Seen("dpo", "", dict(eval=Hashes.of(examples("A", "c", "d"))))
    found = leaks.of_run([sft, dpo])
    assert [(one.selected_on, one.selected_by) for one in found] == [(2, dict(dpo=2)), (0, {})]
    lines = leaks.table(found).splitlines()
    assert " ".join(lines[1].split()) == "held out by sft 3 0 0 2 (dpo validates on 2)"
    assert lines[-1].startswith("selected on: test prompts")
    judged = leaks.leak("evaluate", Hashes.of(examples("c", "e")), [sft, dpo])
    assert judged.selection().startswith("1 of the 2 prompts that are judged are validated on, too")
    assert leaks.leak("evaluate", Hashes.of(examples("e")), [sft, dpo]).selection() == ""


def test_refusal_names_counts_an_example_and_the_way_out():
    texts = ["new", "Old one " * 20, "other"]
    run = [seen("sft", ["old one " * 20]), seen("dpo", ["OTHER", "other"])]
    told = leaks.refusal("evaluate is to report on", Hashes.of(examples(*texts)), texts, run)
    assert told.startswith("2 of the 3 prompts that evaluate is to report on are trained on")
    assert "1 by sft (sft.jsonl), 1 by dpo (dpo.jsonl); 1 exactly" in told
    assert "'Old one Old one" in told and "..." in told and "\n" not in told
    assert "on_leak=drop" in told and "on_leak=allow" in told
    assert leaks.refusal("evaluate", Hashes.of(examples("new")), ["new"], run) == ""


def test_prefixes_are_compared_as_tokens():
    ids = [np.array(tokens, np.int32) for tokens in ([1, 2], [1, 2, 3], [4, 5], [1, 2])]
    assert leaks.shared_prefixes(ids, [ids[1], np.array([4], np.int32)]) == 1
    assert leaks.shared_prefixes(ids, ids[:1]) == 2

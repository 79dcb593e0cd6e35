"""The comparison of a chat model with torch, on a tiny one, and the committed figures."""

import json

import pytest

from experiments import real_model
from tests.helpers import chat_model, tiny_runs
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_jsonl

RESULTS = ROOT / "experiments" / "results" / "real_model"
WORDS = [f"w{number}" for number in range(40)]
SIZES = real_model.Sizes(
    chats=3, longest_chat=64, answers=3, new_tokens=6, steps=3, longest_pair=32
)


def in_this_process(*words):
    """Do what the commands do, which would start for seconds."""
    name, *flags = words
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    model, out = given["model"], given["out"]
    if name == "score":
        lengths = {field: int(given[field]) for field in ("max_length", "max_prompt_length")}
        options = dict(per_token=True, settings=lengths)
        tiny_runs.score_file(model, given["data"], out, **options)
    else:
        sampling = dict(temperature=0.0, n=1, max_new_tokens=int(given["max_new_tokens"]))
        tiny_runs.sample_file(model, given["prompts"], out, **sampling)


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="compares with transformers' torch models")
    monkeypatch.setattr(real_model, "run_command", in_this_process)
    questions = [" ".join(WORDS[start : start + 4]) for start in (0, 11, 23)]
    monkeypatch.setattr(real_model, "QUESTIONS", questions)
    model = chat_model.write(tmp_path / "model", "float32")
    rows = []
    for number in range(20):
        asked, *answers = (WORDS[(number + shift) % 40] for shift in (0, 7, 19, 24))
        shared = f"\n\nHuman: {asked} w3\n\nAssistant:"
        rows.append(
            dict(chosen=f"{shared} {answers[0]} w2", rejected=f"{shared} {answers[1]} {answers[2]}")
        )
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "test.jsonl", rows)
    folder = tmp_path / "out"
    folder.mkdir()
    with tiny_runs.on_devices(1):
        yield real_model.Task(str(model), str(data), folder, SIZES)


def test_transcript_becomes_messages():
    shared = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Where is\n\nit?\n\nAssistant:"
    pair = real_model.as_pair(dict(chosen=f"{shared} Here.", rejected=f"{shared} There."))
    assert [(one["role"], one["content"]) for one in pair["prompt"]] == [
        ("user", "Hi."),
        ("assistant", "Hello!"),
        ("user", "Where is\n\nit?"),
    ]
    assert pair["chosen"] == [dict(role="assistant", content="Here.")]
    assert pair["rejected"] == [dict(role="assistant", content="There.")]


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: e", "\n\nHuman: a\n\nAssistant: b\n\nHuman: f"),
        ("\n\nAssistant: b", "\n\nAssistant: d"),
    ],
)
def test_rows_that_are_no_pair_of_answers_are_left_out(chosen, rejected):
    assert real_model.as_pair(dict(chosen=chosen, rejected=rejected)) is None


def test_too_few_pairs_are_named(task):
    with pytest.raises(ValueError, match=r"only 20 of its pairs have at most 64 .* expected 21\."):
        task.pairs(21, 64)


def test_chats_and_answers_equal_torch(task):
    chats = real_model.compare_chats(task)
    assert chats["chats"] == 6 and chats["largest_logit"] > 1
    assert all(0 <= difference < 1e-4 for difference in chats["difference"].values())
    answers = real_model.compare_answers(task)
    assert answers["equal"] == answers["answers"] == 3 and not answers["parted"]
    assert answers["difference"]["answer_log_probs"] < 1e-4


def test_answer_that_parts_says_where_and_by_how_much(task):
    theirs = real_model.open_torch(task.model)
    chat = [dict(role="user", content="w0 w1")]
    prompt = real_model.prompt_tokens(task.tokenizer, chat)
    answer = []
    for _ in range(3):
        answer.append(int(real_model.torch_logits(theirs, prompt + answer)[-1].argmax()))
    logits_V = real_model.torch_logits(theirs, prompt + answer[:2])[-1]
    other = int(logits_V.argsort()[-2])
    text = "".join(f" {task.tokenizer.decode([token])}" for token in [*answer[:2], other])
    found = real_model.compare_answer(task.tokenizer, theirs, chat, text, 3)
    assert found["tokens"] == 3 and found["parted"]["place"] == 2
    assert found["parted"]["gap"] == pytest.approx(logits_V.max() - logits_V[other], abs=1e-5)


def test_steps_beside_each_other():
    ours = [dict.fromkeys(real_model.MEASURES, 1.0), dict.fromkeys(real_model.MEASURES, 2.0)]
    theirs = [dict.fromkeys(real_model.MEASURES.values(), value) for value in (1.0, 2.0)]
    theirs[1] |= {"loss": 2.5}
    found = real_model.beside(ours, theirs)
    assert found["steps"][1]["loss/train"] == [2.0, 2.5] and found["steps"][1]["step"] == 2
    assert found["difference"].pop("loss/train") == 0.5
    assert set(found["difference"].values()) == {0.0}


@pytest.mark.slow
def test_all_parts(task):
    """And what is done is not done again: half a minute."""
    pytest.importorskip("trl", reason="the independent references are TRL's trainer and peft")
    result = real_model.run(task, list(real_model.PARTS))
    for name in ("dpo", "lora"):
        part = result[name]
        assert len(part["steps"]) == 3 and max(part["difference"].values()) < 1e-3
    assert result["export"]["equal"] == result["export"]["answers"]
    assert result["export"]["difference"]["logits"] < 1e-4
    assert not any(result["export"]["loading"].values())
    written = (task.folder / "real_model.md").read_text()
    assert written == real_model.page(result)
    before = (task.folder / "dpo.json").stat()
    assert real_model.run(task, ["dpo"]) == result  # which others are kept in
    assert (task.folder / "dpo.json").stat() == before


def test_committed_page_is_of_the_committed_figures():
    result = json.loads((RESULTS / "real_model.json").read_text())
    assert (RESULTS / "real_model.md").read_text() == real_model.page(result)
    assert real_model.table(result) in (ROOT / "docs" / "models.md").read_text()
    assert result["weights"] > 1e8 and result["chats"]["chats"] == 40
    check(result)


def check(result):
    """Both are float32 with sums in another order: 1e-5 of the largest number, at most."""
    chats, answers, export = result["chats"], result["answers"], result["export"]
    of_logits = 1e-5 * chats["largest_logit"]
    of_responses = 1e-5 * abs(chats["mean_log_prob"])
    assert 40 < chats["largest_logit"] < 60
    assert chats["difference"]["logits"] < of_logits
    assert chats["difference"]["token_log_probs"] < 1e-4
    assert chats["difference"]["response_log_probs"] < of_responses

    assert answers["equal"] == answers["answers"] == 20 and not answers["parted"]
    assert answers["difference"]["answer_log_probs"] < of_responses
    assert export["equal"] == export["answers"] == 5
    assert export["difference"]["logits"] < of_logits and not any(export["loading"].values())

    for name in ("dpo", "lora"):
        steps, difference = result[name]["steps"], dict(result[name]["difference"])
        assert len(steps) == 20
        largest_norm = max(step["grad_norm"][1] for step in steps)
        assert difference.pop("grad_norm") < 2e-4 * largest_norm
        assert difference.pop("final_logits", 0) < of_logits
        assert difference.pop("loss/train") < 1e-4
        assert difference.pop("rewards_train/margins") < 1e-4
        assert max(difference.values()) < of_responses  # sums over a response's tokens

"""Rows of a prompt alone, which stages that only sample take, and no other."""

import pytest

from dpo_jax.data import dataset, splits
from dpo_jax.data.ledger import Malformed, Unusable
from dpo_jax.data.shapes import local, local_or_prompt
from dpo_jax.data.tokenizer import encode_prompts
from tests.helpers.letters import letters_tokenizer
from tests.helpers.rows import data_config, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant={% endif %}"
)
WHY = {"role": "user", "content": "why"}
SO = {"role": "assistant", "content": "so"}
ENCODING = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True, show=0)


@pytest.fixture(scope="module")
def letters():
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "fields, prompt",
    [
        ({"prompt": "why"}, "why"),
        ({"prompt": "why", "completion": None, "score": 3}, "why"),
        ({"prompt": [WHY]}, [WHY]),
        ({"prompt": [WHY, SO, WHY]}, [WHY, SO, WHY]),
        ({"messages": [WHY]}, [WHY]),
        ({"messages": [WHY, SO, WHY]}, [WHY, SO, WHY]),
        ({"conversations": [{"from": "human", "value": "why"}]}, [WHY]),
        ({"question": "why"}, [WHY]),
        ({"instruction": "why"}, [WHY]),
        ({"system": "be brief", "prompt": "why"}, [{"role": "system", "content": "be brief"}, WHY]),
    ],
)
def test_prompt_of_each_form(fields, prompt):
    row = local_or_prompt(fields)
    assert (row.prompt, row.responses) == (prompt, ())
    assert row.shape == f"prompts, {'text' if isinstance(prompt, str) else 'chat'}"


def test_columns_and_ignored_fields():
    fields = {"ask": "why", "context": "x"}
    row = local_or_prompt(fields, {"prompt": "ask"}, ("context",))
    assert (row.prompt, row.responses) == ("why", ())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "why", "completion": " so"},
        {"prompt": "why", "chosen": " so", "rejected": " no"},
        {"messages": [WHY, SO]},
        {"text": "why"},
    ],
)
def test_rows_with_an_answer_are_read_as_ever(fields):
    assert local_or_prompt(fields) == local(fields)


@pytest.mark.parametrize(
    "fields, error, reason",
    [
        ({"prompt": [WHY, SO]}, Malformed, "does not end in a turn of a user or a tool; .*assist"),
        ({"prompt": [{"role": "system", "content": "x"}]}, Malformed, "end in a turn of a user"),
        ({"prompt": "why", "context": "x"}, Malformed, "field 'context' has content"),
        ({"prompt": []}, Malformed, "empty list of messages"),
        ({"prompt": 3}, Malformed, "field 'prompt' holds something else than"),
        ({"completion": "so"}, Malformed, "none of the fields 'prompt', 'messages'"),
        ({"prompt": " \n"}, Unusable, "empty prompt"),
        ({"prompt": "why", "completion": 3}, Malformed, "field 'completion' is not text"),
        ({"prompt": "why", "chosen": "", "rejected": 3}, Malformed, "field 'rejected'"),
    ],
)
def test_what_is_no_prompt_is_refused(fields, error, reason):
    with pytest.raises(error, match=reason):
        local_or_prompt(fields)


@pytest.mark.parametrize("kind", ["sft", "pairs", "unpaired"])
@pytest.mark.parametrize("fields", [{"prompt": "why"}, {"prompt": [WHY]}])
def test_training_on_answers_refuses_prompts_alone(tmp_path, kind, fields):
    data = data_config(path=str(write_jsonl(tmp_path / "a.jsonl", [fields])))
    with pytest.raises(ValueError, match="a.jsonl row 1: no known shape of row") as refused:
        splits.read(data, kind)
    assert splits.PROMPTS_ALONE in str(refused.value)


@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_prompts_alone_are_held_out_like_rows_with_answers(tmp_path, name):
    """The same validation and test halves, and the same rows drawn."""
    found = []
    for answered in (False, True):
        rows = []
        for number in range(120):
            asked = {"role": "user", "content": f"q{number}"}
            row = {name: [asked] if name == "messages" else f"q{number}"}
            if answered and name == "messages":
                row[name] = [asked, SO]
            elif answered:
                row["completion"] = " so"
            rows.append(row)
        path = write_jsonl(tmp_path / f"{answered}.jsonl", rows)
        data = data_config(path=str(path), eval_fraction=0.4, max_rows=30)
        examples, ledger = splits.read(data, "prompts")
        numbers = {split: [e.where.split()[-1] for e in of] for split, of in examples.items()}
        found.append((numbers, ledger.train.held_out, ledger.eval.read, ledger.test.read))
    assert found[0] == found[1]
    assert len(found[0][0]["train"]) == 30 and found[0][0]["eval"] and found[0][0]["test"]


def test_tokens_of_prompts_alone(tmp_path, letters):
    """Those from which `sample` completes, cut to max_prompt_length; rows with answers beside."""
    rows = [
        {"prompt": "why"},
        {"prompt": "w" * 30},
        {"prompt": [WHY]},
        {"prompt": "w" * 30, "completion": "so"},
    ]
    data = data_config(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), **ENCODING)
    loaded = dataset.load(data, letters, "prompts")
    texts = splits.read(data, "prompts")[0]["train"]
    expected = encode_prompts(texts, letters, data, "keep_end")
    assert [len(ids) for ids in expected[:2]] == [3, 20]
    for ids, example in list(zip(expected, loaded.train, strict=True))[:3]:
        assert ids.tolist() == example.prompt.tolist() and not len(example.responses[0])
    # Together with its answer this row is short enough.
    assert len(loaded.train[3].prompt) == 30 and len(loaded.train[3].responses[0])
    assert loaded.ledger.train.prompts_truncated == 1
    assert loaded.ledger.train.shapes == {
        "prompts, text": 2,
        "prompts, chat": 1,
        "TRL prompt and completion, text": 1,
    }

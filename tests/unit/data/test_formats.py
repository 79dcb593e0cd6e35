"""Rows as people have them, from the file to what a model is trained on.

Each test holds one public report about preference data, or one data set's form; the comment names
it. Its rows are read as a run reads them, and the text of the token ids is compared: the prompt,
and each response, whose tokens that are trained on stand between ⟦ and ⟧.
"""

import csv
import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import dataset
from tests.helpers.chat_tokenizers import make_tokenizer, template_of
from tests.helpers.rows import assistant, user, write_jsonl, write_parquet

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
ASKED = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
QUESTION, GOOD, BAD = "Name a colour.", "Blue.", "Seven."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def chatml():
    return make_tokenizer(CHATML, "<|im_end|>")


def qwen(name="qwen3"):
    return make_tokenizer(template_of(name), "<|im_end|>")


def plain(kind="bytes"):
    """A tokenizer with <s> and </s>, which starts each text with <s>."""
    return make_tokenizer(ZEPHYR, "</s>", "<s>", kind)


def load(path, tokenizer, kind="pairs", **changes):
    """Read, tokenise and check a data set as a run does."""
    config = configs.default(("dpo",))
    config.data.update({"path": str(path), "max_length": 4000, "max_prompt_length": 2000})
    config.data.update({"eval_fraction": 0.0} | changes)
    return dataset.load(config.data, tokenizer, kind)


def seen(tmp_path, rows, tokenizer, kind="pairs", **changes):
    """Return the text of each example: the prompt, and the responses with what is trained on."""
    data = load(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, kind, **changes)
    return [shown(example, tokenizer) for example in data.train]


def shown(example, tokenizer) -> tuple[str, ...]:
    masks = example.completion_masks or [np.ones(len(ids), bool) for ids in example.responses]
    texts = [decoded(tokenizer, example.prompt)]
    for ids, mask in zip(example.responses, masks, strict=True):
        text = ""
        borders = np.flatnonzero(np.diff(mask)) + 1
        for run, marks in zip(np.split(ids, borders), np.split(mask, borders), strict=True):
            text += f"⟦{decoded(tokenizer, run)}⟧" if marks.any() else decoded(tokenizer, run)
        texts.append(text)
    return tuple(texts)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def call(place, content="", name="get_weather"):
    function = {"name": name, "arguments": {"place": place}}
    return assistant(content) | {"tool_calls": [{"type": "function", "function": function}]}


def tool_call(place, name="get_weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"place": "{place}"}}}}\n</tool_call>'


# text


@pytest.mark.parametrize("append_eos", [True, False])
def test_text_in_the_models_chat_format(tmp_path, append_eos):
    # alignment-handbook#116, orca_dpo_pairs in ChatML: the format of text rows is the user's.
    tokenizer = chatml()
    rows = [{"prompt": ASKED, "chosen": f"{GOOD}<|im_end|>\n", "rejected": f"{BAD}<|im_end|>"}]
    (texts,) = seen(tmp_path, rows, tokenizer, append_eos=append_eos)
    assert texts == (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")


@pytest.mark.parametrize("append_eos", [True, False])
def test_text_in_the_models_chat_format_without_end(tmp_path, append_eos):
    # The same, where the end of the turn is left to the trainer.
    tokenizer = chatml()
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}]
    (texts,) = seen(tmp_path, rows, tokenizer, append_eos=append_eos)
    end = "<|im_end|>" if append_eos else ""
    assert texts == (ASKED, f"⟦Blue.{end}⟧", f"⟦Seven.{end}⟧")


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("tail", ["</s>", "</s>\n", " </s> "])
def test_eos_written_behind_the_answers(tmp_path, tail, append_eos):
    # unsloth#416: "+ EOS_TOKEN" by hand.
    tokenizer = plain()
    rows = [{"prompt": "Q:", "chosen": f" Blue.{tail}", "rejected": f" Seven.{tail}"}]
    (texts,) = seen(tmp_path, rows, tokenizer, append_eos=append_eos)
    space = " " if tail[0] == " " else ""
    assert texts == ("<s>Q:", f"⟦ Blue.{space}</s>⟧", f"⟦ Seven.{space}</s>⟧")


def test_bos_and_eos_written_in_a_text(tmp_path):
    # guanaco-llama2's form.
    rows = [{"text": "<s>[INST] Name a colour. [/INST] Blue. </s>"}]
    (texts,) = seen(tmp_path, rows, plain(), "sft")
    assert texts == ("<s>", "⟦[INST] Name a colour. [/INST] Blue. </s>⟧")


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_no_space_after_a_chats_newline(tmp_path, kind):
    # catwalk#156, transformers#31513: a tokenizer that puts a space before every text.
    tokenizer = plain(kind)
    chat = [user(QUESTION)]
    rows = [{"prompt": chat, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}]
    data = load(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer)
    for response, answer in zip(data.train[0].responses, (GOOD, BAD), strict=True):
        whole = tokenizer.apply_chat_template([*chat, assistant(answer)], return_dict=False)
        ids = [*data.train[0].prompt.tolist(), *response.tolist()]
        # but for the newline after the last EOS
        assert ids == whole[: len(ids)] and ids[-1] == tokenizer.eos_token_id
        assert not tokenizer.convert_ids_to_tokens(response)[0].startswith("▁")


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_one_space_where_the_answer_has_one(tmp_path, kind):
    # The same for text rows: " Blue." is one space and a word, not two spaces.
    tokenizer = plain(kind)
    rows = [{"prompt": "It is", "chosen": " nine degrees.", "rejected": " green."}]
    data = load(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer)
    example = data.train[0]
    for response, answer in zip(example.responses, (" nine degrees.", " green."), strict=True):
        joint = tokenizer("It is" + answer).input_ids
        assert [*example.prompt, *response] == [*joint, tokenizer.eos_token_id]
    assert data.ledger.train.boundary_merges == 0


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
@pytest.mark.parametrize("answer", ["\n\nnine", "\nnine", "nine"])
def test_no_space_where_a_token_would_reach_across(tmp_path, kind, answer):
    # Where prompt and answer would merge, the answer stands alone, and still without the space.
    tokenizer = plain(kind)
    rows = [{"prompt": "It is\n", "chosen": answer, "rejected": " green."}]
    ((_, chosen, _),) = seen(tmp_path, rows, tokenizer)
    data = load(tmp_path / "rows.jsonl", tokenizer)
    assert data.ledger.train.boundary_merges == answer.startswith("\n")
    ids = data.train[0].responses[0]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == f"{answer}</s>"


def test_prompt_inside_the_answers(tmp_path):
    # unsloth-zoo#830: TRL's implicit prompt, as text.
    start = "User: Name a colour.\nBot:"
    rows = [{"chosen": f"{start} Blue.", "rejected": f"{start} Seven."}]
    (texts,) = seen(tmp_path, rows, chatml())
    assert texts == (start, "⟦ Blue.<|im_end|>⟧", "⟦ Seven.<|im_end|>⟧")


def test_answers_that_repeat_the_prompt(tmp_path):
    # reward-bench#140, trl#1582.
    rows = [
        {"prompt": f"{QUESTION}\n", "chosen": f"{QUESTION}\nBlue.", "rejected": f"{QUESTION}\nNo."}
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load(path, chatml())
    texts = shown(data.train[0], chatml())
    assert texts == (f"{QUESTION}\n", "⟦Blue.<|im_end|>⟧", "⟦No.<|im_end|>⟧")
    assert "repeat" in data.ledger.table()


def test_question_at_the_end_of_a_long_prompt(tmp_path):
    # The common form of retrieval: long context, question and cue last.
    context = "The shop opens at nine. " * 40
    rows = [{"prompt": f"{context}\nWhen?\nAnswer:", "chosen": " At nine.", "rejected": " No."}]
    (texts,) = seen(tmp_path, rows, chatml(), max_length=100, max_prompt_length=50)
    assert texts[0].endswith("\nWhen?\nAnswer:")


# tools and reasoning


def test_tools_and_calls_in_the_prompt(tmp_path):
    # axolotl#3824, trl#6259.
    result = {"role": "tool", "name": "get_weather", "content": "9 degrees"}
    rows = [
        {
            "tools": TOOLS,
            "prompt": [user(QUESTION), call("Paris"), result],
            "chosen": [assistant(GOOD)],
            "rejected": [assistant(BAD)],
        }
    ]
    ((prompt, chosen, rejected),) = seen(tmp_path, rows, qwen("qwen2_5"))
    assert json.dumps(TOOLS[0]) in prompt
    assert f"<|im_start|>assistant\n{tool_call('Paris')}<|im_end|>" in prompt
    assert "<tool_response>\n9 degrees\n</tool_response>" in prompt
    assert (chosen, rejected) == ("⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")


def test_answer_of_text_and_a_call(tmp_path):
    rows = [
        {
            "tools": TOOLS,
            "prompt": [user(QUESTION)],
            "chosen": [call("Paris", "I look it up.")],
            "rejected": [assistant("I look it up.")],
        }
    ]
    ((_, chosen, rejected),) = seen(tmp_path, rows, qwen("qwen2_5"))
    assert chosen == f"⟦I look it up.\n{tool_call('Paris')}<|im_end|>⟧"
    assert rejected == "⟦I look it up.<|im_end|>⟧"


@pytest.mark.parametrize("content", ["", None])
def test_answers_that_are_bare_calls(tmp_path, content):
    # kakao/diatool-dpo#2; OpenAI's form has null content beside calls.
    rows = [
        {
            "tools": TOOLS,
            "prompt": [user(QUESTION)],
            "chosen": [call("Paris", content)],
            "rejected": [call("Paris", content, "get_time")],
        }
    ]
    ((_, chosen, rejected),) = seen(tmp_path, rows, qwen("qwen2_5"))
    assert chosen == f"⟦{tool_call('Paris')}<|im_end|>⟧"
    assert rejected == f"⟦{tool_call('Paris', 'get_time')}<|im_end|>⟧"


def test_calls_are_never_lost(tmp_path):
    # A template that knows no tools.
    rows = [{"prompt": [user("?")], "chosen": [call("Paris", "I see.")], "rejected": [user("No")]}]
    rows[0]["rejected"] = [assistant("No.")]
    with pytest.raises(ValueError, match=r"row 1: .*does not write 'tool_calls'.*data.ignore="):
        seen(tmp_path, rows, chatml())
    (texts,) = seen(tmp_path, rows, chatml(), ignore=("tool_calls",))
    assert texts[1] == "⟦I see.<|im_end|>⟧"


def test_reasoning_is_trained_on(tmp_path):
    # axolotl#3824. Pairs that differ in reasoning alone are pairs.
    good = assistant(GOOD) | {"reasoning_content": "The sea is blue."}
    worse = assistant(GOOD) | {"reasoning_content": "A guess."}
    rows = [{"prompt": [user(QUESTION)], "chosen": [good], "rejected": [worse]}]
    (texts,) = seen(tmp_path, rows, qwen())
    assert texts == (
        ASKED,
        "⟦<think>\nThe sea is blue.\n</think>\n\nBlue.<|im_end|>⟧",
        "⟦<think>\nA guess.\n</think>\n\nBlue.<|im_end|>⟧",
    )
    with pytest.raises(ValueError, match="does not write 'reasoning_content'"):
        seen(tmp_path, rows, chatml())


def test_options_of_the_template(tmp_path):
    # ms-swift#6763, LlamaFactory#9092: Qwen3 without thinking.
    rows = [{"prompt": [user(QUESTION)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}]
    (texts,) = seen(tmp_path, rows, qwen())
    assert texts[:2] == (ASKED, "⟦<think>\n\n</think>\n\nBlue.<|im_end|>⟧")
    (texts,) = seen(tmp_path, rows, qwen(), template={"enable_thinking": False})
    assert texts[:2] == (f"{ASKED}<think>\n\n</think>\n\n", "⟦Blue.<|im_end|>⟧")


# conversations


def test_answers_of_several_turns(tmp_path):
    # AReno#437, SimpleTIR#23: agent traces, and conversations that differ from their first answer.
    trace = [assistant("I look."), {"role": "tool", "content": "9"}, assistant(GOOD)]
    rows = [{"prompt": [user(QUESTION)], "chosen": trace, "rejected": [assistant(BAD)]}]
    (texts,) = seen(tmp_path, rows, chatml())
    assert texts == (
        ASKED,
        "⟦I look.<|im_end|>⟧\n<|im_start|>tool\n9<|im_end|>\n<|im_start|>assistant\n"
        "⟦Blue.<|im_end|>⟧",
        "⟦Seven.<|im_end|>⟧",
    )
    chats = [
        [user(QUESTION), assistant(first), user("And?"), assistant(last)]
        for first, last in (("Yes?", GOOD), ("No?", BAD))
    ]
    (texts,) = seen(tmp_path, [{"chosen": chats[0], "rejected": chats[1]}], chatml())
    between = "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == (
        ASKED,
        f"⟦Yes?<|im_end|>⟧{between}⟦Blue.<|im_end|>⟧",
        f"⟦No?<|im_end|>⟧{between}⟦Seven.<|im_end|>⟧",
    )


def test_conversations_of_several_turns_for_sft(tmp_path):
    # trl#2424, trl#1282.
    system = {"role": "system", "content": "Be kind."}
    chat = [system, user("One?"), assistant("First."), user("Two?"), assistant("Second.")]
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    between = "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    (texts,) = seen(tmp_path, [{"messages": chat}], chatml(), "sft")
    first, second = "First.<|im_end|>", "Second.<|im_end|>"
    cue = "<|im_start|>assistant\n"
    assert texts == (f"{start}{cue}", f"⟦{first}⟧{between}⟦{second}⟧")
    (texts,) = seen(tmp_path, [{"messages": chat}], chatml(), "sft", turns="last")
    assert texts == (f"{start}{cue}{first}{between}", f"⟦{second}⟧")


def test_one_bad_conversation_is_dropped(tmp_path):
    # alignment-handbook#93, unsloth#334: a template that raises for one row of many.
    tokenizer = make_tokenizer(template_of("gemma"), "<eos>", "<bos>")
    rows = []
    for number in range(24):
        prompt = [user(f"Question {number}?")]
        rows.append({"prompt": prompt, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]})
    rows[7]["prompt"] = [user("Two"), user("turns")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="rows.jsonl row 8: .*must alternate(.|\n)*on_bad_row"):
        load(path, tokenizer)
    data = load(path, tokenizer, on_bad_row="drop")
    assert len(data.train) == data.ledger.train.kept == 23
    assert list(data.ledger.train.dropped.values()) == [1]
    ((where,),) = data.ledger.train.examples.values()
    assert where == "rows.jsonl row 8"


def test_system_column_is_the_system_turn(tmp_path):
    # LlamaFactory#5743, truthy-dpo.
    rows = [{"id": 0, "system": "Say arr.", "prompt": QUESTION, "chosen": GOOD, "rejected": BAD}]
    (texts,) = seen(tmp_path, rows, chatml())
    system = "<|im_start|>system\nSay arr.<|im_end|>\n"
    assert texts == (f"{system}{ASKED}", "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")


def test_role_names_of_others(tmp_path):
    # LlamaFactory#3264.
    chats = []
    for answer in (GOOD, BAD):
        asked = {"role": "Human", "content": QUESTION}
        chats.append([asked, {"role": "Assistant", "content": answer}])
    (texts,) = seen(tmp_path, [{"chosen": chats[0], "rejected": chats[1]}], chatml())
    assert texts == (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")


@pytest.mark.parametrize("prompt", [f"system: be brief. {QUESTION}", f"{QUESTION} "])
def test_prompt_that_is_not_exactly_the_turn(tmp_path, prompt):
    # orpo-dpo-mix: the conversation says it all.
    chats = [[user(QUESTION), assistant(answer)] for answer in (GOOD, BAD)]
    rows = [{"prompt": prompt, "chosen": chats[0], "rejected": chats[1]}]
    (texts,) = seen(tmp_path, rows, chatml())
    assert texts == (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")


def test_content_in_parts(tmp_path):
    # transformers' form of content, as JSON and as a table's structs of lists.
    def parts(message):
        return message | {"content": [{"type": "text", "text": message["content"]}]}

    turns = [user(QUESTION), assistant(GOOD), assistant(BAD)]
    prompt, chosen, rejected = ([parts(turn)] for turn in turns)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    expected = (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")
    assert seen(tmp_path, [row], chatml()) == [expected]
    columns = {}
    for name, turn in zip(("prompt", "chosen", "rejected"), turns, strict=True):
        columns[name] = {"role": [turn["role"]], "content": [turn["content"]]}
    path = write_parquet(tmp_path / "structs" / "train.parquet", [columns])
    assert shown(load(path, chatml()).train[0], chatml()) == expected
    row["prompt"][0]["content"].append({"type": "image", "url": "sea.png"})
    with pytest.raises(ValueError, match="row 1: .*part of type 'image'"):
        seen(tmp_path, [row], chatml())


def test_unpaired_rows(tmp_path):
    # KTO's: an answer that was not liked is nothing to imitate.
    rows = [
        {"prompt": "Q:", "completion": " Blue.", "label": True},
        {"prompt": "Q:", "completion": " Seven.", "label": False},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load(path, chatml(), "sft")
    assert [shown(example, chatml()) for example in data.train] == [("Q:", "⟦ Blue.<|im_end|>⟧")]
    assert sum(data.ledger.train.filtered.values()) == 1
    with pytest.raises(ValueError, match="row 1: .*label"):
        load(path, chatml())


# columns of known sets

OPENAI = {
    "input": {"messages": [user(QUESTION)], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant(GOOD)],
    "non_preferred_output": [assistant(BAD)],
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": QUESTION}],
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": BAD},
}
ARENA = {
    "question_id": "0",
    "model_a": "a",
    "model_b": "b",
    "winner": "model_b",
    "conversation_a": [user(QUESTION), assistant(BAD)],
    "conversation_b": [user(QUESTION), assistant(GOOD)],
}
COMPLETIONS = [{"response": BAD, "overall_score": 2.0}, {"response": GOOD, "overall_score": 8.0}]
KNOWN = {
    "orca_dpo_pairs": {"system": "", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "distilabel": {
        "system": "",
        "input": QUESTION,
        "chosen": GOOD,
        "rejected": BAD,
        "generations": [GOOD, BAD],
        "order": ["a", "b"],
        "rating": [9.0, 2.0],
    },
    "stack-exchange-paired": {
        "qid": 0,
        "question": QUESTION,
        "response_j": GOOD,
        "response_k": BAD,
    },
    "Argilla binarized": {
        "source": "x",
        "instruction": QUESTION,
        "chosen_response": GOOD,
        "rejected_response": BAD,
    },
    "ShareGPT ranking": SHAREGPT,
    "messages and two answers": {
        "messages": [user(QUESTION)],
        "chosen": assistant(GOOD),
        "rejected": assistant(BAD),
    },
    "ms-swift": {"messages": [user(QUESTION), assistant(GOOD)], "rejected_response": BAD},
    "OpenAI preferences": OPENAI,
    "HelpSteer3": {
        "domain": "general",
        "language": "english",
        "context": [user(QUESTION)],
        "response1": BAD,
        "response2": GOOD,
        "overall_preference": 2,
    },
    "PKU-SafeRLHF by better_response_id": {
        "prompt": QUESTION,
        "response_0": BAD,
        "response_1": GOOD,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "arena votes": ARENA,
    "UltraFeedback": {"instruction": QUESTION, "completions": COMPLETIONS},
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_columns(tmp_path, name):
    # LlamaFactory#5911 and the sets themselves: recognised without a word, and said in the ledger.
    data = load(write_jsonl(tmp_path / "rows.jsonl", [KNOWN[name]]), chatml())
    texts = shown(data.train[0], chatml())
    assert texts == (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")
    assert name in data.ledger.table()


def test_ranked_answers_to_a_transcript(tmp_path):
    # Nectar: the prompt is a transcript in text, and ranks count from 1, the best.
    answers = [{"answer": text, "rank": rank} for text, rank in ((BAD, 2.0), (GOOD, 1.0))]
    rows = [{"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant: ", "answers": answers, "turns": 1}]
    (texts,) = seen(tmp_path, rows, chatml())
    prompt = f"\n\nHuman: {QUESTION}\n\nAssistant:"
    assert texts == (prompt, "⟦ Blue.<|im_end|>⟧", "⟦ Seven.<|im_end|>⟧")


def test_all_pairs_of_scored_answers(tmp_path):
    # UltraFeedback in full: four completions, of which every pair of unequal scores is one.
    completions = []
    for score in (3.0, 9.0, 3.0, 6.0):
        text = f"Score {score}, number {len(completions)}."
        completions.append({"response": text, "overall_score": score})
    rows = [{"instruction": QUESTION, "completions": completions}]
    texts = seen(tmp_path, rows, chatml())
    assert {prompt for prompt, *_ in texts} == {ASKED}
    scores = sorted(tuple(int(text[len("⟦Score ")]) for text in pair[1:]) for pair in texts)
    assert scores == [(6, 3), (6, 3), (9, 3), (9, 3), (9, 6)]


def test_columns_under_other_names(tmp_path):
    rows = [{"ask": QUESTION, "good": " Blue.", "bad": " Seven."}]
    with pytest.raises(ValueError, match="row 1: no known shape(.|\n)*--config.data.columns="):
        seen(tmp_path, rows, chatml())
    columns = "prompt=ask,chosen=good,rejected=bad"
    (texts,) = seen(tmp_path, rows, chatml(), columns=columns)
    assert texts == (QUESTION, "⟦ Blue.<|im_end|>⟧", "⟦ Seven.<|im_end|>⟧")


# files


def test_dotted_names_are_splits(tmp_path):
    # datasets#5693, OpenRLHF#367: the test rows are not trained on.
    for split, count in (("train", 18), ("test", 6)):
        rows = [
            {"prompt": f"{split} {i}:", "chosen": " Yes.", "rejected": " No."} for i in range(count)
        ]
        write_jsonl(tmp_path / f"prefs.{split}.jsonl", rows)
    data = load(tmp_path, chatml())
    assert (len(data.train), len(data.eval)) == (18, 6)
    assert decoded(chatml(), data.eval[0].prompt) == "test 0:"


def test_folders_of_save_to_disk(tmp_path):
    # alignment-handbook#53, LlamaFactory#5521, NeMo-RL#1610.
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"{i}:", "chosen": " Yes.", "rejected": " No."} for i in range(5)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one", chatml()).train) == 5
    splits = {"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    data = load(tmp_path / "two", chatml())
    assert (len(data.train), len(data.eval)) == (3, 2)


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_chat_lists_in_csv(tmp_path, write):
    # to_csv of pandas (repr), and lists as JSON: never trained on as text.
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        chats = [[user(QUESTION), assistant(answer)] for answer in (GOOD, BAD)]
        writer.writerow([QUESTION, *map(write, chats)])
    texts = shown(load(path, chatml()).train[0], chatml())
    assert texts == (ASKED, "⟦Blue.<|im_end|>⟧", "⟦Seven.<|im_end|>⟧")

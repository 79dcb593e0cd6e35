"""The shapes of the user's own rows: what each becomes, and which are refused with which words."""

import contextlib
import json

import pytest

from dpo_jax.data import every_row
from dpo_jax.data.ledger import Filtered, Malformed, Unusable
from dpo_jax.data.rows import Row
from dpo_jax.data.shapes import SHAPES, local, local_prompt, parse_columns
from tests.helpers.rows import PAIR, assistant, data_config, read, user, write_jsonl, write_parquet

PAIRED = ((0, 1),)


def system(content):
    return {"role": "system", "content": content}


def chat(asked, *answers, pairs=PAIRED, **more):
    """Return the row of a question and answers to it, each one message."""
    responses = tuple([assistant(answer)] for answer in answers)
    return Row([user(asked)], responses, pairs, **more)


WHY, SO, NO = "Why is that?", "So it is.", "No idea."
WHOLE = [user(WHY), assistant(SO)]
WHOLE_NO = [user(WHY), assistant(NO)]
SHAREGPT = [{"from": "human", "value": WHY}, {"from": "gpt", "value": SO}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def text_row(*responses, pairs=PAIRED, shape, prompt="Q: why?\nA:"):
    return Row(prompt, responses, pairs, shape=f"{shape}, text")


# one of each shape


@pytest.mark.parametrize(
    "fields, row",
    [
        (
            {"prompt": "Q: why?\nA:", "chosen": " So.", "rejected": " No."},
            text_row(" So.", " No.", shape="TRL pairs"),
        ),
        (
            {"prompt": [user(WHY)], "chosen": [assistant(SO)], "rejected": [assistant(NO)]},
            chat(WHY, SO, NO, shape="TRL pairs, chat"),
        ),
        (
            {
                "prompt": WHY,
                "prompt_id": "1",
                "chosen": WHOLE,
                "rejected": WHOLE_NO,
                "messages": WHOLE,
                "score_chosen": 8.0,
                "score_rejected": 5.0,
            },
            chat(WHY, SO, NO, shape="UltraFeedback binarized, chat"),
        ),
        (
            {"prompt": "Q: why?\nA:", "completion": " So."},
            text_row(" So.", pairs=(), shape="TRL prompt and completion"),
        ),
        (
            {"prompt": [user(WHY)], "completion": [assistant(SO)]},
            chat(WHY, SO, pairs=(), shape="TRL prompt and completion, chat"),
        ),
        (
            {"chosen": "User: why?\nBot: So.", "rejected": "User: why?\nBot: No."},
            text_row(
                " So.",
                " No.",
                shape="TRL pairs with the prompt inside",
                prompt="User: why?\nBot:",
            ),
        ),
        (
            {"chosen": WHOLE, "rejected": WHOLE_NO},
            chat(WHY, SO, NO, shape="TRL pairs with the prompt inside, chat"),
        ),
        (
            {"prompt": "Q: why?\nA:", "chosen": " So."},
            text_row(" So.", pairs=(), shape="prompt and chosen"),
        ),
        ({"chosen": WHOLE}, Row([], (WHOLE,), shape="chosen conversations, chat")),
        ({"completion": WHOLE}, Row([], (WHOLE,), shape="completion conversations, chat")),
        (
            {"prompt": "Q: why?\nA:", "completion": " So.", "label": True},
            Row("Q: why?\nA:", (" So.",), label=True, shape="KTO rows, text"),
        ),
        (
            {"messages": WHOLE, "label": False},
            Row([], (WHOLE,), label=False, shape="KTO messages, chat"),
        ),
        ({"messages": WHOLE}, Row([], (WHOLE,), shape="messages, chat")),
        ({"text": "Once."}, Row("", ("Once.",), shape="whole texts, text")),
        ({"conversations": SHAREGPT}, Row([], (WHOLE,), shape="ShareGPT conversations, chat")),
        ({"conversation": WHOLE}, Row([], (WHOLE,), shape="conversations, chat")),
        (
            {
                "conversations": SHAREGPT[:1],
                "chosen": SHAREGPT[1],
                "rejected": {"from": "gpt", "value": NO},
            },
            chat(WHY, SO, NO, shape="ShareGPT ranking, chat"),
        ),
        (
            {"messages": [user(WHY)], "chosen": assistant(SO), "rejected": assistant(NO)},
            chat(WHY, SO, NO, shape="messages and two answers, chat"),
        ),
        (
            {
                "messages": [user(WHY)],
                "chosen_response": assistant(SO),
                "rejected_response": assistant(NO),
                "tools": [json.dumps(TOOL)],
            },
            chat(WHY, SO, NO, tools=[TOOL], shape="messages and two responses, chat"),
        ),
        (
            {"messages": WHOLE, "rejected_response": NO},
            chat(WHY, SO, NO, shape="ms-swift, chat"),
        ),
        (
            {"messages": WHOLE, "rejected_messages": WHOLE_NO},
            chat(WHY, SO, NO, shape="ms-swift conversations, chat"),
        ),
        (
            {
                "input": {"messages": [user(WHY)], "tools": [TOOL], "parallel_tool_calls": True},
                "preferred_output": [assistant(SO)],
                "non_preferred_output": [assistant(NO)],
            },
            chat(WHY, SO, NO, tools=[TOOL], shape="OpenAI preferences, chat"),
        ),
        (
            {"system": "", "question": WHY, "chosen": SO, "rejected": NO},
            chat(WHY, SO, NO, shape="orca_dpo_pairs, chat"),
        ),
        (
            {
                "system": "",
                "input": WHY,
                "chosen": SO,
                "rejected": NO,
                "generations": [SO, NO],
                "order": ["a", "b"],
                "rating": [9.0, 2.0],
                "status": "unchanged",
            },
            chat(WHY, SO, NO, shape="distilabel, chat"),
        ),
        (
            {"instruction": "Answer.", "input": WHY, "chosen": SO, "rejected": NO},
            chat(f"Answer.\n{WHY}", SO, NO, shape="Alpaca pairs, chat"),
        ),
        (
            {
                "instruction": WHY,
                "input": "",
                "output": SO,
                "history": [["Hi", "Hello."]],
                "text": f"### Instruction: {WHY}\n### Response: {SO}",
            },
            Row(
                [user("Hi"), assistant("Hello."), user(WHY)],
                ([assistant(SO)],),
                shape="Alpaca, chat",
            ),
        ),
        (
            {"question": WHY, "completion": SO},
            chat(WHY, SO, pairs=(), shape="question and completion, chat"),
        ),
        (
            {"query": WHY, "response": SO, "rejected_response": NO, "history": None},
            chat(WHY, SO, NO, shape="query and two responses, chat"),
        ),
        (
            {"query": WHY, "response": SO},
            chat(WHY, SO, pairs=(), shape="query and response, chat"),
        ),
        (
            {"source": "x", "instruction": WHY, "chosen_response": SO, "rejected_response": NO},
            chat(WHY, SO, NO, shape="Argilla binarized, chat"),
        ),
        (
            {"qid": 1, "question": WHY, "response_j": SO, "response_k": NO},
            chat(WHY, SO, NO, shape="stack-exchange-paired, chat"),
        ),
        (
            {
                "instruction": WHY,
                "completions": [
                    {"response": "b", "overall_score": 6.0, "fine-grained_score": 1.0},
                    {"response": "a", "overall_score": 8.0, "fine-grained_score": 1.0},
                    {"response": "c", "overall_score": 6.0, "fine-grained_score": 1.0},
                    {"response": "d", "overall_score": 1.0, "fine-grained_score": 1.0},
                ],
            },
            chat(
                WHY,
                *"abcd",
                pairs=((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)),
                shape="UltraFeedback, 4 completions by overall_score, chat",
            ),
        ),
        (
            {
                "instruction": WHY,
                "generations": [NO, SO, "lost"],
                "ratings": ["2", "5", "N/A"],
            },
            chat(WHY, SO, NO, shape="distilabel ratings, 2 completions, chat"),
        ),
        (
            {
                "domain": "general",
                "context": [user(WHY)],
                "response1": NO,
                "response2": SO,
                "overall_preference": 2,
            },
            chat(WHY, SO, NO, shape="HelpSteer3, chat"),
        ),
        (
            {"prompt": WHY, "response_1": SO, "response_2": NO, "preference_strength": -1},
            chat(WHY, SO, NO, shape="HelpSteer2 preferences, chat"),
        ),
        (
            {
                "prompt": "\n\nHuman: Why?\n\nAssistant: ",
                "answers": [
                    {"answer": "b", "rank": 2.0, "model": "m"},
                    {"answer": "a", "rank": 1.0, "model": "m"},
                    {"answer": "c", "rank": 3.0, "model": "m"},
                ],
            },
            Row(
                "\n\nHuman: Why?\n\nAssistant:",
                (" a", " b", " c"),
                ((0, 1), (0, 2), (1, 2)),
                shape="Nectar, 3 completions, text",
            ),
        ),
        (
            {
                "prompt": WHY,
                "response_0": NO,
                "response_1": SO,
                "better_response_id": 1,
                "safer_response_id": 0,
            },
            chat(WHY, SO, NO, shape="PKU-SafeRLHF by better_response_id, chat"),
        ),
        (
            {
                "history": "Why?",
                "human_ref_A": NO,
                "human_ref_B": SO,
                "labels": 0,
                "score_ratio": 3.0,
            },
            text_row(f" {SO}", f" {NO}", shape="SHP", prompt="\n\nHuman: Why?\n\nAssistant:"),
        ),
        (
            {
                "model_a": "a",
                "conversation_a": WHOLE_NO,
                "conversation_b": WHOLE,
                "winner": "model_b",
            },
            chat(WHY, SO, NO, shape="arena votes, chat"),
        ),
        # a vote on the first turn
        (
            {
                "conversation_a": [*WHOLE, user("And?"), assistant("x")],
                "conversation_b": [*WHOLE_NO, user("And?"), assistant("x")],
                "winner": "model_a",
                "turn": 1,
            },
            chat(WHY, SO, NO, shape="arena votes, chat"),
        ),
        (
            {
                "prompt": json.dumps(["Hi", WHY]),
                "response_a": json.dumps(["Hello.", SO]),
                "response_b": json.dumps(["Yes?", NO]),
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
            Row(
                [user("Hi")],
                (
                    [assistant("Hello."), user(WHY), assistant(SO)],
                    [assistant("Yes?"), user(WHY), assistant(NO)],
                ),
                PAIRED,
                shape="arena votes as text, chat",
            ),
        ),
        (
            {
                "prompt": WHY,
                "chosen": SO,
                "chosen_model": "a",
                "rejected": NO,
                "rejected_model": "b",
                "subset": "alpacaeval-easy",
                "id": 0,
            },
            chat(WHY, SO, NO, shape="RewardBench, chat"),
        ),
        (
            {"prompt": WHY, "chosen": ["a", "b"], "rejected": ["c", "d"], "subset": "Focus"},
            chat(
                WHY,
                *"abcd",
                pairs=((0, 2), (0, 3), (1, 2), (1, 3)),
                shape="RewardBench 2, chat",
            ),
        ),
    ],
)
def test_recognised_shape(fields, row):
    assert local(fields) == row


def fields_of_example(shape):
    """Return the row that a shape's error messages show as a right one."""
    text = shape.example
    if "}, or " in text:
        text = text[: text.index("}, or ") + 1]
    return json.loads(text.replace("[...]", json.dumps(WHOLE_NO)).replace("Why?", WHY))


SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])


@SHAPE
def test_example_is_right_row(shape):
    row = local(fields_of_example(shape))
    assert row.shape.startswith(shape.name)


JUNK = (3, -1, True, "", "x", [], [3], ["x"], [[]], [None], {}, {"a": 1}, {"role": "user"}, [{}])


@SHAPE
def test_junk_is_refused_with_words(shape):
    """No value of any field ends in a traceback of our own."""
    right = fields_of_example(shape)
    for name in right:
        for junk in JUNK:
            with contextlib.suppress(Malformed, Unusable, Filtered):
                local(right | {name: junk})


# prompts and answers, as text and as messages


ASKED = [system("s"), user("q")]


@pytest.mark.parametrize(
    "fields, prompt, responses",
    [
        # the answers alone, as messages or as text, behind a prompt of either form
        (
            {"prompt": ASKED, "chosen": [assistant("a")], "rejected": [assistant("b")]},
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {"prompt": ASKED, "chosen": "a", "rejected": "b"},
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            [user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {"prompt": user("q"), "chosen": assistant("a"), "rejected": assistant("b")},
            [user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        # whole conversations, with the prompt, with its text, or without it
        (
            {
                "prompt": ASKED,
                "chosen": [*ASKED, assistant("a")],
                "rejected": [*ASKED, assistant("b")],
            },
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        # one whole, one alone
        (
            {"prompt": ASKED, "chosen": [*ASKED, assistant("a")], "rejected": [assistant("b")]},
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {"chosen": [*ASKED, assistant("a")], "rejected": [*ASKED, assistant("b")]},
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        # the system turn on one side only
        (
            {
                "prompt": [user("q")],
                "chosen": [*ASKED, assistant("a")],
                "rejected": [*ASKED, assistant("b")],
            },
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {
                "prompt": ASKED,
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            ASKED,
            ([assistant("a")], [assistant("b")]),
        ),
        # a prompt of text that is the turn but for white space, or has more around it, or is a
        # part of the turn, or all turns
        (
            {
                "prompt": " q\n ",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {
                "prompt": "system: s. the question",
                "chosen": [user("the  question"), assistant("a")],
                "rejected": [user("the  question"), assistant("b")],
            },
            [user("the  question")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {
                "prompt": "the question",
                "chosen": [user("Here is the question."), assistant("a")],
                "rejected": [user("Here is the question."), assistant("b")],
            },
            [user("Here is the question.")],
            ([assistant("a")], [assistant("b")]),
        ),
        # a conversation that the assistant opens, whole and as its answer alone
        (
            {
                "prompt": [assistant("hi"), user("q")],
                "chosen": [assistant("hi"), user("q"), assistant("a")],
                "rejected": [assistant("hi"), user("q"), assistant("b")],
            },
            [assistant("hi"), user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {
                "prompt": "q",
                "chosen": [assistant("hi"), user("q"), assistant("a")],
                "rejected": [assistant("hi"), user("q"), assistant("b")],
            },
            [assistant("hi"), user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        (
            {"prompt": [assistant("hi"), user("q")], "completion": [assistant("a")]},
            [assistant("hi"), user("q")],
            ([assistant("a")],),
        ),
        # messages that have the better answer already
        (
            {
                "messages": [user("q"), assistant("a")],
                "chosen": assistant("a"),
                "rejected": assistant("b"),
            },
            [user("q")],
            ([assistant("a")], [assistant("b")]),
        ),
        # several turns: the last shared one is where the response starts
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("x")],
                "rejected": [user("q"), assistant("a"), user("r"), assistant("y")],
            },
            [user("q"), assistant("a"), user("r")],
            ([assistant("x")], [assistant("y")]),
        ),
        # they part at the first answer: answers of several turns
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("x")],
                "rejected": [user("q"), assistant("b"), user("r"), assistant("y")],
            },
            [user("q")],
            (
                [assistant("a"), user("r"), assistant("x")],
                [assistant("b"), user("r"), assistant("y")],
            ),
        ),
        # they part at a user's turn: back to the assistant's turn before it
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("x")],
                "rejected": [user("q"), assistant("a"), user("s"), assistant("y")],
            },
            [user("q")],
            (
                [assistant("a"), user("r"), assistant("x")],
                [assistant("a"), user("s"), assistant("y")],
            ),
        ),
        # one side is the beginning of the other
        (
            {
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("a"), user("r"), assistant("y")],
            },
            [user("q")],
            ([assistant("a")], [assistant("a"), user("r"), assistant("y")]),
        ),
        # tools' turns inside the answers, behind a prompt of text
        (
            {
                "prompt": "q",
                "chosen": [assistant("wait"), {"role": "tool", "content": "9"}, assistant("a")],
                "rejected": [assistant("b")],
            },
            [user("q")],
            (
                [assistant("wait"), {"role": "tool", "content": "9"}, assistant("a")],
                [assistant("b")],
            ),
        ),
        # whole conversations for SFT are split by data.turns, unless a prompt says where
        (
            {"messages": [user("q"), assistant("a"), user("r"), assistant("x")]},
            [],
            ([user("q"), assistant("a"), user("r"), assistant("x")],),
        ),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, [user("q")], ([assistant("a")],)),
        (
            {"prompt": "q", "messages": [user("q"), assistant("a")]},
            [],
            ([user("q"), assistant("a")],),
        ),
        ({"prompt": "q", "messages": [assistant("a")]}, [user("q")], ([assistant("a")],)),
        (
            {"prompt": [user("q")], "messages": [user("q"), assistant("a")]},
            [user("q")],
            ([assistant("a")],),
        ),
        # text
        (PAIR, "Name a colour.", (" Blue.", " Seven.")),
        (PAIR | {"prompt": ""}, "", (" Blue.", " Seven.")),
        ({"text": "t", "completion": None}, "", ("t",)),
    ],
)
def test_prompts_and_answers(fields, prompt, responses):
    row = local(fields)
    assert (row.prompt, row.responses) == (prompt, responses)


# messages


@pytest.mark.parametrize(
    "message, expected",
    [
        # other names of roles, in any case
        ({"role": "Human", "content": "x"}, user("x")),
        ({"role": "Assistant", "content": "x"}, assistant("x")),
        ({"from": "gpt", "value": "x"}, assistant("x")),
        ({"from": "system", "value": "x"}, system("x")),
        ({"from": "observation", "value": "x"}, {"role": "tool", "content": "x"}),
        ({"role": "bot", "content": "x"}, assistant("x")),
        ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
        (
            {"role": "function", "name": "now", "content": "x"},
            {"role": "tool", "name": "now", "content": "x"},
        ),
        # other keys stay, but for nulls and empty lists of calls
        (
            {"role": "assistant", "content": "x", "reasoning_content": "r", "name": None},
            assistant("x") | {"reasoning_content": "r"},
        ),
        ({"role": "assistant", "content": "x", "tool_calls": []}, assistant("x")),
        # whether a turn is trained on, where that is as it would be
        ({"from": "human", "value": "x", "weight": 0.0}, user("x")),
        ({"from": "gpt", "value": "x", "weight": 1.0}, assistant("x")),
        ({"from": "gpt", "value": "x", "weight": 0.0}, assistant("x") | {"weight": 0.0}),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": None, "function": {"name": "now", "arguments": None}}],
            },
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "now", "arguments": {}}}],
            },
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": '[{"function": {"name": "now"}}]'},
            assistant("") | {"tool_calls": [{"function": {"name": "now"}}]},
        ),
        (
            {"role": "tool", "content": "9", "tool_call_id": "1"},
            {"role": "tool", "content": "9", "tool_call_id": "1"},
        ),
        # a call as a turn of its own
        (
            {"from": "function_call", "value": '{"name": "now", "arguments": {"a": 1}}'},
            assistant("")
            | {
                "tool_calls": [
                    {"type": "function", "function": {"name": "now", "arguments": {"a": 1}}}
                ]
            },
        ),
        # content in parts
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a", "image": None},
                    {"type": "text", "text": "b"},
                ],
            },
            user("ab"),
        ),
    ],
)
def test_message(message, expected):
    row = local({"prompt": [user("q"), message], "completion": [assistant("a")]})
    assert row.prompt == [user("q"), expected]


@pytest.mark.parametrize(
    "message, said",
    [
        ("hello", "field 'prompt' holds something else than messages"),
        ({"role": "narrator", "content": "x"}, "a message whose role is none of system, developer"),
        ({"role": "narrator", "content": "x"}, "found 'narrator' (str)"),
        ({"role": "user", "content": None}, "field 'prompt' has a message without content"),
        ({"role": "user", "content": 3}, "has a message whose content is not text; found 3 (int)"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            "a part of type 'image_url'; only text can be used",
        ),
        (
            {"from": "function_call", "value": "now()"},
            "a function_call turn of field 'prompt' is not JSON; found 'now()' (str)",
        ),
    ],
)
def test_message_refused(message, said):
    with pytest.raises(Malformed) as error:
        local({"prompt": [message], "completion": [assistant("a")]})
    assert said in str(error.value)


def test_messages_from_tables(tmp_path):
    # datasets' Sequence of structs, and structs that lack keys
    whole = {"role": ["user", "assistant"], "content": [WHY, SO]}
    other = {"role": ["user", "assistant"], "content": [WHY, NO]}
    assert local({"chosen": whole, "rejected": other}).responses == (
        [assistant(SO)],
        [assistant(NO)],
    )
    rows = [
        {"messages": [user("q"), assistant("a") | {"name": "x"}]},
        {"messages": [user("r"), assistant("b")]},
    ]
    splits, _ = read(write_parquet(tmp_path / "rows.parquet", rows), "sft")
    assert [example.responses for example in splits["train"]] == [
        ([assistant("a") | {"name": "x"}],),
        ([assistant("b")],),
    ]


# What lists of messages look like as structs of lists, and what nulls look like in a table.
ARGUMENTS = [
    {"from": ["A"], "to": ["B"]},
    {"role": ["x", "y"], "answer": ["z", "w"]},
    {"place": "Paris", "unit": None, "when": {"day": None}, "list": [None, {"from": None}]},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_and_schemas_stay_as_they_are(tmp_path, arguments):
    function = {"name": "mail", "arguments": arguments}
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    tool = {"type": "function", "function": {"name": "mail", "parameters": arguments}}
    row = {"prompt": [user("q")], "chosen": [answer], "rejected": [assistant("a")], "tools": [tool]}
    in_openai = {
        "input": {"messages": [user("q")], "tools": [tool]},
        "preferred_output": [answer],
        "non_preferred_output": [assistant("a")],
    }
    rows = [row, row | {"tools": json.dumps([tool])}, in_openai]
    splits, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    for example in splits["train"]:
        assert example.responses == ([answer], [assistant("a")])
        assert example.tools == [tool]


def test_arguments_in_tables(tmp_path):
    """A table has the keys of all calls in each of them; those that a call lacks are not its."""
    rows = []
    for arguments in ({"place": "Paris"}, {"from": ["A"], "to": ["B"]}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        parameters = {"properties": {name: {"type": "string"} for name in arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        # One definition has a key that the other lacks.
        strictness = {"strict": True} if rows else {}
        rows.append({"messages": [user("q"), answer], "tools": [tool | strictness]})
    splits, _ = read(write_parquet(tmp_path / "rows.parquet", rows), "sft")
    for example, row in zip(splits["train"], rows, strict=True):
        assert example.responses == (row["messages"][1:],)
        assert example.tools == row["tools"]


# columns of system text and tools


def test_system_column():
    fields = {"system": "Be brief.", "prompt": WHY, "chosen": SO, "rejected": NO}
    row = local(fields)
    assert row.prompt == [system("Be brief."), user(WHY)]
    assert row.responses == ([assistant(SO)], [assistant(NO)])
    assert row.shape == "TRL pairs, with column system, chat"
    # chat whatever the row's system text is, so that all rows of a set are alike
    assert local(fields | {"system": ""}).prompt == [user(WHY)]
    assert local(fields | {"system": None}).prompt == [user(WHY)]
    assert local(fields, ignore=("system",)).prompt == WHY
    assert local({"system_prompt": "s", "question": WHY, "chosen": SO, "rejected": NO}).prompt == [
        system("s"),
        user(WHY),
    ]
    # a conversation whole
    assert local({"system": "s", "messages": WHOLE}).responses == ([system("s"), *WHOLE],)
    # it may repeat the turn that is there, and not contradict it
    turned = {"system": "s", "prompt": [system("s"), user("q")], "completion": [assistant("a")]}
    assert local(turned).prompt == [system("s"), user("q")]
    with pytest.raises(Malformed, match="system text differs from the messages' system turn"):
        local(turned | {"system": "t"})
    with pytest.raises(Malformed, match=r"no place for field 'system'.*data.ignore=system"):
        local({"system": "s", "text": "t"})


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL])
def test_tools_column(tools):
    row = local({"tools": tools, "prompt": [user("q")], "completion": [assistant("a")]})
    assert row.tools == [TOOL]
    row = local({"tools": tools, "prompt": WHY, "chosen": SO, "rejected": NO})
    assert (row.tools, row.prompt) == ([TOOL], [user(WHY)])


def test_functions_column():
    function = TOOL["function"]
    called = {"role": "assistant", "function_call": {"name": "now", "arguments": "{}"}}
    row = local({"functions": [function], "prompt": [user("q")], "completion": [called]})
    assert row.tools == [TOOL]
    calls = [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    assert row.responses == ([{"role": "assistant", "tool_calls": calls}],)


def test_tools_column_without_tools():
    for nothing in ([], "", "[]", None):
        assert local(PAIR | {"tools": nothing}).tools is None
        # chat like the rows of the file that have some
        assert local(PAIR | {"tools": nothing}).prompt == [user(PAIR["prompt"])]
        assert local(PAIR | {"tools": nothing}, ignore=("tools",)).prompt == PAIR["prompt"]
        assert local({"text": "Once.", "tools": nothing}).responses == ("Once.",)
    with pytest.raises(Malformed, match="field 'tools' is not JSON"):
        local({"tools": "now()", "messages": WHOLE})
    with pytest.raises(Malformed, match="not a list of definitions"):
        local({"tools": [3], "messages": WHOLE})


# text that holds its prompt


@pytest.mark.parametrize(
    "prompt, chosen, rejected, expected",
    [
        # the prompt as it is, without its line end, and in a transcript
        (
            "Why is that?\n",
            "Why is that?\nSo.",
            "Why is that?\nNo.",
            ("Why is that?\n", "So.", "No."),
        ),
        (
            "Why is that?",
            "Why is that? So.",
            "Why is that?\nNo.",
            ("Why is that?", " So.", "\nNo."),
        ),
        (
            "Why is that?\n",
            "Why is that? So.",
            "Why is that? No.",
            ("Why is that?", " So.", " No."),
        ),
        (
            "Why is that?",
            "User: Why is that?\nBot: So.",
            "User: Why is that?\nBot: No.",
            ("User: Why is that?\nBot:", " So.", " No."),
        ),
        # one answer that repeats the question
        ("Why is that?", "Why is that? So.", "No.", ("Why is that?", " So.", "No.")),
        ("Why is that?\n", "So.", "Why is that?\nNo.", ("Why is that?\n", "So.", "No.")),
        (
            "Why is that?\n",
            "So.",
            "User: Why is that?\nBot: No.",
            ("Why is that?\n", "So.", " No."),
        ),
        # each in its own way
        (
            "Why is that?",
            "Why is that? So.",
            "User: Why is that?\nBot: No.",
            ("Why is that?", " So.", " No."),
        ),
        # answers that begin as a prompt does
        (
            "Tell of a sea",
            "Tell of a season? So.",
            "No.",
            ("Tell of a sea", "Tell of a season? So.", "No."),
        ),
        ("Hi", "Hi there.", "Hi!", ("Hi", "Hi there.", "Hi!")),
        (
            "天空是什么颜色",
            "天空是什么颜色: 蓝",
            "天空是什么颜色: 绿",
            ("天空是什么颜色", ": 蓝", ": 绿"),
        ),
        ("", "So.", "No.", ("", "So.", "No.")),
    ],
)
def test_answers_that_repeat_the_prompt(prompt, chosen, rejected, expected):
    row = local({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (row.prompt, *row.responses) == expected
    is_cut = expected != (prompt, chosen, rejected)
    assert (" cut" in row.shape) == is_cut


def test_replies_that_repeat_the_question():
    row = local({"question": WHY, "chosen": f"{WHY}\n{SO}", "rejected": f"{WHY}\n{NO}"})
    assert row.responses == ([assistant(SO)], [assistant(NO)])
    row = local({"question": WHY, "chosen": SO, "rejected": f"{WHY}\n{NO}"})
    assert row.responses == ([assistant(SO)], [assistant(NO)])
    assert row.shape == "orca_dpo_pairs, prompt cut from the answer that repeats it, chat"


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        # after the last cue that they share, also where the answers begin alike
        ("User: why?\nBot: So so.", "User: why?\nBot: So it is.", "User: why?\nBot:"),
        (
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x",
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: y",
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
        ),
        (
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x",
            "\n\nHuman: q\n\nAssistant: b",
            "\n\nHuman: q\n\nAssistant:",
        ),
        (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nSo.",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nSome.",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("[INST] why? [/INST] So.", "[INST] why? [/INST] No.", "[INST] why? [/INST]"),
        ("### Question\nWhy?\n### Response: So.", "### Question\nWhy?\n### Response: No.", None),
        # without a cue, where they part, but not inside a word; the space is the answer's
        ("The sea is blue", "The sea is green", "The sea is"),
        ("The sea is blue", "The sea is black", "The sea is"),
        ("Tell me a tale.\nOnce", "Tell me a tale.\nNever", "Tell me a tale.\n"),
        ("ten and two are 12", "ten and two are 13", "ten and two are"),
        ("为什么? 讲 天空 是蓝色", "为什么? 讲 天空 是绿色", "为什么? 讲 天空 是"),
    ],
)
def test_prompt_inside_text(chosen, rejected, prompt):
    row = local({"chosen": chosen, "rejected": rejected})
    assert (row.prompt + row.responses[0], row.prompt + row.responses[1]) == (chosen, rejected)
    assert row.prompt == (prompt or "### Question\nWhy?\n### Response:")


# columns and what is in them


def test_columns():
    fields = {"q": WHY, "good": SO, "bad": NO, "deep": {"messages": [user(WHY)]}, "id": 3}
    text = parse_columns("prompt=q, chosen=good,rejected=bad")
    assert text == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert parse_columns("prompt=The question") == {"prompt": "The question"}
    assert local(fields, text) == Row(WHY, (SO, NO), PAIRED, shape="TRL pairs, text")
    # bare replies to a question are chat
    replies = parse_columns("question=q,chosen=good,rejected=bad")
    assert local(fields, replies).prompt == [user(WHY)]
    deep = parse_columns("prompt=deep.messages,chosen=good,rejected=bad")
    assert local(fields, deep).responses == ([assistant(SO)], [assistant(NO)])
    # a field that keeps its name, and one that another takes the place of
    part = parse_columns("prompt=question,chosen=chosen_response")
    given = {"question": WHY, "chosen_response": SO, "rejected": NO, "prompt": "other"}
    assert local(given, part) == Row(WHY, (SO, NO), PAIRED, shape="TRL pairs, text")
    safer = {"response_0": SO, "response_1": NO, "better_response_id": 1, "safer_response_id": 0}
    row = local({"prompt": WHY} | safer, parse_columns("better_response_id=safer_response_id"))
    assert row.responses == ([assistant(SO)], [assistant(NO)])


@pytest.mark.parametrize(
    "fields, responses",
    [
        (
            {
                "completions": [
                    {"response": NO, "overall_score": 2.0},
                    {"response": SO, "overall_score": 8.0},
                ]
            },
            (SO, NO),
        ),
        ({"generations": [SO, NO], "ratings": [5, 1]}, (SO, NO)),
        ({"chosen_response": SO, "rejected_response": NO}, (SO, NO)),
        ({"output": SO}, (SO,)),
    ],
)
def test_question_of_known_shape_as_text(fields, responses):
    """The error of a model without a chat template suggests it, for rows of any shape."""
    row = local({"instruction": WHY} | fields, parse_columns("prompt=instruction"))
    assert (row.prompt, row.responses) == (WHY, responses)
    assert row.shape.endswith(", text")
    with pytest.raises(Malformed, match="no known shape of row"):
        local({"instruction": WHY, "source": "x"} | fields, parse_columns("prompt=source"))


def test_conversation_is_not_read_as_text():
    earlier = {"instruction": WHY, "output": SO, "history": [["a", "b"]]}
    with pytest.raises(Malformed, match="several turns cannot be read as a prompt of text"):
        local(earlier, parse_columns("prompt=instruction"))


def test_columns_refused():
    with pytest.raises(ValueError, match=r"'promt' is no name of a field.*prompt, question"):
        parse_columns("promt=question")
    with pytest.raises(ValueError, match="'prompt' is not NAME=COLUMN"):
        parse_columns("prompt")
    with pytest.raises(ValueError, match="no kind of row has all of text, rejected"):
        parse_columns("text=a,rejected=b")
    with pytest.raises(ValueError, match="names 'prompt' twice"):
        parse_columns("prompt=a,prompt=b")
    with pytest.raises(Malformed, match="column 'q', which is not there; found question, chosen"):
        local({"question": WHY, "chosen": SO}, {"prompt": "q"})


def test_columns_are_for_local_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": WHY, "chosen": SO, "rejected": NO}])
    splits, ledger = read(path, columns="question=q")
    assert splits["train"][0].prompt == [user(WHY)]
    assert ledger.train.shapes == {"orca_dpo_pairs, chat": 1}
    assert "recognised as: orca_dpo_pairs, chat" in ledger.table()
    with pytest.raises(ValueError, match="data.columns='prompt=q' is for data.source=local"):
        read(path, source="hh", columns="prompt=q")


def test_ambiguous_row():
    fields = {"prompt": "Q: why?", "question": "Why?", "chosen": SO, "rejected": NO}
    with pytest.raises(Malformed) as error:
        local(fields)
    assert str(error.value) == (
        "the row could be TRL pairs and orca_dpo_pairs; choose with "
        "--config.data.columns=prompt=prompt for TRL pairs, or "
        "--config.data.columns=question=question for orca_dpo_pairs"
    )
    assert local(fields, parse_columns("prompt=prompt")).prompt == "Q: why?"
    assert local(fields, parse_columns("question=question")).prompt == [user("Why?")]
    assert local(fields, ignore=("question",)).prompt == "Q: why?"


@pytest.mark.parametrize(
    "fields, name",
    [
        (PAIR | {"images": ["sea.png"]}, "images"),
        (PAIR | {"context": "The sea is far."}, "context"),
        (PAIR | {"history": [["a", "b"]]}, "history"),
        ({"text": "Once.", "prompt": "Tell a tale."}, "prompt"),
        ({"chosen": WHOLE, "rejected": WHOLE_NO, "question": "Who?"}, "question"),
        (
            {"prompt": WHY, "chosen": WHOLE, "rejected": WHOLE_NO, "messages": [user("x")]},
            "messages",
        ),
    ],
)
def test_content_that_no_one_reads(fields, name):
    with pytest.raises(Malformed, match=f"field '{name}' has content.*data.ignore={name}"):
        local(fields)
    assert local(fields, ignore=(name,))
    # empty, or said already
    assert local(fields | {name: ""})


def test_advice_is_not_in_the_reason(tmp_path):
    """What to do is said where the run stops; a line of the ledger is short."""
    rows = [PAIR, PAIR | {"images": ["sea.png"]}, {"prompt": "p"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, ledger = read(path, on_bad_row="drop")
    reason = "field 'images' has content that rows of TRL pairs do not use"
    assert ledger.train.dropped == {reason: 1, "no known shape of row": 1}
    with pytest.raises(ValueError, match=f"row 2: {reason}; .*--config.data.ignore=images"):
        read(path)


def test_content_said_already():
    assert local({"text": "Tell a tale. Once.", "prompt": "Tell a tale."}).responses
    assert local({"messages": WHOLE, "text": f"[INST] {WHY} [/INST] {SO}"}).responses == (WHOLE,)
    assert local({"chosen": WHOLE, "rejected": WHOLE_NO, "question": WHY}).prompt == [user(WHY)]


# rows that cannot be used


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"prompt": "p"},
            "no known shape of row; nearest: TRL prompt and completion, without 'completion'; "
            "prompt and chosen, without 'chosen'; Nectar, without 'answers'; found prompt",
        ),
        ({"a": 1}, "no known shape of row; found a"),
        (
            {"prompt": "p", "chosen": None, "rejected": "r"},
            "no known shape of row; nearest: TRL pairs, without 'chosen'; found prompt, rejected",
        ),
        (
            {"chosen": "c", "rejected": "r"},
            "there is no field 'prompt', and 'chosen' and 'rejected' do not begin with the same "
            "prompt; if a column has it, name it with --config.data.columns=prompt=COLUMN; found "
            "'c' (str) and 'r' (str)",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "'rejected' is not text; found 3 (int)"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "'prompt' is not text; found 3 (int)"),
        (
            {"prompt": "p", "completion": {"a": 1}},
            "'completion' is not text; found {'a': 1} (dict)",
        ),
        (
            {"prompt": "z", "chosen": WHOLE, "rejected": WHOLE_NO},
            "field 'prompt' says something else than the conversation; found 'z' (str); the user "
            "says 'Why is that?' (str)",
        ),
        (
            {"prompt": [user("z")], "chosen": WHOLE, "rejected": WHOLE_NO},
            "the conversation does not continue 'prompt'",
        ),
        (
            {"prompt": [user("q")], "completion": [assistant("a"), user("r")]},
            "a response does not begin and end with an assistant's turn; found roles "
            "['assistant', 'user']",
        ),
        (
            {"prompt": "p", "completion": "c", "label": "sports"},
            "field 'label' is neither true nor false",
        ),
        (
            {"conversation_a": WHOLE, "conversation_b": WHOLE_NO, "winner": "me"},
            "field 'winner' is none of model_a, model_b, tie, both_bad; found 'me' (str)",
        ),
        (
            {"prompt": WHY, "response_0": SO, "response_1": NO, "better_response_id": -1},
            "field 'better_response_id' is neither 0 nor 1; found -1.0 (float)",
        ),
        (
            {"messages": [user("q")], "rejected_response": "r"},
            "does not end in an assistant's turn",
        ),
    ],
)
def test_malformed_row(fields, said):
    with pytest.raises(Malformed) as error:
        local(fields)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "fields, reason",
    [
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("z"), assistant("a")]},
            "no shared assistant turn",
        ),
        ({"prompt": [user("q")], "completion": []}, "empty response"),
    ],
)
def test_unusable_row(fields, reason):
    with pytest.raises(Unusable, match=reason):
        local(fields)


TIES = [
    {"context": [user(WHY)], "response1": SO, "response2": NO, "overall_preference": 0},
    {"conversation_a": WHOLE, "conversation_b": WHOLE_NO, "winner": "tie (bothbad)"},
    {"conversation_a": WHOLE, "conversation_b": WHOLE_NO, "winner": "both_bad"},
    {
        "instruction": WHY,
        "completions": [
            {"response": "a", "overall_score": 1},
            {"response": "b", "overall_score": 1},
        ],
    },
    {"input": WHY, "chosen": SO, "rejected": NO, "status": "tie"},
]


@pytest.mark.parametrize("fields", TIES)
def test_ties_are_filtered(fields):
    with pytest.raises(Filtered, match="a tie: no answer is better"):
        local(fields)


def test_read_says_what_is_right(tmp_path):
    row = {"prompt": WHY, "response_0": SO, "response_1": NO, "better_response_id": 2}
    with pytest.raises(ValueError) as error:
        read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert (
        'a right row for PKU-SafeRLHF by better_response_id: {"prompt": "Why?", "response_0"'
    ) in str(error.value)


@pytest.mark.parametrize("name", ["system", "tools"])
def test_column_that_some_rows_fill(tmp_path, name):
    filled = {"system": "Be brief.", "tools": json.dumps([TOOL])}[name]
    rows = [PAIR | {name: value} for value in (None, "", filled)]
    # a table: all rows have the column
    splits, ledger = read(write_parquet(tmp_path / "rows.parquet", rows))
    assert [example.prompt[-1] for example in splits["train"]] == [user(PAIR["prompt"])] * 3
    assert "mixes" not in ledger.table()
    # prompts alone, as `sample` reads them
    for row in rows:
        assert local_prompt({"prompt": "q", name: row[name]}).prompt[-1] == user("q")
    # JSON lines, where some lack it
    _, ledger = read(write_jsonl(tmp_path / "rows.jsonl", [PAIR, PAIR, *rows]))
    assert (
        "warning, train: mixes text and chat rows: 2 are text, which is trained on as it stands, "
        "and 3 are chat, which goes through the chat template"
    ) in ledger.table()


def test_pairs_that_contradict_their_scores(tmp_path):
    rows = [
        PAIR | {"score_chosen": 3, "score_rejected": 7},
        PAIR | {"score_chosen": "2.5", "score_rejected": "7.0"},
        PAIR | {"score_chosen": 7.0, "score_rejected": 7.0},
        PAIR | {"chosen_avg_rating": 1.0, "rejected_avg_rating": 2.0},
        PAIR | {"score_chosen": 7.0, "score_rejected": 3.0, "chosen_length": 1},
        PAIR | {"score_chosen": None, "score_rejected": 3.0},
    ]
    splits, ledger = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(splits["train"]) == 6
    assert list(ledger.train.doubts.values()) == [2, 1, 1]
    table = ledger.table()
    below = "'score_chosen' is below 'score_rejected', which contradicts the pair"
    assert f"warning, train: {below} (2 rows)" in table
    assert "'chosen_avg_rating' is below 'rejected_avg_rating'" in table
    assert "'score_chosen' equals 'score_rejected', by which the pair is a tie (1 rows)" in table


@pytest.mark.parametrize(
    "fields, is_doubtful",
    [
        ({"prompt": "Q: Why?\nA: No.", "chosen": " So.", "rejected": " No."}, True),
        ({"prompt": "Q: Why?\nA: So.", "chosen": " So.", "rejected": " No."}, True),
        ({"prompt": "Q: Why?\nA: So. ", "completion": "So."}, True),
        ({"prompt": "Is it a tiger", "chosen": "ger", "rejected": "No."}, False),
        ({"prompt": "Q: Why?\nA:", "chosen": " So.", "rejected": " No."}, False),
        ({"prompt": [user("Yes or No."), assistant(SO), user("q")], "completion": "x"}, False),
    ],
)
def test_prompt_that_ends_in_an_answer(fields, is_doubtful):
    ends = ("the prompt ends in one of its answers, which may be meant to follow it",)
    assert local(fields).doubts == (ends if is_doubtful else ())


def test_prompt_that_ends_in_the_rejected_turn():
    for last in (SO, NO):
        row = local(
            {
                "prompt": [*WHOLE[:1], assistant(last)],
                "chosen": [assistant(SO)],
                "rejected": [assistant(NO)],
            }
        )
        assert (row.prompt, row.responses) == ([user(WHY)], ([assistant(SO)], [assistant(NO)]))
        assert row.doubts == ()


LIKES = [("kto_tag", 0), ("kto_tag", "false"), ("is_desirable", False), ("desirable", "False")]
LIKES += [("label", "False"), ("label", 0), ("liked", "no"), ("preference", 0.0)]
LIKES += [("label", "undesirable"), ("feedback", "bad"), ("thumbs_up", 0)]


@pytest.mark.parametrize("name, value", LIKES)
def test_disliked_answers_are_not_trained_on(tmp_path, name, value):
    answers = [
        {"instruction": WHY, "output": SO},
        {"query": WHY, "response": SO},
        {"conversations": SHAREGPT},
        {"prompt": "p", "completion": "c"},
        {"messages": WHOLE},
    ]
    for answer in answers:
        assert local(answer | {name: value}).label is False
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,output,{name}\nq,a,True\nq,b,{value}\nq,c,\n")
    splits, ledger = read(path, "sft")
    assert [example.responses for example in splits["train"]] == [
        ([assistant("a")],),
        ([assistant("c")],),
    ]
    assert sum(ledger.train.filtered.values()) == 1


def test_labels_that_say_something_else():
    answer = {"instruction": WHY, "output": SO}
    for value in (-1, 2, "0.5", 3.0):
        with pytest.raises(Malformed, match="'label' is neither true nor false.*ignore=label"):
            local(answer | {"label": value})
    with pytest.raises(Malformed, match="'kto_tag' is neither true nor false"):
        local(answer | {"kto_tag": "sports"})
    with pytest.raises(Malformed, match="'kto_tag' and 'label' differ in whether the answer"):
        local(answer | {"kto_tag": True, "label": False})
    assert local(answer | {"kto_tag": False}, parse_columns("label=kto_tag")).label is False
    # of pairs, they say nothing
    assert local(PAIR | {"label": 0, "kto_tag": 0}).label is None


def test_column_that_looks_like_a_label(tmp_path):
    rows = [{"instruction": WHY, "output": SO, "correct": i > 1, "old": False} for i in range(5)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    splits, ledger = read(path, "sft")
    assert len(splits["train"]) == 5
    assert [line for line in ledger.train.all_warnings() if "old" in line] == []
    assert (
        "field 'correct' is false in 2 rows and true in 3, and is not read; if it says which "
        "answers are good, pass --config.data.columns=label=correct, else "
        "--config.data.ignore=correct"
    ) in ledger.train.all_warnings()
    splits, ledger = read(path, "sft", columns="label=correct")
    assert (len(splits["train"]), ledger.train.all_warnings()) == (3, [])
    _, ledger = read(path, "sft", ignore=("correct",))
    assert ledger.train.all_warnings() == []


@pytest.mark.parametrize(
    "name", ["reasoning", "rationale", "thinking", "thinking_trajectories", "chain_of_thought"]
)
def test_reasoning_in_a_column_is_not_dropped(name):
    for fields in ({"prompt": "p", "completion": "c"}, PAIR, {"instruction": "i", "output": "o"}):
        with pytest.raises(Malformed, match=f"'{name}' has content.*'reasoning_content'.*ignore="):
            local(fields | {name: "Since it is so."})
        assert local(fields | {name: "Since it is so."}, ignore=(name,))
        assert local(fields | {name: None})
    # its prompt is the same
    assert local_prompt({"prompt": "p", name: "Since it is so."}).prompt == "p"


def test_rationale_of_a_judge():
    fields = {"input": WHY, "chosen": SO, "rejected": NO, "rationale": "The first is right."}
    assert local(fields).shape == "distilabel, chat"


@pytest.mark.parametrize(
    "scores, error, said",
    [
        ([3, 3], Filtered, "a tie: no answer is better"),
        ([None, None], Unusable, "fewer than two answers have a score"),
        ([3, None], Unusable, "fewer than two answers have a score"),
        ([3], Filtered, "fewer than two answers"),
    ],
)
def test_rows_without_a_better_answer(scores, error, said):
    completions = [{"response": f"a{i}", "overall_score": score} for i, score in enumerate(scores)]
    with pytest.raises(error) as raised:
        local({"instruction": WHY, "completions": completions})
    assert str(raised.value) == said


def test_equal_answers_with_different_scores():
    completions = [{"response": "a", "overall_score": score} for score in (1, 2)]
    with pytest.raises(Unusable, match="answers with different scores are equal"):
        local({"instruction": WHY, "completions": completions})


def test_function_call_as_text():
    call = {"name": "now", "arguments": "{}"}
    called = {"role": "assistant", "content": "", "function_call": json.dumps(call)}
    row = local({"prompt": [user("q")], "completion": [called]})
    calls = [{"type": "function", "function": call}]
    assert row.responses == ([assistant("") | {"tool_calls": calls}],)
    with pytest.raises(Malformed, match="'function_call' in field 'completion' is not JSON"):
        local({"prompt": [user("q")], "completion": [called | {"function_call": "now()"}]})


def test_refusal_is_the_answer():
    for content in (None, "", [{"type": "refusal", "refusal": "I cannot."}]):
        refused = {"role": "assistant", "content": content, "refusal": "I cannot."}
        if content:
            del refused["refusal"]
        row = local({"prompt": [user("q")], "completion": [refused]})
        assert row.responses == ([assistant("I cannot.")],)


def test_lists_in_tables_of_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'instruction,generations,ratings\nq,"[""a"",""b""]","[1,5]"\nr,"[\'c\', \'d\']","[5, 1]"\n'
    )
    splits, _ = read(path)
    assert [example.responses for example in splits["train"]] == [
        ([assistant("b")], [assistant("a")]),
        ([assistant("c")], [assistant("d")]),
    ]
    with pytest.raises(Malformed, match="field 'generations' is not a list"):
        # as NumPy writes it
        local({"instruction": "q", "generations": "['a' 'b']", "ratings": [1, 2]})
    # RewardBench 2
    row = local({"prompt": WHY, "chosen": "['a']", "rejected": "['c', 'd']", "subset": "Focus"})
    assert row == chat(WHY, *"acd", pairs=((0, 1), (0, 2)), shape="RewardBench 2, chat")
    row = local({"prompt": WHY, "chosen": "['a']", "rejected": "['c']"})
    assert (row.responses, len(row.doubts)) == (("['a']", "['c']"), 1)
    assert "lists that are written as text" in row.doubts[0]
    # a list of other things, or on one side alone, is an answer
    assert local({"prompt": WHY, "chosen": "['a']", "rejected": "No."}).doubts == ()
    assert local({"prompt": WHY, "chosen": "[1, 2]", "rejected": "[2, 3]"}).doubts == ()


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"Prompt": "p", "CHOSEN": "c", "rejected": "r"},
            "names of fields are in lower case; read these by "
            "--config.data.columns=prompt=Prompt,chosen=CHOSEN;",
        ),
        (
            {"prompt": "p", " chosen": "c", "rejected ": "r"},
            "take the white space from the names ' chosen', 'rejected '",
        ),
        ({"prompt;chosen;rejected": "p;c;r"}, "the columns seem to be separated by semicolons"),
        ({"prompt\tchosen\trejected": "p"}, "the columns seem to be separated by tabs"),
    ],
)
def test_names_that_are_nearly_right(fields, said):
    with pytest.raises(Malformed) as error:
        local(fields)
    assert said in str(error.value)


def test_prompts_that_say_the_same():
    fields = {"prompt": WHY, "question": f" {WHY}", "chosen": SO, "rejected": NO}
    assert local(fields).prompt == WHY
    assert local(fields | {"instruction": WHY}).prompt == WHY
    assert local(fields, parse_columns("question=question")).prompt == [user(f" {WHY}")]


def test_prompt_without_messages():
    for fields in (
        {"prompt": [], "chosen": SO, "rejected": NO},
        {"prompt": [], "chosen": [assistant(SO)], "rejected": [assistant(NO)]},
        {"prompt": [], "completion": SO},
    ):
        with pytest.raises(Malformed, match="field 'prompt' is an empty list of messages"):
            local(fields)
        with pytest.raises(Malformed, match="field 'prompt' is an empty list of messages"):
            local_prompt(fields)
    # the prompt is in the conversations
    assert local({"prompt": [], "chosen": WHOLE, "rejected": WHOLE_NO}).prompt == [user(WHY)]


def test_answers_in_json(tmp_path):
    asked = {"prompt": "Give JSON.", "rejected": "no"}
    one = json.dumps({"role": "admin", "content": "x"})
    rows = [asked | {"chosen": one}]
    splits, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert splits["train"][0].responses == (one, "no")
    # what may be a broken table of conversations stops, and the way out is named
    several = json.dumps([{"role": "admin", "content": "x"}])
    path = write_jsonl(tmp_path / "rows.jsonl", [asked | {"chosen": several}])
    with pytest.raises(ValueError, match="meant as it stands.*write the row as chat messages"):
        read(path)
    messages = {"prompt": [user("Give JSON.")], "rejected": [assistant("no")]}
    rows = [messages | {"chosen": [assistant(several)]}]
    splits, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert splits["train"][0].responses[0] == [assistant(several)]


def test_every_answer_is_scored():
    data = data_config()
    nothing = {"role": "assistant", "content": None}
    fields = {"prompt": [user(WHY)], "chosen": [nothing], "rejected": [assistant(NO)]}
    (pair,) = every_row.answered(fields, data, "row 1")
    assert pair.responses == ([assistant("")], [assistant(NO)])
    (pair,) = every_row.answered(fields | {"chosen": nothing}, data, "row 1")
    assert pair.responses == ([assistant("")], [assistant(NO)])
    (pair,) = every_row.answered(
        {"chosen": [user(WHY), {"from": "gpt", "value": None}], "rejected": WHOLE_NO}, data, "row 1"
    )
    assert pair.responses == ([assistant("")], [assistant(NO)])
    # a turn of a user who says nothing is still wrong
    with pytest.raises(Malformed, match="a message without content"):
        wrong = fields | {"prompt": [{"role": "user", "content": None}, user(WHY)]}
        every_row.answered(wrong, data, "row 1")


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": WHY, "generations": [SO, NO], "ratings": [1, 1]},
        {"prompt": WHY, "response_1": SO, "response_2": NO, "preference_strength": 0},
    ],
)
def test_answers_of_a_tie_are_scored(fields):
    answers = every_row.answered(fields | {"system": "s"}, data_config(), "row 1")
    assert [answer.where for answer in answers] == ["row 1 answer 1", "row 1 answer 2"]
    assert [answer.prompt for answer in answers] == [[system("s"), user(WHY)]] * 2
    assert [answer.responses for answer in answers] == [([assistant(SO)],), ([assistant(NO)],)]


def test_label_beside_an_answer():
    assert local({"instruction": WHY, "output": SO, "kto_tag": False}).label is False
    assert local({"conversations": SHAREGPT, "label": True}).label is True
    # a class of the text, or of the conversation
    assert local({"text": "A film.", "label": True}).label is None
    assert local({"conversations": SHAREGPT, "label": "sports"}).label is None


@pytest.mark.parametrize("label", [False, 0, "False", "0"])
def test_labelled_rows_for_sft(tmp_path, label):
    rows = [
        {"prompt": "p", "completion": "bad", "label": label},
        {"prompt": "p", "completion": "good", "label": not json.loads(str(label).lower())},
    ]
    splits, ledger = read(write_jsonl(tmp_path / "rows.jsonl", rows), "sft")
    assert [example.responses for example in splits["train"]] == [("good",)]
    assert sum(ledger.train.filtered.values()) == 1

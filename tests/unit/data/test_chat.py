"""Chat templates: turns found, nothing lost, dates fixed; ids beside transformers and TRL."""

import datetime
import json

import pytest
import transformers
import trl.data_utils

from dpo_jax.data.chat import Chat
from dpo_jax.data.ledger import Malformed
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import encode, encode_prompts
from tests.helpers.chat_tokenizers import make_tokenizer, template_of
from tests.unit.data import test_tokenizer

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
EOS = {
    "qwen2_5": "<|im_end|>",
    "qwen2_5_training": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_training": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_training": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma4_v5": "<turn|>",
    "gemma_training": "<end_of_turn>",
    "phi3": "<|endoftext|>",
    "gptoss": "<|return|>",
    "glm4moe": "<|user|>",
    "lfm2": "<|im_end|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3_training": "<｜end▁of▁sentence｜>",
    "nemotron_3_nano": "<|im_end|>",
    "idefics3": "<end_of_utterance>",
}
# The system text goes with the last user turn, so that it moves when the conversation goes on.
MOVING_SYSTEM = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.last else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "Which place"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather"}}
CALL["function"]["arguments"] = {"place": "Paris"}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call_1", "content": "9 degrees"}


def data_config(**changes):
    return test_tokenizer.data_config(**{"max_length": 4000, "max_prompt_length": 3000} | changes)


def system(content):
    return {"role": "system", "content": content}


def user(content="Name a colour."):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def called(*calls):
    return {"role": "assistant", "tool_calls": list(calls)}


SEVERAL = [said("Blue, mostly."), user("And then?"), said("Grey."), user("Sure?"), said("<b>Yes")]


def tokenizer_of(name, **more):
    return make_tokenizer(template_of(name), EOS[name], "<s>", **more)


def chat_of(name, **settings):
    return Chat(tokenizer_of(name), date=datetime.date(2026, 1, 2), **settings)


def marked(response):
    """The text of a response, with what is trained on between ⟦ and ⟧."""
    text = response.text
    for start, end in reversed(response.spans or [(0, len(text))]):
        text = text[:start] + "⟦" + text[start:end] + "⟧" + text[end:]
    return text


def rendered(chat, prompt, *responses, tools=None):
    example = chat.example(prompt, responses, tools)
    return example.prompt, *(marked(response) for response in example.responses)


# beside transformers and TRL


@pytest.mark.parametrize("kind", ["bytes", "llama2", "metaspace"])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3", "gemma3", "phi3", "lfm2", "cohere2", "gptoss", "glm4moe"]
)
@pytest.mark.parametrize(
    "prompt",
    [[user()], [system("Be brief."), user()], [user(), said("Grey."), user("Sure?")]],
    ids=["one", "system", "several"],
)
def test_ids_are_those_of_transformers_and_trl(name, prompt, kind):
    tokenizer = tokenizer_of(name, kind=kind)
    answers = [[said("Blue, mostly.")], [said("It rains.")]]
    row = TextExample(prompt, tuple(answers), "row 1")
    examples, counts = encode([row], tokenizer, data_config(), "keep_start")
    (example,) = examples
    assert (counts.boundary_merges, counts.laid_behind) == (0, 0)

    prompt_ids = trl.data_utils._tokenize(tokenizer, prompt, add_generation_prompt=True)
    (same,) = encode_prompts([row], tokenizer, data_config(), "keep_start")
    assert example.prompt.tolist() == prompt_ids["input_ids"] == same.tolist()
    for response, answer in zip(example.responses, answers, strict=True):
        whole = trl.data_utils._tokenize(tokenizer, [*prompt, *answer])["input_ids"]
        ids = [*example.prompt, *response]
        eos = tokenizer.eos_token_id
        # Only the EOS of a template that has none is added, and white space after it left off.
        assert ids[-1] == eos and ids.count(eos) - whole.count(eos) in (0, 1)
        common = trl.data_utils.common_prefix_length(ids, whole)
        assert common >= len(ids) - 1 and not tokenizer.decode(whole[common:]).strip()


@pytest.mark.parametrize("kind", ["bytes", "llama2", "metaspace"])
@pytest.mark.parametrize("name", ["qwen2_5_training", "llama3_training", "qwen3_training"])
def test_masks_are_those_of_transformers(name, kind):
    if kind == "llama2" and name.startswith("qwen") and TRANSFORMERS < (5, 24):
        # 5.17 leaves tokens of the assistant's turns out that 5.24 marks, as we do.
        pytest.skip("the masks of this transformers lack tokens of the assistant's turns")
    tokenizer = tokenizer_of(name, kind=kind)
    row = TextExample([user()], (SEVERAL,), "row 1")
    (example,), counts = encode([row], tokenizer, data_config(), "keep_start")
    whole = tokenizer.apply_chat_template(
        [user(), *SEVERAL], return_dict=True, return_assistant_tokens_mask=True
    )
    start = len(example.prompt)
    ids, mask = whole["input_ids"][start:], whole["assistant_masks"][start:]
    (response,), (found,) = example.responses, example.completion_masks
    assert response.tolist() == ids[: len(response)]
    assert found.tolist() == [bool(trained) for trained in mask[: len(response)]]
    assert counts.other_turns == 2


@pytest.mark.parametrize("kind", ["bytes", "llama2", "metaspace"])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3", "gemma3", "gemma4", "phi3", "gptoss", "glm4moe"]
)
def test_masks_cover_what_assistants_say(name, kind):
    tokenizer = tokenizer_of(name, kind=kind)
    row = TextExample([user()], (SEVERAL, [said("No")]), "row 1")
    (example,), counts = encode([row], tokenizer, data_config(), "keep_start")
    mask, whole_mask = example.completion_masks
    response = example.responses[0]
    trained, context = tokenizer.decode(response[mask]), tokenizer.decode(response[~mask])
    assert whole_mask.all() and counts.other_turns == 2
    for message in SEVERAL:
        inside, outside = trained, context
        if message["role"] == "user":
            inside, outside = context, trained
        # Decoders of SentencePiece's kind lose the first space of a text.
        content = message["content"].replace(" ", "")
        assert content in inside.replace(" ", "") and content not in outside.replace(" ", "")


# where turns start and end


def test_turns_of_marks_and_of_prefixes_are_the_same():
    for name in ("qwen2_5_training", "llama3_training", "gemma_training"):
        chat = chat_of(name)
        messages = [user(), *SEVERAL]
        whole = chat._render(messages, None)
        start = len(chat._render([user()], None, cue=True))
        answer = start, start + len(chat._without_tail(whole[start:]))
        marks = chat._marked_spans(messages, None, whole, answer)
        found = chat._found_spans(messages, 1, None, whole, answer)
        # A mark may have the white space after the EOS.
        texts = [whole[a:b].strip() for a, b in marks]
        assert texts == [whole[a:b] for a, b in found] and len(texts) == 3


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "qwen3",  # an earlier turn has no thinking block, the last has
            "⟦Blue.<|im_end|>⟧\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nGrey.<|im_end|>⟧",
        ),
        (
            "phi3",  # EOS only at the end
            "⟦Blue.<|end|>\n⟧<|user|>\nMore?<|end|>\n<|assistant|>\n⟦Grey.<|end|>\n<|endoftext|>⟧",
        ),
        (
            "gptoss",  # one token ends a turn, another the conversation
            "⟦<|channel|>final<|message|>Blue.<|end|>⟧<|start|>user<|message|>More?<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|>Grey.<|return|>⟧",
        ),
        (
            "glm4moe",  # no token ends a turn
            "⟦\n<think></think>\nBlue.⟧<|user|>\nMore?<|assistant|>⟦\n<think></think>\nGrey.⟧",
        ),
    ],
)
def test_turns_of_templates_that_write_the_last_one_differently(name, expected):
    answer = [said("Blue."), user("More?"), said("Grey.")]
    _, response = rendered(chat_of(name), [user()], answer)
    assert response == expected


def test_turns_with_tools_between():
    answer = [called(CALL, CALL), RESULT, RESULT, said("Nine."), user(), called(CALL), RESULT]
    answer += [said("Nine again.")]
    _, response = rendered(chat_of("qwen3"), [user()], answer, tools=TOOLS)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Paris"}}\n</tool_call>'
    result = "\n<tool_response>\n9 degrees\n</tool_response>"
    assert response == (
        f"⟦{call}\n{call}<|im_end|>⟧\n<|im_start|>user{result}{result}<|im_end|>\n"
        "<|im_start|>assistant\n⟦Nine.<|im_end|>⟧\n"
        "<|im_start|>user\nName a colour.<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{call}<|im_end|>⟧\n<|im_start|>user{result}<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nNine again.<|im_end|>⟧"
    )


def test_turn_that_holds_the_results_of_its_calls():
    _, response = rendered(
        chat_of("gemma4"), [user()], [called(CALL), RESULT, said("Nine.")], tools=TOOLS
    )
    assert response == (
        '⟦<|tool_call>call:get_weather{place:<|"|>Paris<|"|>}<tool_call|><|tool_response>⟧'
        'response:get_weather{value:<|"|>9 degrees<|"|>}<tool_response|>⟦Nine.<turn|>⟧'
    )


def test_turns_that_cannot_be_told_apart():
    backwards = (
        "{% for message in messages | reverse %}{{ message.role + ': ' + message.content + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = Chat(make_tokenizer(backwards, "</s>"))
    for answer in ([said("Blue.")], [said("Blue."), user("More?"), said("Grey.")]):
        with pytest.raises(Malformed, match="an assistant turn cannot be told apart.*message 2"):
            chat.example([user()], [answer])


# answers behind their prompt


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ([user("A")], "<s>[INST] A[/INST]"),
        ([system("Be brief."), user("A")], "<s>[INST] Be brief.\n\nA[/INST]"),
        (
            [system("Be brief."), user("A"), said("B"), user("A")],
            "<s>[INST] A[/INST] B</s>[INST] Be brief.\n\nA[/INST]",
        ),
    ],
)
def test_answer_behind_a_prompt_whose_system_text_moves(prompt, expected):
    chat = Chat(make_tokenizer(MOVING_SYSTEM, "</s>", "<s>"))
    several = [said("C"), user("D"), said("E")]
    found = chat.example(prompt, [[said("B [x]")], several])
    assert found.prompt == expected
    assert [marked(response) for response in found.responses] == [
        "⟦ B [x]</s>⟧",
        "⟦ C</s>⟧[INST] D[/INST]⟦ E</s>⟧",
    ]
    moves = prompt[0]["role"] == "system"
    assert [response.is_laid_behind for response in found.responses] == [moves, moves]


def test_answer_behind_a_thinking_cue():
    found = rendered(chat_of("deepseek_r1_distill"), [user("A")], [said("B")], [said("<thinly>")])
    eos = EOS["deepseek_r1_distill"]
    assert found == (
        "<s><｜User｜>A<｜Assistant｜><think>\n",
        f"⟦B{eos}⟧",
        f"⟦<thinly>{eos}⟧",
    )


def test_answer_begins_where_a_thinking_block_differs_from_the_cue():
    found = rendered(
        chat_of("nemotron_3_nano"),
        [user("A")],
        [said("B")],
        [said("C", reasoning_content="Because.")],
    )
    assert found[0].endswith("<|im_start|>assistant\n<think>\n")
    assert found[1:] == ("⟦</think>B<|im_end|>⟧", "⟦Because.\n</think>\nC<|im_end|>⟧")


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3_training", "qwen3_5_think"])
def test_several_turns_do_not_begin_inside_the_thinking(name):
    """The template writes earlier turns without the mark that its generation prompt ends in."""
    chat = chat_of(name)
    several = [said("B"), user("C"), said("D")]
    whole = chat._render([user("A"), *several], None)
    found = chat.example([user("A")], [several, [said("E")]])
    assert found.is_without_cue and "<think>" not in found.prompt
    for response, messages in zip(found.responses, (several, [said("E")]), strict=True):
        # Both answers follow the same prompt, and are what the template writes.
        whole = chat._render([user("A"), *messages], None)
        assert found.prompt + response.text == chat._without_tail(whole)
        assert not response.is_laid_behind and not response.is_inside_thinking
    assert marked(found.responses[0]).startswith("⟦B")
    alone = chat.example([user("A")], [[said("E")]])
    assert alone.prompt == found.prompt + "<think>\n" == chat.prompt([user("A")])
    assert alone.responses[0].is_inside_thinking == (name != "qwen3_5_think")


def test_system_text_that_moves_out_of_the_answer_is_refused():
    chat = chat_of("deepseek_r1_distill")
    answer = [said("B"), system("Be brief."), user("C"), said("D")]
    with pytest.raises(Malformed, match="moves a system message of a response .*'Be brief.'"):
        chat.example([user("A")], [answer])
    # In the prompt, it stands at the front as well, and nothing is lost.
    found = chat.example([user("A"), said("B"), system("Be brief."), user("C")], [[said("D")]])
    assert found.prompt.startswith("<s>Be brief.")


def test_cue_is_not_doubled():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ '<think>' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
    )
    chat = Chat(make_tokenizer(template, "</s>"))
    answers = [[said("<think>Hm.</think>B")], [said("C")]]
    assert rendered(chat, [user("A")], *answers) == (
        "<user>A</s><assistant><think>",
        "⟦Hm.</think>B</s>⟧",
        "⟦C</s>⟧",
    )


def test_options_turn_thinking_off():
    on, off = chat_of("qwen3"), chat_of("qwen3", options={"enable_thinking": False})
    block = "<think>\n\n</think>\n\n"
    assert rendered(on, [user()], [said("B")])[1] == f"⟦{block}B<|im_end|>⟧"
    prompt, response = rendered(off, [user()], [said("B")])
    assert prompt.endswith(f"<|im_start|>assistant\n{block}") and response == "⟦B<|im_end|>⟧"


def test_reasoning_after_an_empty_thinking_block():
    chat = chat_of("qwen3_5_nothink")
    with pytest.raises(Malformed, match="already closes the thinking.*enable_thinking=True"):
        chat.example([user()], [[said("B", reasoning_content="Because.")]])


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "qwen3",
            {"enable_thinkng": False},
            "not read 'enable_thinkng'. .* reads: enable_thinking.",
        ),
        ("zephyr", {"enable_thinking": False}, "not read 'enable_thinking'. .* reads: none."),
        ("qwen3", {"tools": []}, "data.template.tools cannot be set: these are the row's"),
        ("qwen3", {"messages": []}, "data.template.messages cannot be set: these are the row's"),
        ("qwen3", {"add_generation_prompt": True}, "prompt cannot be set: the prompt ends where"),
        ("qwen3", {"continue_final_message": True}, "message cannot be set: the prompt ends where"),
        ("qwen3", {"max_length": 3}, "max_length cannot be set: it is about tokens"),
    ],
)
def test_refuses_options_that_the_template_does_not_read(name, options, message):
    zephyr = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(zephyr, "</s>") if name == "zephyr" else tokenizer_of(name)
    settings = data_config(template=options)
    with pytest.raises(ValueError, match=message):
        encode([TextExample([user()], ([said("B")],), "row 1")], tokenizer, settings, "keep_end")
    with pytest.raises(ValueError, match=message):
        encode_prompts([TextExample([user()], (), "row 1")], tokenizer, settings, "keep_end")


@pytest.mark.parametrize(
    "name, option",
    [
        ("qwen3", "enable_thinking"),
        ("qwen3_training", "enable_thinking"),
        ("llama3_2", "date_string"),
        ("gptoss", "reasoning_effort"),
        ("gemma3", "bos_token"),
        ("qwen3", "chat_template"),
    ],
)
def test_options_that_the_template_reads(name, option):
    chat_of(name, options={option: template_of(name)}).check("row 1")
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = {"default": template_of("llama3"), "tool_use": template_of("qwen3")}
    Chat(tokenizer, options={"enable_thinking": True}).check("row 1")
    with pytest.raises(ValueError, match="does not read 'enable_thinking'"):
        named = {"enable_thinking": True, "chat_template": "default"}
        Chat(tokenizer, options=named).check("row 1")


def test_template_as_an_option():
    chat = chat_of("llama3", options={"chat_template": template_of("qwen2_5")})
    assert rendered(chat, [user()], [said("B")])[1] == "⟦B<|im_end|>\n⟧"


# the date


@pytest.mark.parametrize(
    "name, expected", [("llama3_2", "Today Date: 02 Jan 2026\n"), ("gptoss", "date: 2026-01-02\n")]
)
def test_date_is_fixed(name, expected):
    chat = chat_of(name)
    assert expected in chat.prompt([user()])
    assert chat.prompt([user()]) == chat_of(name).prompt([user()])
    today = Chat(chat.tokenizer).prompt([user()])
    assert today == chat.tokenizer.apply_chat_template(
        [user()], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "call, expected",
    [
        ("strftime_now('%d %B %Y')", "02 January 2026"),
        ("strftime_now(format='%d %B %Y')", "02 January 2026"),
        ("strftime_now(pattern)", "Friday"),
        ("strftime_now('%d/%m'|string)", "02/01"),
        ("strftime_now('%d ' + '%B')", "02 January"),
        ("strftime_now('%-d \\'%y, 100%%')", "2 '26, 100%"),
        ("(now('%Y') if strftime_now is defined else 'never')", "2026"),
        ("today()", "Jan 02"),
    ],
)
def test_date_is_fixed_however_it_is_asked_for(call, expected):
    template = (
        "\n{% macro today() %}{{ strftime_now('%b %d') }}{% endmacro %}"
        "{% set pattern = '%A' %}{% set now = strftime_now %}"
        "{{ 'Today: ' + CALL + '.' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = make_tokenizer(template.replace("CALL", call), "</s>")
    prompt = Chat(tokenizer, date=datetime.date(2026, 1, 2)).prompt([user("A")])
    assert prompt == f"\nToday: {expected}.A"
    # Nothing but the day is another: it is transformers' own text where the day is today.
    assert Chat(tokenizer).prompt([user("A")]) == tokenizer.apply_chat_template(
        [user("A")], tokenize=False, add_generation_prompt=True
    )


def test_date_in_an_unknown_format_is_refused():
    template = "{{ strftime_now('%Q') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(Malformed, match="unknown format of a date: %Q"):
        Chat(make_tokenizer(template, "</s>")).prompt([user("A")])


def test_date_as_an_option():
    chat = chat_of("llama3_2", options={"date_string": "some day"})
    assert "Today Date: some day\n" in chat.prompt([user()])


# what a template leaves out


@pytest.mark.parametrize(
    "name, answer, tools, message, ignore",
    [
        ("llama3", said("B"), TOOLS, "does not write the row's tools.*get_weather", "tools"),
        ("llama3", called(CALL), None, "does not write 'tool_calls' of an assist", "tool_calls"),
        ("lfm2", called(CALL), TOOLS, "does not write 'tool_calls' of an assist", "tool_calls"),
        ("llama3", said("B", reasoning_content="Hm."), None, "'reasoning_content' .*'Hm", None),
        ("gemma3", said("B", thinking="Hm."), None, "'thinking' of an assistant .*'Hm", None),
        ("deepseek_r1_distill", said("<think>\nHm.\n</think>\nB"), None, "'reasoning'", None),
        ("llama3", said("B", weight=0), None, "'weight' of an assistant message.*'0'", "weight"),
        ("llama3", said("B", name="Ann"), None, "'name' of an assistant message.*'Ann'", "name"),
    ],
)
def test_refuses_what_is_left_out(name, answer, tools, message, ignore):
    with pytest.raises(Malformed, match=message) as error:
        chat_of(name).example([user()], [[answer]], tools)
    ignore = ignore or str(error.value).split("config.data.ignore=")[1].split(";")[0]
    chat_of(name, ignore=(ignore,)).example([user()], [[said("C")], [answer]], tools)


def test_what_a_message_says_cannot_be_ignored():
    answer = said("I look.", tool_calls=[CALL])
    for ignore in ((), ("content",)):
        chat = chat_of("llama3_2", ignore=ignore)
        with pytest.raises(Malformed, match="does not write 'content' .*I look") as error:
            chat.example([user()], [[answer]], TOOLS)
        assert "ignore=" not in str(error.value)


def test_refuses_by_each_message_that_is_left_out():
    """Text that stands elsewhere in the conversation does not hide that it is left out here."""
    chat = chat_of("gemma4_v5")  # a result without a call is not written
    with pytest.raises(Malformed, match="does not write 'content' of a tool message"):
        chat.example([user("B"), said("A"), {"role": "tool", "content": "B"}], [[said("C")]])
    # A second call is not written, though its text is that of the first.
    with pytest.raises(Malformed, match="'tool_calls' of an assistant message"):
        chat_of("gptoss").example([user()], [[called(CALL, CALL)]], TOOLS)


def test_names_all_keys_that_are_left_out():
    message = {**user(), "language": "English", "toxic": False}
    with pytest.raises(Malformed, match="'language', 'toxic' of a user .*ignore=language,toxic"):
        chat_of("llama3").prompt([message])


def test_empty_keys_and_ids_are_nothing():
    empty = {"tool_calls": [], "reasoning_content": "", "name": None, "refusal": None, "id": "m1"}
    answer = said("B", **empty, tool_call_id="c1")
    prompt, response = rendered(chat_of("llama3"), [{**user(), **empty}], [answer])
    assert (prompt, response) == rendered(chat_of("llama3"), [user()], [said("B")])
    named = [user(), called(CALL), RESULT]  # the result's name is that of the call
    assert "9 degrees" in chat_of("llama3_2").prompt(named, TOOLS)


def test_the_same_text_under_two_names():
    answer = said("B", reasoning_content="Hm.", reasoning="Hm.")
    assert "Hm." in rendered(chat_of("qwen3"), [user()], [answer])[1]


@pytest.mark.parametrize(
    "earlier", [said("B", reasoning_content="Hm."), said("<think>\nHm.\n</think>\n\nB")]
)
def test_reasoning_of_earlier_turns_is_counted(earlier):
    chat = chat_of("qwen3")
    last = said("C", reasoning_content="So.")
    found = chat.example([user()], [[earlier, user("More?"), last], [last]])
    assert [response.reasoning_left_out for response in found.responses] == [1, 0]
    assert "Hm." not in found.responses[0].text and "So." in found.responses[0].text
    found = chat.example([user(), earlier, user("More?")], [[last]])
    assert (found.reasoning_left_out, found.responses[0].reasoning_left_out) == (1, 0)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3", "phi3", "deepseek_r1_distill"])
@pytest.mark.parametrize("key", ["reasoning_content", ""])
def test_reasoning_of_a_trained_turn_that_is_never_written(name, key):
    thinks = said("B", reasoning_content="Hm.") if key else said("<think>\nHm.\n</think>\n\nB")
    chat = chat_of(name)
    answer = [thinks, user("More?"), said("C")]
    if not key and name != "deepseek_r1_distill":
        # It is content, and written as such.
        assert "Hm." in chat.example([user()], [answer]).responses[0].text
        return
    with pytest.raises(Malformed, match="does not write '(reasoning|reasoning_content)' of an ass"):
        chat.example([user()], [answer])
    chat_of(name, ignore=(key or "reasoning",)).example([user()], [answer])
    # In the prompt it is not trained on.
    assert chat.example([user(), thinks, user()], [[said("C")]]).reasoning_left_out == 1


def test_what_is_left_out_may_depend_on_what_follows():
    thinks = {**called(CALL), "reasoning_content": "Hm."}
    steps = [thinks, RESULT, {**called(CALL), "reasoning_content": "So."}, RESULT]
    chat = chat_of("qwen3")
    for _ in range(2):  # whichever comes first
        asked_again = chat.example([user(), *steps, said("Nine."), user()], [[said("B")]], TOOLS)
        assert asked_again.reasoning_left_out == 2 and "So." not in asked_again.prompt
        goes_on = chat.example([user(), *steps], [[said("Nine.")]], TOOLS)
        assert goes_on.reasoning_left_out == 0 and "So." in goes_on.prompt
    # gpt-oss writes text beside a call only where no final answer follows.
    prompt = [user(), said("I look.", tool_calls=[CALL]), RESULT]
    chat = chat_of("gptoss")
    for _ in range(2):
        with pytest.raises(Malformed, match="'content' of an assistant message"):
            chat.prompt([*prompt, said("Nine."), user()], TOOLS)
        assert "I look." in chat.prompt(prompt, TOOLS)


def test_content_in_other_words_is_content():
    shouting = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content | upper + eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    chat = Chat(make_tokenizer(shouting, "</s>"))
    assert rendered(chat, [user("Why?")], [said("So.\nYes.")])[1] == "⟦SO.\nYES.</s>⟧"


def test_escaped_content_is_content():
    result = {**RESULT, "content": 'He said "nine"\nor é'}
    prompt = chat_of("gptoss").prompt([user(), called(CALL), result], TOOLS)
    assert r'"He said \"nine\"\nor é"' in prompt


# forms of messages


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gemma4_v5", "glm4moe"])
def test_arguments_as_json_text(name):
    text = {**CALL, "function": {"name": "get_weather", "arguments": '{"place": "Paris"}'}}
    for prompt, answer in (([user()], called(text)), ([user(), called(text), RESULT], said("B"))):
        as_object = [called(CALL) if "tool_calls" in message else message for message in prompt]
        same = called(CALL) if "tool_calls" in answer else answer
        chat = chat_of(name)
        found = rendered(chat, prompt, [answer], tools=TOOLS)
        assert found == rendered(chat, as_object, [same], tools=TOOLS)


def test_arguments_as_object_where_the_template_takes_text():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for call in m.tool_calls %}"
        "{{ '(' + call.function.name + ' ' + call.function.arguments + ')' }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    chat = Chat(make_tokenizer(template, "</s>"))
    _, response = rendered(chat, [user()], [called(CALL)])
    assert response == '⟦(get_weather {"place": "Paris"})</s>⟧'


def test_content_as_parts_for_templates_of_vision_models():
    found = rendered(chat_of("idefics3"), [user("A")], [said("B"), user("C"), said("D")])
    assert found == (
        "<|begin_of_text|>User: A<end_of_utterance>\nAssistant:",
        "⟦ B<end_of_utterance>⟧\nUser: C<end_of_utterance>\nAssistant:⟦ D<end_of_utterance>⟧",
    )


@pytest.mark.parametrize(
    "calls",
    [
        CALL,
        json.dumps([CALL]),
        [CALL["function"]],
        [{"function": {"name": "get_weather", "arguments": '{"place": "Paris"}'}}],
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "glm4moe", "gptoss"])
def test_other_forms_of_calls(name, calls):
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    del answer["content"]
    found = rendered(chat_of(name), [user()], [answer], tools=TOOLS)
    assert found == rendered(chat_of(name), [user()], [called(CALL)], tools=TOOLS)


@pytest.mark.parametrize("arguments", [{"arguments": None}, {"arguments": ""}, {}])
def test_call_without_arguments(arguments):
    calls = {"function": {"name": "get_weather", **arguments}}
    _, response = rendered(chat_of("qwen3"), [user()], [called(calls)], tools=TOOLS)
    assert '{"name": "get_weather", "arguments": {}}' in response


@pytest.mark.parametrize("calls", [-1.5, True, "get_weather()", ["f(x=1)"], [[]], [{}]])
def test_calls_that_are_none(calls):
    answer = {"role": "assistant", "content": "B", "tool_calls": calls}
    with pytest.raises(Malformed, match="'tool_calls' of an assistant message is not a list of ca"):
        chat_of("qwen3").example([user()], [[answer]])


@pytest.mark.parametrize("tools", [["get"], 3, [{"function": "get"}], "get", [None]])
def test_tools_that_are_none(tools):
    with pytest.raises(Malformed, match="'tools' is not a list of definitions"):
        chat_of("qwen3").prompt([user()], tools)


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "glm4moe", "gptoss"])
def test_bare_tools(name):
    assert "get_weather" in chat_of(name).prompt([user()], [TOOLS[0]["function"]])


def test_developer_is_the_system_where_there_is_none():
    messages = [{"role": "developer", "content": "Be brief."}, user()]
    found = chat_of("qwen3").example(messages, [[said("B")]])
    assert found.prompt == chat_of("qwen3").prompt([system("Be brief."), user()])
    assert found.is_developer_system
    # Where the template writes one, it stays.
    assert not chat_of("gptoss").example(messages, [[said("B")]]).is_developer_system
    with pytest.raises(Malformed, match="refuses this conversation.*change the row"):
        chat_of("gemma_training").prompt(messages)


def test_the_error_is_that_of_the_form_that_the_template_takes():
    """A form that it does not take would lose the question."""
    chat = chat_of("qwen3")
    broken = {**CALL, "function": {"name": "get_weather", "arguments": [1]}, "index": "first"}
    answer = {"role": "assistant", "name": "Ann", "tool_calls": [broken]}
    with pytest.raises(Malformed, match="does not write 'name' of an assistant message"):
        chat.example([user()], [[answer]])
    twice = [user("A"), user("B")]
    with pytest.raises(Malformed, match="refuses this conversation.*roles must alternate"):
        chat_of("gemma3").prompt(twice)


def test_template_of_its_own_for_tools():
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = {"default": template_of("llama3"), "tool_use": template_of("qwen3")}
    chat = Chat(tokenizer)
    assert "<tools>" in chat.prompt([user()], TOOLS)
    assert "<|start_header_id|>" in chat.prompt([user()], []) == chat.prompt([user()])


# in the encoder


def encoded(tokenizer, *rows, keep_all=False, **changes):
    texts = [TextExample(*row[:2], f"row {i}", *row[2:]) for i, row in enumerate(rows, start=1)]
    settings = data_config(**changes)
    return encode(texts, tokenizer, settings, "keep_end", keep_all=keep_all)


def test_encode_drops_or_refuses_what_the_template_refuses():
    tokenizer = tokenizer_of("gemma_training")
    rows = [
        ([user()], ([said("B")], [said("C")])),
        ([user(), user()], ([said("B")], [said("C")])),
        ([system("Be brief."), user()], ([said("B")], [said("C")])),
        ([user()], ([said("B", thinking="Hm.")], [said("C")])),
    ]
    with pytest.raises(ValueError, match="row 2: the chat template refuses .*roles must alternate"):
        encoded(tokenizer, *rows)
    examples, counts = encoded(tokenizer, *rows, on_bad_row="drop")
    lost = next(reason for reason in counts.dropped if "'thinking'" in reason)
    assert len(examples) == counts.kept == 1
    assert counts.examples == {
        "the chat template refuses this conversation": ["row 2", "row 3"],
        lost: ["row 4"],
    }


def test_encode_refuses_tools_beside_text():
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(ValueError, match="row 1: the row has tools, .* but its prompt is text"):
        encoded(tokenizer, ("A", ("B",), TOOLS))
    with pytest.raises(ValueError, match="row 1: the row has tools, .* but its prompt is text"):
        encode_prompts([TextExample("A", (), "row 1", TOOLS)], tokenizer, data_config(), "keep_end")
    assert len(encoded(tokenizer, ("A", ("B",), TOOLS), ignore=("tools",))[0]) == 1


def test_encode_prompts_needs_a_template():
    tokenizer = make_tokenizer("", "</s>")
    with pytest.raises(ValueError, match="row 1 holds chat messages, but the tokenizer has no cha"):
        encode_prompts([TextExample([user()], (), "row 1")], tokenizer, data_config(), "keep_end")


def test_encode_counts_what_is_not_trained_on():
    prompt = [user(), said("A", reasoning_content="Hm."), user()]
    row = (prompt, (SEVERAL, [said("C")]))
    counts = encoded(tokenizer_of("qwen3"), row)[1]
    assert (counts.laid_behind, counts.other_turns, counts.reasoning_left_out) == (0, 2, 1)
    assert counts.boundaries == 2
    counts = encoded(tokenizer_of("deepseek_r1_distill"), ([user()], ([said("B")],)))[1]
    assert (counts.laid_behind, counts.inside_thinking, counts.without_cue) == (1, 1, 0)
    (warning,) = counts.warnings
    assert warning.startswith("1 response(s) follow a prompt in which the chat template opens the")
    counts = encoded(tokenizer_of("deepseek_r1_distill"), ([user()], (SEVERAL,)))[1]
    assert (counts.laid_behind, counts.inside_thinking, counts.without_cue) == (0, 0, 1)
    assert counts.warnings == []
    developer = [{"role": "developer", "content": "Be brief."}, user()]
    counts = encoded(tokenizer_of("qwen3"), (developer, ([said("B")],)))[1]
    assert counts.developer_is_system == 1


def test_encode_warns_of_a_misspelt_name_to_ignore():
    tokenizer = tokenizer_of("llama3")
    row = ([user()], ([said("B", names="Ann")], [said("C")]))
    counts = encoded(tokenizer, row, ignore=("tolls", "names", "weight"))[1]
    warning = "data.ignore has 'tolls', which no message has; did you mean 'tools'?"
    assert counts.warnings == [warning]


def test_encode_drops_by_a_short_reason():
    row = ([user()], ([called(CALL)], [said("B")]))
    counts = encoded(tokenizer_of("llama3"), row, on_bad_row="drop")[1]
    reason = "the chat template does not write 'tool_calls' of an assistant message"
    assert counts.dropped == {reason: 1}


def test_encode_mask_follows_the_cut():
    tokenizer = tokenizer_of("qwen2_5")
    long = [said("B"), user("Paris " * 50), said("C")]
    (example,), counts = encoded(tokenizer, ([user()], (long,)))
    size = len(example.prompt)
    limits = {"max_length": size + 30, "max_prompt_length": size}
    (cut,), counts = encoded(tokenizer, ([user()], (long,)), **limits)
    (mask,), (whole) = cut.completion_masks, example.completion_masks[0]
    assert len(mask) == 30 and mask.tolist() == whole[:30].tolist()
    assert (counts.responses_truncated, counts.eos_lost) == (1, 1)


def test_encode_drops_where_no_assistant_turn_is_left():
    tokenizer = tokenizer_of("qwen2_5_training")
    rows = [([user()], ([user("Paris " * 50), said("B")],))]
    _, counts = encoded(tokenizer, *rows, max_prompt_length=20, max_length=40)
    assert counts.dropped == {"no assistant turn is left, once cut": 1}


def test_encode_keeps_all_for_scoring():
    tokenizer = tokenizer_of("qwen2_5")
    eos = tokenizer.eos_token_id
    rows = [
        ([user()], ([said("B")], [said("B")])),
        ([user()], ([said("")], [said("B")])),
        ("A", ("", "B")),
        ("A", ("<|im_end|>", "B")),
        ([user("<|im_end|>")], ([said("B")], [said("C")])),
    ]
    assert encoded(tokenizer, *rows)[1].dropped == {
        "chosen and rejected are equal in tokens, or once cut": 1,
        "response without tokens": 3,
        "special token inside a message": 1,
    }
    examples, counts = encoded(tokenizer, *rows, keep_all=True)
    assert len(examples) == counts.kept == 5 and counts.dropped == {}
    assert [example.responses[0].tolist() for example in examples][1:4] == [[eos]] * 3
    examples, _ = encoded(tokenizer, rows[2], keep_all=True, append_eos=False)
    assert examples[0].responses[0].tolist() == [eos]


def test_encode_prompts_with_tools_is_as_encode():
    tokenizer = tokenizer_of("qwen3")
    rows = [([user()], ([called(CALL)],), TOOLS), ([user()], ([said("B")],)), ("A", ("B",))]
    examples, _ = encoded(tokenizer, *rows)
    texts = [TextExample(prompt, (), "", *tools) for prompt, _, *tools in rows]
    settings = data_config()
    prompts = encode_prompts(texts, tokenizer, settings, "keep_end")
    for example, prompt in zip(examples, prompts, strict=True):
        assert example.prompt.tolist() == prompt.tolist()
    texts = [TextExample([user()], (), "row 7", TOOLS)]
    with pytest.raises(ValueError, match="row 7: the chat template does not write the row's tools"):
        encode_prompts(texts, tokenizer_of("llama3"), settings, "keep_end")

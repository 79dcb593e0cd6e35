"""Token ids of chats beside transformers' and TRL's own, for templates of the TRL package.

Each template x (one turn, several turns, system, tools, reasoning) x (DPO, SFT, sample). The
references are computed without our encoder: the prompt's ids are those of `apply_chat_template`
with the generation prompt, and the whole's those of prompt and answer together. Which tokens are
trained on comes from the text (what stands between an assistant's header and the end of its turn)
and, for TRL's training templates, from transformers' assistant mask.
"""

import dataclasses
import datetime
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl", reason="the templates are those of TRL")

from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import encode, encode_prompts
from tests.helpers.chat_tokenizers import FOLDER, make_tokenizer, template_of
from tests.helpers.rows import assistant, data_config, read, user, write_jsonl

# Mistral 7B Instruct v0.3's rule: the system text stands before the last message, if that is the
# user's; so the conversation with an answer has none.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set turns = messages[1:] if system else messages %}{{ bos_token }}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.last and system %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)
# Zephyr's: the turns' marks are plain text.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# ChatML with a default system text, as SmolLM2's.
CHATML = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NO_TOOLS = {"tools", "tool call", "bare tool call", "tool use in the answer"}


@dataclasses.dataclass(frozen=True)
class Template:
    """What the tests know of a template, beside the template itself."""

    eos: str
    opens: str  # a pattern of what stands before an assistant's text
    closes: str  # a pattern of what ends its turn
    bos: str | None = None
    refuses: frozenset = frozenset()  # cases that the template cannot write
    text: str = ""  # the template, where it is not TRL's
    kind: str = "bytes"  # of tokenizer
    arguments: type = dict  # of a tool call, as the template takes them
    reasoning: str = "reasoning_content"  # the key from which the template reads it


def _im(think: str = "", **fields) -> Template:
    opens = r"<\|im_start\|>assistant\n" + think
    return Template("<|im_end|>", opens, r"<\|im_end\|>", **fields)


REASONING = frozenset({"reasoning"})
NO_TOOLS_OR_REASONING = REASONING | NO_TOOLS | {"call without definitions"}
TEMPLATES = {
    "llama3": Template(
        "<|eot_id|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|eot_id\|>",
        bos="<|begin_of_text|>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "llama3_1": Template(
        "<|eot_id|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|eot_id\|>",
        bos="<|begin_of_text|>",
        # Beside a call it writes no text.
        refuses=REASONING | {"tool call"},
    ),
    "llama3_2": Template(
        "<|eot_id|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|eot_id\|>",
        bos="<|begin_of_text|>",
        refuses=REASONING | {"tool call"},
    ),
    "qwen2_5": _im(refuses=REASONING),
    "qwen3": _im(),
    "qwen3_instruct_2507": _im(refuses=REASONING),
    "gemma": Template(
        "<eos>",
        "<start_of_turn>model\n",
        "<end_of_turn>\n",
        bos="<bos>",
        refuses=NO_TOOLS_OR_REASONING | {"system"},
    ),
    "gemma3": Template(
        "<eos>",
        "<start_of_turn>model\n",
        "<end_of_turn>\n",
        bos="<bos>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "phi3": Template(
        "<|endoftext|>",
        r"<\|assistant\|>\n",
        r"<\|end\|>\n(?:<\|endoftext\|>)?",
        bos="<s>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "phi3_5": Template(
        "<|endoftext|>",
        r"<\|assistant\|>\n",
        r"<\|end\|>\n(?:<\|endoftext\|>)?",
        bos="<s>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "cohere": Template(
        "<|END_OF_TURN_TOKEN|>",
        r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>",
        r"<\|END_OF_TURN_TOKEN\|>",
        bos="<BOS_TOKEN>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "deepseek_r1_distill": Template(
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "deepseekv3": Template(
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜>|<｜tool▁outputs▁end｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        # It writes calls, but no definitions.
        refuses=REASONING | NO_TOOLS,
        arguments=str,
    ),
    "glm4moe": Template(
        "<|endoftext|>", r"<\|assistant\|>", r"(?=<\|user\|>|<\|observation\|>|\Z)"
    ),
    # The generation prompt opens the thinking, which only a last turn goes on with.
    "qwen3_5_think": _im(think=r"(?:<think>\n)?"),
    "qwen3_6": _im(think=r"(?:<think>\n)?"),
    "qwen3_5_nothink": _im(think=r"(?:<think>\n\n</think>\n\n)?", refuses=REASONING),
    "gptoss": Template(
        "<|return|>",
        r"<\|start\|>assistant",
        r"<\|return\|>|<\|call\|>|<\|end\|>(?!<\|start\|>assistant)",
        reasoning="thinking",
    ),
    "lfm2": _im(bos="<|startoftext|>", refuses=NO_TOOLS_OR_REASONING),
    "lfm2_v2": _im(bos="<|startoftext|>", refuses=REASONING),
    # The generation prompt opens the thinking, which an answer without any closes at once.
    "nemotron_3_nano": Template("<|im_end|>", r"<\|im_start\|>assistant\n<think>", r"<\|im_end\|>"),
    "cohere2": Template(
        "<|END_OF_TURN_TOKEN|>",
        r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|><\|START_RESPONSE\|>",
        r"<\|END_OF_TURN_TOKEN\|>",
        bos="<BOS_TOKEN>",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "mistral v0.3": Template(
        "</s>",
        r"\[/INST\]",
        "</s>",
        bos="<s>",
        text=MISTRAL,
        kind="metaspace",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "zephyr": Template(
        "</s>",
        r"<\|assistant\|>\n",
        "</s>",
        bos="<s>",
        text=ZEPHYR,
        kind="llama2",
        refuses=NO_TOOLS_OR_REASONING,
    ),
    "chatml": _im(text=CHATML, refuses=NO_TOOLS_OR_REASONING),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "a town"}},
                "required": ["place"],
            },
        },
    }
]
QUESTION = user("What is the weather in Paris?")
GOOD, BAD = assistant("It is nine degrees."), assistant("I do not know, sorry.")
SYSTEM = {"role": "system", "content": "You are brief."}
RESULT = {"role": "tool", "name": "get_weather", "content": "9 degrees"}


def call(content: str, place: str = "Paris") -> dict:
    function = {"name": "get_weather", "arguments": {"place": place}}
    calls = [{"type": "function", "function": function}]
    return assistant(content) | {"tool_calls": calls}


def thinking(text: str, message: dict) -> dict:
    return message | {"reasoning": text}


MORE = [assistant("For which day?"), user("For Monday.")]
# name: (prompt, chosen, rejected, tools)
CASES = {
    "one turn": ([QUESTION], [GOOD], [BAD], None),
    "several turns": ([QUESTION, *MORE], [GOOD], [BAD], None),
    "several turns in the answer": ([QUESTION], [*MORE, GOOD], [BAD], None),
    "five turns in the answer": ([QUESTION], [*MORE, GOOD, user("And then?"), BAD], [BAD], None),
    "system": ([SYSTEM, QUESTION], [GOOD], [BAD], None),
    "tools": ([QUESTION, call(""), RESULT], [GOOD], [BAD], TOOLS),
    "tool call": ([QUESTION], [call("I look it up.")], [BAD], TOOLS),
    "bare tool call": ([QUESTION], [call("")], [call("", "Rome")], TOOLS),
    "tool use in the answer": ([QUESTION], [call(""), RESULT, GOOD], [BAD], TOOLS),
    "call without definitions": ([QUESTION], [call("")], [call("", "Rome")], None),
    "reasoning": ([QUESTION], [thinking("Nine.", GOOD)], [thinking("Hm.", BAD)], None),
    "reasoning of an earlier turn": (
        [QUESTION, thinking("Which?", MORE[0]), MORE[1]],
        [GOOD],
        [BAD],
        None,
    ),
}
# No prompt or response is cut.
LONG = dict(max_length=100_000, max_prompt_length=50_000, append_eos=True)


def tokenizer_of(name: str, training: bool = False):
    """Return a tokenizer with a template, or with TRL's training variant of it."""
    known = TEMPLATES[name]
    text = known.text or template_of(f"{name}_training" if training else name)
    return make_tokenizer(text, known.eos, known.bos, known.kind)


def as_read(message: dict, known: Template) -> dict:
    """Return a message as the template reads it."""
    message = dict(message)
    if "reasoning" in message:
        message[known.reasoning] = message.pop("reasoning")
    if "tool_calls" in message and known.arguments is str:
        calls = []
        for tool_call in message["tool_calls"]:
            function = dict(tool_call["function"])
            function["arguments"] = json.dumps(function["arguments"])
            calls.append({**tool_call, "function": function})
        message["tool_calls"] = calls
    return message


def case_of(template: str, case: str):
    """Return a case's prompt, chosen, rejected and tools, in the template's own keys."""
    known = TEMPLATES[template]
    *parts, tools = CASES[case]
    return *([as_read(message, known) for message in part] for part in parts), tools


def rendered(tokenizer, messages, tools, **options):
    """Return messages as transformers writes them, and their ids."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, **options)
    return text, list(ids["input_ids"])


def shared_prompt(tokenizer, prompt, answers, tools) -> list[int]:
    """Return the ids of the prompt that all answers follow.

    The mark that opens the thinking is left out where the template does not write it before an
    answer of several turns.
    """
    text, ids = rendered(tokenizer, prompt, tools, add_generation_prompt=True)
    short = text.removesuffix("<think>\n")
    for answer in answers:
        whole, _ = rendered(tokenizer, [*prompt, *answer], tools)
        is_without = whole.startswith(short) and not whole.startswith(short + "<think>")
        if short != text and roles(answer).count("assistant") > 1 and is_without:
            return tokenizer(short, add_special_tokens=False).input_ids
    return ids


def reference(name: str, tokenizer, prompt, answer, tools, answers=()):
    """Return (prompt ids, response ids, completion mask), from transformers' ids and the text.

    answers: all that follow the same prompt, where there are several.
    """
    known = TEMPLATES[name]
    prompt_ids = shared_prompt(tokenizer, prompt, answers or [answer], tools)
    whole_text, whole_ids = rendered(tokenizer, [*prompt, *answer], tools)
    encoded = tokenizer(whole_text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.input_ids == whole_ids
    first = len(prompt_ids)
    if whole_ids[:first] != prompt_ids:
        # The answer is rendered behind the prompt: what the whole has from its own header on.
        headers = list(re.finditer(known.opens, whole_text))
        start = headers[roles(prompt).count("assistant")].end()
        first = next(i for i, (_, end) in enumerate(encoded.offset_mapping) if end > start)
    offsets = encoded.offset_mapping[first:]
    response_ids = whole_ids[first:]

    # Assistant turns are trained on, with the token that ends them; what is between them is not.
    is_trained = np.zeros(len(whole_text), bool)
    start = offsets[0][0]
    while start is not None:
        end = re.compile(known.closes).search(whole_text, start).end()
        is_trained[start:end] = True
        header = re.compile(known.opens).search(whole_text, end)
        start = header and header.end()
    mask = [bool(is_trained[start:end].any()) for start, end in offsets]

    # An answer ends in one EOS: white space after it is left out, and where it lacks, it is added.
    if tokenizer.eos_token_id in response_ids[-3:]:
        while response_ids[-1] != tokenizer.eos_token_id:
            assert not tokenizer.decode(response_ids.pop()).strip()
            mask.pop()
    else:
        response_ids.append(tokenizer.eos_token_id)
        mask.append(True)
    return prompt_ids, response_ids, mask


def roles(messages) -> list[str]:
    return [message["role"] for message in messages]


def encoded_row(folder, tokenizer, row: dict, kind: str, turns: str = "all"):
    """Return the one example of a file with one row, and what became of it."""
    path = write_jsonl(folder / "rows.jsonl", [row])
    read_splits, _ = read(path, kind, turns=turns)
    settings = data_config(turns=turns, **LONG)
    examples, counts = encode(read_splits["train"], tokenizer, settings, "keep_end")
    assert counts.dropped == {}
    assert len(examples) == 1
    return examples[0], counts


def check(example, references) -> None:
    """Compare an example with the references of its responses."""
    for index, (prompt_ids, response_ids, mask) in enumerate(references):
        assert example.prompt.tolist() == prompt_ids
        assert example.responses[index].tolist() == response_ids
        found = [True] * len(response_ids)
        if example.completion_masks is not None:
            found = example.completion_masks[index].tolist()
        assert found == mask


HOLDS = [
    (name, case) for name in TEMPLATES for case in CASES if case not in TEMPLATES[name].refuses
]
# Reasoning of an earlier turn is to be trained on, and the template never writes any.
LOST_IN_TRAINING = [
    (name, "reasoning of an earlier turn")
    for name in TEMPLATES
    if "reasoning" in TEMPLATES[name].refuses and name != "qwen3_5_nothink"
]
REFUSED = [(name, case) for name in TEMPLATES for case in CASES if case in TEMPLATES[name].refuses]


@pytest.mark.parametrize("name, case", HOLDS)
def test_pair_as_transformers(tmp_path, name, case):
    tokenizer = tokenizer_of(name)
    prompt, chosen, rejected, tools = case_of(name, case)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}
    example, _ = encoded_row(tmp_path, tokenizer, row, "pairs")
    references = [
        reference(name, tokenizer, prompt, answer, tools, (chosen, rejected))
        for answer in (chosen, rejected)
    ]
    check(example, references)


COMPLETIONS = [(*pair, "last") for pair in HOLDS]
COMPLETIONS += [(*pair, "all") for pair in HOLDS if pair not in LOST_IN_TRAINING]


@pytest.mark.parametrize("name, case, turns", COMPLETIONS)
def test_completion_as_transformers(tmp_path, name, case, turns):
    tokenizer = tokenizer_of(name)
    prompt, chosen, _, tools = case_of(name, case)
    messages = [*prompt, *chosen]
    start = roles(messages).index("assistant") if turns == "all" else len(messages) - 1
    example, _ = encoded_row(
        tmp_path, tokenizer, {"messages": messages, "tools": tools}, "sft", turns
    )
    check(example, [reference(name, tokenizer, messages[:start], messages[start:], tools)])


@pytest.mark.parametrize("name, case", LOST_IN_TRAINING)
def test_reasoning_that_the_template_never_writes(tmp_path, name, case):
    """To leave out earlier reasoning is by design only of templates that write the last turn's."""
    tokenizer = tokenizer_of(name)
    prompt, chosen, _, tools = case_of(name, case)
    row = {"messages": [*prompt, *chosen], "tools": tools}
    with pytest.raises(ValueError, match="does not write '.*' of an assistant message"):
        encoded_row(tmp_path, tokenizer, row, "sft", "all")


@pytest.mark.parametrize("name, case", HOLDS)
def test_sampled_prompt_as_transformers(name, case):
    tokenizer = tokenizer_of(name)
    prompt, *_, tools = case_of(name, case)
    settings = data_config(**LONG)
    asked = TextExample(prompt, (), "row 1", tools)
    (ids,) = encode_prompts([asked], tokenizer, settings, "keep_end")
    _, expected = rendered(tokenizer, prompt, tools, add_generation_prompt=True)
    assert ids.tolist() == expected


@pytest.mark.parametrize("kind", ["pairs", "sft"])
@pytest.mark.parametrize("name, case", REFUSED)
def test_refused_by_name(tmp_path, name, case, kind):
    """What a template does not write, or refuses itself, is no silent loss."""
    tokenizer = tokenizer_of(name)
    prompt, chosen, rejected, tools = case_of(name, case)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}
    if kind == "sft":
        row = {"messages": [*prompt, *chosen], "tools": tools}
    with pytest.raises(ValueError) as caught:
        encoded_row(tmp_path, tokenizer, row, kind)
    message = str(caught.value)
    assert "rows.jsonl row 1" in message
    expected = "the chat template (does not write|refuses)|the prompt already closes the thinking"
    assert re.search(expected, message), message


@pytest.mark.parametrize("name", ["gemma4_v3", "gemma4_v5", "diffusion_gemma"])
def test_text_that_moves_behind_a_result_is_refused(tmp_path, name):
    """Gemma 4 writes the text beside a call after the call's result, which would be trained on."""
    tokenizer = make_tokenizer(template_of(name), "<turn|>", "<bos>")
    row = {"prompt": [QUESTION], "rejected": [BAD], "tools": TOOLS}
    answers = {"": [call(""), RESULT, GOOD], "Wait.": [call("Wait."), RESULT, GOOD]}
    example, _ = encoded_row(tmp_path, tokenizer, row | {"chosen": answers[""]}, "pairs")
    masked = example.responses[0][~example.completion_masks[0]]
    assert RESULT["content"] in tokenizer.decode(masked)
    with pytest.raises(ValueError, match="an assistant turn cannot be told apart"):
        encoded_row(tmp_path, tokenizer, row | {"chosen": answers["Wait."]}, "pairs")


CALLS = [pair for pair in HOLDS if "tool" in pair[1] or "call" in pair[1]]


@pytest.mark.parametrize("name, case", CALLS)
def test_calls_in_the_form_of_the_row(tmp_path, name, case):
    """Arguments as an object or as JSON text, and null content, are the same to every template."""
    tokenizer = tokenizer_of(name)
    *parts, tools = CASES[case]
    known = TEMPLATES[name]
    references = []
    for form in (dict, str):
        other = dataclasses.replace(known, arguments=form)
        prompt, chosen, rejected = ([as_read(turn, other) for turn in part] for part in parts)
        for message in (*prompt, *chosen, *rejected):
            if form is str and not message["content"]:
                message["content"] = None  # OpenAI's form
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}
        example, _ = encoded_row(tmp_path, tokenizer, row, "pairs")
        references.append([part.tolist() for part in (example.prompt, *example.responses)])
    assert references[0] == references[1]


DAY = datetime.date(2026, 1, 5)


@pytest.mark.parametrize("name, written", [("llama3_2", "05 Jan 2026"), ("gptoss", "2026-01-05")])
def test_date_of_the_template_is_given(name, written):
    """The day that is kept with a stage, not today's: else a run would not resume tomorrow."""
    tokenizer = tokenizer_of(name)
    example = TextExample([QUESTION], ([GOOD],), "FILE row 1")
    examples, _ = encode([example], tokenizer, data_config(**LONG), "keep_end", date=DAY)
    asked = TextExample([QUESTION], (), "FILE row 1")
    (sampled,) = encode_prompts([asked], tokenizer, data_config(**LONG), "keep_end", date=DAY)
    text = tokenizer.decode(examples[0].prompt)
    today, _ = rendered(tokenizer, [QUESTION], None, add_generation_prompt=True)
    assert written in text and written not in today
    assert examples[0].prompt.tolist() == sampled.tolist()
    if name == "llama3_2":
        dated, ids = rendered(
            tokenizer, [QUESTION], None, add_generation_prompt=True, date_string=written
        )
        assert examples[0].prompt.tolist() == ids and text == dated


# TRL's own tokenisation of the same rows

# TRL drops the end of these prompts, "<think>" or the system text, for the answer's sake: the model
# is then trained on a context that it never sees. Ours keeps the prompt, unless "<think>" stands
# before an answer of several turns, which then do not begin as thinking.
CUT_BY_TRL = {("nemotron_3_nano", case) for case in CASES} | {("mistral v0.3", "system")}
CUT_BY_TRL |= {("qwen3_5_nothink", case) for case in CASES if "turns in the answer" in case}
# Its training template writes reasoning in turns whose generation prompt has closed it.
REFUSED_IN_TRAINING = [*LOST_IN_TRAINING, ("qwen3_5_nothink", "reasoning of an earlier turn")]
DROPPED_CUES = ("deepseek_r1_distill", "deepseekv3")
# Rows with tools go through Arrow in TRL, which gives every message null calls: templates that ask
# whether a message has the key then fail. Those rows are compared with transformers' ids alone.
TRL_CASES = [case for case in CASES if CASES[case][-1] is None and "definitions" not in case]
TRAINING = [name for name in TEMPLATES if (FOLDER / f"{name}_training.jinja").exists()]


def trl_rows(trainer: type, tokenizer, row: dict, **fields) -> dict:
    """Return a row as a trainer of TRL prepares it; no model is made."""
    from datasets import Dataset

    settings = dict(
        dataset_num_proc=None,
        max_length=None,
        truncation_mode="keep_end",
        assistant_only_loss=True,
        dataset_text_field="text",
        shuffle_dataset=False,
    )
    itself = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=False, chat_template=None)
    prepared = trainer._prepare_dataset(
        itself, Dataset.from_list([row]), tokenizer, SimpleNamespace(**settings), **fields
    )
    return prepared[0]


def without_tail(ids: list[int], tokenizer) -> list[int]:
    """Return ids up to their last EOS, if white space alone follows; else with an EOS."""
    eos = tokenizer.eos_token_id
    last = len(ids) - 1 - ids[::-1].index(eos) if eos in ids else -1
    if last >= 0 and not tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1]
    return [*ids, eos]


def comparable(names, kind: str) -> list[tuple[str, str]]:
    """Return the pairs of template and case for which TRL's prompt is ours."""
    found = []
    for name, case in itertools.product(names, TRL_CASES):
        prompt, chosen, *_ = CASES[case]
        answer = [*prompt, *chosen] if kind == "sft" else chosen
        is_cut = name in DROPPED_CUES and roles(answer).count("assistant") == 1
        is_lost = kind == "sft" and (name, case) in REFUSED_IN_TRAINING
        is_same = not is_cut and (name, case) not in CUT_BY_TRL
        if (name, case) in HOLDS and is_same and not is_lost:
            found.append((name, case))
    return found


@pytest.mark.parametrize("name, case", comparable(TEMPLATES, "pairs"))
def test_pair_as_trl(tmp_path, name, case):
    from trl import DPOTrainer

    tokenizer = tokenizer_of(name)
    prompt, chosen, rejected, _ = case_of(name, case)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    theirs = trl_rows(DPOTrainer, tokenizer, row, dataset_name="train")
    ours, _ = encoded_row(tmp_path, tokenizer, row, "pairs")
    assert ours.prompt.tolist() == theirs["prompt_ids"]
    assert ours.responses[0].tolist() == without_tail(theirs["chosen_ids"], tokenizer)
    assert ours.responses[1].tolist() == without_tail(theirs["rejected_ids"], tokenizer)


@pytest.mark.parametrize("name, case", comparable(TRAINING, "sft"))
def test_completion_mask_as_trl(tmp_path, name, case):
    """TRL's training templates mark what an assistant writes; TRL's labels are those tokens."""
    from trl import SFTTrainer

    tokenizer = tokenizer_of(name, training=True)
    prompt, chosen, *_ = case_of(name, case)
    row = {"messages": [*prompt, *chosen]}
    theirs = trl_rows(
        SFTTrainer, tokenizer, row, packing=False, formatting_func=None, dataset_name="train"
    )
    ours, _ = encoded_row(tmp_path, tokenizer, row, "sft")
    ids = [*ours.prompt.tolist(), *ours.responses[0].tolist()]
    assert ids == without_tail(theirs["input_ids"], tokenizer)
    labels = [label != -100 for label in theirs["labels"]][len(ours.prompt) :]
    expected = [*labels, True][: len(ours.responses[0])]
    mask = [True] * len(expected)
    if ours.completion_masks is not None:
        mask = ours.completion_masks[0].tolist()
    assert mask == expected

"""Special tokens, truncation, chat templates and what is dropped, in exact ids."""

import hashlib

import ml_collections
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import (
    Examples,
    Rule,
    cut,
    encode,
    encode_example_prompts,
    encode_prompts,
)
from tests.helpers.paths import SHARED, needs_shared

LETTERS = "abcdefghijklmnopqrstuvwxyz :\n"
CHATML = (
    "{% for m in messages %}{{ m.role[:1] + ':' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
NO_EOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[:1] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def small(bos=None, eos="<e>", adds_bos=False, pad=None, template=None, first="<p>"):
    """A tokenizer of single letters and "ab"; other characters are lost. Ids: specials, then
    LETTERS.
    """
    specials = list(dict.fromkeys(token for token in (bos, first, eos) if token))
    vocabulary = {token: i for i, token in enumerate([*specials, *LETTERS, "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    # None: keep white space in the pieces.
    backend.pre_tokenizer = pre_tokenizers.Split("\0", "isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            f"{bos} $A", None, [(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def data_config(**changes):
    fields = {
        "max_length": 100,
        "max_prompt_length": 50,
        "append_eos": True,
        "on_bad_row": "error",
        "template": {},
        "ignore": (),
    }
    return ml_collections.ConfigDict(fields | changes)


def unanswered(*prompts):
    """Prompts without responses, to sample from."""
    return [TextExample(prompt, (), f"row {i}") for i, prompt in enumerate(prompts, 1)]


def encoded(tokenizer, *rows, truncate="keep_start", **changes):
    """Each row as lists, [prompt, *responses], and the counts."""
    texts = [
        TextExample(prompt, responses, f"row {i}") for i, (prompt, responses) in enumerate(rows, 1)
    ]
    examples, counts = encode(texts, tokenizer, data_config(**changes), truncate)
    found = []
    for example in examples:
        responses = [response.tolist() for response in example.responses]
        found.append([example.prompt.tolist(), *responses])
    return found, counts


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return [{"role": "assistant", "content": content}]


# special tokens


@pytest.mark.parametrize(
    "settings, prompt, expected",
    [
        ({"bos": None}, "c", ["c"]),
        ({"bos": "<b>", "adds_bos": False}, "c", ["c"]),
        ({"bos": "<b>", "adds_bos": True}, "c", ["<b>", "c"]),
        ({"bos": "<b>", "first": None, "adds_bos": True}, "c", ["<b>", "c"]),  # BOS has id 0
        ({"bos": "<e>", "adds_bos": False}, "c", ["c"]),  # as in GPT-2: BOS is EOS, and is not put
        ({"bos": "<e>", "adds_bos": True}, "c", ["<e>", "c"]),
        # an empty prompt still has a token to predict from
        ({"bos": None}, "", ["<e>"]),
        ({"bos": "<b>", "adds_bos": False}, "", ["<b>"]),
        ({"bos": "<b>", "first": None, "adds_bos": False}, "", ["<b>"]),
        ({"bos": "<b>", "adds_bos": True}, "", ["<b>"]),
        ({"bos": "<e>", "adds_bos": False}, "", ["<e>"]),
    ],
)
def test_encode_bos_once_before_prompt(settings, prompt, expected):
    tokenizer = small(**settings)
    (row,), _ = encoded(tokenizer, (prompt, ("d", " e")))
    assert row == [
        ids_of(tokenizer, *expected),
        ids_of(tokenizer, "d", "<e>"),
        ids_of(tokenizer, " ", "e", "<e>"),
    ]
    (asked,) = encode_prompts(unanswered(prompt), tokenizer, data_config(), "keep_start")
    assert asked.tolist() == row[0]


def test_encode_prompt_that_spells_bos():
    tokenizer = small(bos="<b>", adds_bos=True)
    (row,), _ = encoded(tokenizer, ("<b>c", ("d", "e")))
    assert row[0] == ids_of(tokenizer, "<b>", "c")
    # The format of a text is the user's own, as in "<s>[INST] ... </s><s>[INST] ...".
    (row,), _ = encoded(tokenizer, ("c<b>d", ("d", "e<b>e")))
    assert row[0] == ids_of(tokenizer, "<b>", "c", "<b>", "d")
    assert row[2] == ids_of(tokenizer, "e", "<b>", "e", "<e>")


def test_encode_bos_id_0():
    assert ids_of(small(bos="<b>", first=None), "<b>") == [0]


def test_encode_pad_equal_to_eos():
    rows = [("c", ("d",)), ("", ("e f",))]
    assert encoded(small(pad="<e>"), *rows)[0] == encoded(small(), *rows)[0]


def test_encode_append_eos_off():
    tokenizer = small()
    assert encoded(tokenizer, ("c", ("d",)), append_eos=False)[0] == [
        [ids_of(tokenizer, "c"), ids_of(tokenizer, "d")]
    ]
    assert encoded(small(bos="<b>", eos=None), ("c", ("d",)), append_eos=False)[1].kept == 1


@pytest.mark.parametrize("append_eos", [True, False])
def test_encode_text_in_chat_format_stands(append_eos):
    """EOS may be anywhere in text; one at the end, before white space, is the response's own."""
    tokenizer = small()
    (row,), counts = encoded(tokenizer, ("c<e>d", ("d<e>f<e>\n", "e<e>")), append_eos=append_eos)
    assert row == [
        ids_of(tokenizer, "c", "<e>", "d"),
        ids_of(tokenizer, "d", "<e>", "f", "<e>"),
        ids_of(tokenizer, "e", "<e>"),
    ]
    assert counts.dropped == {}


@pytest.mark.parametrize(
    "settings, start",
    [
        ({"bos": "<b>", "adds_bos": True}, "<b>"),
        ({"bos": "<b>", "adds_bos": False}, "<b>"),
        ({"bos": "<e>", "adds_bos": False}, "<e>"),
        ({"bos": None}, "<e>"),
    ],
)
def test_encode_sft_text_with_its_own_bos_and_eos(settings, start):
    tokenizer = small(**settings)
    text = f"{start}c d<e>\n"
    (row,), _ = encoded(tokenizer, ("", (text,)))
    joint = tokenizer(text.strip(), add_special_tokens=False).input_ids
    assert row[0] + row[1] == joint == ids_of(tokenizer, start, "c", " ", "d", "<e>")
    assert row[0] == ids_of(tokenizer, start)


def test_encode_drops_empty_response():
    rows, counts = encoded(small(), ("c", ("d", "é")), ("c", ("d", "e")))
    assert len(rows) == 1 and counts.dropped == {"response without tokens": 1}


def test_encode_drops_equal_responses():
    rows, counts = encoded(
        small(), ("c", ("d", "dé")), ("c", ("dddde", "ddddf")), max_length=5, max_prompt_length=1
    )
    assert rows == [] and counts.dropped == {
        "chosen and rejected are equal in tokens, or once cut": 2
    }
    assert counts.prompts_truncated == counts.responses_truncated == 0


def test_encode_counts_boundary_merges():
    tokenizer = small()
    rows, counts = encoded(tokenizer, ("ca", ("b", "c")), ("a", ("ab", "b")))
    assert rows[0] == [
        ids_of(tokenizer, *part) for part in (("c", "a"), ("b", "<e>"), ("c", "<e>"))
    ]
    assert (counts.boundary_merges, counts.boundaries) == (2, 4)


def test_encode_warns_of_merges():
    _, counts = encoded(small(), *[("ca", ("b",))] * 1200)
    assert (counts.boundary_merges, counts.boundaries, counts.kept) == (1200, 1200, 1200)
    assert counts.warnings == [
        "1200 of 1200 responses would merge with the end of their prompt into other tokens: 'ca' "
        "and then 'b' is tokenised as ['c', 'a'] and ['b'], but as one text as ['c', 'ab']. Text "
        "usually continues with a space at the start of the response, not at the end of the prompt."
    ]
    assert encoded(small(), *[("ca", ("b",))] * 9)[1].warnings == []
    rows = [("ca", ("b",))] * 9 + [("c", ("b",))]
    assert encoded(small(), *rows)[1].warnings == []


# truncation


def rule(truncate, bos=None, max_length=10, max_prompt_length=4):
    return Rule(bos, bos is not None, 99, True, max_length, max_prompt_length, truncate)


@pytest.mark.parametrize(
    "truncate, bos, prompt, responses, cut_prompt, cut_responses",
    [
        # fits: nothing is cut, however long the prompt
        ("keep_start", None, [1] * 8, [[5, 99], [6]], [1] * 8, [[5, 99], [6]]),
        ("keep_end", None, [1] * 6, [[5, 5, 5, 99]], [1] * 6, [[5, 5, 5, 99]]),
        # one token too many: the prompt is cut to max_prompt_length
        (
            "keep_start",
            None,
            [1, 2, 3, 4, 5, 6, 7, 8, 9],
            [[5, 99], [6, 99]],
            [1, 2, 3, 4],
            [[5, 99], [6, 99]],
        ),
        (
            "keep_end",
            None,
            [1, 2, 3, 4, 5, 6, 7, 8, 9],
            [[5, 99], [6, 99]],
            [6, 7, 8, 9],
            [[5, 99], [6, 99]],
        ),
        # BOS stays, and counts
        ("keep_start", 0, [0, 2, 3, 4, 5, 6, 7, 8, 9], [[5, 99]], [0, 2, 3, 4], [[5, 99]]),
        ("keep_end", 0, [0, 2, 3, 4, 5, 6, 7, 8, 9], [[5, 99]], [0, 7, 8, 9], [[5, 99]]),
        # a first token that is not BOS is cut like any other
        ("keep_end", 0, [1, 2, 3, 4, 5, 6, 7, 8, 9], [[5, 99]], [6, 7, 8, 9], [[5, 99]]),
        # the longer response decides, and both keep the same prompt
        (
            "keep_end",
            None,
            [1, 2, 3, 4, 5],
            [[5, 99], [6] * 5 + [99]],
            [2, 3, 4, 5],
            [[5, 99], [6] * 5 + [99]],
        ),
        # still too long: responses lose their end, and with it their EOS; none is put there
        (
            "keep_start",
            None,
            [1, 2, 3, 4, 5],
            [[5, 99], [6] * 8 + [99]],
            [1, 2, 3, 4],
            [[5, 99], [6] * 6],
        ),
        # a short prompt leaves its room to the responses
        ("keep_start", None, [1, 2], [[5] * 9 + [99], [6] * 8], [1, 2], [[5] * 8, [6] * 8]),
        ("keep_end", 0, [0], [[5] * 20 + [99]], [0], [[5] * 9]),
    ],
)
def test_cut_by_hand(truncate, bos, prompt, responses, cut_prompt, cut_responses):
    assert cut(prompt, responses, rule(truncate, bos)) == (cut_prompt, cut_responses)


def test_cut_keep_cue():
    for bos, start in ((0, [0, 1, 2]), (None, [0, 1, 2])):
        rule = Rule(bos, bos is not None, 99, True, 30, 19, "keep_cue")
        assert cut(list(range(40)), [[5, 99]], rule) == ([*start, *range(24, 40)], [[5, 99]])
    short = Rule(0, True, 99, True, 12, 9, "keep_cue")  # no room for a start but BOS
    assert cut(list(range(40)), [[5, 99]], short) == ([0, *range(32, 40)], [[5, 99]])


@pytest.mark.parametrize("truncate, kept", [("keep_start", [0]), ("keep_end", [0])])
def test_cut_to_bos_alone(truncate, kept):
    assert cut([0, 1, 2, 3], [[5] * 9], rule(truncate, 0, max_prompt_length=1)) == (kept, [[5] * 9])


def test_encode_counts_truncation():
    rows, counts = encoded(
        small(),
        ("c" * 20, ("d", "e")),
        ("c", ("d", "e" * 30)),
        ("c" * 20, ("d" * 30, "e" * 30)),
        ("c", ("d", "e")),
        max_length=16,
        max_prompt_length=8,
    )
    assert [[len(part) for part in row] for row in rows] == [
        [8, 2, 2],
        [1, 2, 15],
        [8, 8, 8],
        [1, 2, 2],
    ]
    assert (counts.prompts_truncated, counts.responses_truncated, counts.eos_lost) == (2, 3, 3)
    eos = small().eos_token_id
    assert [[part[-1] == eos for part in row[1:]] for row in rows] == [
        [True, True],
        [True, False],
        [False, False],
        [True, True],
    ]
    _, counts = encoded(
        small(), ("c", ("e" * 30,)), max_length=16, max_prompt_length=8, append_eos=False
    )
    assert (counts.responses_truncated, counts.eos_lost) == (1, 0)


def test_encode_mean_lengths():
    counts = encoded(small(), ("c", ("ddd", "e")), ("ccc", ("d", "eee")))[1]
    assert counts.mean_tokens == {
        "prompt": 2,
        "chosen": 3,
        "rejected": 3,
        "chosen minus rejected": 0,
    }
    assert encoded(small(), ("c", ("ddd",)), ("ccc", ("d",)))[1].mean_tokens == {
        "prompt": 2,
        "completion": 3,
    }
    assert encoded(small())[1].mean_tokens == {}


# chat


def test_chat_eos_once_at_end():
    tokenizer = small(bos="<b>", adds_bos=True, template=CHATML)
    (row,), counts = encoded(tokenizer, ([user("c")], (answer("d"), answer("e "))))
    # the template puts no BOS, so there is none
    assert row == [
        ids_of(tokenizer, "u", ":", "c", "<e>", "\n", "a", ":"),
        ids_of(tokenizer, "d", "<e>"),
        ids_of(tokenizer, "e", " ", "<e>"),
    ]
    assert counts.boundaries == 2 and counts.dropped == {}


def test_chat_appends_missing_eos():
    tokenizer = small(bos="<b>", adds_bos=True, template=NO_EOS)
    (row,), _ = encoded(tokenizer, ([user("c")], (answer("d"),)))
    assert row == [
        ids_of(tokenizer, "<b>", "u", ":", "c", "\n", "a", ":"),
        ids_of(tokenizer, "d", "\n", "<e>"),
    ]
    (row,), _ = encoded(tokenizer, ([user("c")], (answer("d"),)), append_eos=False)
    assert row[1] == ids_of(tokenizer, "d", "\n")


def test_chat_keeps_template_eos():
    tokenizer = small(template=CHATML)
    (row,), _ = encoded(tokenizer, ([user("c")], (answer("d"),)), append_eos=False)
    assert row[1] == ids_of(tokenizer, "d", "<e>")


def test_chat_drops_special_tokens_in_messages():
    call = {"function": {"name": "c", "arguments": {"d": "<e>"}}}
    rows = [
        ([user("c<e>")], (answer("d"),)),
        ([user("c")], (answer("d<p>e"),)),
        ([user("c")], ([{"role": "assistant", "content": "c", "tool_calls": [call]}],)),
        ([user("c")], (answer("<d>"),)),  # is none
    ]
    counts = encoded(small(pad="<p>", template=CHATML), *rows)[1]
    assert counts.kept == 1 and counts.dropped == {"special token inside a message": 3}


def test_chat_drops_empty_response():
    counts = encoded(small(template=CHATML), ([user("c")], (answer(""),)))[1]
    assert counts.dropped == {"response without tokens": 1}


def test_encode_prompts_of_chat():
    tokenizer = small(template=CHATML)
    prompts = unanswered([user("c")], "d")
    chat, text = encode_prompts(prompts, tokenizer, data_config(), "keep_end")
    assert chat.tolist() == ids_of(tokenizer, "u", ":", "c", "<e>", "\n", "a", ":")
    assert text.tolist() == ids_of(tokenizer, "d")


def test_encode_prompts_names_the_row():
    tokenizer = small(template="{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="^row 2: the chat template refuses .*no"):
        encode_prompts(unanswered("d", [user("c")]), tokenizer, data_config(), "keep_end")


def test_encode_prompts_cuts():
    tokenizer = small(bos="<b>", adds_bos=True)
    settings = data_config(max_prompt_length=3)
    for truncate, kept in (("keep_end", ["<b>", "e", "f"]), ("keep_start", ["<b>", "c", "d"])):
        (ids,) = encode_prompts(unanswered("cdef"), tokenizer, settings, truncate)
        assert ids.tolist() == ids_of(tokenizer, *kept)
    assert encode_prompts([], tokenizer, settings, "keep_end") == []


@pytest.mark.parametrize("max_length", [5, 7, 8, 100])
def test_encode_example_prompts_cut_as_training(max_length):
    """Of 5 tokens where they pass max_length with the response's 2: "d" and EOS."""
    tokenizer, changes = (
        small(bos="<b>", adds_bos=True),
        dict(max_length=max_length, max_prompt_length=3),
    )
    rows = [TextExample("cdef", ("d",), ""), TextExample("c", ("d",), "")]
    found = encode_example_prompts(rows, tokenizer, data_config(**changes), "keep_end")
    trained, _ = encoded(
        tokenizer, *((row.prompt, row.responses) for row in rows), truncate="keep_end", **changes
    )
    assert [prompt.tolist() for prompt in found] == [row[0] for row in trained]
    assert len(found[0]) == (3 if max_length < 7 else 5)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "row 1 holds chat messages, but the tokenizer has no chat template"),
        (
            "{{ messages[0].content }}{% if add_generation_prompt %}a:{% endif %}",
            "row 1: the chat template does not write 'content' of an assistant message.*found 'd'",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "row 1: the chat template refuses this conversation.*found roles must alternate",
        ),
    ],
)
def test_chat_refuses_template(template, message):
    with pytest.raises(ValueError, match=message):
        encoded(small(template=template), ([user("c")], (answer("d"),)))


# settings and folders


@pytest.mark.parametrize(
    "tokenizer, changes, message",
    [
        ({"eos": None}, {}, "the tokenizer has no EOS token, which data.append_eos=True needs"),
        (
            {},
            {"max_prompt_length": 100},
            "data.max_prompt_length=100 must be at least 1 and less than data.max_length=100",
        ),
        ({}, {"max_prompt_length": 0}, "data.max_prompt_length=0 must be at least 1"),
        (
            {},
            {"truncate": "keep_middle"},
            "data.truncate='keep_middle' is not one of auto, keep_start",
        ),
        (
            {"eos": None},
            {"append_eos": False},
            "a prompt is empty, and the tokenizer has neither BOS nor EOS",
        ),
    ],
)
def test_rule_refuses_settings(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        encoded(small(**tokenizer), ("", ("d",)), **changes)


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing' is not a folder; a tokenizer is loaded from"
    ):
        tokenizers.load(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match="has no tokenizer that transformers can load. Expected"
    ):
        tokenizers.load(tmp_path)


def test_load_what_was_saved(tmp_path):
    saved = small(bos="<b>", adds_bos=True, template=CHATML)
    saved.save_pretrained(tmp_path)
    rows = [("c", ("d", "e")), ([user("c")], (answer("d"), answer("e")))]
    assert encoded(tokenizers.load(tmp_path), *rows) == encoded(saved, *rows)


# examples


def test_examples_are_a_sequence():
    texts = [TextExample("c", ("d", "e"), "row 1")]
    examples, _ = encode(texts, small(), data_config(), "keep_start")
    assert len(examples) == 1 and examples.where == ["row 1"]
    prompt, responses = examples[0].prompt, examples[0].responses
    assert len(examples) == 1
    assert prompt.dtype == responses[0].dtype == responses[1].dtype == np.int32
    assert isinstance(responses, tuple)


def test_examples_take_slices_and_lists():
    texts = [TextExample(prompt, ("d", "e"), prompt) for prompt in "cdefc"]
    examples, _ = encode(texts, small(), data_config(), "keep_start")
    for index, expected in {
        (1, 2): examples[1:3],
        (4, 0): examples[[4, 0]],
        (3, 4): examples[np.array([3, 4])],
        (0, 2, 4): examples[np.array([True, False, True, False, True])],
        (): examples[[]],
    }.items():
        assert isinstance(expected, Examples)
        assert expected.where == [examples.where[i] for i in index]
        for example, i in zip(expected, index, strict=True):
            np.testing.assert_array_equal(example.prompt, examples.prompts[i])
            for response, same in zip(example.responses, examples.responses[i], strict=True):
                np.testing.assert_array_equal(response, same)
    for last in (examples[-1], examples[np.int64(4)]):
        np.testing.assert_array_equal(last.prompt, examples.prompts[4])
    assert examples[:5].fingerprint == examples.fingerprint != examples[:4].fingerprint
    with pytest.raises(IndexError):
        examples[[5]]
    with pytest.raises(IndexError, match="2 booleans for 5 examples"):
        examples[np.array([True, False])]


def test_fingerprint_sees_ids_and_boundaries():
    def examples(*rows, where="here"):
        made = Examples()
        for prompt, *responses in rows:
            made.append(prompt, responses, where)
        return made

    base = examples([[1, 2], [3], [4, 5]], [[6], [7], [8]])
    same = examples([[1, 2], [3], [4, 5]], [[6], [7], [8]], where="elsewhere")
    assert base.fingerprint == same.fingerprint
    # caches are found by it, so its form is fixed: for each row the number of parts, their lengths,
    # their ids
    numbers = np.array([3, 2, 1, 2, 1, 2, 3, 4, 5, 3, 1, 1, 1, 6, 7, 8], "<i4")
    assert base.fingerprint == hashlib.sha256(numbers.tobytes()).hexdigest()
    others = [
        examples([[1, 2], [3], [4, 6]], [[6], [7], [8]]),  # an id
        examples([[1], [2, 3], [4, 5]], [[6], [7], [8]]),  # a boundary
        examples([[1, 2], [4, 5], [3]], [[6], [7], [8]]),  # sides
        examples([[6], [7], [8]], [[1, 2], [3], [4, 5]]),  # order
        examples([[1, 2], [3], [4, 5]]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


# real tokenizers


@needs_shared
@pytest.mark.parametrize(
    "name, start, empty, eos",
    [
        ("stories260k", [1], [1], 2),
        ("gpt2-tokenizer", [], [50256], 50256),
        ("pythia-tokenizer", [], [0], 0),
    ],
)
def test_encode_with_real_tokenizers(name, start, empty, eos):
    tokenizer = tokenizers.load(SHARED / name)
    text = "\n\nHuman: Hi there\n\nAssistant:"
    rows, counts = encoded(
        tokenizer, (text, (" Hello.", " Go away!")), ("", ("Once upon a time", "é 漢"))
    )
    assert [row[0] for row in rows] == [
        start + tokenizer.encode(text, add_special_tokens=False),
        empty,
    ]
    for row in rows:
        assert [part.count(eos) for part in row[1:]] == [1, 1] and all(
            part[-1] == eos for part in row[1:]
        )
    whole = rows[0][0][len(start) :] + rows[0][1][:-1]
    assert whole == tokenizer.encode(text + " Hello.", add_special_tokens=False)
    assert tokenizer.decode(whole, clean_up_tokenization_spaces=False) == text + " Hello."
    assert counts.dropped == {} and counts.boundaries == 4


@needs_shared
@pytest.mark.parametrize("name", ["stories260k", "gpt2-tokenizer"])
def test_encode_nul_with_real_tokenizers(name):
    tokenizer = tokenizers.load(SHARED / name)
    (row,), _ = encoded(tokenizer, ("a\0b\0", ("\0c", "d\0")))
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in row]
    assert texts == ["a\0b\0", "\0c", "d\0"]


@needs_shared
@pytest.mark.parametrize(
    "name, eos", [("stories260k", "</s>"), ("gpt2-tokenizer", "<|endoftext|>")]
)
def test_encode_literal_eos_with_real_tokenizers(name, eos):
    tokenizer = tokenizers.load(SHARED / name)
    (row,), _ = encoded(tokenizer, (f"p{eos}", (f" a {eos} b", f" c{eos}\n")))
    id_ = tokenizer.eos_token_id
    assert [part.count(id_) for part in row] == [1, 2, 1]
    assert row[0][-1] == row[1][-1] == row[2][-1] == id_

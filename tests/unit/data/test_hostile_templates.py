"""Chat templates that loop, write without an end, or cannot be read."""

import threading
import time

import pytest

from dpo_jax.data import chat, limits
from dpo_jax.data.chat import Chat
from tests.helpers.chat_tokenizers import make_tokenizer
from tests.helpers.rows import assistant, user

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


def chat_with(template: str) -> Chat:
    tokenizer = make_tokenizer("{{ messages[0].content }}", "<|end|>")
    tokenizer.chat_template = template
    tokenizer.name_or_path = "models/mine"
    return Chat(tokenizer)


def render(template: str) -> str:
    conversations = chat_with(template)
    conversations.check("a.jsonl row 1")
    return conversations.example([user("Hi")], [[assistant("Ho")]])


def refusal(template: str) -> str:
    with pytest.raises(ValueError) as error:
        render(template)
    return str(error.value)


@pytest.mark.parametrize(
    "body", ["", "x", "{{ i }}", "{% set k = i %}", "{% if i %}{% endif %}", "{{ messages }}"]
)
def test_templates_that_loop_are_stopped_and_named(monkeypatch, body):
    monkeypatch.setattr(chat, "RENDERING_SECONDS", 0.3)
    began = time.monotonic()
    said = refusal(LOOP.replace("BODY", body))
    assert "the chat template of models/mine has not written a conversation within 0.3 s" in said
    assert time.monotonic() - began < 5


def test_templates_that_loop_are_stopped_on_other_threads(monkeypatch):
    monkeypatch.setattr(chat, "RENDERING_SECONDS", 0.3)
    said = []
    threads = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: said.append(refusal(LOOP)), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(20)
    assert len(said) == 3 and all("models/mine has not written" in text for text in said)


def test_templates_that_write_too_much(monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_TEXT", 1000)
    said = refusal("{{ messages[0].content }}{% for i in range(5000) %}x{% endfor %}")
    assert "the chat template of models/mine writes 5,0" in said and "at most 1,000" in said


def test_templates_that_hold_too_much(monkeypatch):
    """Though they write little of it: a text that doubles takes all memory within seconds."""
    monkeypatch.setattr(chat, "RENDERING_MEMORY", 2 * 10**7)
    added = "{% set ns.held = [ns.held, 'x' * 1000 ~ i ~ j] %}"
    body = LOOP.replace("BODY", added)
    said = refusal("{% set ns = namespace(held=[]) %}{{ messages[0].content }}" + body)
    assert "of models/mine takes more than 0.02 GB of memory to write a conversation" in said


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 10 ** 10 ** 9 }}", "has a power, ** in line 1"),
        ("\n{{ 'x' * 10000000000 }}", "has the number 1e+10 in line 2"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "the chat template cannot be read"),
        ("{{ " + "1" * 5000 + " }}", "the chat template cannot be read"),
        ("{% for %}", "the chat template cannot be read"),
    ],
)
def test_templates_that_cannot_be_worked_out(template, said):
    assert said in refusal(template)


def test_what_is_done_in_time_is_left_alone():
    with limits.limited(0.3, 10**9):
        pass
    # Were the limit still on, it would end this.
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        pass


def test_an_error_within_the_time_is_its_own():
    with pytest.raises(KeyError), limits.limited(5, 10**9):
        raise KeyError("mine")

"""Which examples a row gives, for SFT and for pairs."""

import pytest

from dpo_jax.data.ledger import Filtered, Malformed
from dpo_jax.data.rows import Row
from dpo_jax.data.splits import examples_of
from tests.helpers.rows import assistant, user

CHAT = [user("q"), assistant("a"), user("r"), assistant("x")]


@pytest.mark.parametrize("turns, start", [("all", 1), ("last", 3)])
def test_conversation_for_sft(turns, start):
    (example,) = examples_of(Row([], (CHAT,)), "sft", turns, "row 1")
    assert (example.prompt, example.responses) == (CHAT[:start], (CHAT[start:],))


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

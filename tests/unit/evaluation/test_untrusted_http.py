"""Judge servers that lie: huge, endless, slow, packed, redirected and wrongly typed answers."""

import gzip
import itertools
import json
import ssl
import time
import tracemalloc

import pytest

from dpo_jax.evaluation import chat_api, untrusted_http
from dpo_jax.evaluation.judge import ChatError, compare
from tests.helpers.comparisons import LONGER_WINS, a_judge, comparisons, kept, quiet
from tests.helpers.judge_server import (
    KEY,
    JudgeServer,
    Status,
    Stream,
    always,
    answer,
    longer,
    prefers,
)


def refusal(reply, folder, **fields) -> tuple[str, int]:
    """Return the error that ends a run whose judge replies so, and the number of requests."""
    settings = a_judge(concurrency=1, **fields)
    with (
        JudgeServer(lambda *_: reply) as server,
        server.environment(),
        pytest.raises(ChatError) as error,
    ):
        compare(settings, comparisons(2), folder, quiet)
    assert KEY not in str(error.value) and kept(folder) == []
    return str(error.value), len(server.requests)


def completion(**changes) -> Status:
    """Return an answer in a server's form, with some fields changed."""
    message = dict(role="assistant", content=answer("A"))
    body = dict(
        id="one", object="chat.completion", model="judge-1", choices=[dict(message=message)]
    )
    return Status(200, json.dumps(body | changes))


def with_content(content) -> Status:
    return completion(choices=[dict(message=dict(role="assistant", content=content))])


@pytest.mark.parametrize(
    "reply",
    [
        Stream(itertools.repeat(b"x" * 65536)),
        with_content("A" * 10_000_000),
        Status(200, '{"choices": ', {"Content-Length": str(10**15)}),
        Status(500, "x" * 10_000_000),
    ],
    ids=["endless", "long", "length that lies", "long error"],
)
def test_huge_answer_takes_no_memory(reply, tmp_path, monkeypatch):
    """Nor is it asked for again, as each may have a price."""
    monkeypatch.setattr(chat_api, "RETRIES", 1)
    tracemalloc.start()
    try:
        said, requests = refusal(reply, tmp_path, timeout=2.0)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    slow = isinstance(reply, Status) and "Content-Length" in reply.headers
    assert slow or ("larger than 256 KiB" in said and requests == 1)
    # The server's own texts and openai's modules are in it, but no answer.
    assert most < 80e6


def test_packed_answer_is_not_unpacked(tmp_path):
    bomb = gzip.compress(b" " * 50_000_000)
    reply = Stream([bomb], headers={"Content-Encoding": "gzip"})
    said, requests = refusal(reply, tmp_path)
    assert "compressed ('gzip')" in said and requests == 1


def test_client_asks_for_plain_answers(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(), comparisons(), tmp_path, quiet) == LONGER_WINS
    assert server.requests[0]["headers"]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status, tmp_path):
    with JudgeServer(always("A")) as other:
        reply = Status(status, "", {"Location": other.url + "/chat/completions"})
        said, requests = refusal(reply, tmp_path)
        assert requests == 1 and not other.requests
    assert other.url in said and "set OPENAI_BASE_URL" in said


def test_slow_answer_ends_in_time(tmp_path, monkeypatch):
    """A byte now and then keeps a connection alive for ever."""
    monkeypatch.setattr(chat_api, "RETRIES", 1)
    began = time.monotonic()
    said, requests = refusal(Stream(itertools.repeat(b" "), seconds=0.05), tmp_path, timeout=0.5)
    assert "timed out" in said and requests == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "reply",
    [
        with_content(["A"]),
        with_content(dict(text="A")),
        with_content(True),
        completion(choices={}),
        completion(choices={"0": 1}),
        completion(choices="A"),
        completion(choices=[None]),
        completion(choices=None),
        completion(model=["judge"]),
        completion(model=5),
        Status(200, "[" * 100_000),
        Status(200, '{"choices": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        Status(200, "1" * 100_000),
        Status(200, "null"),
        Status(200, '"text"'),
        Status(200, '{"choices": [{"message": {"content": "\\ud800\\u0000"'),
    ],
)
def test_wrong_types_end_run(reply, tmp_path):
    said, requests = refusal(reply, tmp_path)
    assert "did not send a chat completion" in said and requests == 1


@pytest.mark.parametrize(
    "usage",
    [
        dict(prompt_tokens=-(10**9), completion_tokens=5),
        dict(prompt_tokens=5, completion_tokens=-1),
        dict(prompt_tokens=0, completion_tokens=0),
        dict(prompt_tokens=10**400, completion_tokens=5),
        dict(prompt_tokens=True, completion_tokens=True),
        dict(prompt_tokens="5", completion_tokens=5.5),
        [5, 5],
        "many",
    ],
)
def test_usage_that_lies_costs_the_most(usage, tmp_path):
    """A count below 0 would give money back; one that cannot be is not believed."""
    with JudgeServer(lambda *_: completion(usage=usage)) as server, server.environment():
        compare(a_judge(), comparisons(1), tmp_path, quiet)
    assert [row["usage"] for row in kept(tmp_path)] == [None]


def test_error_of_server_is_cut_and_printable(tmp_path):
    message = f"\x1b[2J\x1b]0;title\x07{KEY} " + "no " * 10_000
    said, _ = refusal(Status(402, dict(error=dict(message=message))), tmp_path)
    assert len(said) < 2000 and said.isascii()
    assert all(mark.isprintable() or mark == "\n" for mark in said)


def test_answer_that_repeats_key_is_kept_without(tmp_path):
    reply = Status(200, with_content(f"{KEY}\nBetter: A").body)
    with JudgeServer(lambda *_: reply) as server, server.environment():
        compare(a_judge(), comparisons(1), tmp_path, quiet)
    assert KEY not in (tmp_path / "judgements.jsonl").read_text()
    assert kept(tmp_path)[0]["answer"] == "[OPENAI_API_KEY]\nBetter: A"


def test_certificates_are_checked():
    client = untrusted_http.Client(wait=None, seconds=1.0)
    context = client._transport._pool._ssl_context
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname

"""Judges against a real server on the loopback: verdicts, failures, caps, records."""

import json
import threading
import time

import numpy as np
import pytest

from dpo_jax.evaluation import chat_api, judge
from dpo_jax.evaluation.judge import BudgetExhausted, ChatError, Comparison, compare
from tests.helpers.comparisons import LONGER_WINS, a_judge, asked, comparisons, kept, quiet
from tests.helpers.judge_server import (
    KEY,
    Drop,
    Hang,
    JudgeServer,
    Status,
    always,
    answer,
    longer,
    prefers,
    texts,
)

pytest.importorskip("openai", reason="a chat model as judge needs the extra `judge`")


@pytest.mark.parametrize("template", judge.TEMPLATES)
def test_compare_in_either_order(template, tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        found = compare(a_judge(template=template), comparisons(16), tmp_path, quiet)
    assert found == LONGER_WINS * 4
    ours_first = sum(texts(prompt)[0].startswith("ours") for prompt in server.prompts)
    assert len(server.prompts) == 16 and 3 <= ours_first <= 13
    body = server.requests[0]["body"]
    assert (body["model"], body["temperature"]) == ("judge", 0) and server.requests[0]["headers"][
        "authorization"
    ] == f"Bearer {KEY}"


def test_compare_order_by_seed_and_content(tmp_path):
    def orders(folder, rows, **fields):
        with JudgeServer(always("A")) as server, server.environment():
            compare(a_judge(**fields), rows, tmp_path / folder, quiet)
        return {asked(prompt): texts(prompt)[0].startswith("ours") for prompt in server.prompts}

    first = orders("one", comparisons(24))
    assert orders("two", comparisons(24)[::-1]) == first
    by_another_seed = orders("three", comparisons(24), seed=1)
    assert 4 < sum(by_another_seed[i] != first[i] for i in range(24)) < 20


def test_compare_judge_always_says_a(tmp_path):
    with JudgeServer(always("A")) as server, server.environment():
        both = compare(a_judge(orders=2), comparisons(24), tmp_path, quiet)
        once = compare(a_judge(), comparisons(24), tmp_path, quiet)
    assert both == ["tie"] * 24
    assert 5 <= once.count("win") <= 19 and once.count("win") + once.count("loss") == 24
    assert len(server.requests) == 48  # the one order was among the two


def test_compare_in_both_orders(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(orders=2), comparisons(8), tmp_path, quiet) == LONGER_WINS * 2
    assert len(server.requests) == 16


def test_compare_without_judge(tmp_path, monkeypatch):
    """Neither a key nor a network."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = [("same", " same\n"), ("", "text"), ("text", "  "), ("", " ")]
    assert compare(a_judge(), [Comparison("post", *row) for row in rows], tmp_path, quiet) == [
        "tie",
        "loss",
        "win",
        "tie",
    ]
    assert compare(a_judge(), [], tmp_path, quiet) == []


def test_compare_asks_equal_questions_once(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(), comparisons(4) * 5, tmp_path, quiet) == LONGER_WINS * 5
    assert len(server.requests) == 4


def test_compare_braces_in_texts(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(
            a_judge(), [Comparison("{a} {x}", "{b} {", "one two three {0}")], tmp_path, quiet
        ) == ["loss"]
    assert "{a} {x}" in server.prompts[0] and set(texts(server.prompts[0])) == {
        "{b} {",
        "one two three {0}",
    }


def test_compare_replays_without_network(tmp_path, monkeypatch):
    lines = []
    with JudgeServer(prefers(longer)) as server, server.environment():
        found = compare(a_judge(input_price=1.0), comparisons(12), tmp_path, lines.append)
    assert "judge 12/12  calls 12 (0 retried)" in lines[-1] and "spent 0.00" in lines[-1]
    content = (tmp_path / "judgements.jsonl").read_bytes()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)  # where nothing listens any more
    assert compare(a_judge(), comparisons(12), tmp_path, lines.append) == found
    assert "calls 0" in lines[-1] and "all answers were kept" in lines[-1]
    assert (tmp_path / "judgements.jsonl").read_bytes() == content
    row = json.loads(content.splitlines()[0])
    assert row["answer"] == answer("A") or row["answer"] == answer("B")
    assert row["prompt"] in server.prompts and row["order"] in ("ours, other", "other, ours")
    assert row["usage"] == dict(prompt_tokens=len(row["prompt"].split()), completion_tokens=5)
    for other in (
        dict(model="another"),
        dict(temperature=0.5),
        dict(template="summary_simple"),
        dict(orders=2),
    ):
        with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
            compare(a_judge(**other), comparisons(12), tmp_path, quiet)


def test_compare_asks_again_if_unreadable(tmp_path):
    def behave(prompt, times):
        if asked(prompt) == 0 or (asked(prompt) == 1 and times < 2):
            return ["Both are fine.", "Better: A or B", ""][times]
        return prefers(longer)(prompt, times)

    with JudgeServer(behave) as server, server.environment():
        assert compare(a_judge(), comparisons(), tmp_path, quiet) == [None, *LONGER_WINS[1:]]
        assert sorted(map(asked, server.prompts)) == [0, 0, 0, 1, 1, 1, 2, 3]
        assert compare(a_judge(), comparisons(), tmp_path, quiet) == [None, *LONGER_WINS[1:]]
    assert len(server.requests) == 8 and sorted(row["attempt"] for row in kept(tmp_path)) == [
        0
    ] * 4 + [1, 1, 2, 2]


def test_compare_one_unreadable_order(tmp_path):
    def behave(prompt, _times):
        return answer("A") if texts(prompt)[0].startswith("ours") else "no"

    with JudgeServer(behave) as server, server.environment():
        assert compare(a_judge(orders=2), comparisons(1), tmp_path, quiet) == [None]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Comparison: a is longer.\nBetter: A", "A"),
        ("Better: B", "B"),
        ("B", "B"),
        ("**Better:** *B*.\n\n", "B"),
        ('Comparison: x\r\nPreferred: "A"', "A"),
        ("More helpful: <B>", "B"),
        ("### Better: “B”", "B"),
        ("Better: C", None),
        ("Better: A or B", None),
        ("Better: a", None),
        ("Better: AB", None),
        ("", None),
        ("A is better", None),
        ("Better: A\nBetter: B", None),
        ("Better: A\nThank you.", None),
        ("Better: B\nBetter: B", "B"),
        ("Better: A/B", None),
        ("Better: not A", None),
        ("I choose A", None),
        ("Better:\nA", "A"),
        ("Better: Summary A", "A"),
        ("**Response B**", "B"),
        ("Preferred: reply B.", "B"),
        ("Summary A\nIt is short.\nSummary B\nIt is long.\nBetter: Summary A", "A"),
        ("Better: Post A", None),
        ("Better: Summary A\nBetter: B", None),
        ("Worse: A", None),
        ("The worse one: Answer A", None),
        ("Not better: A", None),
        ("Worse: A\nBetter: B", "B"),
        ("Note: A", "A"),
    ],
)
def test_read_choice_is_strict(text, expected):
    assert judge.read_choice(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("{prompt} {a}", r"placeholders {a}, {prompt}; expected {prompt}, {a} and {b}"),
        ("{prompt} {a} {b} {post}", "{post}"),
        ("{prompt} {a!r} {b}", "{a!r}"),
        ("{prompt} {a:>9} {b}", "{a:>9}"),
        ("nothing", "(none)"),
        ("{prompt} {a} {b} {", "Write {{ and }} for literal braces"),
        ("{} {prompt} {a} {b}", "{}"),
    ],
)
def test_read_template_checks_file(text, message, tmp_path):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        a_judge(template=str(tmp_path / "mine.txt"))
    assert message in str(error.value) and "mine.txt" in str(error.value)


def test_read_template_as_it_is(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('{{"q": {prompt}}} first={a} second={b}')

    def behave(prompt, _times):
        first, second = prompt.split("first=")[1].split(" second=")
        return "A" if longer(first) > longer(second) else "B"

    with JudgeServer(behave) as server, server.environment():
        assert compare(a_judge(template=str(path)), comparisons(), tmp_path, quiet) == LONGER_WINS
    assert server.prompts[0].startswith('{"q": post ')


def test_read_template_missing():
    with pytest.raises(
        ValueError, match="'sumary' is neither a file nor one of summary_simple, summary_concise, "
    ):
        a_judge(template="sumary")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(orders=3), "orders=3"),
        (dict(concurrency=0), "concurrency=0"),
        (dict(timeout=0), "timeout=0"),
        (dict(temperature=3.0), "temperature"),
        (dict(max_calls=-1), "max_calls"),
        (dict(model=""), "model"),
        (dict(requests_per_minute=0), "requests_per_minute"),
        (dict(max_cost=-1.0, input_price=1.0), "max_cost"),
        (dict(max_cost=5.0), "max_cost=5 needs input_price and output_price"),
        (dict(input_price=-1.0), "input_price"),
    ],
)
def test_judge_checks_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        a_judge(**fields)


def test_compare_retries_failures(tmp_path):
    """Too many requests, a server's fault, a hang, a dropped connection: each once, then an
    answer.
    """
    faults = [
        Status(429, dict(error=dict(message="slow down")), {"Retry-After": "0.8"}),
        Status(500, "oops"),
        Hang(),
        Drop(),
    ]
    lines = []

    def behave(prompt, times):
        return prefers(longer)(prompt, times) if times else faults[asked(prompt)]

    with JudgeServer(behave) as server, server.environment():
        assert compare(a_judge(timeout=1.5), comparisons(), tmp_path, lines.append) == LONGER_WINS
    assert (
        sorted(map(asked, server.prompts)) == [0, 0, 1, 1, 2, 2, 3, 3] and len(kept(tmp_path)) == 4
    )
    first, second = [
        request["time"] for request in server.requests if asked(request["prompt"]) == 0
    ]
    # What Retry-After asks for; without it the first wait is 0.5 s at most.
    assert second - first >= 0.8
    assert "calls 4 (4 retried)" in lines[-1]


def test_compare_ends_at_lasting_failure(tmp_path):
    refusal = Status(402, dict(error=dict(message="no credit")))

    def behave(prompt, times):
        return refusal if asked(prompt) == 9 else prefers(longer)(prompt, times)

    with JudgeServer(behave) as server, server.environment(), pytest.raises(ChatError) as error:
        compare(a_judge(concurrency=3), comparisons(20), tmp_path, quiet)
    assert "no credit" in str(error.value) and "answers are kept in" in str(error.value)
    first = set(server.prompts)
    assert len(kept(tmp_path)) == len(first) - 1 >= 9
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(), comparisons(20), tmp_path, quiet) == LONGER_WINS * 5
    assert [asked(prompt) for prompt in server.prompts if prompt in first] == [9]


@pytest.mark.parametrize("status", chat_api.REFUSALS)
def test_compare_counts_refused_questions(status, tmp_path, monkeypatch):
    """The first of all too; it is asked once, costs nothing, and the others go on."""

    def behave(prompt, times):
        refusal = Status(status, dict(error=dict(message=f"too long, {KEY}")))
        return refusal if asked(prompt) in (0, 5, 19) else prefers(longer)(prompt, times)

    expected = [None if i in (0, 5, 19) else verdict for i, verdict in enumerate(LONGER_WINS * 5)]
    lines = []
    with JudgeServer(behave) as server, server.environment():
        settings = a_judge(concurrency=1, max_calls=18)  # refusals are no answers
        assert compare(settings, comparisons(20), tmp_path, lines.append) == expected
    # The last waits for the end.
    assert len(server.requests) == 20 and "calls 17 (0 retried)  2 refused" in lines[-1]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert compare(settings, comparisons(20), tmp_path, quiet) == expected
    found = judge.write_verdicts(tmp_path / "verdicts.json", settings, expected, tmp_path)
    assert (found["unparsable"], found["n"], found["served_by"]) == (3, 17, ["judge-0001"])
    refused = [row for row in kept(tmp_path) if row["answer"] is None]
    assert len(refused) == 3 and all(
        "too long" in row["refused"] and KEY not in row["refused"] for row in refused
    )


@pytest.mark.parametrize("answers", [0, 10])
def test_compare_ends_if_all_refused(answers, tmp_path):
    """Nothing of it is kept, as the questions are not at fault; nor where it begins to after some
    answers.
    """
    refusal = Status(400, dict(error=dict(message="no such option")))

    def behave(prompt, times):
        return prefers(longer)(prompt, times) if asked(prompt) < answers else refusal

    with (
        JudgeServer(behave) as server,
        server.environment(),
        pytest.raises(ChatError, match="no such option"),
    ):
        compare(a_judge(concurrency=1), comparisons(60), tmp_path, quiet)
    assert (
        len(kept(tmp_path)) == answers and len(server.requests) == answers + chat_api.MOST_REFUSALS
    )


def test_compare_without_server(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_api, "RETRIES", 1)
    with JudgeServer(always("A")) as server:
        pass  # it is there, and closed again: its port is nobody's
    with (
        server.environment(),
        pytest.raises(ChatError, match="no answer from 127.0.0.1:.*Connection error"),
    ):
        compare(a_judge(), comparisons(2), tmp_path, quiet)


def test_compare_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_api, "RETRIES", 1)
    with (
        JudgeServer(lambda *_: Hang()) as server,
        server.environment(),
        pytest.raises(ChatError, match="timed out"),
    ):
        compare(a_judge(timeout=0.3), comparisons(1), tmp_path, quiet)


@pytest.mark.parametrize(
    "reply",
    [
        Status(200, "<html>Welcome</html>", {"Content-Type": "text/html"}),
        Status(200, '{"choices": []}'),
        Status(200, '{"object": "list"}'),
        Status(200, '{"choices": [{"message": {"content": 5}}]}'),
    ],
)
def test_compare_with_no_chat_endpoint(reply, tmp_path):
    with (
        JudgeServer(lambda *_: reply) as server,
        server.environment(),
        pytest.raises(ChatError, match="OPENAI_BASE"),
    ):
        compare(a_judge(), comparisons(2), tmp_path, quiet)


@pytest.mark.parametrize("status", [401, 403, 404, 400, 422])
def test_errors_never_show_key(status, tmp_path):
    reply = Status(status, dict(error=dict(message=f"Incorrect API key provided: {KEY}", code=KEY)))
    with (
        JudgeServer(lambda *_: reply) as server,
        server.environment(),
        pytest.raises(ChatError) as error,
    ):
        compare(a_judge(), comparisons(2), tmp_path, quiet)
    assert KEY not in str(error.value) and str(status) in str(error.value)
    assert error.value.__context__ is None and error.value.__cause__ is None
    assert "OPENAI_API_KEY" in str(error.value) or "judge" in str(error.value)
    assert KEY.encode() not in (tmp_path / "judgements.jsonl").read_bytes()


@pytest.mark.parametrize(
    "key, message",
    [
        ("", "OPENAI_API_KEY is not set.*http://localhost"),
        ("  \n", "not set"),
        ("sk-café-0123456789", "Copy it again"),
        ("sk-one\x07two-0123456", "Copy it again"),
    ],
)
def test_api_key_that_cannot_be_sent(key, message, tmp_path):
    with (
        JudgeServer(always("A")) as server,
        server.environment(key),
        pytest.raises(ValueError, match=message) as error,
    ):
        compare(a_judge(), comparisons(1), tmp_path, quiet)
    assert not key.strip() or key not in str(error.value)


def test_api_key_with_newline(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment(KEY + "\n"):
        assert compare(a_judge(), comparisons(), tmp_path, quiet) == LONGER_WINS


def test_max_calls_is_never_passed(tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        for cap, already in [(5, 0), (5, 5), (9, 5)]:  # what earlier runs kept counts
            with pytest.raises(
                BudgetExhausted, match=f"max_calls={cap} is reached: {cap} answers are kept"
            ):
                compare(a_judge(max_calls=cap), comparisons(20), tmp_path, quiet)
            assert len(server.requests) == len(kept(tmp_path)) == cap >= already
        assert compare(a_judge(max_calls=20), comparisons(20), tmp_path, quiet) == LONGER_WINS * 5
    assert len(server.requests) == 20


@pytest.mark.parametrize("usage", [True, False])
def test_max_cost_is_never_passed(usage, tmp_path):
    """One that is not told what a call cost takes the most that it can have cost."""
    prices = dict(input_price=1000.0, output_price=100.0)
    stopped = pytest.raises(
        BudgetExhausted, match="max_cost=2.5 could be passed by the next call, of up to 0.[67]"
    )
    with JudgeServer(prefers(longer), usage=usage) as server, server.environment(), stopped:
        compare(a_judge(max_cost=2.5, **prices), comparisons(30), tmp_path, quiet)
    rows = kept(tmp_path)
    # A token for each byte.
    most = [(len(row["prompt"].encode()) + 64) * 1000 / 1e6 + 1024 * 100 / 1e6 for row in rows]
    if usage:
        spent = sum((len(row["prompt"].split()) * 1000 + 5 * 100) / 1e6 for row in rows)
        assert 2.5 - 1.05 * max(most) < spent <= 2.5
    else:
        assert len(rows) == 3 and sum(most) < 2.5 < sum(most) + min(most)
    assert len(rows) == len(server.requests) < 30


def test_requests_and_retries_are_paced(tmp_path):
    def behave(prompt, times):
        return prefers(longer)(prompt, times) if times else Status(500, "", {"Retry-After": "0.01"})

    with JudgeServer(behave) as server, server.environment():
        compare(a_judge(requests_per_minute=120.0), comparisons(4), tmp_path, quiet)
    times = [request["time"] for request in server.requests]
    assert len(times) == 8 and times[-1] - times[0] > 7 * 0.5 - 0.2


def test_concurrency_is_bounded(tmp_path):
    at_once, most, lock = 0, 0, threading.Lock()

    def behave(prompt, times):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return prefers(longer)(prompt, times)

    with JudgeServer(behave) as server, server.environment():
        compare(a_judge(concurrency=3), comparisons(18), tmp_path, quiet)
    assert most == 3


UNCOUNTED = '{"key": "1", "prompt": "", "answer": "", "usage": {"prompt_tokens": "x"}}'


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "1"}', "", UNCOUNTED])
def test_read_names_broken_line(line, tmp_path):
    with JudgeServer(prefers(longer)) as server, server.environment():
        compare(a_judge(), comparisons(), tmp_path, quiet)
    path = tmp_path / "judgements.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:], ""]))
    content = path.read_bytes()
    with pytest.raises(ValueError, match="judgements.jsonl line 2 is not a kept call"):
        compare(a_judge(), comparisons(), tmp_path, quiet)
    assert path.read_bytes() == content


def test_read_names_a_changed_verdict(tmp_path):
    """A flipped letter would be a win rate that no judge gave."""
    with JudgeServer(prefers(longer)) as server, server.environment():
        compare(a_judge(), comparisons(), tmp_path, quiet)
    path = tmp_path / "judgements.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    letter = json.loads(lines[1])["answer"][-1]
    other = "B" if letter == "A" else "A"
    changed = lines[1].replace(f'Better: {letter}"', f'Better: {other}"')
    assert changed != lines[1]
    path.write_text("".join([lines[0], changed, *lines[2:]]))
    with pytest.raises(ValueError, match="judgements.jsonl line 2 is .*not what was written"):
        compare(a_judge(), comparisons(), tmp_path, quiet)
    # Without it, that question alone is asked again.
    path.write_text("".join([lines[0], *lines[2:]]))
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(), comparisons(), tmp_path, quiet) == LONGER_WINS
    assert len(server.requests) == 1


def test_answers_kept_by_an_earlier_version(tmp_path):
    """They have no sha256, and are used as they are."""
    with JudgeServer(prefers(longer)) as server, server.environment():
        compare(a_judge(), comparisons(), tmp_path, quiet)
    path = tmp_path / "judgements.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("sha256") for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(a_judge(), comparisons(), tmp_path, quiet) == LONGER_WINS


def test_compare_by_reward():
    def reward(prompts, completions, tokens):
        assert tokens is None and len(prompts) == len(completions) == 12
        return np.array(
            [
                len(prompt) * float(text.split()[0]) if text else 9.0
                for prompt, text in zip(prompts, completions, strict=True)
            ]
        )

    rows = [("1", "2"), ("3", "2.5"), ("2", "2.0"), ("-1", "-1.5"), ("", "1"), ("7 x", "7 x ")]
    assert judge.compare_by_reward(reward, [Comparison("p", *row) for row in rows]) == [
        "loss",
        "win",
        "tie",
        "win",
        "loss",
        "tie",
    ]
    with pytest.raises(ValueError, match="comparison 1 is not finite"):
        judge.compare_by_reward(
            lambda prompts, *_: np.array([1, 2, 3, np.nan]), [Comparison("p", "a", "b")] * 2
        )
    assert judge.compare_by_reward(lambda *_: np.zeros(0), []) == []


def test_votes_of_both_orders(tmp_path):
    """A judge of positions says A twice, which makes a tie; each vote has its cost."""
    settings = a_judge(orders=2, input_price=1e6, output_price=0.0)
    rows = [*comparisons(1), Comparison("post", "x", "x")]
    with JudgeServer(always("A")) as server, server.environment():
        (asked_both, no_call) = judge.vote(settings, rows, tmp_path, quiet)
    assert [(vote.order, vote.verdict) for vote in asked_both] == [
        ("ours, other", "win"),
        ("other, ours", "loss"),
    ]
    assert judge.combined(asked_both) == "tie" == judge.combined(no_call)
    for vote, prompt in zip(asked_both, sorted(server.prompts), strict=True):
        assert (vote.answer, vote.calls, vote.cost) == (answer("A"), 1, len(prompt.split()))
    assert no_call == (judge.Vote("", "tie"),)


def test_vote_that_cannot_be_read(tmp_path):
    with JudgeServer(lambda *_: "Both are fine.") as server, server.environment():
        ((vote,),) = judge.vote(a_judge(), comparisons(1), tmp_path, quiet)
    assert (vote.verdict, vote.answer, vote.calls) == (None, "Both are fine.", judge.ATTEMPTS)


def test_write_verdicts_record(tmp_path):
    settings = a_judge(seed=3, template="summary_simple")
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    with JudgeServer(prefers(longer)) as server, server.environment():
        compare(a_judge(model="another"), comparisons(), tmp_path, quiet)
        verdicts = compare(
            settings, [*comparisons(3), Comparison("post", "x", "x")], tmp_path, quiet
        )
    found = judge.write_verdicts(tmp_path / "verdicts.json", settings, verdicts, tmp_path)
    assert json.loads((tmp_path / "verdicts.json").read_text()) == found
    assert (found["judge"], found["served_by"], found["template"]) == (
        "judge",
        ["judge-0001"],
        "summary_simple",
    )
    assert (found["orders"], found["seed"], found["temperature"], found["rate"]) == (
        1,
        3,
        0.0,
        1.5 / 4,
    )
    assert (found["wins"], found["ties"], found["losses"], found["unparsable"]) == (1, 1, 2, 0)
    assert (
        found["verdicts"] == ["loss", "win", "loss", "tie"] and found["low"] < 0.375 < found["high"]
    )
    assert began <= found["asked_from"] <= found["asked_to"] <= found["written"]
    import hashlib

    assert (
        found["template_sha256"]
        == hashlib.sha256(judge.TEMPLATES["summary_simple"].encode()).hexdigest()
    )
    assert not list(tmp_path.glob("*.draft"))


def test_news_template_speaks_of_articles():
    news, forum = judge.TEMPLATES["news_concise"], judge.TEMPLATES["summary_concise"]
    assert (
        "post" not in news
        and "forum" not in news
        and news.count("article") == forum.count("post") == 3
    )

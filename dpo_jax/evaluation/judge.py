"""Which of two answers is better, by a chat model or by a reward.

A judge reads a template with the prompt and the answers, A and B, and ends on a letter. Which of
ours and the other's is A is drawn for each comparison from its content and the seed, so neither its
place in a list nor a resumed run changes it; with orders=2 both ways are asked, and a judge that
contradicts itself gives a tie.

Without a call: equal answers are a tie, and an empty answer loses. No jax here.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import string
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from dpo_jax.evaluation import chat_api, winrate_stats
from dpo_jax.evaluation.chat_api import BudgetExhausted, ChatError

__all__ = [
    "BudgetExhausted",
    "ChatError",
    "Comparison",
    "Judge",
    "compare",
    "compare_by_reward",
    "define_flags",
    "write_verdicts",
]

JUDGEMENTS = "judgements.jsonl"
ATTEMPTS = 3  # times that a question is asked until the answer can be read
ORDERS = ("ours, other", "other, ours")  # A, B
PROGRESS_SECONDS = 10.0
_CHOICE = re.compile(
    r"\s*(?P<label>(?!(?i:[a-z ]*\b(?:worse|not)\b))[A-Za-z][A-Za-z ]*:)?"
    r"\s*(?P<noun>(?i:summary|response|answer|reply)\s+)?(?P<letter>[AB])\s*\.?\s*"
)

_FORM = """\
Answer in two lines, in this form:
Comparison: <one sentence on how the two differ>
Better: <A or B, the letter alone>
"""
_SUMMARIES = """\
{prompt}

Summary A:
{a}

Summary B:
{b}

"""
_SIMPLE = """\
Below are a forum post and two summaries of it. Judge which summary tells more of what matters \
most in the post.

Forum post:
"""
_CONCISE = """\
Below are a forum post and two summaries of it. Judge which summary is better. A summary should \
hold what matters most in the post, and it should hold nothing else: details that a reader could \
do without count against it. Between two that say as much, take the one that says it exactly and \
in few words.

Forum post:
"""
_NEWS = (
    _CONCISE.replace("Forum post", "News article")
    .replace("forum post", "news article")
    .replace("in the post", "in the article")
)
_DIALOGUE = """\
Below are a conversation with an assistant and two replies that the assistant could give next. \
Judge which reply is of more help to the user.

Conversation:
{prompt}

Reply A:
{a}

Reply B:
{b}

"""
# The paper's questions (appendix C.2), in our words.
TEMPLATES = {
    "summary_simple": _SIMPLE + _SUMMARIES + _FORM,
    "summary_concise": _CONCISE + _SUMMARIES + _FORM,
    "news_concise": _NEWS + _SUMMARIES + _FORM,
    "dialogue": _DIALOGUE + _FORM,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One question: is `ours` better than `other` as an answer to `prompt`?"""

    prompt: str
    ours: str
    other: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(chat_api.Endpoint):
    """A chat model with a question; the other fields are of chat_api.Endpoint."""

    # a name in TEMPLATES, or a file with {prompt}, {a} and {b}, whose answers end on a letter
    template: str
    orders: int = 1  # 2: both, and where they disagree it is a tie
    seed: int = 0  # of the order, where it is one

    def __post_init__(self):
        super().__post_init__()
        if self.orders not in (1, 2):
            raise ValueError(f"orders={self.orders!r}: expected 1 or 2.")
        read_template(self.template)


def _print(line: str) -> None:
    print(line, flush=True)


def compare(
    judge: Judge,
    comparisons: list[Comparison],
    folder: pathlib.Path,
    progress: Callable[[str], None] = _print,
) -> list[str | None]:
    """Verdict of each comparison: "win" (ours), "tie", "loss", or None where no answer could be
    read or the endpoint refused the question.

    Calls are kept in folder/judgements.jsonl, and what is there is not asked again: neither network
    nor key is needed where all is. progress: is given a line now and then. Raises BudgetExhausted
    before a call that could pass a cap, and ChatError where the endpoint fails, both after the
    calls under way are kept.
    """
    plain = [
        Comparison(*(text.strip() for text in dataclasses.astuple(comparison)))
        for comparison in comparisons
    ]
    asked = dict.fromkeys(comparison for comparison in plain if _without_call(comparison) is None)
    questions = [
        (comparison, order) for comparison in asked for order in _orders(judge, comparison)
    ]
    found = asyncio.run(_ask_all(judge, questions, pathlib.Path(folder) / JUDGEMENTS, progress))
    return [
        _without_call(comparison)
        or _together([found[comparison, order] for order in _orders(judge, comparison)])
        for comparison in plain
    ]


def compare_by_reward(reward: Callable, comparisons: list[Comparison]) -> list[str]:
    """The same verdicts by a reward of dpo_jax/rewards.py that reads texts: the higher is better,
    equal ones tie.
    """
    prompts = [comparison.prompt for comparison in comparisons]
    texts = [comparison.ours for comparison in comparisons] + [
        comparison.other for comparison in comparisons
    ]
    rewards_N2 = np.reshape(reward(prompts * 2, texts, None), (2, -1)).T
    if not np.isfinite(rewards_N2).all():
        raise ValueError(
            f"the reward of comparison {np.argwhere(~np.isfinite(rewards_N2))[0][0]} is not finite."
        )
    return [
        _without_call(comparison) or ("win" if ours > other else "loss" if ours < other else "tie")
        for comparison, (ours, other) in zip(comparisons, rewards_N2, strict=True)
    ]


def write_verdicts(
    path: pathlib.Path, judge: Judge, verdicts: list[str | None], folder: pathlib.Path
) -> dict:
    """Writes, and returns, what was judged, by whom and when, with the win rate and each verdict.

    folder: that of `compare`, whose calls say when they were made and which model served them.
    """
    template = _digest(read_template(judge.template))
    calls = [
        row
        for row in chat_api.read(pathlib.Path(folder) / JUDGEMENTS)
        if (row["model"], row["temperature"], row["template"])
        == (judge.model, judge.temperature, template)
    ]
    dates = sorted(row["date"] for row in calls)
    result = dict(
        judge=judge.model,
        served_by=sorted({row["served_by"] for row in calls if row["answer"] is not None}),
        template=judge.template,
        template_sha256=template,
        temperature=judge.temperature,
        orders=judge.orders,
        seed=judge.seed,
        asked_from=dates[0] if dates else None,
        asked_to=dates[-1] if dates else None,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        **winrate_stats.win_rate(verdicts),
        verdicts=verdicts,
    )
    draft = pathlib.Path(path).with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)
    return result


def read_template(name: str) -> str:
    """The text of a template by name or file; ValueError where it has not {prompt}, {a} and {b},
    and nothing else.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not pathlib.Path(name).is_file():
        raise ValueError(f"template={name!r} is no file, and none of {', '.join(TEMPLATES)}.")
    text = pathlib.Path(name).read_text()
    try:
        fields = {
            "{" + field + (f"!{change}" if change else "") + (f":{form}" if form else "") + "}"
            for _, field, form, change in string.Formatter().parse(text)
            if field is not None
        }
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}; write {{{{ and }}}} for braces that are meant as such."
        ) from None
    if fields != {"{prompt}", "{a}", "{b}"}:
        raise ValueError(
            f"{name} has the placeholders {', '.join(sorted(fields)) or '(none)'}; expected {{prompt}}, "
            "{a} and {b}, and {{ and }} for braces that are meant as such."
        )
    return text


def read_choice(answer: str) -> str | None:
    """ "A" or "B" where the last line is that letter, after a label such as "Better:" or alone, and
    no line before says the other; else None. Quotes, brackets and Markdown's stars do not matter;
    "Summary A" is A, and nothing is read after "worse" or "not".
    """
    lines = [
        line for line in re.sub(r"[*_`\"'“”‘’()\[\]<>#]", "", answer).splitlines() if line.strip()
    ]
    choices = [_CHOICE.fullmatch(line) for line in lines]
    headings = [
        choice for choice in choices[:-1] if choice and choice["noun"] and not choice["label"]
    ]
    letters = {choice["letter"] for choice in choices if choice and choice not in headings}
    return letters.pop() if choices and choices[-1] and len(letters) == 1 else None


async def _ask_all(judge: Judge, questions: list, path: pathlib.Path, show: Callable) -> dict:
    """(comparison, order) -> verdict. A failure ends it once the calls under way have ended."""
    template, waiting, found = read_template(judge.template), collections.deque(questions), {}
    async with chat_api.opened(judge, path) as calls:
        report = _Report(show, calls, len(questions), bool(judge.input_price or judge.output_price))

        async def work():
            while waiting:
                comparison, order = waiting.popleft()
                try:
                    found[comparison, order] = await _ask(calls, template, comparison, order)
                except (
                    Exception
                ):  # whatever it is, nobody takes another question; `gather` brings it up
                    waiting.clear()
                    raise
                report(len(found))

        failures = await asyncio.gather(
            *(work() for _ in range(judge.concurrency)), return_exceptions=True
        )
        for failure in filter(None, failures):
            raise failure
    return found


async def _ask(
    calls: chat_api.Calls, template: str, comparison: Comparison, order: str
) -> str | None:
    """The verdict in one order; None after answers that cannot be read, or a refusal."""
    ours_first = order == ORDERS[0]
    a, b = (
        (comparison.ours, comparison.other) if ours_first else (comparison.other, comparison.ours)
    )
    prompt = template.format(prompt=comparison.prompt, a=a, b=b)
    for attempt in range(ATTEMPTS):
        answer = await calls.ask(prompt, template=_digest(template), order=order, attempt=attempt)
        if answer is None:
            return None
        if choice := read_choice(answer):
            return "win" if (choice == "A") == ours_first else "loss"
    return None


class _Report:
    """A line now and then: how far, calls, their rate, time left, spend."""

    def __init__(
        self, show: Callable[[str], None], calls: chat_api.Calls, total: int, priced: bool
    ):
        self._show, self._calls, self._total, self._priced = show, calls, total, priced
        self._began = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now, calls = time.monotonic(), self._calls
        if done < self._total and now - self._last < PROGRESS_SECONDS:
            return
        self._last, rate = now, calls.new / max(now - self._began, 1e-9)
        left = (
            f"{tqdm.format_interval((self._total - done) / rate)} left" if rate else "all were kept"
        )
        refused = f"  {calls.refused} refused" * bool(calls.refused)
        spend = f"  spent {calls.spent:.4f}" if self._priced else ""
        self._show(
            f"judge {done}/{self._total}  calls {calls.new} ({calls.retries} retried){refused}  {rate:.1f}/s"
            f"{spend}  {left}"
        )


def _orders(judge: Judge, comparison: Comparison) -> tuple[str, ...]:
    """In which order, or orders, a comparison is asked."""
    if judge.orders == 2:
        return ORDERS
    return (
        ORDERS[int(_digest(json.dumps([judge.seed, *dataclasses.astuple(comparison)])), 16) % 2],
    )


def _without_call(comparison: Comparison) -> str | None:
    """A verdict that needs no judge."""
    ours, other = comparison.ours.strip(), comparison.other.strip()
    if ours == other:
        return "tie"
    return "loss" if not ours else "win" if not other else None


def _together(verdicts: list[str | None]) -> str | None:
    """One verdict from those in each order."""
    if None in verdicts:
        return None
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def define_flags() -> Callable[..., Judge]:
    """Defines the flags of a command that judges; the result, once they are parsed, makes a Judge
    of them.

    The result takes the fields that have no flag, or another value: model, template.
    """
    from absl import flags

    holders = dict(
        temperature=flags.DEFINE_float(
            "judge_temperature", Judge.temperature, "Of the judge's own sampling."
        ),
        orders=flags.DEFINE_integer(
            "orders", Judge.orders, "1: A and B at random; 2: both, disagreement is a tie."
        ),
        seed=flags.DEFINE_integer("judge_seed", Judge.seed, "Of the order."),
        concurrency=flags.DEFINE_integer(
            "concurrency", Judge.concurrency, "Calls under way at a time."
        ),
        requests_per_minute=flags.DEFINE_float(
            "requests_per_minute", None, "At most; default: no limit."
        ),
        timeout=flags.DEFINE_float(
            "timeout", Judge.timeout, "Seconds until a request that hangs is made again."
        ),
        max_calls=flags.DEFINE_integer(
            "max_calls", None, "Stop before more answers are kept; default: no cap."
        ),
        max_cost=flags.DEFINE_float(
            "max_cost", None, "Stop before all kept cost more; default: no cap."
        ),
        input_price=flags.DEFINE_float("input_price", Judge.input_price, "Per million tokens."),
        output_price=flags.DEFINE_float("output_price", Judge.output_price, "Per million tokens."),
    )
    return lambda **fields: Judge(
        **{name: holder.value for name, holder in holders.items()} | fields
    )

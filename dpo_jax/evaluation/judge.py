"""Judge which of two answers is better, by a chat model or by a reward.

A judge reads a template with the prompt and the answers A and B, and ends with a letter. Whether
ours or the other answer is A is drawn for each comparison from its content and the seed, so neither
its place in a list nor a resumed run changes it. With orders=2 both ways are asked, and a judge
that contradicts itself gives a tie.

Two cases need no call: equal answers tie, and an empty answer loses. This file imports no jax.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import string
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from dpo_jax.evaluation import chat_api, winrate_stats
from dpo_jax.evaluation.chat_api import BudgetExhausted, ChatError
from dpo_jax.whole_file import whole_file

__all__ = [
    "BudgetExhausted",
    "ChatError",
    "Comparison",
    "Judge",
    "Vote",
    "combined",
    "compare",
    "compare_by_reward",
    "define_flags",
    "vote",
    "write_verdicts",
]

JUDGEMENTS = "judgements.jsonl"
ATTEMPTS = 3  # how often a question is asked until the answer can be read
ORDERS = ("ours, other", "other, ours")  # which is A, which is B
PROGRESS_SECONDS = 10.0
# A line such as "Better: A", "Summary B" or "A."; labels such as "Worse:" do not count.
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


@dataclasses.dataclass(frozen=True)
class Vote:
    """The verdict on a comparison in one order, and how it came about."""

    order: str  # one of ORDERS; "" where no call was needed
    verdict: str | None
    answer: str = ""  # the judge's last words, whatever could be read of them
    calls: int = 0  # questions asked until an answer could be read
    cost: float = 0.0  # of these calls, by the judge's prices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(chat_api.Endpoint):
    """A chat model with a question to ask; other fields are in chat_api.Endpoint."""

    # A name in TEMPLATES, or a file with {prompt}, {a} and {b} whose answers end with a letter.
    template: str
    orders: int = 1  # 1: one order, drawn; 2: both, and a tie if they disagree
    seed: int = 0  # of the drawn order

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
    """Return the verdict of each comparison: "win" (for ours), "tie", "loss" or None.

    It is `combined` of what `vote` returns and raises.
    """
    return [combined(votes) for votes in vote(judge, comparisons, folder, progress)]


def vote(
    judge: Judge,
    comparisons: list[Comparison],
    folder: pathlib.Path,
    progress: Callable[[str], None] = _print,
) -> list[tuple[Vote, ...]]:
    """Return the votes on each comparison: one, or with judge.orders=2 one in each order.

    A verdict of None means that no answer could be read, or that the endpoint refused the question.
    Equal comparisons share their votes, which are paid for once. Calls are kept in
    folder/judgements.jsonl and not made again, so neither network nor key is needed if all are
    there. progress: called with a line now and then. Raises BudgetExhausted before a call that
    could pass a cap, and ChatError if the endpoint fails; calls in flight are kept first.
    """
    stripped = []
    for comparison in comparisons:
        texts = (text.strip() for text in dataclasses.astuple(comparison))
        stripped.append(Comparison(*texts))
    questions = []
    for comparison in dict.fromkeys(stripped):  # equal comparisons are asked once
        if _without_call(comparison) is None:
            questions += [(comparison, order) for order in _orders(judge, comparison)]
    found = asyncio.run(_ask_all(judge, questions, pathlib.Path(folder) / JUDGEMENTS, progress))
    votes = []
    for comparison in stripped:
        verdict = _without_call(comparison)
        if verdict is None:
            orders = _orders(judge, comparison)
            votes.append(tuple(found[comparison, order] for order in orders))
        else:
            votes.append((Vote("", verdict),))
    return votes


def compare_by_reward(reward: Callable, comparisons: list[Comparison]) -> list[str]:
    """Return verdicts by a reward that reads texts: the higher reward wins, equal ones tie.

    reward: as made by rewards/make.py. Raises ValueError if a reward is not finite.
    """
    prompts = [comparison.prompt for comparison in comparisons]
    ours = [comparison.ours for comparison in comparisons]
    others = [comparison.other for comparison in comparisons]
    rewards_N2 = np.reshape(reward(prompts * 2, ours + others, None), (2, -1)).T
    if not np.isfinite(rewards_N2).all():
        first = np.argwhere(~np.isfinite(rewards_N2))[0][0]
        raise ValueError(f"the reward of comparison {first} is not finite.")
    verdicts = []
    for comparison, (our_reward, other_reward) in zip(comparisons, rewards_N2, strict=True):
        verdict = _without_call(comparison)
        if verdict is None and our_reward == other_reward:
            verdict = "tie"
        elif verdict is None:
            verdict = "win" if our_reward > other_reward else "loss"
        verdicts.append(verdict)
    return verdicts


def write_verdicts(
    path: pathlib.Path, judge: Judge, verdicts: list[str | None], folder: pathlib.Path
) -> dict:
    """Write and return the verdicts and the win rate, with who judged and when.

    folder: that of `compare`, whose calls say when they were made and which model served them.
    """
    template = _digest(read_template(judge.template))
    asked = (judge.model, judge.temperature, template)
    calls = []
    for row in chat_api.read(pathlib.Path(folder) / JUDGEMENTS):
        if (row["model"], row["temperature"], row["template"]) == asked:
            calls.append(row)
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
    with whole_file(path) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n")
    return result


def read_template(name: str) -> str:
    """Return the text of a template, by name or file.

    Raises ValueError unless its placeholders are exactly {prompt}, {a} and {b}.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not pathlib.Path(name).is_file():
        raise ValueError(f"template={name!r} is neither a file nor one of {', '.join(TEMPLATES)}.")
    text = pathlib.Path(name).read_text()
    try:
        fields = _placeholders(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Write {{{{ and }}}} for literal braces.") from None
    if fields != {"{prompt}", "{a}", "{b}"}:
        raise ValueError(
            f"{name} has the placeholders {', '.join(sorted(fields)) or '(none)'}; expected "
            "{prompt}, {a} and {b}. Write {{ and }} for literal braces."
        )
    return text


def _placeholders(text: str) -> set[str]:
    """The placeholders of a format string as they are written, such as {a} or {a!r:>8}."""
    found = set()
    for _, field, form, conversion in string.Formatter().parse(text):
        if field is not None:
            shown = field
            if conversion:
                shown += f"!{conversion}"
            if form:
                shown += f":{form}"
            found.add("{" + shown + "}")
    return found


def read_choice(answer: str) -> str | None:
    """Return the letter that an answer ends with, "A" or "B"; None if it cannot be read.

    The last line must be the letter, alone or after a label such as "Better:", and no line before
    may say the other. Quotes, brackets and Markdown's stars do not matter. "Summary A" is A, and a
    letter after "worse" or "not" does not count.
    """
    plain = re.sub(r"[*_`\"'“”‘’()\[\]<>#]", "", answer)
    lines = [line for line in plain.splitlines() if line.strip()]
    choices = [_CHOICE.fullmatch(line) for line in lines]
    if not choices or not choices[-1]:
        return None
    # "Summary A" alone on an earlier line is a heading above a remark, not a choice.
    letters = {choices[-1]["letter"]}
    for choice in choices[:-1]:
        is_heading = choice and choice["noun"] and not choice["label"]
        if choice and not is_heading:
            letters.add(choice["letter"])
    return letters.pop() if len(letters) == 1 else None


async def _ask_all(judge: Judge, questions: list, path: pathlib.Path, show: Callable) -> dict:
    """Ask all questions: (comparison, order) -> vote. After a failure no new call is made."""
    template = read_template(judge.template)
    waiting = collections.deque(questions)
    found = {}
    has_prices = bool(judge.input_price or judge.output_price)
    async with chat_api.opened(judge, path) as calls:
        report = _Report(show, calls, len(questions), has_prices)

        async def work():
            while waiting:
                comparison, order = waiting.popleft()
                try:
                    found[comparison, order] = await _ask(calls, template, comparison, order)
                except Exception:
                    waiting.clear()  # the other workers stop too; `gather` returns the failure
                    raise
                report(len(found))

        workers = [work() for _ in range(judge.concurrency)]
        failures = await asyncio.gather(*workers, return_exceptions=True)
        for failure in filter(None, failures):
            raise failure
    return found


async def _ask(calls: chat_api.Calls, template: str, comparison: Comparison, order: str) -> Vote:
    """Ask for a vote in one order; its verdict is None after unreadable answers or a refusal."""
    ours_first = order == ORDERS[0]
    a, b = comparison.ours, comparison.other
    if not ours_first:
        a, b = b, a
    prompt = template.format(prompt=comparison.prompt, a=a, b=b)
    verdict = None
    answer = ""
    cost = 0.0
    for attempt in range(ATTEMPTS):
        call = await calls.ask(prompt, template=_digest(template), order=order, attempt=attempt)
        cost += calls.cost(call)
        if call["answer"] is None:
            break
        answer = call["answer"]
        choice = read_choice(answer)
        if choice:
            verdict = "win" if (choice == "A") == ours_first else "loss"
            break
    return Vote(order, verdict, answer, attempt + 1, cost)


class _Report:
    """Shows a line now and then: progress, calls, their rate, the time left and the cost."""

    def __init__(
        self, show: Callable[[str], None], calls: chat_api.Calls, total: int, priced: bool
    ):
        self._show = show
        self._calls = calls
        self._total = total
        self._priced = priced
        self._began = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        calls = self._calls
        if done < self._total and now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        rate = calls.new / max(now - self._began, 1e-9)
        parts = [f"judge {done}/{self._total}", f"calls {calls.new} ({calls.retries} retried)"]
        if calls.refused:
            parts.append(f"{calls.refused} refused")
        parts.append(f"{rate:.1f}/s")
        if self._priced:
            parts.append(f"spent {calls.spent:.4f}")
        if rate:
            parts.append(f"{tqdm.format_interval((self._total - done) / rate)} left")
        else:
            parts.append("all answers were kept")
        self._show("  ".join(parts))


def _orders(judge: Judge, comparison: Comparison) -> tuple[str, ...]:
    """The order, or both orders, in which a comparison is asked."""
    if judge.orders == 2:
        return ORDERS
    content = json.dumps([judge.seed, *dataclasses.astuple(comparison)])
    return (ORDERS[int(_digest(content), 16) % 2],)


def _without_call(comparison: Comparison) -> str | None:
    """The verdict of a comparison that needs no judge; None for the others."""
    ours, other = comparison.ours.strip(), comparison.other.strip()
    if ours == other:
        return "tie"
    if not ours:
        return "loss"
    return None if other else "win"


def combined(votes: tuple[Vote, ...]) -> str | None:
    """Return one verdict from those of each order: a tie if they differ, None if one is None."""
    verdicts = [one.verdict for one in votes]
    if None in verdicts:
        return None
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def define_flags(orders: int = Judge.orders) -> Callable[..., Judge]:
    """Define the flags of a command that judges; return a function that makes a Judge of them.

    orders: the default of --orders.

    Call the function once the flags are parsed. It takes the fields that have no flag (model,
    template) and those that should override one.
    """
    from absl import flags

    holders = dict(
        temperature=flags.DEFINE_float(
            "judge_temperature", Judge.temperature, "The judge's sampling temperature."
        ),
        orders=flags.DEFINE_integer(
            "orders", orders, "1: draw which answer is A; 2: ask both, disagreement ties."
        ),
        seed=flags.DEFINE_integer("judge_seed", Judge.seed, "Seed of the drawn order."),
        concurrency=flags.DEFINE_integer(
            "concurrency", Judge.concurrency, "Calls in flight at a time."
        ),
        requests_per_minute=flags.DEFINE_float(
            "requests_per_minute", None, "Most requests per minute; default: no limit."
        ),
        timeout=flags.DEFINE_float(
            "timeout", Judge.timeout, "Seconds after which a hanging request is retried."
        ),
        max_calls=flags.DEFINE_integer("max_calls", None, "Most answers to keep; default: no cap."),
        max_cost=flags.DEFINE_float("max_cost", None, "Most that they may cost; default: no cap."),
        input_price=flags.DEFINE_float(
            "input_price", Judge.input_price, "Price of a million input tokens."
        ),
        output_price=flags.DEFINE_float(
            "output_price", Judge.output_price, "Price of a million output tokens."
        ),
    )

    def make_judge(**fields) -> Judge:
        if holders["orders"].value == 2 and holders["seed"].present:
            raise ValueError("--judge_seed would do nothing with --orders=2, which asks both.")
        given = {name: holder.value for name, holder in holders.items()}
        return Judge(**given | fields)

    return make_judge

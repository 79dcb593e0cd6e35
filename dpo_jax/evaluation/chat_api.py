"""Calls to an OpenAI-compatible chat endpoint, each kept in a file so that it is paid for once.

The environment says where the endpoint is: OPENAI_BASE_URL (OpenAI's own if it is not set) and
OPENAI_API_KEY, which goes into the requests' header and nowhere else. Neither is needed if the
file holds all answers already. This file imports no jax.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import time

from dpo_jax.whole_file import append, parse_sealed, with_sha256

# A failed request is retried this often, after as long as Retry-After says, else 0.5 s to 8 s.
RETRIES = 6
REFUSALS = (400, 413, 422)  # HTTP codes that refuse one question: too long, or filtered
# So many refusals in a row, with no answer in between, are not the questions' fault.
MOST_REFUSALS = 20
# Of an answer. A judge writes a sentence and a letter, but models that reason need room.
MAX_TOKENS = 1024
OVERHEAD = 64  # tokens that a chat format may add to a prompt
MOST_TOKENS = 10**9  # that an endpoint may say that a call took
COUNTED = ("prompt_tokens", "completion_tokens")  # in the usage of a call
SHOWN = 1000  # characters of an endpoint's words


class BudgetExhausted(RuntimeError):
    """The next call could pass max_calls or max_cost. All answers so far are kept."""


class ChatError(RuntimeError):
    """The endpoint refused, or failed too often. All answers so far are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an endpoint, and how it may be called.

    Prices and max_cost share one currency, whichever it is.
    """

    model: str  # its name at the endpoint
    temperature: float = 0.0
    concurrency: int = 8  # calls in flight at a time
    requests_per_minute: float | None = None  # with retries; None: no limit
    timeout: float = 60.0  # seconds after which a hanging request is retried
    max_calls: int | None = None  # answers in the file, earlier runs' included; None: no cap
    max_cost: float | None = None  # of all those answers, by today's prices; None: no cap
    input_price: float = 0.0  # per million tokens
    output_price: float = 0.0  # per million tokens

    def __post_init__(self):
        rate = self.requests_per_minute
        for name, fine, expected in [
            ("model", self.model, "the model's name at the endpoint"),
            ("temperature", 0 <= self.temperature <= 2, "0 to 2"),
            ("concurrency", self.concurrency >= 1, "1 or more"),
            ("requests_per_minute", rate is None or rate > 0, "above 0"),
            ("timeout", self.timeout > 0, "seconds, above 0"),
            ("max_calls", self.max_calls is None or self.max_calls >= 0, "0 or more"),
            ("max_cost", self.max_cost is None or self.max_cost >= 0, "0 or more"),
            ("input_price", self.input_price >= 0, "0 or more, per million tokens"),
            ("output_price", self.output_price >= 0, "0 or more, per million tokens"),
        ]:
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}.")
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError(
                f"max_cost={self.max_cost:g} needs input_price and output_price, the prices per "
                "million tokens."
            )

    def cost(self, prompt: str, usage: dict | None) -> float:
        """Return the cost of a call; without its usage, the most that it can have cost."""
        if usage:
            read, written = usage["prompt_tokens"], usage["completion_tokens"]
        else:
            # No token is shorter than a byte.
            read, written = len(prompt.encode()) + OVERHEAD, MAX_TOKENS
        return (read * self.input_price + written * self.output_price) / 1e6


class Calls:
    """Answers of an endpoint: from the file where they are kept, else by a call. See `opened`."""

    def __init__(self, endpoint: Endpoint, file, rows: list[dict]):
        self._endpoint = endpoint
        self._file = file
        self._client = None
        self._rows = {row["key"]: row for row in rows}
        answered = [row for row in rows if row["answer"] is not None]
        # Whether this model has answered anything: a refusal is then the question's fault.
        self._answered = any(
            row.get("model") == endpoint.model and row.get("temperature") == endpoint.temperature
            for row in answered
        )
        self._refusals = []  # rows that wait for the first answer before they are kept
        self.count = len(answered)
        self.spent = sum(map(self.cost, rows))
        self.new = self.retries = self.refused = 0  # by this process
        self._in_flight = 0
        self._reserved = 0.0  # the most that the calls in flight can cost
        self._landed = asyncio.Condition()
        self._next_start = 0.0  # when the next request may start, for requests_per_minute

    async def ask(self, prompt: str, **about) -> dict:
        """Return the kept call of a prompt; its answer is None if the endpoint refuses it.

        A refusal is kept too, and not asked again. `about` belongs to the question's identity and
        is kept beside the answer, in JSON's types. Raises BudgetExhausted before a call that could
        pass a cap, and ChatError if the endpoint fails.
        """
        identity = dict(
            model=self._endpoint.model,
            temperature=self._endpoint.temperature,
            prompt=prompt,
            **about,
        )
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if key not in self._rows:
            async with self._budget(self._endpoint.cost(prompt, None)):
                found = await self._send(prompt)
                date = time.strftime("%Y-%m-%d %H:%M:%S")
                self._take(dict(key=key, **identity, **found, date=date))
        return self._rows[key]

    def cost(self, row: dict) -> float:
        """Return the cost of a kept call."""
        return self._endpoint.cost(row["prompt"], row["usage"])

    @contextlib.asynccontextmanager
    async def _budget(self, bound: float):
        """Wait until the calls in flight leave room for one more that costs at most `bound`."""
        async with self._landed:
            await self._landed.wait_for(lambda: not self._in_flight or not self._over(bound))
            if over := self._over(bound):
                raise BudgetExhausted(
                    f"{over}: {self.count} answers are kept in {self._file.name}; they cost "
                    f"{self.spent:.4f}. Run the same command with a higher cap to continue."
                )
            self._in_flight += 1
            self._reserved += bound
        try:
            yield
        finally:
            self._in_flight -= 1
            self._reserved -= bound
            async with self._landed:
                self._landed.notify_all()

    def _over(self, bound: float) -> str:
        """The cap that one more call could pass; "" if there is none."""
        max_calls, max_cost = self._endpoint.max_calls, self._endpoint.max_cost
        if max_calls is not None and self.count + self._in_flight >= max_calls:
            return f"max_calls={max_calls} is reached"
        if max_cost is not None and self.spent + self._reserved + bound > max_cost:
            return f"max_cost={max_cost:g} could be passed by the next call, of up to {bound:.4f}"
        return ""

    def _take(self, row: dict) -> None:
        """Keep an answer. A refusal waits until an answer shows that the endpoint works."""
        self._rows[row["key"]] = row
        if row["answer"] is None:
            self._refusals.append(row)
            if len(self._refusals) >= MOST_REFUSALS:
                raise self._failed(row["refused"])
            return
        self._answered = True
        self._keep(row)
        self.count += 1
        self.new += 1
        self.spent += self.cost(row)
        self.settle()

    def settle(self) -> None:
        """Keep the refusals that wait; ChatError if the endpoint has answered nothing so far."""
        while self._refusals:
            if not self._answered:
                raise self._failed(self._refusals[0]["refused"])
            self._keep(self._refusals.pop(0))
            self.refused += 1

    def _keep(self, row: dict) -> None:
        shown = json.loads(_without_key(json.dumps(row)))
        append(self._file.name, json.dumps(with_sha256(shown)).encode() + b"\n")

    async def _send(self, prompt: str) -> dict:
        """Make one call: its answer, usage and the model's full name, or why it was refused."""
        client = self._client = self._client or self._connect()

        import openai

        try:
            reply = await client.chat.completions.create(
                model=self._endpoint.model,
                messages=[dict(role="user", content=prompt)],
                temperature=self._endpoint.temperature,
                max_completion_tokens=MAX_TOKENS,
            )
            answer = reply.choices[0].message.content or ""  # a filtered answer has no content
            # Either fails for what is no text.
            answer, served_by = answer.strip(), _said(reply.model or "")
            return dict(answer=_without_key(answer), served_by=served_by, usage=_usage(reply))
        except openai.OpenAIError as error:
            if getattr(error, "status_code", None) in REFUSALS:
                nothing = dict(prompt_tokens=0, completion_tokens=0)
                return dict(answer=None, refused=_said(str(error)), served_by=None, usage=nothing)
            failure = self._explained(error)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            failure = ChatError(
                f"{self._host()} did not send a chat completion. Check OPENAI_BASE_URL, which "
                "usually ends in /v1."
            )
        # Raised out here because openai's error holds the request, and so the key.
        raise failure

    def _connect(self):
        key = api_key()

        import openai

        from dpo_jax.evaluation import untrusted_http

        timeout = self._endpoint.timeout
        return openai.AsyncOpenAI(
            api_key=key,
            timeout=timeout,
            max_retries=RETRIES,
            http_client=untrusted_http.Client(wait=self._pace, seconds=timeout),
        )

    async def _pace(self, request) -> None:
        """Wait for this request's turn; retries wait too."""
        self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"
        if self._endpoint.requests_per_minute:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60 / self._endpoint.requests_per_minute
            await asyncio.sleep(start - time.monotonic())

    def _explained(self, error) -> ChatError:
        """A failure in words, without the key."""
        status = getattr(error, "status_code", None)
        said = _said(str(error))
        if status in (401, 403):
            said = f"it refuses the key ({status}): check OPENAI_API_KEY."
        elif status == 404:
            said = f"it has no model {self._endpoint.model!r}, or OPENAI_BASE_URL is wrong: {said}"
        return self._failed(said)

    def _failed(self, said: str) -> ChatError:
        return ChatError(
            f"no answer from {self._host()}: {said}\n{self.count} answers are kept in "
            f"{self._file.name}. Run the same command to continue."
        )

    def _host(self) -> str:
        return self._client.base_url.netloc.decode()  # without a password

    async def close(self) -> None:
        if self._client:
            await self._client.close()


@contextlib.asynccontextmanager
async def opened(endpoint: Endpoint, path: pathlib.Path):
    """Open the file of JSON lines where an endpoint's calls are kept, locked for this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is writing to {path}. Wait for it, or choose another folder."
            ) from None
        calls = Calls(endpoint, file, read(path))
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # drop a line that a kill cut short
        try:
            yield calls
            calls.settle()
        finally:
            await calls.close()


def read(path: pathlib.Path) -> list[dict]:
    """Read the calls kept in a file, without a last line that a kill cut short.

    Raises ValueError with the number of a line that is not the call that was kept there: to ask
    again costs money, so that is left to the user.
    """
    *lines, _cut = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_sealed(line)
        if row is None or not _is_call(row):
            raise ValueError(
                f"{path} line {number} is not a kept call, or not what was written there. Put the "
                "file back from a copy, or remove the line to ask again."
            )
        rows.append(row)
    return rows


def _is_call(row: dict) -> bool:
    """Return whether a row has what is read of a kept call, in its types."""
    is_text = all(isinstance(row.get(name), str) for name in ("key", "prompt"))
    has_answer = isinstance(row.get("answer", 0), str | None)
    usage = row.get("usage", 0)
    if isinstance(usage, dict):
        counts = [usage.get(name) for name in COUNTED]
        return is_text and has_answer and all(type(count) is int for count in counts)
    return is_text and has_answer and usage is None


def _usage(reply) -> dict | None:
    """Return the tokens read and written; None where the endpoint says nothing that can be."""
    counts = {}
    for name in COUNTED:
        count = getattr(reply.usage, name, None)
        # A negative count would give money back, and let a run pass its max_cost.
        if type(count) is not int or not 0 <= count <= MOST_TOKENS:
            return None
        counts[name] = count
    # Every prompt has tokens. Without a count, a call costs the most that it can have cost.
    return counts if counts["prompt_tokens"] else None


def api_key() -> str:
    """Return the key; ValueError (which does not show it) if it is missing or cannot be sent.

    Raises ImportError if the package that would send it is missing.
    """
    if importlib.util.find_spec("openai") is None:
        raise ImportError(
            "a chat model as judge needs the package openai, which is an extra: "
            'pip install "dpo_jax[judge]" (or pip install openai).'
        )
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise ValueError(
            "OPENAI_API_KEY is not set. For a server of your own that needs no key, set it to any "
            "word, and OPENAI_BASE_URL to the address, such as http://localhost:8000/v1."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds a character that no key has. Copy it again.")
    return key


def _said(text: str) -> str:
    """Return a server's words for a person: short, in one piece, without the key."""
    shown = _without_key(text)[:SHOWN]
    # Terminals obey some of what cannot be printed.
    return "".join(mark if mark.isprintable() or mark == "\n" else " " for mark in shown)


def _without_key(text: str) -> str:
    """A server's words with the key blanked out, in case they repeat it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    is_secret = len(key) >= 8  # a shorter one is a word such as EMPTY
    return text.replace(key, "[OPENAI_API_KEY]") if is_secret else text

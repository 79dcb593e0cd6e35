"""Calls to an OpenAI-compatible chat endpoint: each is kept in a file, so that it is paid for once.

The environment says where the endpoint is: OPENAI_BASE_URL (without it, OpenAI's own), and
OPENAI_API_KEY, which goes into the requests' header and nowhere else. A file that holds all that is
asked for needs neither. No jax here.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time

# of a request that failed for a while; waits as long as Retry-After says, else 0.5 s, 1 s, ... 8 s
RETRIES = 6
REFUSALS = (400, 413, 422)  # of one question: too long, or filtered
MOST_REFUSALS = 20  # on end, without an answer between: then it is not the questions
MAX_TOKENS = (
    1024  # of an answer; the judges' are one sentence and a letter, but models that think need room
)
OVERHEAD = 64  # tokens that a chat format may add to a prompt


class BudgetExhausted(RuntimeError):
    """The next call could pass max_calls or max_cost. Nothing was lost: all answers so far are
    kept.
    """


class ChatError(RuntimeError):
    """The endpoint refused, or failed too often. All answers so far are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an endpoint, and how it may be called. Prices and max_cost are in one
    currency, whichever.
    """

    model: str  # its name there
    temperature: float = 0.0
    concurrency: int = 8  # calls under way at a time
    requests_per_minute: float | None = None  # retries count; None: no limit
    timeout: float = 60.0  # seconds until a request that hangs is made again
    max_calls: int | None = (
        None  # answers kept in the file, those of earlier runs too; None: no cap
    )
    max_cost: float | None = None  # of all those, by the prices given now; None: no cap
    input_price: float = 0.0  # per million tokens
    output_price: float = 0.0  # per million tokens

    def __post_init__(self):
        for name, fine, expected in [
            ("model", self.model, "the model's name at the endpoint"),
            ("temperature", 0 <= self.temperature <= 2, "0 to 2"),
            ("concurrency", self.concurrency >= 1, "1 or more"),
            (
                "requests_per_minute",
                self.requests_per_minute is None or self.requests_per_minute > 0,
                "above 0",
            ),
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
                f"max_cost={self.max_cost:g} needs input_price and output_price, per million tokens."
            )

    def cost(self, prompt: str, usage: dict | None) -> float:
        """What a call cost; without a usage, the most that it can have cost: no token is shorter
        than a byte.
        """
        usage = usage or dict(
            prompt_tokens=len(prompt.encode()) + OVERHEAD, completion_tokens=MAX_TOKENS
        )
        return (
            usage["prompt_tokens"] * self.input_price
            + usage["completion_tokens"] * self.output_price
        ) / 1e6


class Calls:
    """The answers of an endpoint, from the file where they are kept or else by a call. Made by
    `opened`.
    """

    def __init__(self, endpoint: Endpoint, file, rows: list[dict]):
        self._endpoint, self._file, self._client = endpoint, file, None
        self._answers = {row["key"]: row["answer"] for row in rows}
        self._refusals, self._answered = (
            [],
            any(
                row["answer"] is not None
                and (row.get("model"), row.get("temperature"))
                == (endpoint.model, endpoint.temperature)
                for row in rows
            ),
        )
        self.count = sum(row["answer"] is not None for row in rows)
        self.spent = sum(endpoint.cost(row["prompt"], row["usage"]) for row in rows)
        self.new = self.retries = self.refused = 0  # of this process
        self._flying, self._reserved, self._landed, self._next_start = (
            0,
            0.0,
            asyncio.Condition(),
            0.0,
        )

    async def ask(self, prompt: str, **about) -> str | None:
        """The answer to a prompt; `about` belongs to its identity and is kept beside it, in JSON's
        types.

        None where the endpoint refuses this very question: that is kept too, and not asked again.
        Raises BudgetExhausted before a call that could pass a cap, ChatError where there is no
        answer to be had.
        """
        identity = dict(
            model=self._endpoint.model,
            temperature=self._endpoint.temperature,
            prompt=prompt,
            **about,
        )
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if key not in self._answers:
            async with self._budget(self._endpoint.cost(prompt, None)):
                found = await self._send(prompt)
                self._take(
                    dict(key=key, **identity, **found, date=time.strftime("%Y-%m-%d %H:%M:%S"))
                )
        return self._answers[key]

    @contextlib.asynccontextmanager
    async def _budget(self, bound: float):
        """Waits until calls under way leave room for one more that costs `bound` at most."""
        async with self._landed:
            await self._landed.wait_for(lambda: not self._flying or not self._over(bound))
            if over := self._over(bound):
                raise BudgetExhausted(
                    f"{over}: {self.count} answers are kept in {self._file.name}, which cost "
                    f"{self.spent:.4f}. The same command with a higher cap goes on from there."
                )
            self._flying, self._reserved = self._flying + 1, self._reserved + bound
        try:
            yield
        finally:
            self._flying, self._reserved = self._flying - 1, self._reserved - bound
            async with self._landed:
                self._landed.notify_all()

    def _over(self, bound: float) -> str:
        """The cap that one more call could pass, "" for none."""
        end = self._endpoint
        if end.max_calls is not None and self.count + self._flying >= end.max_calls:
            return f"max_calls={end.max_calls} is reached"
        if end.max_cost is not None and self.spent + self._reserved + bound > end.max_cost:
            return (
                f"max_cost={end.max_cost:g} could be passed by the next call, of up to {bound:.4f}"
            )
        return ""

    def _take(self, row: dict) -> None:
        """Keeps an answer; a refusal once an answer shows that the endpoint works, so it was the
        question's fault.
        """
        self._answers[row["key"]] = row["answer"]
        if row["answer"] is None:
            self._refusals.append(row)
            if len(self._refusals) >= MOST_REFUSALS:
                raise self._failed(row["refused"])
            return
        self._answered = True
        self._keep(row)
        self.count, self.new = self.count + 1, self.new + 1
        self.spent += self._endpoint.cost(row["prompt"], row["usage"])
        self.settle()

    def settle(self) -> None:
        """Keeps the refusals that wait; ChatError where the endpoint has answered nothing so
        far.
        """
        while self._refusals:
            if not self._answered:
                raise self._failed(self._refusals[0]["refused"])
            self._keep(self._refusals.pop(0))
            self.refused += 1

    def _keep(self, row: dict) -> None:
        self._file.write(_without_key(json.dumps(row)).encode() + b"\n")
        self._file.flush()

    async def _send(self, prompt: str) -> dict:
        """Answer and usage of one call, and the model's full name; without an answer, why it was
        refused.
        """
        import openai

        client = self._client = self._client or self._connect()
        try:
            reply = await client.chat.completions.create(
                model=self._endpoint.model,
                messages=[dict(role="user", content=prompt)],
                temperature=self._endpoint.temperature,
                max_completion_tokens=MAX_TOKENS,
            )
            answer = reply.choices[0].message.content or ""  # none where it was filtered
            return dict(answer=answer.strip(), served_by=reply.model, usage=_usage(reply))
        except openai.OpenAIError as error:
            if getattr(error, "status_code", None) in REFUSALS:
                nothing = dict(prompt_tokens=0, completion_tokens=0)
                return dict(
                    answer=None, refused=_without_key(str(error)), served_by=None, usage=nothing
                )
            failure = self._explained(error)
        except (AttributeError, IndexError, TypeError, ValueError):
            failure = ChatError(
                f"what {self._host()} sent is no chat completion: is OPENAI_BASE_URL right? It mostly "
                "ends in /v1."
            )
        raise failure  # not where the error is at hand, which holds the request and so the key

    def _connect(self):
        import openai

        return openai.AsyncOpenAI(
            api_key=api_key(),
            timeout=self._endpoint.timeout,
            max_retries=RETRIES,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=dict(request=[self._pace])),
        )

    async def _pace(self, request) -> None:
        """Before each request, retries too: waits for its turn."""
        self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"
        if self._endpoint.requests_per_minute:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60 / self._endpoint.requests_per_minute
            await asyncio.sleep(start - time.monotonic())

    def _explained(self, error) -> ChatError:
        """A failure in words, without the key."""
        status, said = getattr(error, "status_code", None), _without_key(str(error))
        if status in (401, 403):
            said = f"it refuses the key ({status}): check OPENAI_API_KEY."
        elif status == 404:
            said = f"it has no model {self._endpoint.model!r}, or OPENAI_BASE_URL is wrong: {said}"
        return self._failed(said)

    def _failed(self, said: str) -> ChatError:
        return ChatError(
            f"no answer from {self._host()}: {said}\n{self.count} answers are kept in {self._file.name}; "
            "the same command goes on from there."
        )

    def _host(self) -> str:
        return self._client.base_url.netloc.decode()  # has no password

    async def close(self) -> None:
        if self._client:
            await self._client.close()


@contextlib.asynccontextmanager
async def opened(endpoint: Endpoint, path: pathlib.Path):
    """The Calls of an endpoint, kept in a file of JSON lines, which this process alone holds until
    it is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is at work in {path}: wait for it, or give another folder."
            ) from None
        calls = Calls(endpoint, file, read(path))
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        try:
            yield calls
            calls.settle()
        finally:
            await calls.close()


def read(path: pathlib.Path) -> list[dict]:
    """The calls kept in a file, less a last line that a kill cut short; ValueError naming a line
    that is no call.
    """
    *lines, _cut = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            whole = {"key", "prompt", "answer", "usage"} <= rows[-1].keys()
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(
                f"{path} line {number} is not a kept call: mend the line, or remove it to ask again."
            )
    return rows


def _usage(reply) -> dict | None:
    """Tokens read and written, where the endpoint counts them."""
    counts = {
        name: getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")
    }
    return counts if all(isinstance(count, int) for count in counts.values()) else None


def api_key() -> str:
    """The key; ValueError, without it, where there is none or it cannot be sent."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise ValueError(
            "OPENAI_API_KEY is not set. For a server of your own that asks for none, set it to any word, "
            "and OPENAI_BASE_URL to its address, such as http://localhost:8000/v1."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds a character that no key has: copy it again.")
    return key


def _without_key(text: str) -> str:
    """A server's words, in case they repeat the key. Below 8 letters it is a word such as EMPTY,
    and no secret.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "[OPENAI_API_KEY]") if len(key) >= 8 else text

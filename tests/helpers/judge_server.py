"""A chat endpoint on the loopback for the tests of judges: a real HTTP server that answers as a
test tells it to.

    with JudgeServer(prefers(len)) as server:
        with server.environment(): ...

A behaviour is a function (prompt, times) -> str, the answer, or one of Status, Hang, Drop and
Stream; `times` counts how often that prompt was asked before. Everything that came in is in
`server.requests`.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

KEY = "sk-loopback-0123456789"


@dataclasses.dataclass(frozen=True)
class Status:
    """An answer with this status; a body that is text goes out as it is."""

    code: int
    body: str | dict = dataclasses.field(default_factory=dict)
    headers: dict = dataclasses.field(default_factory=dict)


class Hang:
    """No answer until the server closes."""


class Drop:
    """The connection breaks in the middle of the answer."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A body that goes out piece by piece, each of them as a chunk, until the client has gone."""

    pieces: Iterable[bytes]
    seconds: float = 0.0  # between two pieces
    headers: dict = dataclasses.field(default_factory=dict)


class JudgeServer:
    """Serves a behaviour at `url` while it is entered."""

    def __init__(self, behave: Callable, usage: bool = True):
        self.requests, self._times, self._lock = [], collections.Counter(), threading.Lock()
        self.closing, self.usage, self._behave = threading.Event(), usage, behave
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.owner = True, self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def reply(self, body: dict, headers: dict):
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.requests.append(
                dict(body=body, headers=headers, prompt=prompt, time=time.monotonic())
            )
            times = self._times[prompt]
            self._times[prompt] += 1
        return self._behave(prompt, times)

    @property
    def prompts(self) -> list[str]:
        return [request["prompt"] for request in self.requests]

    def variables(self, key: str = KEY) -> dict:
        """What a process needs to find it."""
        return dict(OPENAI_BASE_URL=self.url, OPENAI_API_KEY=key)

    @contextlib.contextmanager
    def environment(self, key: str = KEY):
        with mock.patch.dict(os.environ, self.variables(key)):
            yield self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions", self.path
        server = self.server.owner
        reply = server.reply(body, dict(self.headers))
        if isinstance(reply, Hang):
            server.closing.wait()
            self.close_connection = True
        elif isinstance(reply, Drop):
            self._send(200, "", {"Content-Length": "100"})
            self.close_connection = True
        elif isinstance(reply, Stream):
            self._stream(reply, server.closing)
            self.close_connection = True
        elif isinstance(reply, Status):
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            self._send(
                reply.code, text, {"Content-Length": str(len(text.encode()))} | reply.headers
            )
        else:
            text = json.dumps(_completion(body, reply, server.usage))
            self._send(200, text, {"Content-Length": str(len(text.encode()))})

    def _send(self, code: int, text: str, headers: dict):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.send_response(code)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

    def _stream(self, reply: Stream, closing: threading.Event):
        with contextlib.suppress(OSError):  # the client has gone
            self._send(200, "", {"Transfer-Encoding": "chunked"} | reply.headers)
            for piece in reply.pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if closing.wait(reply.seconds):
                    return
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        """Nothing of each request goes to stderr."""


def _completion(body: dict, answer: str, usage: bool) -> dict:
    counts = dict(
        prompt_tokens=len(body["messages"][-1]["content"].split()),
        completion_tokens=len(answer.split()),
    )
    message = dict(role="assistant", content=answer)
    return dict(
        id="one",
        object="chat.completion",
        created=0,
        model=body["model"] + "-0001",
        choices=[dict(index=0, finish_reason="stop", message=message)],
        **(dict(usage=counts | dict(total_tokens=sum(counts.values()))) if usage else {}),
    )


def answer(letter: str) -> str:
    """An answer in the form that the templates ask for."""
    return f"Comparison: they differ.\nBetter: {letter}"


def always(letter: str) -> Callable:
    """A judge that looks at the position only."""
    return lambda _prompt, _times: answer(letter)


def longer(text: str) -> int:
    """The number of words, for a judge who prefers the longer text."""
    return len(text.split())


def prefers(score: Callable[[str], float]) -> Callable:
    """A judge that takes the text with the higher score, A where they are equal."""

    def behave(prompt, _times):
        a, b = texts(prompt)
        return answer("A" if score(a) >= score(b) else "B")

    return behave


def texts(prompt: str) -> tuple[str, str]:
    """The two answers in a prompt that one of our templates made."""
    kind = r"\n(?:Summary|Reply) "
    found = re.search(
        kind + r"A:\n(.*)\n" + kind + r"B:\n(.*)\n\nAnswer in two lines", prompt, re.S
    )
    return found[1], found[2]

"""An HTTP client for an endpoint that may lie: what it sends is bounded in size and in time.

It follows no redirect, so that the key goes to no other host, and takes no compressed answer, whose
size is known too late. Imports openai, so that only what calls an endpoint may import this file.
"""

import asyncio
from collections.abc import Awaitable, Callable

import httpx2  # what openai makes its calls with
import openai

# Of an answer with all that is around it. A thousand tokens take some ten thousand bytes.
MOST_BYTES = 1 << 18


class Refused(openai.OpenAIError):
    """An answer that is not read to its end. It is not asked for again, as it may have a price."""


class Client(openai.DefaultAsyncHttpxClient):
    """Sends a request when its turn comes, and reads the answer within the bounds."""

    def __init__(self, *, wait: Callable[[httpx2.Request], Awaitable[None]], seconds: float):
        """wait: called before each request. seconds: from its start to the answer's last byte."""
        super().__init__(follow_redirects=False, headers={"Accept-Encoding": "identity"})
        self._wait = wait
        self._seconds = seconds

    async def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        """Return the whole answer; raise Refused, or httpx2's own errors."""
        await self._wait(request)
        options |= dict(stream=True, follow_redirects=False)
        try:
            # httpx2's own limit is for each read: a byte now and then would never reach it.
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **options)
                try:
                    body = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout("no whole answer in time", request=request) from None
        return httpx2.Response(
            response.status_code, headers=response.headers, content=body, request=request
        )


async def _read(response: httpx2.Response) -> bytes:
    """Return the body of an answer; raise Refused for one that is too large, or elsewhere."""
    if 300 <= response.status_code < 400:
        target = response.headers.get("Location", "")[:200]
        raise Refused(
            f"it redirects to {target!r}, which is not followed: the key would go there. If that "
            "is the endpoint, set OPENAI_BASE_URL to it."
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(
            f"its answer is compressed ({encoding[:20]!r}), which was not asked for and is not "
            "unpacked."
        )
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MOST_BYTES:
            raise Refused(
                f"its answer is larger than {MOST_BYTES >> 10} KiB, far more than was asked for."
            )
    return bytes(body)

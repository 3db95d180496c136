"""Answering while the client is still there: hang-ups stop the work, and streams are server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeray.serve.errors import ClientGoneError, RequestTimeoutError, log_failure, reply_for

_T = TypeVar("_T")

FAREWELL_S = 5.0
"""A client has so long to take the error that ends its stream."""
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
    """Run `work` and return its result.

    When the client hangs up first, or `timeout_s` seconds pass, `work` is cancelled and its clean-up awaited; then
    ClientGoneError or RequestTimeoutError is raised. The request's body must have been read before.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            gone.result()
            raise ClientGoneError("the client hung up")
        raise RequestTimeoutError(f"not finished within {timeout_s:g} s (serve.request_timeout_s)")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, then `data: [DONE]`.

    An error before the first event is answered with its own status; a later one is sent as an event and ends the
    stream. `events` are JSON texts; they are closed in every case, at once when the client hangs up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], timeout_s: float) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._timeout_s = timeout_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send), self._timeout_s)
        except ClientGoneError:
            return
        except Exception as error:
            if not self._started:
                raise
            # Who does not read is not waited for: a server closes the connection of a response that has no end.
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._send_error(send, error)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await self._start(send)
                await _send_event(send, event)
        await self._start(send)
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_error(self, send: Send, error: Exception) -> None:
        reply = reply_for(error)
        log_failure(reply.status, error)
        await _send_event(send, reply.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

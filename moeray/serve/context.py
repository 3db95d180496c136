"""The outermost layer: gives each request its id, for logs and its sequences too, and turns a bug into a plain 500
instead of a stack trace."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeray.logs import REQUEST_ID
from moeray.serve.errors import reply_for

log = logging.getLogger("moeray.serve")

_ACCEPTED_ID = re.compile(r"[!-~]{1,256}")


class RequestContext:
    """ASGI middleware. An `X-Request-Id` of visible characters is taken over; any other is replaced.

    `answer`: send the id back; not behind a proxy that does so itself, as that of Ray Serve does with whatever came.
    """

    def __init__(self, app: ASGIApp, answer: bool = True) -> None:
        self.app = app
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = REQUEST_ID.set(_request_id(scope))
        try:
            await self._run(scope, receive, send, str(REQUEST_ID.get()))
        finally:
            REQUEST_ID.reset(token)

    async def _run(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self.answer:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("a request failed")
            if started:
                raise  # a response that was begun can only be cut off
            await reply_for(error).response()(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex

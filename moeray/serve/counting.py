"""ASGI middleware that counts HTTP requests by route, method and status."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeray.recorder import Recorder

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
OTHER = "other"
"""A path or method that nobody serves: there is no end of names that a stranger can think of."""
AWAITED = (200, 429, 500, 503, 504)
"""Statuses that are there at 0, so that a rate sees the first of them: what alerts look at."""
CLIENT_CLOSED = 499
"""The status of a request whose client hung up before it was answered, as nginx has it."""


class RequestCounts:
    """The outermost layer, so that every answer is counted. `routes`: paths that have their series from the start."""

    def __init__(self, app: ASGIApp, recorder: Recorder, routes: tuple[tuple[str, str], ...] = ()) -> None:
        self.app = app
        self._recorder = recorder
        for path, method in routes:
            for status in AWAITED:
                self._recorder.counter("moeray_http_requests_total", handler=path, method=method, status=status)
            self._recorder.histogram("moeray_http_request_duration_seconds", handler=path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), CLIENT_CLOSED

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        finally:
            self._count(scope, status, time.monotonic() - began)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", OTHER)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._recorder.counter("moeray_http_requests_total", handler=handler, method=method, status=status).add()
        self._recorder.histogram("moeray_http_request_duration_seconds", handler=handler).observe(seconds)

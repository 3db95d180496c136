"""Whose pages a browser lets ask the endpoint (CORS)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class AllowedOrigins:
    """ASGI middleware. `current` gives the origins of now, as a config that changes has them; none: no headers."""

    def __init__(self, app: ASGIApp, current: Callable[[], tuple[str, ...]]) -> None:
        self._inner = app
        self._current = current
        self._made: tuple[tuple[str, ...], ASGIApp] = (), app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins, app = self._made
        if origins != (asked := self._current()):
            app = self._around(asked) if asked else self._inner
            self._made = asked, app
        await app(scope, receive, send)

    def _around(self, origins: tuple[str, ...]) -> ASGIApp:
        methods, shown = ("GET", "HEAD", "POST"), ("X-Request-Id", "Retry-After")
        return CORSMiddleware(
            self._inner, allow_origins=origins, allow_methods=methods, allow_headers=("*",), expose_headers=shown
        )

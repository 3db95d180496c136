"""The page's own files, as a browser gets them. They hold no secret, so they need no key; what they ask for does."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    # Everything comes from here, and nothing else can frame it or be sent to.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask each time, and hear 304: an upgraded server never meets an old script
}


@dataclass(frozen=True)
class Asset:
    """One file. `etag` is of its content."""

    body: bytes
    media_type: str
    etag: str

    def respond(self, request: Request) -> Response:
        """200 with the file, 304 where the client has it."""
        headers = _HEADERS | {"ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers | {"Content-Type": self.media_type})


def page_routes() -> APIRouter:
    """`/` is the page, and `/console/NAME` each of its other files."""
    routes = APIRouter()
    for name, asset in _assets().items():
        path = "/" if name == "index.html" else f"/console/{name}"
        routes.add_api_route(path, _handler(asset), methods=["GET", "HEAD"])
    return routes


def _assets() -> dict[str, Asset]:
    found = {}
    for file in (files("moeray.serve.console") / "page").iterdir():
        body, kind = file.read_bytes(), file.name.rpartition(".")[2]
        found[file.name] = Asset(body, _TYPES[kind], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def _handler(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return asset.respond(request)

    return send

"""Read a request's JSON body: bounded while it is read, and refused before anything is built from it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect

from moeray.errors import RequestError, one_line
from moeray.serve.errors import ApiError, ClientGoneError


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 413 over `max_bytes`, RequestError for anything but an object."""
    _check_content_type(request)
    return parse_object(await _read(request, max_bytes))


def parse_object(raw: bytes, what: str = "the body") -> dict[str, Any]:
    """Parse strict JSON: no NaN or Infinity, no lone surrogates, no nesting that exhausts the stack.

    Raises RequestError that calls it `what`.
    """
    try:
        text = raw.decode("utf-8-sig")  # strictly: json itself would let bytes of lone surrogates, and UTF-16, pass
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text that could be tokenized
    except RecursionError as error:
        raise RequestError(f"{what} is not valid JSON: it is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise RequestError(f"{what} is not valid JSON: {one_line(error)[:200]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError(f"{what} must be a JSON object", code="invalid_json")
    return value


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(
            f"content type {given!r} is not supported; send 'Content-Type: application/json'",
            code="unsupported_content_type",
        )


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        _too_large(max_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                _too_large(max_bytes)
    except ClientDisconnect as error:
        raise ClientGoneError("the client hung up before its body was read") from error
    return bytes(body)


def _too_large(max_bytes: int) -> NoReturn:
    raise ApiError(
        413, f"the body is over the limit of {max_bytes} bytes (serve.max_body_bytes)", code="body_too_large"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""One static API key, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from fastapi import Request

from moeray.serve.errors import ApiError


def require_key(current: Callable[[], str | None]) -> Callable[[Request], None]:
    """A dependency that raises ApiError 401 unless the request bears the key of now; None lets everyone in."""

    def check(request: Request) -> None:
        key = current()
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette decodes headers as latin-1.
        right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check

"""Every failure as an OpenAI-style error, `{"error": {"message", "type", "param", "code"}}` with the `request_id` that
names it in the logs, and its HTTP status."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from moeray.errors import MoerayError, NotReadyError, QueueFullError, RequestError, RouterLostError
from moeray.logs import REQUEST_ID

log = logging.getLogger("moeray.serve")

LOADING_RETRY_S = 5
ROUTER_LOST_RETRY_S = 1


class ApiError(MoerayError):
    """A failure that the HTTP side itself finds, with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class GenerationFailedError(MoerayError):
    """The system ended a sequence by an error of its own."""


class RequestTimeoutError(MoerayError):
    """The request was not finished within the endpoint's time limit."""


class ControllerLostError(MoerayError):
    """The controller does not answer at present; another attempt may find it, or a new one."""


class ControllerSilentError(ControllerLostError):
    """Its process may be there; it has just not answered in time."""


class ClientGoneError(MoerayError):
    """The client hung up; nobody is there to answer."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """One failure, ready to be sent as a response or as an SSE event."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The error object as ASCII JSON, so that no character of the message can fail to be encoded."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if (request_id := REQUEST_ID.get()) is not None:  # a batch's line has none
            error["request_id"] = request_id
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


def reply_for(error: Exception) -> ErrorReply:
    """What the client is told. An error that is not one of ours is a bug: its text stays in the log."""
    match error:
        case ApiError():
            return ErrorReply(error.status, str(error), error.param, error.code, error.headers)
        case RequestError():
            return ErrorReply(400, str(error), error.param, error.code)
        case QueueFullError():
            return ErrorReply(429, str(error), code="queue_full", headers=_retry_after(error.retry_after_s))
        case RouterLostError():
            return ErrorReply(503, str(error), code="router_lost", headers=_retry_after(ROUTER_LOST_RETRY_S))
        case ControllerLostError():
            return ErrorReply(503, str(error), code="controller_lost", headers=_retry_after(LOADING_RETRY_S))
        case NotReadyError():
            return ErrorReply(503, str(error), code="not_ready", headers=_retry_after(LOADING_RETRY_S))
        case RequestTimeoutError():
            return ErrorReply(504, str(error), code="timeout")
        case ClientGoneError():
            return ErrorReply(499, str(error), code="client_closed_request")
        case GenerationFailedError():
            return ErrorReply(500, str(error), code="generation_failed")
        case HTTPException():
            return _http_reply(error)
    return ErrorReply(500, "internal error; the server's log has the details under this request id", code="internal")


def loading_error(detail: str) -> ApiError:
    """503 for a system that is not there yet; `detail` is its progress."""
    message = f"the model is loading: {detail}" if detail else "the model is loading"
    return ApiError(503, f"{message}; try again soon", code="loading", headers=_retry_after(LOADING_RETRY_S))


def failed_error(detail: str) -> ApiError:
    """503 for a system that could not start; trying again does not help, so no Retry-After."""
    return ApiError(503, f"the model could not be loaded: {detail}", code="failed")


def log_failure(status: int, error: Exception) -> None:
    """What the server is to blame for; one that still loads says so in its health, not at each request."""
    if status == 500:
        log.error("a request failed", exc_info=error)
    elif status > 500 and not isinstance(error, ApiError):
        log.warning("a request failed with %d: %s", status, error)


def install_handlers(app: FastAPI) -> None:
    """Answer our own errors and the framework's (unknown path, wrong method) in the one style."""

    async def handle(request: Request, error: Exception) -> Response:
        reply = reply_for(error)
        log_failure(reply.status, error)
        return reply.response()

    app.add_exception_handler(MoerayError, handle)
    app.add_exception_handler(HTTPException, handle)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _http_reply(error: HTTPException) -> ErrorReply:
    headers: dict[str, Any] = dict(error.headers or {})
    if error.status_code == 404:
        return ErrorReply(404, "unknown path; the API lives under /v1", code="not_found", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        message = f"method not allowed here; use {allowed}"
        return ErrorReply(405, message, code="method_not_allowed", headers=headers)
    return ErrorReply(error.status_code, str(error.detail), headers=headers)

"""The lines of OpenAI's batch files: `{custom_id, method, url, body}` in, `{id, custom_id, response, error}` out.

A line of the error file is one of two kinds, as in OpenAI's. `response` holds what the endpoint answers to a request
that it refuses or fails at; `error` says why a line is no request at all. In both, the error object has one more
field, `line`: the number of the input's line, counted from 1.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from moeray.errors import BatchError, RequestError
from moeray.serve.body import parse_object
from moeray.serve.calls import APIS
from moeray.serve.errors import ErrorReply


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the input. `number` counts the file's lines from 1."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


class LineError(BatchError):
    """A line of the input that is no request: `code` is OpenAI's word for why, `param` the field at fault."""

    def __init__(
        self, number: int, message: str, *, code: str, param: str | None = None, custom_id: str | None = None
    ) -> None:
        super().__init__(f"line {number}: {message}")
        self.number = number
        self.code = code
        self.param = param
        self.custom_id = custom_id


def parse_line(raw: bytes, number: int) -> BatchLine:
    """Read one line. Raises LineError that names the field at fault; the body is looked at when it is asked."""
    try:
        line = parse_object(raw, "the line")
    except RequestError as error:
        raise LineError(number, f"{error}; write one request on each line", code="invalid_json_line") from error
    given = line.get("custom_id")
    custom_id = given if isinstance(given, str) and given else None

    def refuse(param: str, code: str, mend: str) -> LineError:
        return LineError(number, mend, code=code, param=param, custom_id=custom_id)

    for name in ("custom_id", "method", "url", "body"):
        if line.get(name) is None:
            raise refuse(name, "missing_required_parameter", f"the field {name!r} is missing; add it")
    if custom_id is None:
        raise refuse("custom_id", "invalid_custom_id", "custom_id must be a string that is not empty")
    if line["method"] != "POST":
        raise refuse("method", "invalid_method", f"method must be 'POST', got {_shown(line['method'])}")
    if not isinstance(line["url"], str) or line["url"] not in APIS:
        raise refuse("url", "invalid_url", f"url must be one of {', '.join(APIS)}, got {_shown(line['url'])}")
    if not isinstance(line["body"], dict):
        raise refuse("body", "invalid_body", f"body must be a JSON object, got {_shown(line['body'])}")
    if line["body"].get("stream"):
        raise refuse("stream", "stream_not_supported", "a batch has no stream; leave body.stream out")
    return BatchLine(number, custom_id, line["url"], line["body"])


def seeded(line: BatchLine) -> dict[str, Any]:
    """The body with a seed: its own, else one that follows from the custom_id.

    So a line has the same tokens whenever it is computed, and a job that was killed ends as one that was not.
    """
    if line.body.get("seed") is not None:
        return line.body
    digest = hashlib.blake2b(line.custom_id.encode(), digest_size=8).digest()
    return {**line.body, "seed": int.from_bytes(digest) >> 1}


def answer_line(line: BatchLine, answer: bytes, request_id: str) -> bytes:
    """A line of the output; `answer` is the endpoint's, JSON without a line break."""
    return _line(line.custom_id, response=_response(200, request_id, answer))


def refusal_line(line: BatchLine, reply: ErrorReply, request_id: str) -> bytes:
    """A line of the error file for a request that the endpoint refuses, or fails at."""
    body = json.loads(reply.body())
    body["error"]["message"] = f"line {line.number}: {reply.message}"
    body["error"]["line"] = line.number
    return _line(line.custom_id, response=_response(reply.status, request_id, json.dumps(body).encode()))


def error_line(error: LineError) -> bytes:
    """A line of the error file for what is no request."""
    said = {"code": error.code, "message": str(error), "param": error.param, "line": error.number}
    return _line(error.custom_id, error=json.dumps(said).encode())


START = b'{"id": "batch_req_'
"""How every line that is written begins."""


def _line(custom_id: str | None, response: bytes = b"null", error: bytes = b"null") -> bytes:
    named = json.dumps(custom_id).encode()
    identity = uuid.uuid4().hex.encode()
    return b'%s%s", "custom_id": %s, "response": %s, "error": %s}\n' % (START, identity, named, response, error)


def _response(status: int, request_id: str, body: bytes) -> bytes:
    return b'{"status_code": %d, "request_id": "%s", "body": %s}' % (status, request_id.encode(), body)


def _shown(value: Any) -> str:
    return repr(value)[:80]

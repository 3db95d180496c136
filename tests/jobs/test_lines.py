"""The batch format: what a line must have, and what is written for it."""

from __future__ import annotations

import json

import pytest
from openai.types import Completion

from moeray.errors import RequestError
from moeray.jobs.lines import BatchLine, LineError, answer_line, error_line, parse_line, refusal_line, seeded
from moeray.serve.errors import reply_for
from tests.jobs.support import CHAT, COMPLETIONS, entry

GOOD = entry("a", "m")


def changed(**fields):
    return json.dumps({**GOOD, **fields}).encode()


def without(name):
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_a_request(url):
    given = entry("x-1", "m", "hi", url, temperature=0.5)
    assert parse_line(json.dumps(given).encode() + b"\r\n", 7) == BatchLine(7, "x-1", url, given["body"])


@pytest.mark.parametrize(
    ("raw", "code", "param", "custom_id"),
    [
        (b"{bad", "invalid_json_line", None, None),
        (b"\xff\xfe", "invalid_json_line", None, None),
        (b"[1]", "invalid_json_line", None, None),
        (b'{"custom_id": NaN}', "invalid_json_line", None, None),
        (b"[" * 100_000, "invalid_json_line", None, None),
        (without("custom_id"), "missing_required_parameter", "custom_id", None),
        (without("method"), "missing_required_parameter", "method", "a"),
        (without("url"), "missing_required_parameter", "url", "a"),
        (without("body"), "missing_required_parameter", "body", "a"),
        (changed(body=None), "missing_required_parameter", "body", "a"),
        (changed(custom_id=5), "invalid_custom_id", "custom_id", None),
        (changed(custom_id=""), "invalid_custom_id", "custom_id", None),
        (changed(method="GET"), "invalid_method", "method", "a"),
        (changed(url="/v1/embeddings"), "invalid_url", "url", "a"),
        (changed(url=["/v1/completions"]), "invalid_url", "url", "a"),
        (changed(body="text"), "invalid_body", "body", "a"),
        (changed(body={"stream": True}), "stream_not_supported", "stream", "a"),
    ],
)
def test_what_is_no_request(raw, code, param, custom_id):
    with pytest.raises(LineError, match=r"^line 12: ") as caught:
        parse_line(raw, 12)
    error = caught.value
    assert (error.code, error.param, error.custom_id, error.number) == (code, param, custom_id, 12)
    assert "\n" not in str(error)
    written = json.loads(error_line(error))
    assert written.keys() == {"id", "custom_id", "response", "error"}
    assert (written["custom_id"], written["response"]) == (custom_id, None)
    assert written["error"] == {"code": code, "message": str(error), "param": param, "line": 12}


LINE = BatchLine(3, 'quote " and é', COMPLETIONS, {"model": "m", "prompt": "x"})


def test_an_answer_is_one_line():
    body = json.dumps(
        {
            "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": "a\nb\u2028", "logprobs": None, "finish_reason": "stop"}],
        }
    )  # fmt: skip
    raw = answer_line(LINE, body.encode(), "req-1")
    assert raw.endswith(b"\n")
    assert raw.count(b"\n") == 1
    written = json.loads(raw)
    assert written.keys() == {"id", "custom_id", "response", "error"}
    assert (written["custom_id"], written["error"]) == (LINE.custom_id, None)
    assert written["id"].startswith("batch_req_")
    assert {key: written["response"][key] for key in ("status_code", "request_id")} == {
        "status_code": 200, "request_id": "req-1"
    }  # fmt: skip
    assert Completion.model_validate(written["response"]["body"]).choices[0].text == "a\nb\u2028"


def test_a_refusal_is_what_the_endpoint_answers_and_names_the_line():
    reply = reply_for(RequestError("prompt is empty", param="prompt", code="empty_prompt"))
    written = json.loads(refusal_line(LINE, reply, "req-2"))
    assert (written["custom_id"], written["error"]) == (LINE.custom_id, None)
    assert written["response"] == {
        "status_code": 400,
        "request_id": "req-2",
        "body": {
            "error": {
                "message": "line 3: prompt is empty", "type": "invalid_request_error", "param": "prompt",
                "code": "empty_prompt", "line": 3,
            }
        },
    }  # fmt: skip


def test_a_seed_follows_from_the_custom_id_unless_there_is_one():
    def seed(custom_id, **body):
        return seeded(BatchLine(1, custom_id, COMPLETIONS, body))["seed"]

    assert seed("a") == seed("a", seed=None) != seed("b")
    assert 0 <= seed("a") < 2**63
    assert seed("a", seed=0) == 0

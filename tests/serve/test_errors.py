"""Every failure is answered in OpenAI's form, by the right status."""

import asyncio
import socket
from dataclasses import replace

import httpx
import openai
import pytest

from moeray.config import Config
from moeray.errors import QueueFullError, RequestError, RouterLostError
from moeray.serve.backend import BackendState
from moeray.settings.serve import ServeConfig
from tests.serve.support import client, serving

MODEL = "org/echo"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": MODEL, "prompt": "hello"}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code", "request_id"}
    assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]
    assert "Traceback" not in reply.text
    assert "\n" not in reply.json()["error"]["message"]
    return reply.json()["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("best_of", 2),
        ("audio", {"voice": "a"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "low"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("echo", True),
        ("web_search_options", {"a": 1}),
        ("no_such_thing", 1),
    ],
)
def test_unsupported_chat_parameters_are_refused_by_name(http, name, value):
    error = error_of(http.post(CHAT_PATH, json=CHAT | {name: value}), 400)
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("best_of", 2), ("tools", []), ("x", 1)])
def test_unsupported_completion_parameters_are_refused_by_name(http, name, value):
    assert error_of(http.post(TEXT_PATH, json=TEXT | {name: value}), 400)["param"] == name


def test_neutral_values_pass(http):
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "functions": None,
        "best_of": 1,
        "audio": None,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "store": False,
        "n": 1,
        "stop": [],
        "logit_bias": {},
        "stream_options": None,
        "temperature": None,
        "max_tokens": None,
        "seed": None,
        "user": "someone",
    }
    assert http.post(CHAT_PATH, json=CHAT | neutral).status_code == 200
    assert http.post(TEXT_PATH, json=TEXT | {"echo": False, "suffix": "", "best_of": 1}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("seed", 1.5),
        ("seed", 2**70),
        ("n", 0),
        ("n", 1000),
        ("max_tokens", 0),
        ("max_tokens", 10**12),
        ("max_tokens", "5"),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", [1]),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**40]),
        ("stop_token_ids", [2**70]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 5),
        ("user", 5),
    ],
)
def test_values_out_of_range_are_named(http, name, value):
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        param = error_of(http.post(path, json=body | {name: value}), 400)["param"]
        assert param.partition("[")[0] == name


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT_PATH, {"model": MODEL}, "messages"),
        (CHAT_PATH, CHAT | {"messages": []}, "messages"),
        (CHAT_PATH, CHAT | {"messages": "hello"}, "messages"),
        (CHAT_PATH, CHAT | {"messages": ["hello"]}, "messages[0]"),
        (CHAT_PATH, CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (CHAT_PATH, CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT_PATH, CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (
            CHAT_PATH,
            CHAT | {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls",
        ),
        (CHAT_PATH, CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT_PATH, CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT_PATH, CHAT | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        (CHAT_PATH, CHAT | {"stream_options": {"more": 1}, "stream": True}, "stream_options.more"),
        (TEXT_PATH, {"prompt": "x"}, "model"),
        (TEXT_PATH, TEXT | {"prompt": ""}, "prompt"),
        (TEXT_PATH, TEXT | {"prompt": []}, "prompt"),
        (TEXT_PATH, TEXT | {"prompt": [[]]}, "prompt"),
        (TEXT_PATH, TEXT | {"prompt": ["a", 1]}, "prompt"),
        (TEXT_PATH, TEXT | {"prompt": [-1]}, "prompt"),
        (TEXT_PATH, TEXT | {"prompt": [10**9]}, "prompt"),
        (TEXT_PATH, TEXT | {"logprobs": 21}, "logprobs"),
        (TEXT_PATH, TEXT | {"prompt": ["a"] * 100, "n": 100}, "n"),
    ],
)
def test_bad_bodies_name_the_parameter(http, path, body, param):
    assert error_of(http.post(path, json=body), 400)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": NaN}',
        b'{"temperature": 1e999, "model": "org/echo", "prompt": "x"}',
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "org/echo", "prompt": "\\ud83e"}',
        b'{"model": "org/echo", "prompt": "\xed\xa0\x80"}',
        '{"model": "org/echo", "prompt": "\\ud83e"}'.encode("utf-16"),
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=range(13),
)
def test_bodies_that_are_not_json_objects(http, raw):
    error_of(http.post(TEXT_PATH, content=raw, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_wrong_content_type(http, kind):
    headers = {} if kind is None else {"content-type": kind}
    error = error_of(http.post(TEXT_PATH, content=b'{"model": "org/echo", "prompt": "x"}', headers=headers), 400)
    assert error["code"] == "unsupported_content_type"


def test_prompt_over_the_context_names_both_numbers(http):
    error = error_of(http.post(TEXT_PATH, json=TEXT | {"prompt": [9] * 600}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "600" in error["message"]
    assert "512" in error["message"]
    error = error_of(http.post(TEXT_PATH, json=TEXT | {"prompt": [9] * 500, "max_tokens": 13}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")


def test_unknown_model_path_and_method(http, ai):
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        assert error_of(http.post(path, json=body | {"model": "gpt-4"}), 404)["code"] == "model_not_found"
    error_of(http.get("/v1/models/gpt-4"), 404)
    error_of(http.get("/nowhere"), 404)
    error_of(http.get("/v1/completions"), 405)
    assert http.get("/v1/completions").headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-4")


@pytest.mark.parametrize("implementation", ["h11", "httptools"])
def test_body_over_the_limit_is_refused_while_it_is_read(backend, implementation):
    config = Config(serve=ServeConfig(max_body_bytes=2048))
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b" " * 1024

    headers = {"content-type": "application/json"}
    with serving(backend, config, implementation) as url, httpx.Client(base_url=url) as http:
        for body in (b" " * 2049, chunks()):
            error = error_of(http.post(TEXT_PATH, content=body, headers=headers), 413)
            assert "2048" in error["message"]
        assert sent > 2
        just_fits = b'{"model": "org/echo", "prompt": "x"}'.ljust(2048)
        assert http.post(TEXT_PATH, content=just_fits, headers=headers).status_code == 200


def test_api_key(backend):
    with serving(backend, Config(serve=ServeConfig(api_key="secret-ключ"))) as url:
        key = "secret-ключ".encode()
        with httpx.Client(base_url=url) as http:
            for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": b"Basic " + key}):
                for path in ("/v1/models", "/status"):
                    error = error_of(http.get(path, headers=wrong), 401)
                    assert error["code"] == "invalid_api_key"
            error_of(http.post(CHAT_PATH, json=CHAT), 401)
            assert http.get("/v1/models", headers={"Authorization": b"Bearer " + key}).status_code == 200
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 200
        with client(url, "no") as ai, pytest.raises(openai.AuthenticationError):
            ai.models.list()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (QueueFullError("the queue is full: 1024 requests wait", retry_after_s=2.3), 429, "3"),
        (RouterLostError("the router is gone"), 503, "1"),
        (RequestError("too long for the cache", param="prompt"), 400, None),
        (ZeroDivisionError("secret detail"), 500, None),
    ],
)
def test_refusals_of_the_backend(http, backend, refusal, status, retry_after, stream):
    backend.refuse = refusal
    reply = http.post(CHAT_PATH, json=CHAT | {"stream": stream, "n": 2})
    error_of(reply, status)
    assert reply.headers.get("retry-after") == retry_after
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"]


def test_loading_and_failed(http, backend):
    backend.state, model = BackendState("loading", "tensors 3/9"), backend.model
    backend.model = None
    for reply in (http.post(CHAT_PATH, json=CHAT), http.get("/v1/models")):
        error = error_of(reply, 503)
        assert "tensors 3/9" in error["message"]
        assert reply.headers["retry-after"] == "5"
    health = http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "loading", "detail": "tensors 3/9"})
    backend.state = BackendState("waiting", "no router can be reached")
    assert (health.headers["retry-after"], http.get("/health").headers["retry-after"]) == ("5", "5")
    backend.state = BackendState("failed", "a.safetensors is truncated; fetch it again")
    assert "a.safetensors" in error_of(http.post(TEXT_PATH, json=TEXT), 503)["message"]
    failed = http.get("/health")
    assert (failed.json()["status"], failed.headers.get("retry-after")) == ("failed", None)
    backend.state, backend.model = BackendState("ready"), model
    assert http.post(TEXT_PATH, json=TEXT).status_code == 200


def test_errors_of_a_running_sequence(http, ai, backend):
    backend.break_after = 2
    assert "expert group 3" in error_of(http.post(TEXT_PATH, json=TEXT | {"prompt": "a b c d"}), 500)["message"]
    received = []
    stream = ai.completions.create(model=MODEL, prompt="a b c d", stream=True)
    with pytest.raises(openai.APIError, match="expert group 3 is gone"):
        received.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(received)
    assert "a b c d".startswith("".join(received))
    backend.break_with = ZeroDivisionError("secret detail")
    headers = {"X-Request-Id": "abc"}
    with http.stream("POST", TEXT_PATH, json=TEXT | {"prompt": "a b c d", "stream": True}, headers=headers) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert reply.status_code == 200
    assert lines[-1].startswith('data: {"error": ')
    assert '"request_id": "abc"' in lines[-1]
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("stream", [False, True])
def test_time_limit(backend, stream):
    backend.hold_after = 2
    with serving(backend, Config(serve=ServeConfig(request_timeout_s=0.5))) as url:
        reply = httpx.post(url + TEXT_PATH, json=TEXT | {"prompt": "a b c d", "stream": stream})
        if stream:
            assert reply.status_code == 200
            assert '"code": "timeout"' in reply.text
            assert "[DONE]" not in reply.text
        else:
            assert error_of(reply, 504)["code"] == "timeout"
        assert backend.closed.acquire(timeout=10)


@pytest.mark.parametrize("implementation", ["h11", "httptools"])
def test_a_body_that_does_not_come_or_breaks_off(backend, implementation):
    config = Config(serve=ServeConfig(request_timeout_s=0.3))
    head = f"POST {TEXT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with serving(backend, config, implementation) as url:
        address = httpx.URL(url).host, httpx.URL(url).port
        with socket.create_connection(address, 20) as waits:
            waits.sendall(head.encode())
            assert waits.recv(64).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address, 20) as breaks_off:
            breaks_off.sendall(head.encode())
        assert httpx.post(url + TEXT_PATH, json=TEXT).status_code == 200


def test_a_sequence_that_the_system_cancels_is_answered(http, backend):
    backend.break_after, backend.break_with = 2, asyncio.CancelledError()
    assert error_of(http.post(TEXT_PATH, json=TEXT), 500)["code"] == "generation_failed"


def test_request_ids(http):
    for good in ("abc-1.2:3", "Root=1-67891233-abcdef012345678912345678;Sampled=1", "a/b+c=="):
        assert http.get("/health", headers={"X-Request-Id": good}).headers["x-request-id"] == good
    made = [http.get("/nowhere", headers={"X-Request-Id": bad}).headers["x-request-id"] for bad in ("a b", "x" * 300)]
    assert all(len(one) == 32 for one in made)
    assert made[0] != made[1]
    assert http.post(TEXT_PATH, json={}, headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"


def test_more_choices_than_the_routers_ever_take_are_refused(http, backend):
    backend.model = replace(backend.model, max_sequences=6)
    error = error_of(http.post(TEXT_PATH, json=TEXT | {"prompt": ["a", "b"], "n": 4}), 400)
    assert error["param"] == "n"
    assert "6" in error["message"]
    assert len(http.post(TEXT_PATH, json=TEXT | {"prompt": ["a", "b"], "n": 3}).json()["choices"]) == 6


def test_a_model_without_a_tokenizer_says_so_without_the_servers_paths(backend, http, tmp_path):
    backend.model = replace(backend.model, metadata_dir=tmp_path)
    error = error_of(http.post(TEXT_PATH, json=TEXT), 503)
    assert error["code"] == "no_tokenizer"
    assert str(tmp_path) not in error["message"]

"""HTTP requests as the endpoint counts them."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from moeray.config import load_config
from moeray.recorder import Recorder
from moeray.serve.openai import create_app
from tests.serve.support import EchoBackend, model_info, save_tokenizer

URL = "http://test"
COMPLETION = {"model": "org/echo", "prompt": "hello", "max_tokens": 4}


@pytest.fixture
def recorder():
    return Recorder()


@pytest.mark.parametrize(
    ("method", "path", "body", "counted"),
    [
        ("POST", "/v1/completions", COMPLETION, ("/v1/completions", "POST", "200")),
        ("POST", "/v1/completions", COMPLETION | {"stream": True}, ("/v1/completions", "POST", "200")),
        ("POST", "/v1/completions", COMPLETION | {"model": "other"}, ("/v1/completions", "POST", "404")),
        ("GET", "/v1/models/org/echo", None, ("/v1/models/{model_id:path}", "GET", "200")),
        ("GET", "/v1/completions", None, ("/v1/completions", "GET", "405")),
        ("GET", "/nonsense/of/a/stranger", None, ("other", "GET", "404")),
        ("BREW", "/health", None, ("/health", "other", "405")),
    ],
)
def test_requests_are_counted_by_route(tmp_path, recorder, method, path, body, counted):
    async def ask():
        backend = EchoBackend(model_info(save_tokenizer(tmp_path)))
        app = create_app(backend, load_config(None, {"model": "m"}), recorder)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=URL) as client:
            await client.request(method, path, json=body)

    asyncio.run(ask())
    found = recorder.read()[1]
    ended = {key: count for key, count in found["moeray_http_requests_total"].items() if count}
    assert ended == {counted: 1}
    observed = {key: row[-1] for key, row in found["moeray_http_request_duration_seconds"].items() if row[-1]}
    assert observed.keys() == {(counted[0],)}


def test_answers_of_the_model_have_their_series_from_the_start(tmp_path, recorder):
    create_app(EchoBackend(None), load_config(None, {"model": "m"}), recorder).build_middleware_stack()
    paths, statuses = ("/v1/completions", "/v1/chat/completions"), ("200", "429", "500", "503", "504")
    assert recorder.read()[1]["moeray_http_requests_total"] == {
        (path, "POST", status): 0 for path in paths for status in statuses
    }

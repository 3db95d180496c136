"""Pages of other origins that a browser lets ask the endpoint."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from moeray.config import load_config
from moeray.serve.openai import create_app
from tests.serve.support import EchoBackend

ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def answers(app, method, origin, **headers):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.request(method, "/v1/chat/completions", headers={"Origin": origin, **headers}, json={})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("allowed", "origin", "answer"),
    [
        ([], "https://a.example", None),
        (["https://a.example"], "https://a.example", "https://a.example"),
        (["https://a.example"], "https://b.example", None),
        (["*"], "https://b.example", "*"),
    ],
)
def test_a_browser_is_told_whose_pages_may_ask(allowed, origin, answer):
    app = create_app(EchoBackend(None), load_config(None, {"model": "m", "serve.allowed_origins": allowed}))
    before = answers(app, "OPTIONS", origin, **ASKED)
    assert before.headers.get("Access-Control-Allow-Origin") == answer
    if answer is not None:
        assert before.status_code == 200
        assert "authorization" in before.headers["Access-Control-Allow-Headers"].lower()
    refused = answers(app, "POST", origin)  # the model is not there: errors can be read, too
    assert refused.status_code >= 400
    assert refused.headers.get("Access-Control-Allow-Origin") == answer


def test_a_newer_config_has_other_origins():
    app = create_app(EchoBackend(None), load_config(None, {"model": "m"}))
    assert "Access-Control-Allow-Origin" not in answers(app, "POST", "https://a.example").headers
    app.state.endpoint.configure(load_config(None, {"model": "m", "serve.allowed_origins": ["https://a.example"]}))
    assert "Access-Control-Allow-Origin" in answers(app, "POST", "https://a.example").headers
    app.state.endpoint.configure(load_config(None, {"model": "m"}))
    assert "Access-Control-Allow-Origin" not in answers(app, "POST", "https://a.example").headers

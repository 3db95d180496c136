"""A client that hangs up frees what it held, at once."""

import asyncio
import json
import socket
from contextlib import ExitStack

import httpx
import pytest

from moeray.config import Config
from moeray.serve import streaming
from moeray.serve.openai import create_app
from moeray.settings.serve import ServeConfig
from tests.serve.support import serving

BODY = {"model": "org/echo", "prompt": ["a b c d e f", "g h i j k l"], "n": 2, "max_tokens": 50}
SEQUENCES = 4


@pytest.mark.parametrize("implementation", ["h11", "httptools"])
@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_closes_every_sequence(backend, stream, implementation):
    backend.hold_after = 3
    with serving(backend, http=implementation) as url:
        address = httpx.URL(url)
        request = httpx.Request("POST", f"{url}/v1/completions", json=BODY | {"stream": stream})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            for _ in range(SEQUENCES):
                assert backend.held.acquire(timeout=20)
            assert backend.open == SEQUENCES
        for _ in range(SEQUENCES):
            assert backend.closed.acquire(timeout=20)
        assert backend.open == 0
        backend.hold_after = None
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_closing_a_stream_in_the_official_client(ai, backend):
    backend.hold_after = 3
    with ExitStack() as stack:
        stream = stack.enter_context(ai.completions.create(model="org/echo", prompt="a b c d e", stream=True))
        assert next(iter(stream)).choices[0].text
        assert backend.held.acquire(timeout=20)
    assert backend.closed.acquire(timeout=20)
    assert backend.open == 0


def test_one_failed_choice_closes_the_others(http, backend):
    backend.break_after = 2
    backend.gather = SEQUENCES
    assert http.post("/v1/completions", json=BODY).status_code == 500
    for _ in range(SEQUENCES):
        assert backend.closed.acquire(timeout=20)
    assert backend.open == 0


def test_a_reader_that_stops_reading_is_let_go(backend, monkeypatch):
    """What a server hands a response that nobody reads: its `send` does not return. The request's time is over, and
    nobody waits for its client to take the error."""
    monkeypatch.setattr(streaming, "FAREWELL_S", 0.2)
    app = create_app(backend, Config(serve=ServeConfig(request_timeout_s=1.0)))
    body = json.dumps(BODY | {"n": 1, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"}, "http_version": "1.1",
    }  # fmt: skip

    async def answer():
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive():
            if not messages:
                await never.wait()
            return messages.pop()

        async def send(message):
            if message["type"] == "http.response.body":
                await never.wait()

        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(answer())
    assert backend.open == 0

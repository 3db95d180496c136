"""The same through the HTTP endpoint: text, stop strings, log probabilities and usage know nothing of a lost router."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from moeray.cluster.local import NODE
from moeray.serve.openai import create_app
from moeray.serve.system import SystemBackend
from moeray.types import GenerationRequest, TokenOutput
from tests.checkpoints import make_tiny
from tests.fleet import Fleet, FleetPort, generated
from tests.serve.support import EchoBackend, _Server, client, model_info
from tests.serve.support import serving as serving_backend

TOKENS = 250
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "Name three rivers."}],
    "max_tokens": TOKENS,
    "temperature": 0.9,
    "seed": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "extra_body": {"ignore_eos": True},
}
COMPLETION = {
    "model": "m",
    "prompt": "Once upon a time",
    "max_tokens": TOKENS,
    "temperature": 0.0,
    "logprobs": 2,
    "extra_body": {"ignore_eos": True, "repetition_penalty": 1.1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("deepseek_v3", tmp_path_factory.mktemp("http") / "m", tokenizer=True)


@contextmanager
def serving(fleet: Fleet, backend_class: type[SystemBackend] = SystemBackend) -> Iterator[openai.OpenAI]:
    backend = backend_class(fleet.config, FleetPort(fleet), NODE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start()
        await backend.ready(60)
        yield
        await backend.close()

    app = create_app(backend, fleet.config)
    app.router.lifespan_context = lifespan
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    try:
        assert server.up.wait(60)
        with client(f"http://127.0.0.1:{listener.getsockname()[1]}") as ai:
            yield ai
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


class Answer:
    """A streamed answer, put together; `at(chunks)` is called on the way."""

    def __init__(self, stream: Any, at: Any = lambda chunks: None) -> None:
        self.text, self.finish, self.usage = "", None, None
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        for count, chunk in enumerate(stream):
            at(count)
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                delta = getattr(choice, "delta", None)
                self.text += (delta.content or "") if delta else choice.text
                self.finish = choice.finish_reason or self.finish
                if choice.logprobs and not delta:
                    self.tokens += choice.logprobs.tokens
                    self.logprobs += choice.logprobs.token_logprobs


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def ask(ai: openai.OpenAI, stop: str | None, at: Any = lambda chunks: None) -> tuple[Answer, Answer, Any]:
    """A chat and a completion as streams, and one without streaming, at once."""
    chat = CHAT | ({"stop": stop} if stop else {})
    with ThreadPoolExecutor(3) as pool:
        chatting = pool.submit(lambda: Answer(ai.chat.completions.create(**chat, **STREAM), at))
        completing = pool.submit(lambda: Answer(ai.completions.create(**COMPLETION, **STREAM), at))
        plain = pool.submit(lambda: ai.completions.create(**COMPLETION | {"prompt": "Twice", "n": 2, "seed": 4}))
        return chatting.result(120), completing.result(120), plain.result(120)


def late_stop(text: str) -> str:
    """Four characters of the text that appear first behind its middle."""
    return next(text[k : k + 4] for k in range(len(text) // 2, len(text)) if text.find(text[k : k + 4]) == k)


def test_no_client_sees_that_a_router_died(model):
    with Fleet(model) as fleet:
        fleet.add_router()
        with serving(fleet) as ai:
            stop = late_stop(ask(ai, None)[0].text)
    with Fleet(model) as fleet:
        fleet.add_router()
        with serving(fleet) as ai:
            expected = ask(ai, stop)
    assert expected[0].finish == "stop"

    both = threading.Barrier(2, action=lambda: (fleet.kill(first), added.append(fleet.add_router())))

    def at(chunks: int) -> None:
        if chunks == 10:
            both.wait(60)

    added: list[Any] = []
    with Fleet(model) as fleet:
        first = fleet.add_router()
        with serving(fleet) as ai:
            chat, completion, plain = ask(ai, stop, at)
        assert generated(added[0]) > 0

    for mine, its in ((chat, expected[0]), (completion, expected[1])):
        assert (mine.text, mine.finish, mine.usage) == (its.text, its.finish, its.usage)
    assert completion.tokens == expected[1].tokens
    assert completion.logprobs == pytest.approx(expected[1].logprobs, abs=1e-3)
    assert len(completion.tokens) == TOKENS
    assert [c.text for c in plain.choices] == [c.text for c in expected[2].choices]
    assert plain.usage == expected[2].usage


class EndsAfterwards(EchoBackend):
    """As a resumed attempt does whose earlier one had come to its end: the end comes by itself, without a token."""

    async def _outputs(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        async for output in super()._outputs(request):
            yield replace(output, finish_reason=None)
        yield TokenOutput(request.request_id, 1, (), finish_reason=output.finish_reason)


@pytest.mark.parametrize("max_tokens", [4, 100])
def test_an_end_that_comes_without_a_token(metadata_dir, max_tokens):
    answers = []
    for backend in (EchoBackend(model_info(metadata_dir)), EndsAfterwards(model_info(metadata_dir))):
        with serving_backend(backend) as url, client(url) as ai:
            options = {"model": "org/echo", "prompt": "the quick fox", "max_tokens": max_tokens, "logprobs": 1}
            plain = ai.completions.create(**options)
            streamed = Answer(ai.completions.create(**options, **STREAM))
            logprobs = plain.choices[0].logprobs
            assert (streamed.text, streamed.tokens) == (plain.choices[0].text, logprobs.tokens)
            answers.append((streamed.text, streamed.finish, streamed.usage, plain.usage, logprobs))
    assert answers[0] == answers[1]


def test_health_says_when_no_router_can_be_reached_and_requests_wait_for_one(model):
    with Fleet(model) as fleet:
        fleet.add_router()
        with serving(fleet) as ai, ThreadPoolExecutor(1) as pool:
            base = str(ai.base_url).removesuffix("/v1/")
            assert httpx.get(f"{base}/health").status_code == 200
            ai.completions.create(model="m", prompt="a", max_tokens=1)  # connects
            fleet.kill(fleet.routers[0])
            while (health := httpx.get(f"{base}/health")).status_code == 200:
                pass
            assert health.json()["status"] == "waiting"
            assert "no router" in health.json()["detail"]
            ask = partial(ai.completions.create, model="m", prompt="a", max_tokens=3, extra_body={"ignore_eos": True})
            waiting = pool.submit(ask)
            fleet.add_router()
            assert waiting.result(60).usage.completion_tokens == 3
            assert httpx.get(f"{base}/health").status_code == 200

"""Several tokens in an event of a stream: the first comes at once, none is lost, and all else stays as it was."""

from __future__ import annotations

import openai
import pytest

from moeray.config import Config
from moeray.settings.serve import ServeConfig
from tests.serve.support import EchoBackend, client, model_info, serving

MODEL = "org/echo"
TEXT = "the quick brown fox 🦊 jumps over 東京 and the lazy dog"


@pytest.fixture(scope="module", params=[1, 3, 8, 1000])
def server(request, metadata_dir):
    """An endpoint, its backend, and how many tokens an event of its streams has."""
    backend = EchoBackend(model_info(metadata_dir))
    with serving(backend, Config(serve=ServeConfig(stream_interval=request.param))) as url, client(url) as ai:
        yield ai, backend, request.param


@pytest.mark.parametrize("options", [{}, {"stop": "lazy"}, {"max_tokens": 7}, {"max_tokens": 1}])
@pytest.mark.parametrize("at_once", [1, 2])
def test_events_have_so_many_tokens_and_together_all_of_them(server, options, at_once):
    ai, backend, interval = server
    backend.tokens_per_step = at_once
    asked = {"model": MODEL, "prompt": TEXT, "max_tokens": 200, "logprobs": 0} | options
    plain = ai.completions.create(**asked)
    events = [
        chunk.choices[0]
        for chunk in ai.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        if chunk.choices
    ]
    assert "".join(event.text for event in events) == plain.choices[0].text
    assert [t for event in events for t in event.logprobs.tokens] == plain.choices[0].logprobs.tokens
    assert events[-1].finish_reason == plain.choices[0].finish_reason
    tokens = [len(event.logprobs.tokens) for event in events]
    assert tokens[0] <= at_once
    assert all(count >= interval for count in tokens[1:-1])
    assert max(tokens[1:], default=0) <= interval + 12  # of a character's bytes, and of what may begin a stop string


def test_a_chats_events(server):
    ai, backend, interval = server
    backend.tokens_per_step = 1
    asked = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "n": 2}
    plain = ai.chat.completions.create(**asked)
    texts, events = ["", ""], [0, 0]
    for chunk in ai.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        events[choice.index] += 1
    assert texts == [choice.message.content for choice in plain.choices] == [TEXT, TEXT]
    assert max(events) <= 4 + plain.usage.completion_tokens // 2 / interval


@pytest.mark.parametrize(("stop", "text"), [("qu", "q"), (None, "🦊")])
def test_a_first_token_without_text_is_not_the_first(server, stop, text):
    """What may begin a stop string, and a character's first bytes, are shown with what follows, which then is due."""
    ai, backend, _ = server
    backend.tokens_per_step = 1
    prompt = f"{text} the lazy dog and the fox"
    stream = ai.completions.create(model=MODEL, prompt=prompt, max_tokens=100, stop=stop, logprobs=0, stream=True)
    events = [chunk.choices[0] for chunk in stream]
    first = next(event for event in events if event.text)
    assert len(first.logprobs.tokens) <= 5
    assert "".join(event.text for event in events) == prompt


def test_what_a_stream_has_when_it_fails_is_shown(server):
    ai, backend, _ = server
    backend.tokens_per_step, backend.break_after = 1, 12
    texts = []

    def read():
        for chunk in ai.completions.create(model=MODEL, prompt=TEXT, max_tokens=100, stream=True):
            texts.append(chunk.choices[0].text)

    with pytest.raises(openai.APIError, match="expert group 3 is gone"):
        read()
    backend.break_after = None
    assert TEXT.startswith("".join(texts))
    assert len("".join(texts)) >= 12


def test_the_first_token_does_not_wait_for_others(server):
    ai, backend, _ = server
    backend.hold_after = 1
    try:
        with ai.completions.create(model=MODEL, prompt=TEXT, stream=True) as stream:
            assert TEXT.startswith(next(iter(stream)).choices[0].text)
    finally:
        backend.hold_after = None

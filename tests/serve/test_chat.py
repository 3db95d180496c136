"""POST /v1/chat/completions through the official client."""

import asyncio
import json
from dataclasses import replace

import openai
import pytest

from tests.serve.support import EOS_ID

MODEL = "org/echo"
TEXT = "hello 🦊 world, 東京は日本の首都です 👩‍👩‍👧 stop here"


def ask(ai, text=TEXT, **options):
    return ai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **options)


def test_plain_answer_has_text_usage_and_finish_reason(ai, backend):
    backend.cached_tokens = 2
    answer = ask(ai)
    request = backend.requests[0]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert answer.usage.completion_tokens == len(request.prompt_ids) - 2 + 1  # less two role tokens, and eos
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("stop", [None, "本の首", ["nowhere", "👩‍👧"], ["d, 東", "world, 東"], "stop here"])
def test_streamed_deltas_equal_the_plain_text(ai, backend, stop, tokens_per_step):
    backend.tokens_per_step = tokens_per_step
    plain = ask(ai, stop=stop).choices[0]
    chunks = list(ask(ai, stop=stop, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    stops = [stop] if isinstance(stop, str) else stop or []
    expected = TEXT[: min((TEXT.index(one) for one in stops if one in TEXT), default=len(TEXT))]
    assert plain.message.content == expected
    assert "".join(piece or "" for piece in pieces) == expected
    assert not any("\ufffd" in (piece or "") for piece in pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None and "usage" not in c.model_fields_set for c in chunks)


def test_a_stop_string_ends_the_sequence_and_counts_its_tokens(ai, backend):
    backend.hold_after = 6  # the backend would wait for ever behind the stop string
    answer = ask(ai, "h e l l o", stop="e")
    assert answer.choices[0].message.content == "h "
    assert answer.choices[0].finish_reason == "stop"
    assert backend.closed.acquire(timeout=10)
    assert backend.stop_strings == [backend.requests[-1].request_id]
    assert answer.usage.completion_tokens == 3  # with the one that ended it


def test_the_token_that_ends_a_sequence_has_no_text(ai, backend):
    z = ask(ai, "z", logprobs=True).choices[0].logprobs.content[0]
    (z_id,) = {i for i in backend.requests[0].prompt_ids if i > 5}
    options = {"extra_body": {"stop_token_ids": [z_id]}}
    choice = ask(ai, "xyz!", logprobs=True, **options).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("xy", "stop")
    assert choice.logprobs.content[-1].token == z.token
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(ai, "xyz!", stream=True, **options))
    assert streamed == "xy"


@pytest.mark.parametrize(("ignore_eos", "stops"), [(False, (9, EOS_ID)), (True, (9,))])
def test_the_tokenizers_own_end_ends_a_sequence_where_the_config_has_another(ai, backend, ignore_eos, stops):
    ask(ai, extra_body={"stop_token_ids": [9], "ignore_eos": ignore_eos})
    assert backend.requests[-1].sampling.stop_token_ids == (9,)  # the config's is the same
    backend.model = replace(backend.model, eos_token_ids=(7,))
    ask(ai, extra_body={"stop_token_ids": [9], "ignore_eos": ignore_eos})
    assert backend.requests[-1].sampling.stop_token_ids == stops


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_counts_in_every_chunk_where_they_are_asked_for_all_along(http, path):
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hello world", "type": "text"}]}
    if path == "/v1/completions":
        body = {"model": MODEL, "stream": True, "prompt": "hello world"}
    asked = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    lines = http.post(path, json=body | asked).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    whole = http.post(path, json=body | {"stream": False, "stream_options": {}}).json()["usage"]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == whole["completion_tokens"]


def test_include_usage_sends_null_then_a_chunk_without_choices(http):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"choices":[],"usage":{"prompt_tokens":' in lines[-2]
    assert all('"usage":null' in line for line in lines[:-2])


def test_logprobs_have_the_shape_of_the_api(ai):
    plain = ask(ai, "hi 🦊", logprobs=True, top_logprobs=3)
    content = plain.choices[0].logprobs.content
    assert len(content) == plain.usage.completion_tokens
    assert bytes(b for token in content[:-1] for b in token.bytes).decode() == "hi 🦊"
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5, -2.5]
    assert content[0].top_logprobs[0].token == content[0].token
    streamed = [
        token.token
        for chunk in ask(ai, "hi 🦊", logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == [token.token for token in content]


def test_n_choices_have_their_own_seed_and_index(ai, backend):
    backend.gather = 3
    answer = ask(ai, "hello fox", n=3, seed=2**63 - 2)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"hello fox"}
    assert [r.sampling.seed for r in backend.requests] == [2**63 - 2, 2**63 - 1, 0]
    assert len({r.request_id for r in backend.requests}) == 3
    one = len(backend.requests[0].prompt_ids)
    assert answer.usage.prompt_tokens == one
    assert answer.usage.completion_tokens == 3 * (one - 1)


def test_n_choices_stream_interleaved(ai, backend):
    backend.gather = 3
    texts = ["", "", ""]
    order = []
    for chunk in ask(ai, "hello 東京 fox", n=3, stream=True):
        order.append(chunk.choices[0].index)
        texts[order[-1]] += chunk.choices[0].delta.content or ""
    assert texts == ["hello 東京 fox"] * 3
    assert order != sorted(order)


def test_max_tokens_default_to_the_rest_of_the_context(ai, backend):
    ask(ai, "hello")
    request = backend.requests[0]
    assert request.sampling.max_tokens == backend.model.max_context - len(request.prompt_ids)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_cut_by_length(ai, name):
    answer = ask(ai, "h e l l o", **{name: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_half_a_character_at_the_end_is_shown_as_such(ai):
    assert ask(ai, "🦊", max_tokens=1).choices[0].message.content == "\ufffd"


def test_text_parts_roles_and_template_variables(ai, backend):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = ai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}],
        extra_body={"chat_template_kwargs": {"shout": "HEY"}},
    )
    assert answer.choices[0].message.content == "be briefone\ntwoHEY"
    assert backend.requests[0].prompt_ids[0] == 1  # <|system|>, since the template does not know developers


def test_an_answer_can_be_sent_back_as_it_came(ai):
    first = ask(ai, "hello").choices[0].message
    messages = [{"role": "user", "content": "hello"}, first.model_dump(), {"role": "user", "content": "fox"}]
    assert ai.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content == "hellohellofox"


def test_a_template_that_refuses_is_the_clients_fault(ai):
    with pytest.raises(openai.BadRequestError, match="roles must alternate") as caught:
        ai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}] * 2)
    assert caught.value.code == "chat_template_error"


def test_64_streams_at_once_get_their_own_text(url, backend):
    backend.gather = 64

    async def one(ai, i):
        text = f"client {i} 東京 🦊 " * 3
        stream = await ai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], stream=True
        )
        return text, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
            return await asyncio.gather(*(one(ai, i) for i in range(64)))

    for text, got in asyncio.run(all_of_them()):
        assert got == text
    assert backend.most_open == 64

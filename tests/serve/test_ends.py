"""Where an answer ends and what is shown of its end: `min_tokens`, stop strings, special tokens."""

import pytest

from moeray.serve.prompt import load_tokenizer
from tests.serve.support import EOS_ID

MODEL = "org/echo"
TEXT = "ab, ab, ab"


@pytest.fixture(scope="module")
def tokenizer(metadata_dir):
    return load_tokenizer(metadata_dir)


def answer(ai, stream, **options):
    """(text, finish reason) of a completion, whole or in parts."""
    result = ai.completions.create(**{"model": MODEL, "prompt": TEXT, "max_tokens": 50, "stream": stream} | options)
    choices = [chunk.choices[0] for chunk in result] if stream else result.choices
    return "".join(choice.text for choice in choices), choices[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("min_tokens", "include", "expected"),
    [(0, False, ""), (0, True, "ab,"), (4, False, "ab, "), (4, True, "ab, ab,"), (50, True, TEXT), (None, None, "")],
)
def test_stop_strings(ai, tokenizer, stream, min_tokens, include, expected):
    """One that ends in the first `min_tokens` tokens does not count."""
    assert len(tokenizer("ab,")["input_ids"]) <= 3 < 4 <= len(tokenizer("ab, ab")["input_ids"])
    body = {"min_tokens": min_tokens, "include_stop_str_in_output": include}
    reason = "stop"
    assert answer(ai, stream, stop="ab,", extra_body=body) == (expected, reason)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("skip", "include", "end"), [(True, False, ""), (False, False, ""), (True, True, ""), (False, True, "<|end|>")]
)
def test_the_token_that_ends_is_shown_where_both_are_asked_for(ai, stream, skip, include, end):
    body = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    assert answer(ai, stream, extra_body=body) == (TEXT + end, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_of_the_request_is_shown_with_what_ends_the_text(ai, tokenizer, stream):
    ids = tokenizer(TEXT)["input_ids"]
    stop = ids[2]
    before, whole = tokenizer.decode(ids[:2]), tokenizer.decode(ids[:3])
    for include, text in ((False, before), (True, whole)):
        body = {"stop_token_ids": [stop], "include_stop_str_in_output": include}
        assert answer(ai, stream, extra_body=body) == (text, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_text_where_they_are_asked_for(ai, backend, monkeypatch, stream):
    """Also for stop strings, which may lie across one."""
    monkeypatch.setattr("tests.serve.support.SPECIAL", [])  # the backend repeats these, too
    prompt = "a<|user|>b<|end|>c"
    shown = {"skip_special_tokens": False, "ignore_eos": True}
    assert answer(ai, stream, prompt=prompt, extra_body={"ignore_eos": True})[0] == "abc"
    assert answer(ai, stream, prompt=prompt, extra_body=shown)[0].startswith(prompt)
    for stop, expected in (("user", "a<|"), ("|>b<|", "a<|user"), ("bc", prompt)):
        text, _ = answer(ai, stream, prompt=prompt, stop=stop, extra_body=shown)
        assert text.startswith(expected)
        assert text == expected or stop == "bc"
    assert answer(ai, stream, prompt=prompt, stop="bc", extra_body={"ignore_eos": True})[0] == "a"


@pytest.mark.parametrize("stream", [False, True])
def test_in_a_chat_too(ai, stream):
    body = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    result = ai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=stream, extra_body=body
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in result)
    else:
        text = result.choices[0].message.content
    assert text == "hello<|end|>"


def test_min_tokens_reaches_the_backend_and_may_not_be_more_than_there_can_be(ai, http, backend):
    answer(ai, False, extra_body={"min_tokens": 7, "stop_token_ids": [9]})
    assert backend.requests[0].sampling.min_tokens == 7
    assert backend.requests[0].sampling.stop_token_ids == (9,)
    assert EOS_ID in backend.model.eos_token_ids  # which is the router's to keep out
    for value in (51, -1):
        body = {"model": MODEL, "prompt": TEXT, "max_tokens": 50, "min_tokens": value}
        reply = http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "min_tokens")

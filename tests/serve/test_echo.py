"""POST /v1/completions with the prompt in the answer, as evaluation clients ask for it."""

import pytest

from moeray.serve.prompt import load_tokenizer
from tests.serve.support import EOS_ID, prompt_score

MODEL = "org/echo"
TEXT = "hi 🦊 fox"


@pytest.fixture(scope="module")
def tokenizer(metadata_dir):
    return load_tokenizer(metadata_dir)


def ask(ai, **options):
    return ai.completions.create(**{"model": MODEL, "prompt": TEXT, "max_tokens": 50, "echo": True} | options)


def assembled(stream):
    """Choices by index: (text, logprobs of every kind, finish)."""
    choices = {}
    for chunk in stream:
        for choice in chunk.choices:
            text, logprobs, _ = choices.get(choice.index, ("", {}, None))
            for name, part in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                logprobs[name] = [*logprobs.get(name, []), *part]
            choices[choice.index] = text + choice.text, logprobs, choice.finish_reason
    return choices


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_the_answer_begins_with_the_prompt(ai, backend, tokenizer, as_ids, stream):
    prompt = tokenizer(TEXT)["input_ids"] if as_ids else TEXT
    answer = ask(ai, prompt=prompt, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == TEXT + TEXT
    assert backend.requests[0].sampling.prompt_logprobs is None


def test_scores_are_those_of_prompt_and_answer_in_one_list(ai, backend):
    answer = ask(ai, logprobs=2)
    (request,) = backend.requests
    assert request.sampling.prompt_logprobs == 2
    logprobs, count = answer.choices[0].logprobs, len(request.prompt_ids)
    total = count + answer.usage.completion_tokens
    assert {len(part) for part in logprobs.model_dump().values()} == {total}
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    expected = [prompt_score(request, place) for place in range(1, count)]
    assert logprobs.token_logprobs[1:count] == [score.logprob for score in expected]
    assert logprobs.token_logprobs[count:] == [-0.5] * (total - count)
    for token, score, top in zip(logprobs.tokens[1:], expected, logprobs.top_logprobs[1:], strict=False):
        assert top[token] == score.logprob
        assert set(top.values()) == {score.logprob, *(value for _, value in score.top)}
    assert logprobs.tokens[:count] == logprobs.tokens[count : 2 * count]
    assert logprobs.text_offset[count : 2 * count] == [len(TEXT) + place for place in logprobs.text_offset[:count]]
    for place, token in zip(logprobs.text_offset[:count], logprobs.tokens, strict=False):
        assert token.startswith("bytes:") or TEXT.startswith(token, place)


def test_streams_have_the_same_in_parts(ai):
    options = {"prompt": [TEXT, "東 dog"], "n": 2, "logprobs": 1}
    plain = ask(ai, **options)
    streamed = assembled(ask(ai, **options, stream=True))
    for choice in plain.choices:
        assert streamed[choice.index] == (choice.text, choice.logprobs.model_dump(), choice.finish_reason)
    assert [choice.text for choice in plain.choices] == [TEXT * 2] * 2 + ["東 dog" * 2] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone(ai, backend, stream):
    """As no router gives no token, one is asked for and not shown."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = ask(ai, max_tokens=0, logprobs=1, **options)
    chunks = list(answer) if stream else [answer]
    ((text, logprobs, finish),) = assembled(chunks).values()
    assert (text, finish) == (TEXT, "length")
    assert backend.requests[0].sampling.max_tokens == 1
    assert len(logprobs["tokens"]) == chunks[-1].usage.prompt_tokens == len(backend.requests[0].prompt_ids)
    assert chunks[-1].usage.completion_tokens == 0


def test_no_stop_string_is_looked_for_in_the_prompt(ai):
    answer = ask(ai, stop=" fox")
    assert answer.choices[0].text == TEXT + "hi 🦊"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "skip", "text"),
    [
        ([EOS_ID, 72], True, "{}{}"),
        ([EOS_ID, 72], False, "<|end|>{}{}"),
        ("<|end|>A", True, "<|end|>AA"),  # a text is repeated to the letter
    ],
)
def test_special_tokens_of_a_prompt(ai, tokenizer, prompt, skip, text):
    answer = ask(ai, prompt=prompt, logprobs=0, extra_body={"skip_special_tokens": skip})
    token = tokenizer.decode([72])
    assert answer.choices[0].text == text.format(token, token)
    assert answer.choices[0].logprobs.tokens[0] == "<|end|>"
    assert answer.choices[0].logprobs.text_offset[:2] == [0, 0 if skip else len("<|end|>")]


def test_scores_by_themselves_have_vllms_form(ai, backend):
    answer = ask(ai, echo=False, extra_body={"prompt_logprobs": 2}).choices[0]
    (request,) = backend.requests
    assert answer.text == TEXT
    assert answer.logprobs is None
    first, *entries = answer.prompt_logprobs
    assert first is None
    assert len(entries) == len(request.prompt_ids) - 1
    for place, entry in enumerate(entries, 1):
        score = prompt_score(request, place)
        chosen = entry.pop(str(request.prompt_ids[place]))
        assert (chosen["logprob"], chosen["rank"]) == (score.logprob, None)
        assert [(int(key), value["logprob"], value["rank"]) for key, value in entry.items()] == [
            (token_id, pytest.approx(logprob), rank) for rank, (token_id, logprob) in enumerate(score.top, 1)
        ]


def test_scores_of_a_chat_have_vllms_form_and_are_of_the_answer_not_of_its_choices(ai, backend):
    messages = [{"role": "user", "content": TEXT}]
    answer = ai.chat.completions.create(model=MODEL, messages=messages, n=2, extra_body={"prompt_logprobs": 1})
    ids = backend.requests[0].prompt_ids
    assert [len(entry or "") for entry in answer.prompt_logprobs] == [0] + [2] * (len(ids) - 1)
    expected = [prompt_score(backend.requests[0], place) for place in range(1, len(ids))]
    chosen = [entry[str(ids[place])] for place, entry in enumerate(answer.prompt_logprobs[1:], 1)]
    assert [each["logprob"] for each in chosen] == [score.logprob for score in expected]
    assert not any("prompt_logprobs" in choice.model_dump() for choice in answer.choices)


def test_who_asks_for_no_scores_has_no_field_of_them(ai):
    assert "prompt_logprobs" not in ask(ai).choices[0].model_dump()
    messages = [{"role": "user", "content": TEXT}]
    assert "prompt_logprobs" not in ai.chat.completions.create(model=MODEL, messages=messages).model_dump()


@pytest.mark.parametrize(
    ("options", "param"),
    [({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs")],
)
def test_what_a_chat_does_not_have_is_refused(http, options, param):
    body = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]} | options
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("options", [{"logprobs": 1}, {"echo": False, "extra_body": {"prompt_logprobs": 1}}])
def test_the_choices_of_a_prompt_have_it_scored_once(ai, backend, options):
    """By the first one, which the others wait for."""
    prompts = [TEXT, "東 dog"]
    answer = ask(ai, prompt=prompts, n=3, **options)
    scored = [request for request in backend.requests if request.sampling.prompt_logprobs is not None]
    assert [request.request_id.rpartition("-")[2] for request in scored] == ["0", "3"]
    assert len(backend.requests) == 6
    for first in (0, 3):
        choices = [choice.model_dump(exclude={"index"}) for choice in answer.choices[first : first + 3]]
        assert choices[0] == choices[1] == choices[2]


def test_a_prompt_that_cannot_be_scored_fails_for_all_its_choices(http, backend):
    backend.break_after = 0
    body = {"model": MODEL, "prompt": TEXT, "n": 3, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 500
    assert "expert group 3 is gone" in answer.text
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_what_does_not_go_together_is_refused(http, options, param):
    reply = http.post("/v1/completions", json={"model": MODEL, "prompt": TEXT} | options)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param

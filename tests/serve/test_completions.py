"""POST /v1/completions and the other endpoints."""

import math

import pytest

MODEL = "org/echo"
TEXT = " the 🦊 jumps over 東京"


def test_plain_answer(ai, backend):
    answer = ai.completions.create(model=MODEL, prompt=TEXT, max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(backend.requests[0].prompt_ids)
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1


def test_sixteen_tokens_by_default_and_less_at_the_end_of_the_context(ai, backend):
    assert ai.completions.create(model=MODEL, prompt="a b " * 20).usage.completion_tokens == 16
    ai.completions.create(model=MODEL, prompt=[9] * (backend.model.max_context - 5))
    assert backend.requests[-1].sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([72, 73, 74], None),
        ([[72, 73], [74, 75, 76]], None),
    ],
)
def test_every_form_of_prompt(ai, backend, prompt, texts):
    answer = ai.completions.create(model=MODEL, prompt=prompt)
    if texts is None:
        asked = [tuple(p) for p in (prompt if isinstance(prompt[0], list) else [prompt])]
        assert [r.prompt_ids for r in backend.requests] == asked
        assert answer.usage.prompt_tokens == sum(map(len, asked))
    else:
        assert [c.text for c in answer.choices] == texts


def test_prompts_times_n_stream_with_the_right_index(ai, backend):
    backend.gather = 4
    texts = [""] * 4
    finishes = [None] * 4
    stream = ai.completions.create(
        model=MODEL, prompt=["fox 東", "dog 🦊"], n=2, stream=True, seed=5, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason
    assert texts == ["fox 東", "fox 東", "dog 🦊", "dog 🦊"]
    assert finishes == ["stop"] * 4
    assert [r.sampling.seed for r in backend.requests] == [5, 6, 7, 8]
    assert chunk.usage.prompt_tokens == sum(len(r.prompt_ids) for r in backend.requests[::2])


def test_logprobs_shape_and_offsets(ai):
    answer = ai.completions.create(model=MODEL, prompt="hi 🦊 fox", logprobs=2, max_tokens=50)
    logprobs = answer.choices[0].logprobs
    count = answer.usage.completion_tokens
    assert [len(part) for part in (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset)] == [count] * 3
    assert all(logprobs.top_logprobs[i][logprobs.tokens[i]] == -0.5 for i in range(count))
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[-1] == len("hi 🦊 fox")
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_streamed_logprobs_equal_the_plain_ones(ai):
    options = {"model": MODEL, "prompt": "hi 🦊 fox", "logprobs": 1, "max_tokens": 50, "stop": "ox"}
    plain = ai.completions.create(**options).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in ai.completions.create(**options, stream=True)]
    assert [t for p in parts for t in p.tokens] == plain.tokens
    assert [t for p in parts for t in p.text_offset] == plain.text_offset


def test_sampling_parameters_reach_the_backend(ai, backend):
    ai.completions.create(
        model=MODEL,
        prompt="a",
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": -100, "8": 3},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "stop_token_ids": [9],
            "ignore_eos": True,
        },
    )
    params = backend.requests[0].sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1.5, 1.2)
    assert (params.logit_bias, params.stop_token_ids, params.ignore_eos) == (((7, -100.0), (8, 3.0)), (9,), True)
    assert params.logprobs is None


def test_defaults_are_openais_unless_the_model_has_its_own(ai, backend):
    ai.completions.create(model=MODEL, prompt="a")
    params = backend.requests[-1].sampling
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    object.__setattr__(backend.model, "sampling_defaults", defaults)
    ai.completions.create(model=MODEL, prompt="a", extra_body={"top_k": -1})
    params = backend.requests[-1].sampling
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 0)


def test_seed_is_drawn_at_random_when_absent(ai, backend):
    for _ in range(2):
        ai.completions.create(model=MODEL, prompt="a")
    first, second = (r.sampling.seed for r in backend.requests)
    assert first != second
    assert min(first, second) >= 0
    assert math.log2(max(first, second)) < 63


def test_models(ai, backend):
    assert [m.id for m in ai.models.list()] == [MODEL]
    card = ai.models.retrieve(MODEL)  # its slash is part of the name
    assert (card.id, card.object, card.created) == (MODEL, "model", backend.model.created)


def test_health_metrics_and_status(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.head("/health").status_code == 200
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "moeray_placement_epoch 3.0" in metrics.text
    assert http.get("/status").json()["epoch"] == 7

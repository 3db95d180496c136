"""Models that mark the parts of their answers, as gpt-oss does: what is the answer, and what led to it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from moeray.serve.channels import Channels, Markers, Part, find_markers
from tests.serve.support import TEMPLATE, EchoBackend, client, model_info, save_tokenizer, serving

CHANNEL, MESSAGE, START, END = 1, 2, 3, 4
WORDS = {10: "analysis", 11: "final", 12: "comment", 13: "ary", 14: " to=functions.f", 15: "assistant"}
CONTENT, REASONING = Part.CONTENT, Part.REASONING


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([20, 21], [CONTENT, CONTENT]),
        ([CHANNEL, 10, MESSAGE, 20], [None, None, None, REASONING]),
        ([CHANNEL, 11, MESSAGE, 20, END, 21], [None, None, None, CONTENT, None, None]),
        ([CHANNEL, 12, 13, 14, MESSAGE, 20], [None] * 5 + [REASONING]),
        (
            [CHANNEL, 10, MESSAGE, 20, END, START, 15, CHANNEL, 11, MESSAGE, 20],
            [None] * 3 + [REASONING] + [None] * 6 + [CONTENT],
        ),
        ([CHANNEL, 10, MESSAGE, 20, START, 15, MESSAGE, 21], [None] * 3 + [REASONING] + [None] * 3 + [CONTENT]),
        ([CHANNEL, MESSAGE, 20], [None, None, CONTENT]),
    ],
)
def test_each_token_belongs_to_a_part_or_to_none(ids, parts):
    channels = Channels(Markers(CHANNEL, MESSAGE, frozenset({START, END})), lambda ids: "".join(map(WORDS.get, ids)))
    assert [channels.part_of(token_id) for token_id in ids] == parts


def test_only_a_tokenizer_with_both_marks_has_channels():
    assert find_markers({"<|channel|>": 1}) is None
    assert find_markers({"<|channel|>": 1, "<|message|>": 2, "<|end|>": 4}) == Markers(1, 2, frozenset({4}))


ANSWER = "<|channel|>analysis<|message|>They greet 東京.<|start|>assistant<|channel|>final<|message|>Hello 🦊!"


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    """An endpoint whose model repeats what it is told, marks included."""
    effort = "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
    folder = save_tokenizer(tmp_path_factory.mktemp("harmony"), TEMPLATE.replace("{% if shout", effort + "{% if shout"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|channel|>", "<|message|>", "<|start|>"]})
    tokenizer.save_pretrained(folder)
    backend = EchoBackend(model_info(folder, vocab_size=len(tokenizer)))
    with serving(backend) as url, client(url) as ai:
        yield backend, ai


def ask(ai, text=ANSWER, **options):
    return ai.chat.completions.create(model="org/echo", messages=[{"role": "user", "content": text}], **options)


def test_the_answer_is_what_the_final_channel_says(harmony):
    _, ai = harmony
    message = ask(ai).choices[0].message
    assert message.content == "Hello 🦊!"
    assert message.reasoning_content == "They greet 東京."
    plain = ask(ai, "no marks at all").choices[0].message
    assert plain.content == "no marks at all"
    assert "reasoning_content" not in plain.model_dump()


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_a_stream_says_the_same_in_the_same_order(harmony, tokens_per_step):
    backend, ai = harmony
    backend.tokens_per_step = tokens_per_step
    deltas = [chunk.choices[0].delta for chunk in ask(ai, stream=True, logprobs=True)]
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    content = [delta.content or "" for delta in deltas]
    assert ("".join(reasoning), "".join(content)) == ("They greet 東京.", "Hello 🦊!")
    assert not any(r and c for r, c in zip(reasoning, content, strict=True))
    last, first = max(i for i, r in enumerate(reasoning) if r), min(i for i, c in enumerate(content) if c)
    assert last < first


def test_every_token_has_its_log_probability_once(harmony):
    backend, ai = harmony
    backend.tokens_per_step = 3
    whole = ask(ai, logprobs=True)
    streamed = [chunk.choices[0].logprobs for chunk in ask(ai, logprobs=True, stream=True)]
    tokens = [entry.token for logprobs in streamed if logprobs for entry in logprobs.content]
    assert tokens == [entry.token for entry in whole.choices[0].logprobs.content]
    assert len(tokens) == whole.usage.completion_tokens


def test_a_stop_string_holds_for_either_part(harmony):
    _, ai = harmony
    choice = ask(ai, stop="greet").choices[0]
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == ("They ", "", "stop")
    choice = ask(ai, stop=["lo", "nowhere"]).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("They greet 東京.", "Hel")


@pytest.mark.parametrize(
    ("stop", "reasoning", "content"),
    [
        (None, "Let me see\nI check it", "Done"),
        ("seeI", "Let me see\nI check it", "Done"),
        ("chec", "Let me see\nI ", ""),
    ],
)
def test_messages_of_one_part_are_a_line_each_and_none_goes_on_in_the_next(harmony, stop, reasoning, content):
    _, ai = harmony
    said = (("analysis", "Let me see"), ("commentary", "I check it"), ("final", "Done"))
    text = "<|start|>assistant".join(f"<|channel|>{name}<|message|>{words}" for name, words in said)
    message = ask(ai, text, stop=stop).choices[0].message
    assert (message.reasoning_content, message.content) == (reasoning, content)


def test_an_answer_may_be_sent_back_with_what_led_to_it(harmony):
    _, ai = harmony
    answer = ask(ai).choices[0].message.model_dump(exclude_none=True)
    again = [{"role": "user", "content": "hello"}, answer, {"role": "user", "content": "again"}]
    assert ai.chat.completions.create(model="org/echo", messages=again).choices[0].finish_reason == "stop"


def test_the_effort_goes_to_a_template_that_reads_it(harmony):
    _, ai = harmony
    assert ask(ai, "hi ", reasoning_effort="low").choices[0].message.content == "hi low"
    options = {"extra_body": {"chat_template_kwargs": {"reasoning_effort": "mine"}}}
    assert ask(ai, "hi ", reasoning_effort="high", **options).choices[0].message.content == "hi mine"

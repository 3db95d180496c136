"""OpenAI answers and stream chunks. Written with `exclude_unset`, so a field is sent exactly where it was given."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]

_LINE_ENDS = {end.encode(): rf"\u{ord(end):04x}".encode() for end in "\x85\u2028\u2029"}
"""Those that JSON leaves as they are."""


class _Answer(BaseModel):
    def encode(self) -> bytes:
        """UTF-8 JSON of the fields that were given, on one line for readers that split by Unicode's line ends, too."""
        data = self.model_dump_json(exclude_unset=True).encode()
        for character, escape in _LINE_ENDS.items():
            data = data.replace(character, escape)
        return data


class PromptTokensDetails(_Answer):
    cached_tokens: int


class Usage(_Answer):
    """Token counts. `prompt_tokens` counts each prompt once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class CompletionLogprobs(_Answer):
    """One entry a token; `text_offset` is in characters of the choice's text. The first token of a prompt that is
    repeated has no log probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Answer):
    """vLLM's. `rank` counts from the likeliest, 1, as far as alternatives were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptScores = list[dict[int, PromptLogprob] | None]


class CompletionChoice(_Answer):
    """A choice of an answer, and of a stream chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    prompt_logprobs: PromptScores | None = None


class Completion(_Answer):
    """An answer, and a stream chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptScores | None = None


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(_Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

"""OpenAI requests. Strict types, spans checked, unknown fields refused by name; answers are in `responses.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from moeray.errors import RequestError
from moeray.serve import unsupported

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
_INT32 = 2**31 - 1

Prompt = str | list[int]


def _stop_strings(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"takes at most {MAX_STOP_STRINGS} strings, got {len(stops)}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _token_ids(value: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in value)


def _prompts(value: Any) -> list[Prompt]:
    """Every form of `prompt` as a list of strings or token-id lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _token_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _token_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, none empty")


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"key {key[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number between -100 and 100")
        biases[int(key)] = float(bias)
    return biases


def _text_content(value: Any) -> str:
    """A string, or the text parts joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"content parts of type {str(kind)[:40]!r} are not supported, only 'text'")
        if not isinstance(part.get("text"), str) or set(part) - {"type", "text", "cache_control"}:
            raise ValueError("a text part has the fields 'type' and 'text', a string, and no others")
        texts.append(part["text"])
    return "\n".join(texts)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_content)]
    name: str | None = None
    reasoning_content: str | None = None


class GenerationFields(_Strict):
    """What both endpoints take. None means that the client left it out."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT32)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(default_factory=dict, max_length=1024)
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=_INT32)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Hints about who asks; they change no token, and nothing is kept of them.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_go_with_stream(self) -> GenerationFields:
        asked = self.stream_options.model_dump(exclude_none=True) if self.stream_options else {}
        if any(asked.values()) and not self.stream:
            raise ValueError("stream_options goes with stream=true only")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_go_without_stream(self) -> GenerationFields:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs goes with stream=false only")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Counts in every chunk of a stream, as vLLM has it."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationFields):
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, le=_INT32)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or go with echo=true, which then is all of the answer")
        return self


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_template_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := RESERVED_TEMPLATE_NAMES & set(value or {}):
            raise ValueError(f"{sorted(taken)[0]!r} cannot be set here")
        return value

    @model_validator(mode="after")
    def _top_goes_with_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true only")
        return self


RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
        "messages",
        "self",
    }
)

_Request = TypeVar("_Request", bound=GenerationFields)


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Raises RequestError that names the parameter at fault."""
    return _parse(CompletionRequest, unsupported.without_unsupported(body, unsupported.COMPLETION))


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Raises RequestError that names the parameter at fault."""
    kept = unsupported.without_unsupported(body, unsupported.CHAT)
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_message(value, place) for place, value in enumerate(kept["messages"])]
    return _parse(ChatRequest, kept)


def _message(value: Any, place: int) -> Any:
    """A message less its neutral unsupported fields; what is no message at all is left for the schema to refuse."""
    if not isinstance(value, dict):
        return value
    return unsupported.without_unsupported(value, unsupported.MESSAGE, f"messages[{place}].")


def _parse(schema: type[_Request], body: dict[str, Any]) -> _Request:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _named(error) from error


def _named(error: ValidationError) -> RequestError:
    """The first fault as a RequestError."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    message = first["msg"].removeprefix("Value error, ")
    if not param:
        return RequestError(message, param=message.partition(" ")[0])
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"unknown parameter {param[:200]!r}; leave it out", param=param[:200], code="unknown_parameter"
        )
    if first["type"] == "missing":
        return RequestError(f"the parameter {param!r} is required", param=param, code="missing_parameter")
    return RequestError(f"{param}: {message[:1].lower()}{message[1:]}", param=param, code="invalid_value")

"""A validated OpenAI request to the sequences that it asks for: one GenerationRequest a choice."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeray.errors import RequestError
from moeray.logs import REQUEST_ID
from moeray.serve.backend import ModelInfo
from moeray.serve.bounds import check_prompt, check_token, max_tokens
from moeray.serve.echo import Echo, echo_of
from moeray.serve.prompt import PromptEncoder
from moeray.serve.schemas import ChatRequest, CompletionRequest, GenerationFields
from moeray.types import GenerationRequest, SamplingParams

COMPLETION_MAX_TOKENS = 16
MAX_SEQUENCES = 1024
"""Choices of a request, whatever the routers take."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a job. `index` is OpenAI's: prompt-major, then the choice of the prompt. Where the log
    probabilities of a prompt's tokens are wanted, its first choice has them computed for all of its choices."""

    index: int
    prompt: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Job:
    """All that is needed to generate and to write the answer. `created` is in unix seconds."""

    id: str
    model: ModelInfo
    created: int
    choices: tuple[Choice, ...]
    prompt_lengths: tuple[int, ...]
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    continues_text: bool  # the output goes on in the prompt's text, so its first space counts
    include_stop: bool  # what ends the text is shown with it
    skip: frozenset[int]  # tokens that are not shown
    echoes: tuple[Echo, ...] = ()  # of the prompts, where answers begin with them
    answers: bool = True  # else the echo is all
    prompt_logprobs: bool = False  # told by themselves, not with the echo


async def completion_job(request: CompletionRequest, model: ModelInfo, encoder: PromptEncoder, created: int) -> Job:
    """Raises RequestError for a prompt or parameter that does not fit the model."""
    prompts = await encoder.encode_prompts(request.prompt)
    for ids in prompts:
        check_prompt(ids, model, "prompt")
    sampling = _sampling(request, model, encoder, request.logprobs)
    sampling["prompt_logprobs"] = _of_prompt(request)
    answers = request.max_tokens != 0
    asked, default = ("max_tokens", request.max_tokens if answers else 1), COMPLETION_MAX_TOKENS
    job = _job("cmpl", request, model, encoder, prompts, sampling, asked, default, created)
    echoes = await _echoes(request, prompts, encoder, job.skip) if request.echo else ()
    return replace(job, echoes=echoes, answers=answers, prompt_logprobs=request.prompt_logprobs is not None)


def _of_prompt(request: CompletionRequest) -> int | None:
    """`SamplingParams.prompt_logprobs`, as vLLM has it: the number asked for, else what an echo shows."""
    if request.prompt_logprobs is None and request.echo:
        return request.logprobs
    return request.prompt_logprobs


async def _echoes(
    request: CompletionRequest, prompts: Sequence[tuple[int, ...]], encoder: PromptEncoder, skip: frozenset[int]
) -> tuple[Echo, ...]:
    each = zip(request.prompt, prompts, strict=True)
    with_offsets = request.logprobs is not None
    return tuple([await echo_of(prompt, ids, encoder.vocabulary, skip, with_offsets) for prompt, ids in each])


async def chat_job(request: ChatRequest, model: ModelInfo, encoder: PromptEncoder, created: int) -> Job:
    """Raises RequestError for messages or a parameter that does not fit the model."""
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    ids = await encoder.encode_chat(messages, _variables(request, encoder))
    check_prompt(ids, model, "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    asked = "max_completion_tokens", request.max_completion_tokens
    if asked[1] is None:
        asked = "max_tokens", request.max_tokens
    sampling = _sampling(request, model, encoder, logprobs)
    sampling["prompt_logprobs"] = request.prompt_logprobs
    job = _job("chatcmpl", request, model, encoder, [ids], sampling, asked, model.max_context, created)
    return replace(job, prompt_logprobs=request.prompt_logprobs is not None)


def _variables(request: ChatRequest, encoder: PromptEncoder) -> dict[str, Any]:
    """What the chat template gets beside the messages. `reasoning_effort` is the template's business, too."""
    variables, effort = dict(request.chat_template_kwargs or {}), request.reasoning_effort
    if effort is None or (effort == "none" and not encoder.knows("reasoning_effort")):
        return variables
    if not encoder.knows("reasoning_effort"):
        raise RequestError(
            "reasoning_effort is not supported by this model's chat template; leave it out",
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    return {"reasoning_effort": effort, **variables}


def _job(
    prefix: str,
    request: GenerationFields,
    model: ModelInfo,
    encoder: PromptEncoder,
    prompts: Sequence[tuple[int, ...]],
    sampling: dict[str, Any],
    asked: tuple[str, int | None],
    default_max_tokens: int,
    created: int,
) -> Job:
    param, wanted = asked
    n = request.n or 1
    most = min(MAX_SEQUENCES, model.max_sequences)
    if n * len(prompts) > most:
        raise RequestError(f"{len(prompts)} prompts with n={n} are over the limit of {most} choices", param="n")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    job_id = f"{prefix}-{uuid.uuid4().hex}"
    choices = []
    unscored = {**sampling, "prompt_logprobs": None}
    for index in range(n * len(prompts)):
        ids = prompts[index // n]
        limit = max_tokens(len(ids), wanted, default_max_tokens, model, param)
        params = SamplingParams(**(unscored if index % n else sampling), max_tokens=limit, seed=(seed + index) % 2**63)
        sequence = GenerationRequest(f"{job_id}-{index}", ids, params, origin=REQUEST_ID.get() or "")
        choices.append(Choice(index, index // n, sequence))
    lengths = tuple(map(len, prompts))
    streams = bool(request.stream), request.include_usage, request.continuous_usage
    skip = frozenset() if request.skip_special_tokens is False else encoder.vocabulary.special_ids
    shown = prefix == "cmpl", bool(request.include_stop_str_in_output), skip
    return Job(job_id, model, created, tuple(choices), lengths, tuple(request.stop), *streams, *shown)


def _sampling(
    request: GenerationFields, model: ModelInfo, encoder: PromptEncoder, logprobs: int | None
) -> dict[str, Any]:
    """SamplingParams' fields but `max_tokens` and `seed`: the client's, else the model's, else OpenAI's."""
    params: dict[str, Any] = {"logprobs": logprobs, "ignore_eos": bool(request.ignore_eos)}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        given = getattr(request, name)
        value = model.sampling_defaults.get(name) if given is None else given
        if value is not None:
            params[name] = value
    for name in ("presence_penalty", "frequency_penalty", "min_tokens"):
        if (value := getattr(request, name)) is not None:
            params[name] = value
    params["top_k"] = max(0, params.get("top_k", 0))
    params["logit_bias"] = _in_vocabulary(request, model)
    stops = tuple(request.stop_token_ids or ())
    for token_id in stops:
        check_token(token_id, model, "stop_token_ids")
    params["stop_token_ids"] = stops if request.ignore_eos else (*stops, *_tokenizers_eos(model, encoder))
    return params


def _tokenizers_eos(model: ModelInfo, encoder: PromptEncoder) -> tuple[int, ...]:
    """A chat model's tokenizer may know how its turns end where its config names the end of a text alone."""
    eos = encoder.vocabulary.eos_id
    return () if eos is None or eos in model.eos_token_ids or eos >= model.vocab_size else (eos,)


def _in_vocabulary(request: GenerationFields, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    for token_id in request.logit_bias:
        check_token(token_id, model, "logit_bias")
    return tuple(request.logit_bias.items())

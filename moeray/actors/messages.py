"""Requests and outputs as plain data, for the frames between an ingress and a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from moeray.errors import MoerayError, QueueFullError, RequestError, RouterLostError, WireError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprobs, TokenOutput

_ID = np.dtype("<i4")
"""Token ids go as their bytes: as plain numbers a long prompt would be larger, and hold up an ingress's event loop."""
_MOST = 2**31 - 1
PROMPT_PART = 128
"""Log probabilities of so many of a prompt's tokens go in one output: 40 KiB at the most."""
_SAMPLING = tuple(field.name for field in fields(SamplingParams))


def request_tree(request: GenerationRequest) -> dict[str, Any]:
    """Raises RequestError for a token id that no vocabulary has."""
    return {
        "request_id": request.request_id, "attempt": request.attempt, "origin": request.origin,
        "timeout_s": request.timeout_s,
        "prompt_ids": _packed(request.prompt_ids), "output_ids": _packed(request.output_ids),
        "prompt_scored": request.prompt_scored,
        "sampling": {name: getattr(request.sampling, name) for name in _SAMPLING},
    }  # fmt: skip


def request_from(tree: Mapping[str, Any]) -> GenerationRequest:
    """Raises WireError for a tree that is not a request, RequestError for values out of range."""
    try:
        sampling = dict(tree["sampling"])
        sampling["logit_bias"] = tuple((int(token), float(bias)) for token, bias in sampling["logit_bias"])
        sampling["stop_token_ids"] = tuple(map(int, sampling["stop_token_ids"]))
        return GenerationRequest(
            str(tree["request_id"]),
            _unpacked(tree["prompt_ids"]),
            SamplingParams(**sampling),
            _unpacked(tree["output_ids"]),
            int(tree["attempt"]),
            str(tree["origin"]),
            max(0, int(tree["prompt_scored"])),
            None if tree["timeout_s"] is None else float(tree["timeout_s"]),
        )
    except RequestError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"a SUBMIT frame does not hold a request: {error!r}") from error


def _packed(ids: tuple[int, ...]) -> bytes:
    if (most := max(ids, default=0)) > _MOST:
        raise RequestError(f"token id {most} is in no vocabulary; give those of the model's", param="prompt")
    return np.array(ids, _ID).tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, _ID).tolist())


def split(output: TokenOutput) -> list[TokenOutput]:
    """The same in parts, each of which a frame can hold however long the prompt's part of it is; most are whole."""
    scores = output.prompt_logprobs
    if len(scores) <= PROMPT_PART:
        return [output]
    starts = range(0, len(scores), PROMPT_PART)
    parts = [
        TokenOutput(output.request_id, output.attempt, (), prompt_logprobs=scores[i : i + PROMPT_PART]) for i in starts
    ]
    return [*parts[:-1], replace(output, prompt_logprobs=parts[-1].prompt_logprobs)]


def output_tree(output: TokenOutput) -> list[Any]:
    finish = output.finish_reason.value if output.finish_reason else None
    return [
        output.request_id, output.attempt, output.token_ids, _logprobs_tree(output.logprobs), finish,
        output.cached_tokens, output.error, _logprobs_tree(output.prompt_logprobs),
    ]  # fmt: skip


def output_from(tree: Sequence[Any]) -> TokenOutput:
    request_id, attempt, token_ids, logprobs, finish, cached, error, of_prompt = tree
    return TokenOutput(
        request_id, attempt, tuple(token_ids), _logprobs_from(logprobs), FinishReason(finish) if finish else None,
        cached, error, _logprobs_from(of_prompt),
    )  # fmt: skip


def _logprobs_tree(entries: Sequence[TokenLogprobs]) -> list[Any]:
    return [[entry.logprob, entry.top] for entry in entries]


def _logprobs_from(tree: Sequence[Any]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(value, tuple((int(t), float(lp)) for t, lp in top)) for value, top in tree)


def error_tree(request_id: str, attempt: int, error: MoerayError) -> dict[str, Any]:
    """What a router answers to a SUBMIT that it does not take. RouterLostError there means that it takes no more."""
    tree: dict[str, Any] = {"request_id": request_id, "attempt": attempt, "message": str(error), "kind": "error"}
    if isinstance(error, QueueFullError):
        tree |= {"kind": "queue_full", "retry_after_s": error.retry_after_s}
    elif isinstance(error, RequestError):
        tree |= {"kind": "request", "param": error.param, "code": error.code}
    elif isinstance(error, RouterLostError):
        tree |= {"kind": "draining"}
    return tree


def error_from(tree: Mapping[str, Any]) -> MoerayError:
    if tree["kind"] == "queue_full":
        return QueueFullError(tree["message"], retry_after_s=tree["retry_after_s"])
    if tree["kind"] == "request":
        return RequestError(tree["message"], param=tree["param"], code=tree["code"])
    if tree["kind"] == "draining":
        return RouterLostError(tree["message"])
    return MoerayError(tree["message"])

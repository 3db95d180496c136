"""Data that more than one room shares. Frozen, without behaviour beyond its own validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from moeray.errors import RequestError


class ExpertId(NamedTuple):
    """One FFN of one MoE layer. `layer` is the decoder layer's index, counted from 0."""

    layer: int
    expert: int


class Lifecycle(StrEnum):
    """The life of an actor; `advance` refuses any other order."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"

    def advance(self, to: Lifecycle) -> Lifecycle:
        if to not in _MOVES[self]:
            raise AssertionError(f"illegal lifecycle move {self.value} -> {to.value}")
        return to


_MOVES: dict[Lifecycle, frozenset[Lifecycle]] = {
    Lifecycle.STARTING: frozenset({Lifecycle.READY, Lifecycle.STOPPED}),
    Lifecycle.READY: frozenset({Lifecycle.DRAINING, Lifecycle.STOPPED}),
    Lifecycle.DRAINING: frozenset({Lifecycle.STOPPED}),
    Lifecycle.STOPPED: frozenset(),
}


class FinishReason(StrEnum):
    """Why a sequence ended. `ABORT` never reaches a client that is still there."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Greedy when `temperature` is 0.

    `logprobs`: None for none, else how many alternatives (0 to 20) to report beside the chosen token.
    `stop_token_ids` end the sequence; stop strings are the ingress's business, which sees text.
    `prompt_logprobs`: the same of the prompt's tokens from the second on, given the tokens before them.
    `min_tokens`: so many output tokens come before one that ends the sequence.
    `seed`: draws are keyed by (seed, position), so a resumed request draws the same tokens.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, span: str) -> None:
            if not ok:
                raise RequestError(f"{name} must be {span}, got {getattr(self, name)!r}", param=name)

        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(
            0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens, here {self.max_tokens}"
        )
        check(0.0 <= self.temperature <= 2.0, "temperature", "between 0 and 2")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0 <= self.top_k < 2**31, "top_k", "0 (off) or more, and below 2**31")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(-(2**63) <= self.seed < 2**64, "seed", "a number of 64 bits")
        for name in ("logprobs", "prompt_logprobs"):
            check(getattr(self, name) is None or 0 <= getattr(self, name) <= 20, name, "between 0 and 20")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "above 0 and at most 10")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: what the ingress submits to a router.

    `output_ids` holds tokens that an earlier attempt generated; generation goes on behind them and
    positions, penalties and `max_tokens` count them. `prompt_scored`: log probabilities of the prompt's tokens, in
    order, that earlier attempts reported; those behind them are still wanted, unless there are output tokens.
    `origin` names what the client knows, the HTTP request for one; logs say it. `timeout_s`: what is left of the
    client's patience as this attempt is submitted; None: it said nothing.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    output_ids: tuple[int, ...] = ()
    attempt: int = 0
    origin: str = ""
    prompt_scored: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of the chosen token and of the likeliest alternatives, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one engine step produced for one request.

    `token_ids` is empty when the request ended without a token (abort, error), and where a part of the prompt was
    computed: `prompt_logprobs` are of its tokens, behind those of earlier outputs; the first is the prompt's second.
    `cached_tokens` counts prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Address:
    """Where an actor listens. Locality is the Ray node id (`node_id`), never the host.

    `unix`: path of its socket, reachable from the same node only. `tcp`, `grpc`: `host:port`, or None where it does not
    listen so.
    """

    actor_id: str
    node_id: str
    unix: str | None
    tcp: str | None = None
    grpc: str | None = None

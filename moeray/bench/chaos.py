"""Load and kills at once: which requests are lost, which tokens change, how long streams stall, how fast all is mended.

Every request's tokens are compared with those of the same request before the first kill.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput

KINDS = ("experts", "routers", "controller")
POLL_S = 0.1
RECOVER_S = 120.0
"""A system that is not whole so long after a kill counts as not recovered."""


class Source(Protocol):
    """Where requests go: the endpoint's backend."""

    def generate(self, request: GenerationRequest) -> Any: ...


@dataclass(frozen=True)
class ChaosPlan:
    """`kill`: one of KINDS, `any`, or `none`. Times in seconds; every stream sends one request after the other."""

    kill: str = "experts"
    every_s: float = 5.0
    for_s: float = 60.0
    streams: int = 16
    max_tokens: int = 64
    prompt_tokens: int = 16
    vocab: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Kill:
    """`at`: the moment, on the run's clock; `recovered_s`: until every expert and actor was there again, if it was."""

    actor: str
    at: float
    recovered_s: float | None = None


@dataclass
class Stream:
    """What one stream saw: the arrival of each token, in order, and where requests began and ended."""

    number: int
    arrivals: list[float] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    changed: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    plan: ChaosPlan
    streams: tuple[Stream, ...]
    kills: tuple[Kill, ...]
    seconds: float
    calm_gaps_s: tuple[float, ...]


def request_of(plan: ChaosPlan, stream: int, name: str) -> GenerationRequest:
    """The request of a stream: every other one is greedy, the rest are sampled with a seed and a penalty."""
    rng = random.Random(plan.seed * 1000 + stream)
    prompt = tuple(rng.randrange(3, plan.vocab) for _ in range(plan.prompt_tokens + stream % 5))
    greedy = stream % 2 == 0
    sampling = SamplingParams(
        max_tokens=plan.max_tokens, temperature=0.0 if greedy else 0.8, seed=stream, ignore_eos=True,
        frequency_penalty=0.0 if greedy else 0.3,
    )  # fmt: skip
    return GenerationRequest(name, prompt, sampling)


async def run_chaos(
    source: Source,
    kill: Callable[[str], Awaitable[str | None]],
    whole: Callable[[], Awaitable[bool]],
    plan: ChaosPlan,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Result:
    """Learn the undisturbed tokens, then run load and kills together.

    `kill(kind)` ends one actor of the kind abruptly and names it (None where there is none now); `whole()` says whether
    every expert has its replicas and every actor that is wanted is there.
    """
    calm = await _calm(source, plan)
    expected = [stream_tokens for stream_tokens, _ in calm]
    gaps = tuple(b - a for _, arrivals in calm for a, b in itertools.pairwise(arrivals))
    began = time.monotonic()
    until = began + plan.for_s
    streams = [Stream(number) for number in range(plan.streams)]
    killer = asyncio.create_task(_kill_on(kill, whole, plan, began, until, report))
    try:
        await asyncio.gather(*(_follow(source, plan, stream, expected, began, until) for stream in streams))
        kills = await killer
    finally:
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)
    return Result(plan, tuple(streams), tuple(kills), time.monotonic() - began, gaps)


async def _calm(source: Source, plan: ChaosPlan) -> list[tuple[list[int], list[float]]]:
    async def one(stream: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        arrivals: list[float] = []
        await _generate(source, request_of(plan, stream, f"calm-{stream}"), tokens, arrivals, time.monotonic())
        return tokens, arrivals

    await asyncio.gather(*(one(stream) for stream in range(plan.streams)))  # warms everything up
    return list(await asyncio.gather(*(one(stream) for stream in range(plan.streams))))


async def _generate(
    source: Source, request: GenerationRequest, tokens: list[int], arrivals: list[float], began: float
) -> None:
    """Collect tokens and when they came. Raises MoerayError for a request that ends with an error."""
    async with aclosing(source.generate(request)) as outputs:
        output: TokenOutput
        async for output in outputs:
            arrivals += [time.monotonic() - began] * len(output.token_ids)
            tokens += output.token_ids
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise MoerayError(output.error or "the request was aborted")


async def _follow(
    source: Source, plan: ChaosPlan, stream: Stream, expected: list[list[int]], began: float, until: float
) -> None:
    while time.monotonic() < until:
        tokens: list[int] = []
        start = time.monotonic() - began
        request = request_of(plan, stream.number, f"chaos-{stream.number}-{stream.requests}")
        stream.requests += 1
        wanted = expected[stream.number]
        try:
            await _generate(source, request, tokens, stream.arrivals, began)
        except MoerayError as error:
            stream.lost += 1
            stream.errors.append(str(error))
            wanted = wanted[: len(tokens)]
        stream.changed += sum(a != b for a, b in itertools.zip_longest(tokens, wanted))
        stream.spans.append((start, time.monotonic() - began))


async def _kill_on(
    kill: Callable[[str], Awaitable[str | None]],
    whole: Callable[[], Awaitable[bool]],
    plan: ChaosPlan,
    began: float,
    until: float,
    report: Callable[[str, int, int], None],
) -> list[Kill]:
    if plan.kill == "none":
        return []
    rng = random.Random(plan.seed)
    mending: list[asyncio.Task[Kill]] = []
    due = began + plan.every_s
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += plan.every_s
        victim = await kill(rng.choice(KINDS) if plan.kill == "any" else plan.kill)
        if victim is not None:
            mending.append(asyncio.create_task(_mend(Kill(victim, time.monotonic() - began), whole, began)))
        report("kills", len(mending), math.ceil(plan.for_s / plan.every_s) - 1)
    return list(await asyncio.gather(*mending))


async def _mend(kill: Kill, whole: Callable[[], Awaitable[bool]], began: float) -> Kill:
    """Wait until the system is whole again."""
    await asyncio.sleep(POLL_S)  # the loss is seen first
    until = began + kill.at + RECOVER_S
    while time.monotonic() < until:
        if await whole():
            return Kill(kill.actor, kill.at, time.monotonic() - began - kill.at)
        await asyncio.sleep(POLL_S)
    return kill


def stalls(result: Result) -> list[float]:
    """For each kill and each stream that was in a request then: the longest gap between tokens until the next kill."""
    found = []
    ends = [kill.at for kill in result.kills[1:]] + [result.seconds]
    for kill, end in zip(result.kills, ends, strict=True):
        for stream in result.streams:
            if any(start <= kill.at <= stop for start, stop in stream.spans):
                found.append(_longest_gap(stream, kill.at, end))
    return found


def _longest_gap(stream: Stream, begin: float, end: float) -> float:
    """The longest time without a token that touches begin..end, the wait for a request's first token included."""
    marks = sorted({*stream.arrivals, *(start for start, _ in stream.spans), *(stop for _, stop in stream.spans)})
    longest = 0.0
    for a, b in itertools.pairwise(marks):
        if b > begin and a < end:
            longest = max(longest, b - a)
    return longest


def quantile(values: list[float], q: float) -> float | None:
    """The q-quantile by the nearest rank; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summary(result: Result) -> dict[str, Any]:
    """The figures as plain data, times in seconds."""
    gaps = stalls(result)
    mended = [kill.recovered_s for kill in result.kills if kill.recovered_s is not None]
    tokens = sum(len(stream.arrivals) for stream in result.streams)
    return {
        "requests": sum(stream.requests for stream in result.streams),
        "lost_requests": sum(stream.lost for stream in result.streams),
        "changed_tokens": sum(stream.changed for stream in result.streams),
        "kills": len(result.kills),
        "stall_p50_seconds": quantile(gaps, 0.5),
        "stall_p99_seconds": quantile(gaps, 0.99),
        "stall_max_seconds": max(gaps, default=None),
        "recovery_p50_seconds": quantile(mended, 0.5),
        "recovery_p99_seconds": quantile(mended, 0.99),
        "not_recovered": len(result.kills) - len(mended),
        "calm_gap_p99_seconds": quantile(list(result.calm_gaps_s), 0.99),
        "tokens": tokens,
        "tokens_per_second": tokens / result.seconds,
        "seconds": result.seconds,
        "errors": sorted({error for stream in result.streams for error in stream.errors})[:5],
        "killed": [[kill.actor, round(kill.at, 3), kill.recovered_s] for kill in result.kills],
    }

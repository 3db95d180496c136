"""What a running system's steps take at the rhythm of real load: streams that decode, and first tokens after a rest.

Seen as a client sees them, so that everything between two tokens is in them: processes that wake up, the step loop,
the way to the client. Prompts are random, and each comes once, so that no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from moeray.bench.traffic import System
from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput

STREAMS = (1, 2, 4, 8, 16)
PROMPTS = (1, 16, 64, 128, 256, 512, 1024, 2048)
CONTEXT, ANSWER = 64, 64
LEAST_S = 1.0
"""How long streams decode side by side at the least: the first tokens after a rest take longer, and few of a real
answer's are such."""
FAR_STREAMS, FAR_CONTEXT = 2, 1024
FAR = 8
"""So many times as long as others are, at least, prompts and contexts that tell what attention takes."""
FEW = 5
"""Prompts that are longer than a chunk are measured fewer times, but so many."""
REST_S = 0.3
"""How long the system has nothing to do before a prompt: all its threads sleep by then."""


@dataclass(frozen=True)
class Phase:
    """One kind of load. `step_s`: of a client's wait, mean (of prompts, that of the middle half); `hop_s`: mean way of
    one actor's rows there and back, without what the actor computed; `context`: tokens that each stream attends to, in
    the mean."""

    count: int
    step_s: float
    hop_s: float
    context: float = 0.0


@dataclass(frozen=True)
class Rhythm:
    """`streams`: seconds between a stream's tokens, by how many decode side by side. `prompts`: seconds to the first
    token of a prompt of so many tokens that finds the system at rest; `beside_s`: of one token, while a stream decodes.

    `far_streams`: as `streams`, with a context that is many times as long. `far_prompts`: seconds to the first token of
    a prompt and of one that is `FAR` times as long, both cut into chunks beside a stream. None where the model has no
    such contexts.
    """

    streams: Sequence[Phase]
    prompts: Sequence[Phase]
    beside_s: float
    far_streams: Phase | None = None
    far_prompts: tuple[Phase, Phase] | None = None


class _SideBySide:
    """Streams of one run, from the moment at which all have begun until each has had `ANSWER` tokens more and `LEAST_S`
    have passed, in the same time or nearly so."""

    def __init__(self, count: int) -> None:
        self._before, self._since = [0] * count, [0] * count
        self._began = self._ended = 0.0

    def stream(self, number: int) -> Callable[[float], bool]:
        """To be told of each of its tokens; it says whether that was the last."""

        def token(at: float) -> bool:
            if self._began:
                self._since[number] += 1
                self._ended = at
            else:
                self._before[number] += 1
                self._began = at if all(self._before) else 0.0
            return min(self._since) >= ANSWER and at - self._began >= LEAST_S

        return token

    @property
    def period_s(self) -> float:
        """Seconds between a stream's tokens. Raises MoerayError where one had ended before the last began."""
        if min(self._since) == 0:
            raise MoerayError(
                f"{len(self._since)} streams did not decode side by side: the prompt of one took longer than the "
                "whole answer of another"
            )
        return (self._ended - self._began) * len(self._since) / sum(self._since)

    @property
    def answered(self) -> float:
        """Tokens of an answer halfway, in the mean over the streams."""
        return statistics.mean(b + s / 2 for b, s in zip(self._before, self._since, strict=True))


class Rhythms:
    """Measures a system that nobody else uses. `longest`: tokens that a step may have; `chunk`: of prompts beside a
    stream; `context`: that a sequence may have; `repeat`: times each."""

    def __init__(
        self, system: System, vocab: int, *, longest: int, chunk: int, context: int, repeat: int, seed: int = 0
    ) -> None:
        self._system, self._vocab = system, vocab
        self._longest, self._chunk, self._context, self._repeat = longest, chunk, context, repeat
        self._rng = random.Random(seed)
        self._sent = 0

    async def measure(self, report: Callable[[str], None]) -> Rhythm:
        """Raises MoerayError when a request fails."""
        await self._times(CONTEXT, ANSWER)  # whatever happens once only
        streams, prompts = [], []
        for count in STREAMS:
            report(f"{count} streams")
            streams.append(await self._stream_phase(count, CONTEXT))
        for tokens in sorted({min(n, self._longest) for n in PROMPTS}):
            report(f"prompts of {tokens} tokens")
            repeat = min(self._repeat, max(FEW, self._repeat * self._chunk // tokens))
            prompts.append(await self._phase(tokens, self._prompts(tokens, repeat)))
        report("prompts beside a stream")
        beside_s = await self._beside(1, 2 * self._repeat)
        report("long contexts")
        return Rhythm(streams, prompts, beside_s, await self._far_streams(), await self._far_prompts())

    async def _far_streams(self) -> Phase | None:
        context = min(FAR_CONTEXT, self._context // FAR_STREAMS - 2 * ANSWER)  # so that the KV cache holds all of them
        return None if context < FAR * CONTEXT else await self._stream_phase(FAR_STREAMS, context)

    async def _far_prompts(self) -> tuple[Phase, Phase] | None:
        near = max((n for n in PROMPTS[1:] if n <= self._chunk and FAR * n < self._context), default=None)
        if near is None:
            return None
        repeat = max(1, self._repeat // 2)
        each = [await self._phase(tokens, self._beside(tokens, repeat)) for tokens in (near, FAR * near)]
        return each[0], each[1]

    async def _stream_phase(self, count: int, context: int) -> Phase:
        runs: list[_SideBySide] = []
        phase = await self._phase(count, self._streams(count, context, runs))
        return replace(phase, context=context + statistics.mean(run.answered for run in runs))

    async def _phase(self, count: int, load: Awaitable[float]) -> Phase:
        before = await self._figures()
        step_s = await load
        after = await self._figures()
        (ways, way_s), (forwards, forward_s) = (
            (after[f"{name}_count"] - before[f"{name}_count"], after[f"{name}_sum"] - before[f"{name}_sum"])
            for name in ("moeray_dispatch_seconds", "moeray_expert_service_seconds")
        )
        return Phase(count, step_s, max(0.0, way_s / ways - forward_s / forwards))

    async def _figures(self) -> dict[str, float]:
        """Prometheus' samples by name, labels added up."""
        totals: dict[str, float] = {}
        text, _ = await self._system.call("metrics")
        for line in text.decode().splitlines():
            if not line.startswith("#"):
                sample, value = line.rsplit(" ", 1)
                name = sample.partition("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def _streams(self, count: int, context: int, runs: list[_SideBySide]) -> float:
        """Mean over the time in which all of them decode: a request's time per token is a mean too."""
        most = min(self._context - context, 4 * ANSWER)  # beyond, near contexts would be as long as far ones
        for _ in range(max(1, self._repeat // 5)):
            await asyncio.sleep(REST_S)
            run = _SideBySide(count)
            each = [run.stream(number) for number in range(count)]
            await asyncio.gather(*(self._times(context, most, enough) for enough in each))
            runs.append(run)
        return statistics.mean(run.period_s for run in runs)

    async def _prompts(self, tokens: int, repeat: int) -> float:
        waits = []
        for _ in range(repeat):
            await asyncio.sleep(REST_S)
            began = time.monotonic()
            waits.append((await self._times(tokens, 1))[0] - began)
        return _middle(waits)

    async def _beside(self, tokens: int, repeat: int) -> float:
        """Prompts come at any moment of the stream's step."""
        waits: list[float] = []
        while len(waits) < repeat:
            stream = asyncio.create_task(self._times(CONTEXT, min(self._context - CONTEXT, 64 * ANSWER)))
            await asyncio.sleep(REST_S)
            while not stream.done() and len(waits) < repeat:
                await asyncio.sleep(self._rng.uniform(0.02, 0.1))
                began = time.monotonic()
                first = (await self._times(tokens, 1))[0]
                if not stream.done():
                    waits.append(first - began)
            stream.cancel()
            await asyncio.wait({stream})
            if not stream.cancelled():
                stream.result()
        return _middle(waits)

    async def _times(self, prompt: int, answer: int, enough: Callable[[float], bool] = lambda at: False) -> list[float]:
        """When each of a request's tokens came, until it has been `enough`, which is asked for each."""
        self._sent += 1
        ids = tuple(self._rng.randrange(3, self._vocab) for _ in range(prompt))
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"rhythm-{self._sent}", ids, sampling)
        times: list[float] = []
        async with aclosing(self._system.generate(request)) as outputs:
            output: TokenOutput
            async for output in outputs:
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise MoerayError(output.error or "the request was aborted")
                times += [time.monotonic()] * len(output.token_ids)
                if any(enough(times[-1]) for _ in output.token_ids):
                    break
        return times


def _middle(waits: Sequence[float]) -> float:
    """The mean of the middle half: a pause of the machine's in one of them is not what they take."""
    quarter = len(waits) // 4
    return statistics.mean(sorted(waits)[quarter : len(waits) - quarter])

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
from dataclasses import dataclass

from moeray.bench.traffic import System
from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput

STREAMS = (1, 2, 4, 8, 16)
PROMPTS = (1, 16, 64, 128, 256, 512, 1024)
CONTEXT, ANSWER = 64, 64
REST_S = 0.3
"""How long the system has nothing to do before a prompt: all its threads sleep by then."""


@dataclass(frozen=True)
class Phase:
    """One kind of load. `step_s`: of a client's wait, mean (median for prompts); `hop_s`: mean way of one actor's rows
    there and back, without what the actor computed."""

    count: int
    step_s: float
    hop_s: float


@dataclass(frozen=True)
class Rhythm:
    """`streams`: seconds between a stream's tokens, by how many decode side by side. `prompts`: seconds to the first
    token of a prompt of so many tokens that finds the system at rest; `beside_s`: of one token, while a stream decodes.
    """

    streams: Sequence[Phase]
    prompts: Sequence[Phase]
    beside_s: float


class Rhythms:
    """Measures a system that nobody else uses. `longest`: tokens that a prompt may have; `repeat`: times each."""

    def __init__(self, system: System, vocab: int, longest: int, repeat: int, seed: int = 0) -> None:
        self._system, self._vocab, self._longest, self._repeat = system, vocab, longest, repeat
        self._rng = random.Random(seed)
        self._sent = 0

    async def measure(self, report: Callable[[str], None]) -> Rhythm:
        """Raises MoerayError when a request fails."""
        await self._times(CONTEXT, ANSWER)  # whatever happens once only
        streams, prompts = [], []
        for count in STREAMS:
            report(f"{count} streams")
            streams.append(await self._phase(count, self._streams(count)))
        for tokens in (n for n in PROMPTS if n <= self._longest):
            report(f"prompts of {tokens} tokens")
            prompts.append(await self._phase(tokens, self._prompts(tokens)))
        report("prompts beside a stream")
        return Rhythm(streams, prompts, await self._beside())

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

    async def _streams(self, count: int) -> float:
        """Mean over the time in which all of them decode: a request's time per token is a mean too."""
        periods = []
        for _ in range(max(1, self._repeat // 5)):
            await asyncio.sleep(REST_S)
            each = await asyncio.gather(*(self._times(CONTEXT, ANSWER) for _ in range(count)))
            begin, end = max(times[0] for times in each), min(times[-1] for times in each)
            tokens = sum(begin < at <= end for times in each for at in times)
            periods.append((end - begin) * count / tokens)
        return statistics.mean(periods)

    async def _prompts(self, tokens: int) -> float:
        waits = []
        for _ in range(self._repeat):
            await asyncio.sleep(REST_S)
            began = time.monotonic()
            waits.append((await self._times(tokens, 1))[0] - began)
        return statistics.median(waits)

    async def _beside(self) -> float:
        """Prompts come at any moment of the stream's step."""
        waits: list[float] = []
        while len(waits) < 2 * self._repeat:
            stream = asyncio.create_task(self._times(CONTEXT, 8 * ANSWER))
            await asyncio.sleep(REST_S)
            while not stream.done() and len(waits) < 2 * self._repeat:
                await asyncio.sleep(self._rng.uniform(0.02, 0.1))
                began = time.monotonic()
                first = (await self._times(1, 1))[0]
                if not stream.done():
                    waits.append(first - began)
            stream.cancel()
            await asyncio.wait({stream})
            if not stream.cancelled():
                stream.result()
        return statistics.mean(waits)

    async def _times(self, prompt: int, answer: int) -> list[float]:
        """When each of a request's tokens came."""
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
        return times

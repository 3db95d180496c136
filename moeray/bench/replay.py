"""A live replay of a trace, to be held against the simulation of the same: requests come when the trace says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from moeray.bench.traffic import System
from moeray.control.outcome import Slo, tpot
from moeray.control.simulate import Latencies
from moeray.control.trace import Trace
from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput

LOOK_S = 1.0
"""How often the system is asked how many actors it has."""


@dataclass(frozen=True, eq=False)
class Replayed:
    """What was seen: latencies as of a simulated run, `actors` at each look (started ones of the expert groups, those
    in reserve too), and one line for each lost request."""

    latencies: Latencies
    actors: Sequence[int]
    errors: Sequence[str]

    def quantile(self, trace: Trace, q: float) -> Slo | None:
        """TTFT and TPOT of the requests that finished, in seconds; None where none did."""
        each = tpot(self.latencies, trace)
        done = ~np.isnan(self.latencies.last_s)
        if not done.any():
            return None
        return Slo(float(np.quantile(self.latencies.first_s[done], q)), float(np.quantile(each[done], q)))


async def replay(
    system: System, trace: Trace, vocab: int, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Replayed:
    """Send every request of the trace at its time, with random tokens, and wait for all of them."""
    began = time.monotonic()
    first, last = np.full(len(trace), np.nan), np.full(len(trace), np.nan)
    errors: list[str] = []

    async def send(i: int) -> None:
        at = float(trace.arrival_s[i])
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        report("requests", i, len(trace))
        try:
            async with aclosing(system.generate(_request(i, trace, vocab))) as outputs:
                output: TokenOutput
                async for output in outputs:
                    now = time.monotonic() - began - at
                    if output.token_ids and np.isnan(first[i]):
                        first[i] = now
                    if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                        raise MoerayError(output.error or "the request was aborted")
            last[i] = time.monotonic() - began - at
        except MoerayError as error:
            errors.append(str(error))

    actors: list[int] = []
    looking = asyncio.create_task(_look(system, actors))
    try:
        await asyncio.gather(*(send(i) for i in range(len(trace))))
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    return Replayed(Latencies(first, last), actors, errors)


def _request(i: int, trace: Trace, vocab: int) -> GenerationRequest:
    rng = random.Random(i)
    prompt = tuple(rng.randrange(3, vocab) for _ in range(int(trace.prompt[i])))
    sampling = SamplingParams(max_tokens=int(trace.output[i]), temperature=0.0, ignore_eos=True)
    return GenerationRequest(f"replay-{i}", prompt, sampling)


async def _look(system: System, actors: list[int]) -> None:
    while True:
        status = await system.status()
        actors.append(sum(row["kind"] == "expert" for row in status["actors"]))
        await asyncio.sleep(LOOK_S)

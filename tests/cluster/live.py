"""A whole system over real Ray actors, for tests that kill and scale it: streams that are checked token by token."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import ray

from moeray.cluster.ray import start_controller, stop_controller
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.serve.errors import ControllerLostError
from moeray.serve.ray_port import RayPort
from moeray.serve.system import SystemBackend
from moeray.types import GenerationRequest, SamplingParams
from tests.scraping import Sample, fallen, lasting, samples

_names = itertools.count()

TOKENS = 96  # of each request
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=TOKENS, temperature=0.9, seed=5, ignore_eos=True, frequency_penalty=0.4)
REQUESTS = tuple((tuple(range(5 + i, 25 + 2 * i)), GREEDY if i % 2 == 0 else SAMPLED) for i in range(4))


class Live:
    """A running system. Waiting is asking: every question is a round trip to the controller."""

    def __init__(self, backend: SystemBackend, controller: Any) -> None:
        self.backend = backend
        self.controller = controller
        self._scraped: dict[Sample, float] = {}

    async def tokens(
        self, prompt: tuple[int, ...], sampling: SamplingParams, at: Callable[[int], None] = lambda count: None
    ) -> list[int]:
        """One request's tokens; `at` is told how many there are, each time that some have come."""
        got: list[int] = []
        request = GenerationRequest(f"live-{next(_names)}", prompt, sampling)
        async with aclosing(self.backend.generate(request)) as outputs:
            async for output in outputs:
                assert output.error is None, output.error
                got += output.token_ids
                at(len(got))
        return got

    async def all_tokens(self, disturb: Callable[[], Any] | None = None) -> list[list[int]]:
        """Every request's tokens, side by side; `disturb` runs once all of them have begun to stream, or the quickest
        is half through: on few cores some router may not get one for as long."""
        begun: set[int] = set()
        now = asyncio.Event()

        def at(request: int, count: int) -> None:
            if count >= 4:
                begun.add(request)
            if len(begun) == len(REQUESTS) or count >= TOKENS // 2:
                now.set()

        tasks = [asyncio.create_task(self.tokens(*r, at=partial(at, i))) for i, r in enumerate(REQUESTS)]
        if disturb is not None:
            await now.wait()
            assert not any(task.done() for task in tasks), "the streams ended before they could be disturbed"
            answer = disturb()
            if asyncio.iscoroutine(answer):
                await answer
        return await asyncio.gather(*tasks)

    async def ask(self, method: str, *args: Any) -> Any:
        """What the controller answers, or the next one where it has died: every question may be put again."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await self.backend._controller.call(method, *args)
                except ControllerLostError:
                    continue

    async def scrape(self, within_s: float = 60.0) -> dict[Sample, float]:
        """All samples, asked for until they are given. No counter may be less than it ever was."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    text, _ = await self.backend.metrics()
                    break
                except MoerayError:
                    continue
        before, self._scraped = self._scraped, lasting(text)
        assert fallen(before, self._scraped) == {}
        return samples(text)

    async def until(self, what: Callable[[dict[str, Any]], Any], timeout: float = 90.0) -> dict[str, Any]:
        """The status, as soon as `what` holds of it."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        status = await self.backend.status()
                    except MoerayError:
                        continue
                    if status["status"] == "ready" and what(status):
                        return status
        except TimeoutError:
            raise AssertionError(f"it did not come to pass within {timeout:g} s: {status}") from None

    async def whole(self) -> dict[str, Any]:
        return await self.until(is_whole)

    async def rows(self, kind: str, state: str = "ready") -> list[dict[str, Any]]:
        status = await self.backend.status()
        return [row for row in status["actors"] if row["kind"] == kind and row["state"] == state]


def is_whole(status: dict[str, Any]) -> bool:
    return (
        not status["changing"]
        and status["fewest_replicas"] >= status["replicas_wanted"]
        and all(status["ready"][g] == n + status["reserve"].get(g, 0) for g, n in status["wanted"].items())
        and not any(row["state"] in ("pending", "silent", "starting", "draining") for row in status["actors"])
    )


def kill(row: dict[str, Any], number: int = signal.SIGKILL) -> None:
    os.kill(row["pid"], number)


@asynccontextmanager
async def live_system(config: Config) -> AsyncIterator[Live]:
    """Started and stopped; Ray is the caller's."""
    controller = start_controller(config)
    backend = SystemBackend(config, RayPort(config), ray.get_runtime_context().get_node_id())
    backend.start()
    try:
        await backend.ready(180)
        yield Live(backend, controller)
    finally:
        await backend.close()
        await asyncio.to_thread(stop_controller, start_controller(config))

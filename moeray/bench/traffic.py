"""Streams that send one request after the other, until told to stop, and when their tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol

from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, TokenOutput


class System(Protocol):
    """A running system, as its endpoint sees it."""

    def generate(self, request: GenerationRequest) -> Any: ...

    async def status(self) -> dict[str, Any]: ...

    async def call(self, method: str, *args: Any) -> Any: ...


class Traffic:
    """`request(stream, n)` is the n-th request of a stream. Entered, `streams` of them are in flight at any time; left,
    the last ones finish first. One event loop."""

    def __init__(self, system: System, request: Callable[[int, int], GenerationRequest], streams: int) -> None:
        self._system = system
        self._request = request
        self._streams = streams
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self.arrivals: list[float] = []
        """When each token came (`time.monotonic`)."""
        self.requests = 0
        self.errors: list[str] = []
        """One for each lost request."""

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)

    async def _stream(self, number: int) -> None:
        n = 0
        while not self._stopped:
            self.requests += 1
            try:
                await self._send(self._request(number, n))
            except MoerayError as error:
                self.errors.append(str(error))
            n += 1

    async def _send(self, request: GenerationRequest) -> None:
        async with aclosing(self._system.generate(request)) as outputs:
            output: TokenOutput
            async for output in outputs:
                self.arrivals += [time.monotonic()] * len(output.token_ids)
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise MoerayError(output.error or "the request was aborted")

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second between two moments."""
        return sum(begin <= at < end for at in self.arrivals) / (end - begin)

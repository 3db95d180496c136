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
        self._waits: list[tuple[float, float, int]] = []  # a stream waited from, to, and then had so many tokens
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
        since = time.time()
        async with aclosing(self._system.generate(request)) as outputs:
            output: TokenOutput
            async for output in outputs:
                now = time.time()
                self._waits.append((since, now, len(output.token_ids)))
                since = now
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise MoerayError(output.error or "the request was aborted")

    @property
    def tokens(self) -> int:
        """Tokens that came so far."""
        return sum(count for _, _, count in self._waits)

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second between two moments (unix seconds, which an actor's own moments can be compared with).

        A token counts evenly over the time that its stream waited for it: what a window of a few steps holds is then
        not a matter of which step it just catches.
        """
        parts = (
            count * (min(end, stop) - max(begin, start)) / (stop - start)
            for start, stop, count in self._waits
            if start < end and begin < stop and stop > start
        )
        return sum(parts) / (end - begin)

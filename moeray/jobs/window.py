"""How many sequences of a batch may be with the routers: what the user allows, less while they refuse to queue more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from moeray.errors import QueueFullError

LONGEST_PAUSE_S = 5.0


class Window:
    """Used on one event loop. Sequences enter in the order in which they ask.

    A refusal sets `size` to what the routers have taken; each sequence that is answered makes room for one more, up to
    `most`. Where they have taken nothing of ours, the window stays shut until they said that it is worth another try.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self.in_flight = 0
        self._most = most
        self._shut: asyncio.TimerHandle | None = None
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, count: int) -> AsyncIterator[None]:
        """Wait for room for `count` sequences, and hold it for the block. More than `most` enter when alone."""
        await self._enter(count)
        try:
            yield
        except QueueFullError as error:
            self._shrink(self.in_flight - count, error.retry_after_s)
            raise
        else:
            self.size = min(self._most, self.size + count)
        finally:
            self._leave(count)

    async def _enter(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # one that has left since then found it cancelled, and took it out
                    self._queue.remove((count, turn))
            else:
                self._leave(count)
            raise

    def _leave(self, count: int) -> None:
        self.in_flight -= count
        self._admit()

    def _shrink(self, taken: int, retry_after_s: float) -> None:
        self.size = max(1, min(self.size, taken))
        if taken == 0 and self._shut is None:
            pause = min(retry_after_s, LONGEST_PAUSE_S)
            self._shut = asyncio.get_running_loop().call_later(pause, self._open)

    def _open(self) -> None:
        self._shut = None
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._shut is None:
            count, turn = self._queue[0]
            if self.in_flight and self.in_flight + count > self.size:
                return
            self._queue.popleft()
            if not turn.done():
                self.in_flight += count
                turn.set_result(None)

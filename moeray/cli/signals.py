"""SIGINT and SIGTERM as the cancellation of one task, so that what it has begun is ended in good order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Caught:
    """`number` is the first signal's, None where none came."""

    number: signal.Signals | None = None


@contextmanager
def cancelled_by_signals(on_signal: Callable[[signal.Signals], None]) -> Iterator[Caught]:
    """Within the block, the first signal calls `on_signal` and cancels the current task; later ones change nothing."""
    loop, task, caught = asyncio.get_running_loop(), asyncio.current_task(), Caught()
    assert task is not None

    def take(number: signal.Signals) -> None:
        if caught.number is None:
            caught.number = number
            on_signal(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, take, number)
    try:
        yield caught
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

"""Who watches a router: the channels that ask for STATS. What must not wait for their next question is pushed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moeray.actors.outbox import Outbox
from moeray.wire.frame import Frame, Op

Losses = tuple[tuple[str, str], ...]


class Observers:
    """Thread-safe. `report(lost)` makes the tree of a report.

    An observer learns of each loss once: at its first question of those that still stand, then of each as it happens.
    """

    def __init__(self, report: Callable[[Losses], Mapping[str, Any]]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._outboxes: set[Outbox] = set()
        self._standing: dict[str, str] = {}

    def answer(self, frame: Frame, outbox: Outbox) -> None:
        """A STATS frame; the channel is an observer from now on."""
        with self._lock:
            lost = () if outbox in self._outboxes else tuple(self._standing.items())
            self._outboxes.add(outbox)
        outbox.put(Frame(Op.STATS, frame.id, meta=self._report(lost)))

    def lose(self, actor_id: str, reason: str) -> None:
        """An expert actor was given up; `reason` is `closed`, `timeout` or `error`."""
        with self._lock:
            self._standing[actor_id] = reason
            self._push(((actor_id, reason),))

    def push(self) -> None:
        """Report now, without being asked."""
        with self._lock:
            self._push(())

    def _push(self, lost: Losses) -> None:
        for outbox in self._outboxes:
            outbox.put(Frame(Op.STATS, meta=self._report(lost)))

    def forget(self, actor_ids: Collection[str]) -> None:
        """These actors are trusted again, or are no longer named."""
        with self._lock:
            for actor_id in actor_ids:
                self._standing.pop(actor_id, None)

    def leave(self, outbox: Outbox) -> None:
        """The channel has ended."""
        with self._lock:
            self._outboxes.discard(outbox)

"""Memory whose channel is closed here, but which the peer may still have open: it is free once the peer is not there.

CUDA leaves undefined what comes of memory that is freed while another process has it open.
"""

from __future__ import annotations

import threading

from moeray.wire.device_memory import Region
from moeray.wire.lifeline import Lifeline


class Retired:
    """Thread-safe. Whoever opens, closes or counts rings sweeps, so that nothing waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Region, Lifeline]] = []

    def add(self, region: Region, lifeline: Lifeline) -> None:
        """Close both as soon as the peer has let go of the lifeline, which was handed over; at once where it has."""
        with self._lock:
            self._waiting.append((region, lifeline))
        self.sweep()

    def sweep(self) -> int:
        """Free what can be; bytes that still wait."""
        with self._lock:
            free = [(region, lifeline) for region, lifeline in self._waiting if lifeline.cut]
            self._waiting = [entry for entry in self._waiting if entry not in free]
            left = sum(len(region.memory) for region, _ in self._waiting)
        for region, lifeline in free:
            region.close()
            lifeline.close()
        return left

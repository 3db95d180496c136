"""What a dispatcher counts of each hop: noted as it comes, and recorded many at a time or when somebody reads."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from moeray.recorder import Recorder

MANY = 64


class Hop:
    """One kind of channel (`unix`, `grpc`)."""

    def __init__(self, recorder: Recorder, kind: str) -> None:
        self._seconds = recorder.histogram("moeray_dispatch_seconds", hop=kind)
        self._rows = recorder.counter("moeray_dispatch_rows_total", hop=kind)
        self._sent = recorder.counter("moeray_dispatch_bytes_total", hop=kind, direction="sent")
        self._received = recorder.counter("moeray_dispatch_bytes_total", hop=kind, direction="received")
        self._noted: deque[tuple[float, int, int, int]] = deque()

    def note(self, took_s: float, rows: int, sent: int, received: int) -> None:
        """A forward was answered: its rows, the bytes of its tensors and of their outputs."""
        self._noted.append((took_s, rows, sent, received))

    def record(self, least: int = 1) -> None:
        """Count what was noted, if that are so many. Any thread may call it."""
        if len(self._noted) < least:
            return
        noted = []
        with suppress(IndexError):  # another thread took the last
            while self._noted:
                noted.append(self._noted.popleft())
        if noted:
            took, rows, sent, received = zip(*noted, strict=True)
            self._seconds.observe_all(took)
            self._rows.add(sum(rows))
            self._sent.add(sum(sent))
            self._received.add(sum(received))

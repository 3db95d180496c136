"""What a dispatcher counts of each hop: noted as it comes, and recorded many layers at a time or when it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, get_args

from moeray.dispatch.planner import Answered
from moeray.recorder import Recorder

Kind = Literal["unix", "tcp", "grpc"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of channels."""
HOPS: tuple[str, ...] = (*KINDS, "device")
"""How rows go: by the channel, or over a device's memory beside it."""
MANY = 64


class Hops:
    """Of all hops. Thread-safe."""

    def __init__(self, recorder: Recorder) -> None:
        self._hops: dict[str, _Hop] = {hop: _Hop(recorder, hop) for hop in HOPS}
        self._noted: deque[tuple[Sequence[str], int, Sequence[Answered]]] = deque()

    def note(self, kinds: Sequence[str], row_bytes: int, answered: Sequence[Answered]) -> None:
        """Forwards were answered, each over its actor's hop; `row_bytes`: of a token, and of a row of outputs."""
        self._noted.append((kinds, row_bytes, answered))

    def record(self, least: int = 1) -> None:
        """Count what was noted, if that is so much."""
        if len(self._noted) < least:
            return
        noted: dict[str, list[tuple[float, int, int, int]]] = {hop: [] for hop in HOPS}
        with suppress(IndexError):  # another thread took the last
            while self._noted:
                kinds, row_bytes, answered = self._noted.popleft()
                for actor, _, rows, tokens, took_s in answered:
                    noted[kinds[actor]].append((took_s, rows, tokens * row_bytes + rows * 8, rows * row_bytes))
        for kind, forwards in noted.items():
            if forwards:
                self._hops[kind].record(forwards)


class _Hop:
    """One of them."""

    def __init__(self, recorder: Recorder, hop: str) -> None:
        self._seconds = recorder.histogram("moeray_dispatch_seconds", hop=hop)
        self._rows = recorder.counter("moeray_dispatch_rows_total", hop=hop)
        self._sent = recorder.counter("moeray_dispatch_bytes_total", hop=hop, direction="sent")
        self._received = recorder.counter("moeray_dispatch_bytes_total", hop=hop, direction="received")

    def record(self, forwards: Sequence[tuple[float, int, int, int]]) -> None:
        """Of each its seconds, its rows, the bytes of its tensors and of their outputs."""
        took_s, rows, sent, received = zip(*forwards, strict=True)
        self._seconds.observe_all(took_s)
        self._rows.add(sum(rows))
        self._sent.add(sum(sent))
        self._received.add(sum(received))

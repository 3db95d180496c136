"""An expert actor's counts in its recorder, brought up to date when somebody reads it."""

from __future__ import annotations

from moeray.actors.memory import Memory
from moeray.recorder import Recorder
from moeray.wire.device_side import DeviceSide


class ExpertFigures:
    """`recorder` labels an expert actor, which has this `side` of channels' rings on a device."""

    def __init__(self, recorder: Recorder, side: DeviceSide | None) -> None:
        self._memory = Memory(recorder, side)
        self._rows = recorder.counter("moeray_expert_rows_total")
        self._forwards = recorder.counter("moeray_expert_forwards_total")
        self._busy_seconds = recorder.counter("moeray_expert_busy_seconds_total")
        self._weight_bytes = recorder.gauge("moeray_expert_weight_bytes")
        self._hosted = recorder.gauge("moeray_expert_hosted")

    def update(self, rows: int, forwards: int, busy_s: float, weight_bytes: int, hosted: int) -> None:
        """Counts since the start, and what is hosted now."""
        self._memory.update()
        self._rows.raise_to(rows)
        self._forwards.raise_to(forwards)
        self._busy_seconds.raise_to(busy_s)
        self._weight_bytes.set(weight_bytes)
        self._hosted.set(hosted)

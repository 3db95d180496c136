"""What an actor's process holds in memory, as its recorder has it."""

from __future__ import annotations

import psutil

from moeray.recorder import Recorder
from moeray.wire.device_side import DeviceSide


class Memory:
    """Brought up to date when somebody reads the recorder, which labels an actor; `side`: of its channels' rings on a
    device."""

    def __init__(self, recorder: Recorder, side: DeviceSide | None) -> None:
        self._resident = recorder.gauge("moeray_actor_memory_bytes")
        self._rings = recorder.gauge("moeray_device_ring_bytes")
        self._side = side
        self._process = psutil.Process()

    def update(self) -> None:
        self._resident.set(self._process.memory_info().rss)
        self._rings.set(self._side.held_bytes if self._side is not None else 0)

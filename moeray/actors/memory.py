"""What an actor's process holds in memory, as its recorder has it."""

from __future__ import annotations

import psutil

from moeray.recorder import Recorder


class Memory:
    """Brought up to date when somebody reads the recorder, which labels an actor."""

    def __init__(self, recorder: Recorder) -> None:
        self._resident = recorder.gauge("moeray_actor_memory_bytes")
        self._process = psutil.Process()

    def update(self) -> None:
        self._resident.set(self._process.memory_info().rss)

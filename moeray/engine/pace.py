"""How many prompt tokens a step may take so that the sequences that decode keep their pace.

What a step costs changes with the expert actors that serve it, so the number is not computed but found: halved after a
step that was too long, doubled again after one that was so short that twice as much may fit.
"""

from __future__ import annotations

from moeray.settings.engine import LEAST_CHUNK, EngineConfig

_SHORT = 0.6
"""A step within this part of `step_s` would about keep to it with twice the chunk, since some of its time is fixed."""


class Pace:
    """`chunk`: prefill tokens of the next step beside decodes; always `prefill_chunk` where `step_s` is None."""

    def __init__(self, config: EngineConfig) -> None:
        self._step_s = config.step_s
        self._most = self.chunk = config.prefill_chunk

    def note(self, decodes: int, prefilled: int, seconds: float) -> None:
        """Take note of a step. Those without decodes keep nobody waiting, those without prefills tell nothing."""
        if self._step_s is None or not decodes or not prefilled:
            return
        if seconds > self._step_s:
            self.chunk = min(self.chunk, max(LEAST_CHUNK, self.chunk // 2))
        elif prefilled >= self.chunk and seconds <= _SHORT * self._step_s:
            self.chunk = min(self._most, 2 * self.chunk)

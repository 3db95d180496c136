"""How many prompt tokens a step may take so that the sequences that decode keep their pace.

What a step costs changes with the expert actors that serve it, so the number is not computed but found: halved after a
step that was too long, doubled again after one that was so short that twice as much may fit.
"""

from __future__ import annotations

from moeray.settings.engine import LEAST_CHUNK

_SHORT = 0.6
"""A step within this part of what it may last would about keep to that with twice the chunk: some of it is fixed."""


class Pace:
    """`chunk`: prefill tokens of the next step beside decodes; `most`, until it is to keep steps to some seconds."""

    def __init__(self, most: int) -> None:
        self._most = self.chunk = most
        self._step_s: float | None = None

    def keep_to(self, step_s: float | None) -> None:
        """Steps are to last no longer from now on; as long as they like with None."""
        self._step_s = step_s
        if step_s is None:
            self.chunk = self._most

    def note(self, decodes: int, prefilled: int, seconds: float) -> None:
        """Take note of a step. Those without decodes keep nobody waiting, those without prefills tell nothing."""
        if self._step_s is None or not decodes or not prefilled:
            return
        if seconds > self._step_s:
            self.chunk = min(self.chunk, max(LEAST_CHUNK, self.chunk // 2))
        elif prefilled >= self.chunk and seconds <= _SHORT * self._step_s:
            self.chunk = min(self._most, 2 * self.chunk)

"""Which of two ways of doing the same is faster, found by doing both."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

UNCOUNTED, COUNTED = 3, 4
"""Turns of a trial that one way has in succession: the first ones are slower for being the first."""
MARGIN = 0.95
"""The other way is kept if it takes less than this part of the usual one's time."""
SETTLED = 2000
"""After so many turns both are tried again."""


@dataclass
class _Trial:
    turns: int = 0
    usual: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    @property
    def tries_other(self) -> bool:
        return self.turns >= UNCOUNTED + COUNTED

    @property
    def is_over(self) -> bool:
        return self.turns >= 2 * (UNCOUNTED + COUNTED)

    @property
    def other_wins(self) -> bool:
        return min(self.other) < MARGIN * min(self.usual)


class Trials:
    """One for each kind of work that is asked for. Not thread-safe."""

    def __init__(self) -> None:
        self._trials: dict[Hashable, _Trial] = {}

    def next(self, kind: Hashable) -> bool:
        """Whether the next work of this kind is to be done the other way."""
        trial = self._trials.setdefault(kind, _Trial())
        return trial.other_wins if trial.is_over else trial.tries_other

    def note(self, kind: Hashable, other: bool, seconds: float) -> None:
        """It was done, the other way or not, and took so long for each of its units."""
        trial = self._trials[kind]
        if not trial.is_over and trial.turns % (UNCOUNTED + COUNTED) >= UNCOUNTED:
            (trial.other if other else trial.usual).append(seconds)
        trial.turns += 1
        if trial.turns >= SETTLED:
            del self._trials[kind]

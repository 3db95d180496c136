"""How often each expert is asked for, over all actors that host it. No clock: times come in.

Experts are numbered as they are first heard of, so that folding and reading are vector operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moeray.types import ExpertId

Vector = NDArray[np.float64]
Numbers = NDArray[np.int64]


class Demand:
    """Rows of each expert in an exponential window, with `window_s` as its time constant, and in a sliding one, a ring
    of `buckets` of a second each. `served_at`: when a row was last served."""

    def __init__(self, window_s: float, buckets: int) -> None:
        self._window_s = window_s
        self._number: dict[ExpertId, int] = {}
        self._rows = np.zeros(0)  # decayed
        self._buckets = np.zeros((buckets, 0))
        self._second: int | None = None
        self.time_s = 0.0
        """Of how many seconds the exponential window's rates are the mean."""
        self._at = 0.0
        self.served_at: float | None = None

    def begin(self, now: float) -> None:
        """From now on rows are counted."""
        self._at = now

    def numbers(self, experts: Iterable[ExpertId]) -> Numbers:
        """The numbers of these experts, new ones included."""
        found = np.array([self._number.setdefault(expert, len(self._number)) for expert in experts], np.int64)
        if len(self._number) > len(self._rows):
            grown = 2 * len(self._number) - len(self._rows)
            self._rows = np.append(self._rows, np.zeros(grown))
            self._buckets = np.pad(self._buckets, ((0, 0), (0, grown)))
        return found

    def count(self, numbers: Numbers, delta: Vector, since: float, now: float) -> None:
        """Rows that were served between `since` and `now`, evenly as far as the buckets are concerned."""
        self._rows[numbers] += delta
        self.served_at = now
        size = len(self._buckets)
        for second in range(max(int(since), int(now) - size + 1), int(now) + 1):
            part = (min(now, second + 1) - max(since, second)) / (now - since) if now > since else 1.0
            if part:
                self._buckets[second % size, numbers] += part * delta

    def advance(self, now: float) -> None:
        """Let the experts' windows fade up to `now`, and empty the buckets that come round again."""
        if now == self._at and self._second is not None:
            return
        span = max(0.0, now - self._at)
        fade = math.exp(-span / self._window_s)
        self._rows *= fade
        self.time_s = fade * self.time_s + self._window_s * (1 - fade)
        self._at = max(now, self._at)
        second = int(now)
        last = second if self._second is None else self._second
        for passed in range(max(last + 1, second - len(self._buckets) + 1), second + 1):
            self._buckets[passed % len(self._buckets)] = 0.0
        self._second = max(last, second)

    def rates(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert, over the exponential window."""
        self.advance(now)
        return self.named(self._rows / self.time_s if self.time_s > 0 else self._rows)

    def peak(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert in the sliding window's busiest second."""
        self.advance(now)
        return self.named(self._buckets.max(axis=0))

    def zeros(self) -> Vector:
        """One number for each expert, to be added to."""
        return np.zeros(len(self._rows))

    def named(self, values: Vector) -> dict[ExpertId, float]:
        """What such numbers say of each expert."""
        return dict(zip(self._number, values[: len(self._number)].tolist(), strict=True))

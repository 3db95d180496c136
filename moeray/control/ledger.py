"""What a system has counted, also by those that are gone. Pure: readings come in, with the time; no clock.

A counter or histogram without the label `actor` is the sum over its living sources and over those that have ended,
so it never falls. With that label it stays for `LINGER_S` behind its source, and a gauge goes with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from moeray.metrics import METRICS
from moeray.recorder import Labels, Reading, Snapshot

LINGER_S = 300.0
"""As long as Prometheus looks back for a sample: the last values of an actor are seen by whoever scrapes at all."""
MOST_GUESTS = 1000
"""Guests whose counts are kept apart; of more, those silent for longest count as ended."""


@dataclass(frozen=True)
class Books:
    """All that another ledger needs to go on from this one, `at` a moment in unix seconds that never goes back. Gauges
    and series with the label `actor` are left out, since actors tell them again."""

    at: float = 0.0
    ended: Snapshot = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()


class Ledger:
    """One owner: not thread-safe. Every snapshot that it takes or gives is left as it is."""

    def __init__(self, books: Books | None = None) -> None:
        books = books or Books()
        self._at = books.at
        self._ended = books.ended
        self._readings = {reading.source: reading for reading in books.readings}
        self._lingering: deque[tuple[float, Snapshot]] = deque()

    def take(self, reading: Reading, now: float) -> None:
        """The newest reading of a source holds; of metrics that it does not name the one before."""
        before = self._readings.get(reading.source)
        if before is not None and before.incarnation == reading.incarnation:
            if reading.at <= before.at:
                return
            reading = replace(reading, values={**before.values, **reading.values})
        elif before is not None:
            self._end(before, now)
        self._readings.pop(reading.source, None)  # the last in the dict is the last that was heard of
        self._readings[reading.source] = reading

    def settle(self, present: Collection[str], now: float) -> None:
        """Sources that are not among `present`, and no guests, have ended."""
        guests = [reading for reading in self._readings.values() if reading.guest]
        gone = [r for r in self._readings.values() if not r.guest and r.source not in present]
        for reading in gone + guests[: max(0, len(guests) - MOST_GUESTS)]:
            self._end(self._readings.pop(reading.source), now)
        while self._lingering and self._lingering[0][0] <= now:
            self._lingering.popleft()

    def _end(self, reading: Reading, now: float) -> None:
        self._ended = merge([self._ended, lasting(reading.values)])
        self._lingering.append((now + LINGER_S, lingering(reading.values)))

    def parts(self) -> list[Snapshot]:
        """What `merge` adds up to the system's series."""
        return [self._ended, *(values for _, values in self._lingering), *(r.values for r in self._readings.values())]

    def books(self, unix_s: float) -> Books:
        """The ledger as it is now."""
        self._at = max(unix_s, math.nextafter(self._at, math.inf))
        readings = tuple(replace(r, values=lasting(r.values)) for r in self._readings.values())
        return Books(self._at, self._ended, readings)


def newer(one: Books | None, other: Books | None) -> Books | None:
    """Of two copies the one to go on from."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda books: books.at)


def lasting(snapshot: Snapshot) -> Snapshot:
    """The series that outlive their source."""
    return {name: series for name, series in snapshot.items() if _counts(name) and not _by_actor(name)}


def lingering(snapshot: Snapshot) -> Snapshot:
    """The series that stay for a while."""
    return {name: series for name, series in snapshot.items() if _counts(name) and _by_actor(name)}


def _counts(name: str) -> bool:
    return METRICS[name].kind != "gauge"


def _by_actor(name: str) -> bool:
    return "actor" in METRICS[name].labels


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Add up counters and histograms series by series; of a gauge with the same labels the last one stays."""
    merged: dict[str, dict[Labels, Any]] = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            into = merged.setdefault(name, {})
            if not into or not _counts(name):
                into.update(series)
                continue
            for key, value in series.items():
                into[key] = _sum(into[key], value) if key in into else value
    return merged


def _sum(a: Any, b: Any) -> Any:
    return [x + y for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b

"""What one actor or endpoint counts, and how that travels: a recorder of series, and readings of it as plain data."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeray.metrics import METRICS

Labels = tuple[str, ...]
Snapshot = Mapping[str, Mapping[Labels, Any]]
"""Metric name -> label values -> a number, or for a histogram [count per bucket..., over the last one, sum]."""


@dataclass(frozen=True)
class Reading:
    """What a source says of itself: its counts since its `incarnation` began, at second `at` of a clock of its own.

    `values` are not changed any more. `guest`: a source of which nobody says when it has ended.
    """

    source: str
    incarnation: str
    at: float
    values: Snapshot = field(default_factory=dict)
    guest: bool = False


class _Series:
    def __init__(self, lock: threading.Lock, row: list[float]) -> None:
        self._lock = lock
        self._row = row


class Counter(_Series):
    """One series of a counter."""

    def add(self, amount: float = 1) -> None:
        with self._lock:
            self._row[0] += amount

    def raise_to(self, total: float) -> None:
        """Take over what somebody else counts."""
        with self._lock:
            self._row[0] = max(self._row[0], total)


class Gauge(_Series):
    """One series of a gauge."""

    def set(self, value: float) -> None:
        with self._lock:
            self._row[0] = value


class Histogram(_Series):
    """One series of a histogram."""

    def __init__(self, lock: threading.Lock, row: list[float], bounds: Sequence[float]) -> None:
        super().__init__(lock, row)
        self._bounds = bounds

    def observe(self, value: float) -> None:
        with self._lock:
            self._row[bisect_left(self._bounds, value)] += 1
            self._row[-1] += value

    def observe_all(self, values: Iterable[float]) -> None:
        row, bounds = self._row, self._bounds
        with self._lock:
            for value in values:
                row[bisect_left(bounds, value)] += 1
                row[-1] += value


class Recorder:
    """Counts of one source. Thread-safe.

    A series is there, at 0, from the moment that it is asked for, so that a rate sees its first increase; whoever
    counts often keeps it. Labels given here hold for every metric that has them. A name, kind or label that the table
    lacks is a KeyError.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._lock = threading.Lock()
        self._rows: dict[str, dict[Labels, list[float]]] = {}

    def counter(self, name: str, **labels: object) -> Counter:
        return Counter(self._lock, self._row("counter", name, labels))

    def gauge(self, name: str, **labels: object) -> Gauge:
        return Gauge(self._lock, self._row("gauge", name, labels))

    def forget_gauge(self, name: str, **labels: object) -> None:
        """There is nothing more to say of it."""
        key = self._key(name, labels)
        with self._lock:
            self._rows.get(name, {}).pop(key, None)

    def histogram(self, name: str, **labels: object) -> Histogram:
        return Histogram(self._lock, self._row("histogram", name, labels), METRICS[name].buckets)

    def _row(self, kind: str, name: str, labels: dict[str, object]) -> list[float]:
        spec = METRICS[name]
        if spec.kind != kind or not labels.keys() <= set(spec.labels):
            raise KeyError(f"{name} is a {spec.kind} with the labels {spec.labels}, not a {kind} with {(*labels,)}")
        key = self._key(name, labels)
        size = len(spec.buckets) + 2 if kind == "histogram" else 1
        with self._lock:
            return self._rows.setdefault(name, {}).setdefault(key, [0.0] * size)

    def _key(self, name: str, labels: dict[str, object]) -> Labels:
        given = {**self._labels, **labels}
        return tuple(str(given[label]) for label in METRICS[name].labels)

    def read(self) -> tuple[float, Snapshot]:
        """A moment of time.monotonic, and a copy of all counts at it: of two readings the later one has no less."""
        with self._lock:
            return time.monotonic(), {
                name: {key: list(row) if METRICS[name].kind == "histogram" else row[0] for key, row in rows.items()}
                for name, rows in self._rows.items()
            }


def snapshot_tree(snapshot: Snapshot) -> list[Any]:
    """Plain data for a frame; `snapshot_from` is the inverse."""
    return [[name, [[list(key), value] for key, value in series.items()]] for name, series in snapshot.items()]


def snapshot_from(tree: Iterable[Any]) -> Snapshot:
    """Raises TypeError or ValueError for a tree that is no snapshot; metrics that the table lacks are left out."""
    return {name: {tuple(key): value for key, value in series} for name, series in tree if name in METRICS}

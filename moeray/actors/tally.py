"""What an expert actor has served: counts since its start, and quantiles since the last report."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeray.types import ExpertId

SAMPLES = 512


class Reservoir:
    """A uniform sample of bounded size from a stream of unknown length (Vitter 1985, algorithm R)."""

    def __init__(self, size: int = SAMPLES) -> None:
        self._size = size
        self._seen = 0
        self._values: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self._seen += 1
        if len(self._values) < self._size:
            self._values.append(value)
        elif (place := self._random.randrange(self._seen)) < self._size:
            self._values[place] = value

    def quantiles(self) -> tuple[float, float]:
        """The median and the 99th percentile of what was added (nearest rank), 0 where nothing was."""
        values = sorted(self._values)
        last = len(values) - 1
        return (values[last // 2], values[int(0.99 * last + 0.5)]) if values else (0.0, 0.0)


@dataclass(frozen=True)
class Served:
    """Counts since the start; `waits_s` and `services_s` are (p50, p99) since the last report."""

    rows: Mapping[ExpertId, int]
    forwards: int
    busy_s: float
    waits_s: tuple[float, float]
    services_s: tuple[float, float]


class Tally:
    """Thread-safe; no lock is held for longer than a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[ExpertId, int] = {}
        self._forwards = 0
        self.busy_s = 0.0
        """Seconds of computing, since the start."""
        self._waits, self._services = Reservoir(), Reservoir()
        self.first_at: float | None = None
        """When the first row had been served, in unix seconds; an actor that begins to host forgets it."""

    def add(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], wait_s: float, service_s: float, at: float
    ) -> None:
        """One forward: `counts` rows of each of `experts`, which waited and then computed for so many seconds, until
        `at` by time.perf_counter."""
        with self._lock:
            self._forwards += 1
            self.first_at = self.first_at or time.time() - (time.perf_counter() - at)
            self.busy_s += service_s
            self._waits.add(wait_s)
            self._services.add(service_s)
            for expert, count in zip(experts, counts, strict=True):
                key = ExpertId(layer, expert)
                self._rows[key] = self._rows.get(key, 0) + count

    def rows(self) -> dict[ExpertId, int]:
        """Rows served so far by every expert that had any."""
        with self._lock:
            return dict(self._rows)

    def totals(self) -> tuple[int, int, float]:
        """Rows, forwards and busy seconds so far."""
        with self._lock:
            return sum(self._rows.values()), self._forwards, self.busy_s

    def report(self) -> Served:
        """Everything, and the quantiles begin anew."""
        with self._lock:
            waits, self._waits = self._waits, Reservoir()
            services, self._services = self._services, Reservoir()
            rows, forwards, busy_s = dict(self._rows), self._forwards, self.busy_s
        return Served(rows, forwards, busy_s, waits.quantiles(), services.quantiles())

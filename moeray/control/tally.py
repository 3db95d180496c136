"""What a simulated expert actor would report of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport
from moeray.types import ExpertId

Ints = NDArray[np.int64]


@dataclass
class Tally:
    """The counts of one actor since it began (`told`: busy seconds and forwards at its last report). Of the rows of
    expert `experts[i]` it gets each `of[i]`-th, and one more where the remainder is above `nth[i]`."""

    actor_id: str
    experts: tuple[ExpertId, ...] = ()
    layers: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    numbers: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    of: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    nth: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    busy_s: float = 0.0
    forwards: float = 0.0
    told: tuple[float, float] = (0.0, 0.0)

    def host(self, shares: Sequence[tuple[ExpertId, int, int]]) -> None:
        """Host other experts: (expert, its replicas, which of them this is). Counts of those that stay go on."""
        had = dict(zip(self.experts, self.rows.tolist(), strict=True))
        self.experts = tuple(expert for expert, _, _ in shares)
        flat = [number for expert, of, nth in shares for number in (*expert, of, nth)]
        table = np.array(flat, np.int64).reshape(-1, 4)
        self.layers, self.numbers, self.of, self.nth = table.T
        self.rows = np.array([had.get(expert, 0) for expert in self.experts], np.int64)

    def count(self, rows_LE: Ints, busy_s: float, forwards: float) -> None:
        """Add what was served: of all actors together `rows_LE`."""
        each, rest = np.divmod(rows_LE[self.layers, self.numbers], self.of)
        self.rows += each + (rest > self.nth)
        self.busy_s += busy_s
        self.forwards += forwards

    def report(self, span_s: float, others: int) -> ExpertReport:
        """What the actor says, `span_s` after it last did. A forward waits for those of `others` routers."""
        busy_s, forwards = self.busy_s - self.told[0], self.forwards - self.told[1]
        self.told = self.busy_s, self.forwards
        service = busy_s / forwards if forwards else 0.0
        busy = min(busy_s / span_s, 1.0) * others / (others + 1)
        p50, p99 = (queue_wait(service, busy, others, q) for q in (0.5, 0.99))
        rows = dict(zip(self.experts, self.rows.tolist(), strict=True))
        return ExpertReport(self.actor_id, "1", rows, int(self.forwards), self.busy_s, p50, p99, service, service)


def share(tallies: Sequence[Tally], placement: Placement) -> None:
    """Tell each actor's tally what it hosts."""
    shares: dict[str, list[tuple[ExpertId, int, int]]] = {tally.actor_id: [] for tally in tallies}
    for expert, actors in placement.replicas.items():
        for nth, actor in enumerate(actors):
            shares[actor].append((expert, len(actors), nth))
    for tally in tallies:
        tally.host(shares[tally.actor_id])


def queue_wait(service_s: float, busy: float, others: int, quantile: float) -> float:
    """The wait's quantile in an M/M/1 queue that is busy for that part of the time, but not longer than the forwards of
    all others take: a router has one at a time at an actor."""
    if busy <= 1 - quantile:
        return 0.0
    return service_s * min(math.log(busy / (1 - quantile)) / (1 - busy), others)

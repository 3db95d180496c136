"""What simulated expert actors would report of themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport
from moeray.types import ExpertId

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Tallies:
    """The counts of all actors since each began. A = actors, X = experts (of all layers, in a row), N = replicas, those
    of one actor side by side."""

    def __init__(self, layers: int, experts: int) -> None:
        self._experts, self._count = experts, layers * experts
        self._actors: tuple[str, ...] = ()
        self._hosted: list[tuple[ExpertId, ...]] = []
        self._busy_s_A, self._forwards_A = np.zeros(0), np.zeros(0)
        self._told: list[tuple[float, float]] = []  # busy seconds and forwards at each actor's last report
        none = np.zeros(0, np.int64)
        self._actor_N, self._expert_N, self._rows_N = none, none, none
        # Of the rows of an expert a replica gets each `of`-th, and one more where the remainder is above `nth`.
        self._of_N, self._nth_N = none, none

    def host(self, actors: Sequence[str], placement: Placement) -> None:
        """These actors are there from now on and host that. Counts of those that stay, and of experts that stay on
        them, go on; the others begin at 0."""
        index = {actor: at for at, actor in enumerate(actors)}
        flat = [
            (index[actor], expert.layer * self._experts + expert.expert, len(held), nth)
            for expert, held in placement.replicas.items()
            for nth, actor in enumerate(held)
        ]
        table_N4 = np.array(flat, np.int64)
        table_N4 = table_N4[table_N4[:, 0].argsort(kind="stable")]
        hosted: list[list[ExpertId]] = [[] for _ in actors]
        for expert, held in placement.replicas.items():
            for actor in held:
                hosted[index[actor]].append(expert)
        self._keep(actors, table_N4)
        self._hosted = [tuple(experts) for experts in hosted]

    def _keep(self, actors: Sequence[str], table_N4: Ints) -> None:
        had = {actor: at for at, actor in enumerate(self._actors)}
        before_A = np.array([had.get(actor, -1) for actor in actors])
        counts_AX = np.zeros((len(had) + 1, self._count), np.int64)  # the last, of those that are new, stays 0
        counts_AX[self._actor_N, self._expert_N] = self._rows_N
        self._actor_N, self._expert_N, self._of_N, self._nth_N = table_N4.T
        self._rows_N = counts_AX[before_A[self._actor_N], self._expert_N]
        self._busy_s_A = np.append(self._busy_s_A, 0.0)[before_A]
        self._forwards_A = np.append(self._forwards_A, 0.0)[before_A]
        self._told = [self._told[at] if at >= 0 else (0.0, 0.0) for at in before_A.tolist()]
        self._actors = tuple(actors)

    def count(self, rows_X: Ints, busy_s_A: Floats, forwards_A: Floats) -> None:
        """Add what was served: of all actors together `rows_X`."""
        each_N, rest_N = np.divmod(rows_X[self._expert_N], self._of_N)
        self._rows_N += each_N + (rest_N > self._nth_N)
        self._busy_s_A += busy_s_A
        self._forwards_A += forwards_A

    def reports(self, span_s: float, others: int) -> list[ExpertReport]:
        """What each actor says, `span_s` after it last did. A forward waits for those of `others` routers."""
        counts = iter(self._rows_N.tolist())
        before, self._told = self._told, list(zip(self._busy_s_A.tolist(), self._forwards_A.tolist(), strict=True))
        reports = []
        for actor, experts, had, (busy_s, forwards) in zip(self._actors, self._hosted, before, self._told, strict=True):
            served = forwards - had[1]
            service = (busy_s - had[0]) / served if served else 0.0
            busy = min((busy_s - had[0]) / span_s, 1.0) * others / (others + 1)
            p50, p99 = (queue_wait(service, busy, others, q) for q in (0.5, 0.99))
            rows = dict(zip(experts, counts, strict=False))  # takes of `counts` what is its own
            reports.append(ExpertReport(actor, "1", rows, int(forwards), busy_s, p50, p99, service, service))
        return reports


def queue_wait(service_s: float, busy: float, others: int, quantile: float) -> float:
    """The wait's quantile in an M/M/1 queue that is busy for that part of the time, but not longer than the forwards of
    all others take: a router has one at a time at an actor."""
    if busy <= 1 - quantile:
        return 0.0
    return service_s * min(math.log(busy / (1 - quantile)) / (1 - busy), others)

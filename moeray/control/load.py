"""What the actors' reports add up to: rates, busy parts and waits over recent windows. No clock: times come in.

An exponential window is a pair of decaying sums, of a count and of the time in which it was counted; their ratio is the
mean rate with weight exp(-age / window_s), right from the first report on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moeray.control.demand import Demand, Numbers, Vector
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, RouterReport
from moeray.control.router_load import RouterBook, RouterLoad
from moeray.types import ExpertId

MEMORY_S = 600.0
"""Time constant, in busy seconds, of an actor's service rate: a property of its machine, not of the load."""

RECENT_S = 5.0
"""What an actor does at present, for people who watch: the mean of its last reports over so many seconds."""


class _Served(NamedTuple):
    """What a report has told: rows in so many seconds, of experts by their numbers and layers."""

    seconds: float
    numbers: Numbers
    layers: Numbers
    rows: Vector


@dataclass
class _Expert:
    """One expert actor. `rows` (the last counts) and `decayed` (the window's sum) go with `ids`, `gone` are the counts
    of experts no longer reported; `busy_s` and `time_s` decay with the window, `served` and its time slowly; `recent`:
    what the last reports told, up to `since`."""

    incarnation: str
    since: float
    ids: tuple[ExpertId, ...] = ()
    gone: dict[ExpertId, float] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    layers: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Vector = field(default_factory=lambda: np.zeros(0))
    decayed: Vector = field(default_factory=lambda: np.zeros(0))
    busy_total: float = 0.0
    busy_s: float = 0.0
    time_s: float = 0.0
    served: float = 0.0
    served_busy_s: float = 0.0
    waits: deque[tuple[float, float]] = field(default_factory=deque)
    recent: deque[_Served] = field(default_factory=deque)
    recent_s: float = 0.0


class LoadBook:
    """Folds reports into windows. One owner: not thread-safe. Times are seconds of any one clock."""

    def __init__(self, window_s: float, *, buckets: int = 60) -> None:
        """`window_s`: time constant of the exponential windows; `buckets`: one-second ones of the sliding window."""
        self.window_s = window_s
        self._since: float | None = None  # the time in which rows were counted starts here
        self._demand = Demand(window_s, buckets)
        self._experts: dict[str, _Expert] = {}
        self._routers = RouterBook(window_s)

    # -- reports come in ------------------------------------------------------------------------------------------

    def fold(self, report: ExpertReport | RouterReport, now: float) -> None:
        """Take one report, which arrived at `now`. Counts are cumulative; after a restart they start at 0."""
        if self._since is None:
            self._since = now
            self._demand.begin(now)
        if isinstance(report, RouterReport):
            self._routers.fold(report, now, sum(bool(actor.ids) for actor in self._experts.values()))
        else:
            self._fold_expert(report, now)

    def forget(self, actor_id: str) -> None:
        """Drop what is known of an actor that is gone; what it served stays in the experts' rates and fades."""
        self._experts.pop(actor_id, None)
        self._routers.forget(actor_id)

    def _fold_expert(self, report: ExpertReport, now: float) -> None:
        actor = self._experts.get(report.actor_id)
        if actor is None:
            # What it counted before this book knew it has no known time span: only what follows is a rate.
            actor = self._experts[report.actor_id] = _Expert(report.incarnation, now)
            self._renumber(actor, tuple(report.rows))
            actor.rows = _counts(report)
            actor.busy_total = report.busy_s
            self._wait(actor, report, now)
            return
        delta, busy = self._delta(actor, report)
        since, span = actor.since, max(0.0, now - actor.since)
        fade = math.exp(-span / self.window_s)
        actor.decayed = fade * actor.decayed + delta
        actor.busy_s = fade * actor.busy_s + min(busy, span)
        actor.time_s = fade * actor.time_s + span
        actor.since = now
        forget = math.exp(-busy / MEMORY_S)
        served = float(delta.sum())
        actor.served = forget * actor.served + served
        actor.served_busy_s = forget * actor.served_busy_s + busy
        self._remember(actor, span, delta)
        self._wait(actor, report, now)
        self._demand.advance(now)
        if served:
            self._demand.count(actor.numbers, delta, since, now)

    def _delta(self, actor: _Expert, report: ExpertReport) -> tuple[Vector, float]:
        """New rows (in the report's order) and new busy seconds."""
        restarted = report.incarnation != actor.incarnation
        if restarted:
            actor.gone.clear()
        if actor.ids != tuple(report.rows):
            self._renumber(actor, tuple(report.rows))
        rows = _counts(report)
        delta = rows if restarted else rows - actor.rows
        if len(delta) and delta.min() < 0:  # an expert's count falls when it was dropped and hosted again
            delta = np.where(delta < 0, rows, delta)
        busy_before = 0.0 if restarted or report.busy_s < actor.busy_total else actor.busy_total
        actor.incarnation, actor.rows, actor.busy_total = report.incarnation, rows, report.busy_s
        return delta, report.busy_s - busy_before

    def _renumber(self, actor: _Expert, ids: tuple[ExpertId, ...]) -> None:
        """The actor reports other experts than before. Counts of those left out are kept, should they come back."""
        actor.gone.update(zip(actor.ids, actor.rows.tolist(), strict=True))
        served = dict(zip(actor.ids, actor.decayed.tolist(), strict=True))
        actor.rows = np.array([actor.gone.pop(expert, 0.0) for expert in ids])
        actor.decayed = np.array([served.get(expert, 0.0) for expert in ids])
        actor.ids, actor.numbers = ids, self._demand.numbers(ids)
        actor.layers = np.array([expert.layer for expert in ids], np.int64)

    def _remember(self, actor: _Expert, span: float, delta: Vector) -> None:
        actor.recent.append(_Served(span, actor.numbers, actor.layers, delta))
        actor.recent_s += span
        while actor.recent_s - actor.recent[0].seconds >= RECENT_S:
            actor.recent_s -= actor.recent.popleft().seconds

    def _wait(self, actor: _Expert, report: ExpertReport, now: float) -> None:
        while actor.waits and (actor.waits[-1][1] <= report.queue_wait_p99_s):
            actor.waits.pop()  # never again the worst: the new one is as bad and stays longer
        actor.waits.append((now, report.queue_wait_p99_s))

    # -- what they add up to --------------------------------------------------------------------------------------

    def expert_rates(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert, over the exponential window."""
        return self._demand.rates(now)

    def load_s(self, now: float) -> float:
        """Of how many seconds these rates are the mean: `window_s` once reports have come for long enough."""
        self._demand.advance(now)
        return self._demand.time_s

    def recent(self) -> tuple[dict[ExpertId, float], dict[str, float]]:
        """Rows per second of each expert and of each actor in its last reports: what people see move.

        An actor's rate is the mean over the time of its own reports, so that it does not matter when one asks.
        """
        experts, actors = self._demand.zeros(), {}
        for actor_id, actor in self._experts.items():
            span = sum(served.seconds for served in actor.recent)
            actors[actor_id] = sum(float(served.rows.sum()) for served in actor.recent) / span if span else 0.0
            for served in actor.recent if span else ():
                experts[served.numbers] += served.rows / span
        return self._demand.named(experts), actors

    def peak(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert in the sliding window's busiest second."""
        return self._demand.peak(now)

    def busy(self, now: float) -> dict[str, float]:
        """The part of the last window that each expert actor computed, 0 to 1. Silence counts as idle."""
        out = {}
        for actor_id, actor in self._experts.items():
            fade = math.exp(-max(0.0, now - actor.since) / self.window_s)
            time_s = fade * actor.time_s + self.window_s * (1 - fade)
            out[actor_id] = min(1.0, fade * actor.busy_s / time_s) if time_s > 0 else 0.0
        return out

    def service_rates(self) -> dict[str, float]:
        """Rows per second of computing, over a long memory; actors that have served nothing are left out."""
        return {name: a.served / a.served_busy_s for name, a in self._experts.items() if a.served_busy_s > 0}

    def queue_waits(self, now: float) -> dict[str, float]:
        """The worst p99 queue wait of each expert actor in the last window, in seconds."""
        out = {}
        for actor_id, actor in self._experts.items():
            while actor.waits and actor.waits[0][0] < now - self.window_s:
                actor.waits.popleft()
            out[actor_id] = actor.waits[0][1] if actor.waits else 0.0
        return out

    def routers(self, now: float) -> dict[str, RouterLoad]:
        """The load of each router; the last report holds until `now`."""
        return self._routers.loads(now)

    def idle_s(self, now: float) -> float:
        """Seconds since a row was last served (since the first report where none was; 0 before any report)."""
        served_at = self._demand.served_at
        since = served_at if served_at is not None else self._since
        return 0.0 if since is None else max(0.0, now - since)

    def skew_observed(self) -> dict[int, float]:
        """Layer -> max/mean of the rows per second that each actor really served, of those that host any of it.

        They are compared over the time that the last reports of all of them tell of, `RECENT_S` or somewhat less: who
        reported last is not ahead of the others. Where one has said nothing for longer, each over its own reports.
        """
        known = [actor for actor in self._experts.values() if actor.recent]
        begin = max((actor.since - actor.recent_s for actor in known), default=0.0)
        end = min((actor.since for actor in known), default=0.0)
        if begin >= end:
            begin, end = -math.inf, math.inf
        layers: dict[int, dict[str, float]] = {}
        for actor_id, actor in self._experts.items():
            rates = _layer_rates(actor, begin, end)
            for layer in np.unique(actor.layers).tolist():
                served = layers.setdefault(layer, {})
                if actor.recent:
                    served[actor_id] = rates.get(layer, 0.0)
        return {layer: _skew(served) for layer, served in sorted(layers.items())}


def _layer_rates(actor: _Expert, begin: float, end: float) -> dict[int, float]:
    """Layer -> rows per second that the actor served in that time, evenly within a report."""
    rates, seconds, until = dict[int, float](), 0.0, actor.since
    for served in reversed(actor.recent):
        inside = max(0.0, min(until, end) - max(until - served.seconds, begin))
        seconds, until = seconds + inside, until - served.seconds
        part = inside / served.seconds if served.seconds else 0.0
        for layer, rows in enumerate(np.bincount(served.layers, served.rows).tolist() if part else ()):
            rates[layer] = rates.get(layer, 0.0) + part * rows
    return {layer: rows / seconds for layer, rows in rates.items()} if seconds else {}


def skew(
    load: Mapping[ExpertId, float], placement: Placement, shares: Mapping[str, float] | None = None
) -> dict[int, float]:
    """Layer -> max/mean of the time that its load takes the actors that host an expert of it; 1 where there is no load.

    `shares`: how fast actors are to each other, all alike if None; one that it lacks is as fast as their mean. An
    expert's load is divided over its replicas by them.
    """
    speeds = shares or {}
    usual = sum(speeds.values()) / len(speeds) if speeds else 1.0
    layers: dict[int, dict[str, float]] = {}
    for expert, actors in placement.replicas.items():
        served = layers.setdefault(expert.layer, {})
        together = sum(speeds.get(actor, usual) for actor in actors)
        for actor in actors:
            part = speeds.get(actor, usual) / together
            served[actor] = served.get(actor, 0.0) + part * load.get(expert, 0.0)
    return {
        layer: _skew(served, {actor: speeds.get(actor, usual) for actor in served})
        for layer, served in sorted(layers.items())
    }


def _skew(served: Mapping[str, float], speeds: Mapping[str, float] | None = None) -> float:
    total, speeds = sum(served.values()), speeds or dict.fromkeys(served, 1.0)
    slowest = max(rows / speeds[actor] for actor, rows in served.items()) if total > 0 else 0.0
    return slowest * sum(speeds.values()) / total if total > 0 else 1.0


def _counts(report: ExpertReport) -> Vector:
    return np.fromiter(report.rows.values(), np.float64, len(report.rows))

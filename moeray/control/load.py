"""What the actors' reports add up to: rates, busy parts and waits over recent windows. No clock: times come in.

An exponential window is a pair of decaying sums, of a count and of the time in which it was counted; their ratio is the
mean rate with weight exp(-age / window_s), right from the first report on. The sliding window is a ring of one-second
buckets. Experts are numbered as they are first heard of, so that folding and reading are vector operations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, RouterReport
from moeray.types import ExpertId

MEMORY_S = 600.0
"""Time constant, in busy seconds, of an actor's service rate: a property of its machine, not of the load."""

STEPS_S = 2.0
"""Time constant of what is known of a router's steps: it must not lag behind the actors that serve them."""
LATE_S = 600.0
"""Time constant of how many requests were late: long enough for one in a hundred to be seen."""
RECENT_S = 3.0
"""What an actor does at present, for people who watch: the mean of its last reports over so many seconds."""
_FADED = 0.1
"""Fewer tokens than this are a memory of what was long ago."""

Vector = NDArray[np.float64]
_Key = TypeVar("_Key")


@dataclass
class _Expert:
    """One expert actor. `rows` (the last counts) and `decayed` (the window's sum) go with `ids`, `gone` are the counts
    of experts no longer reported; `busy_s` and `time_s` decay with the window, `served` and its time slowly; `recent`:
    the last reports' seconds, experts' numbers and new rows."""

    incarnation: str
    since: float
    ids: tuple[ExpertId, ...] = ()
    gone: dict[ExpertId, float] = field(default_factory=dict)
    numbers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Vector = field(default_factory=lambda: np.zeros(0))
    decayed: Vector = field(default_factory=lambda: np.zeros(0))
    busy_total: float = 0.0
    busy_s: float = 0.0
    time_s: float = 0.0
    served: float = 0.0
    served_busy_s: float = 0.0
    waits: deque[tuple[float, float]] = field(default_factory=deque)
    recent: deque[tuple[float, NDArray[np.int64], Vector]] = field(default_factory=deque)
    recent_s: float = 0.0


@dataclass(frozen=True)
class RouterLoad:
    """What a router has to do. Over the last window, means of `running` and `waiting` sequences and of `kv_usage` (0
    to 1). Over the last steps: `tpot_s`, what a decoding sequence waited for a token, `prefill_rate`, prompt tokens per
    second of steps with prefills (both 0 where there were none), and `expert_part` of the steps' time (0 to 1), in
    which a layer waited for as many expert `actors` as there were then. At present: `pending_tokens` of prompts, still
    to be computed. Over a longer time: `requests` that ended, and those of them that were `late`."""

    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    pending_tokens: float = 0.0
    tpot_s: float = 0.0
    prefill_rate: float = 0.0
    expert_part: float = 0.0
    actors: float = 0.0
    requests: float = 0.0
    late: float = 0.0


@dataclass
class _Router:
    """`sums` and `time_s` decay with the window, `work`, the increments of `totals`, faster, `ended` (requests, late
    ones), the increments of `ends`, slowly; `last` is as reported."""

    incarnation: str
    since: float
    time_s: float = 0.0
    sums: Vector = field(default_factory=lambda: np.zeros(3))
    last: Vector = field(default_factory=lambda: np.zeros(3))
    totals: Vector = field(default_factory=lambda: np.zeros(6))
    work: Vector = field(default_factory=lambda: np.zeros(6))
    actors: float = 0.0
    pending_tokens: int = 0
    ends: Vector = field(default_factory=lambda: np.zeros(2))
    ended: Vector = field(default_factory=lambda: np.zeros(2))


class LoadBook:
    """Folds reports into windows. One owner: not thread-safe. Times are seconds of any one clock."""

    def __init__(self, window_s: float, *, buckets: int = 60) -> None:
        """`window_s`: time constant of the exponential windows; `buckets`: one-second ones of the sliding window."""
        self.window_s = window_s
        self._number: dict[ExpertId, int] = {}
        self._rows = np.zeros(0)  # decayed rows of each expert, over all actors
        self._buckets = np.zeros((buckets, 0))
        self._second: int | None = None
        self._since: float | None = None  # the time in which rows were counted starts here
        self._time_s = 0.0
        self._at = 0.0
        self._served_at: float | None = None
        self._experts: dict[str, _Expert] = {}
        self._routers: dict[str, _Router] = {}

    # -- reports come in ------------------------------------------------------------------------------------------

    def fold(self, report: ExpertReport | RouterReport, now: float) -> None:
        """Take one report, which arrived at `now`. Counts are cumulative; after a restart they start at 0."""
        if self._since is None:
            self._since = self._at = now
        if isinstance(report, RouterReport):
            self._fold_router(report, now)
        else:
            self._fold_expert(report, now)

    def forget(self, actor_id: str) -> None:
        """Drop what is known of an actor that is gone; what it served stays in the experts' rates and fades."""
        self._experts.pop(actor_id, None)
        self._routers.pop(actor_id, None)

    def _fold_router(self, report: RouterReport, now: float) -> None:
        tokens, prefilled = report.decode_tokens, report.prefill_tokens
        totals = np.array([report.step_s, report.expert_s, tokens, report.decode_s, prefilled, report.prefill_s])
        ends = np.array([report.requests, report.late], np.float64)
        router = self._routers.get(report.actor_id)
        if router is None:  # what it counted before this book knew it has no known time span
            router = self._routers[report.actor_id] = _Router(report.incarnation, now, totals=totals, ends=ends)
        span = max(0.0, now - router.since)
        fade = math.exp(-span / self.window_s)
        values = np.array([report.running, report.waiting, report.kv_usage], np.float64)
        again = router.incarnation == report.incarnation
        before = router.totals if again else 0.0
        router.ended = math.exp(-span / LATE_S) * router.ended + (ends - (router.ends if again else 0.0))
        router.ends = ends
        router.sums = fade * router.sums + span * values
        done, fade_work = totals - before, math.exp(-span / STEPS_S)
        # Weighed by the time that was waited for them: the mean of those behind `expert_part`.
        waited = fade_work * router.work[1] + done[1]
        if waited > 0:
            serving = sum(bool(actor.ids) for actor in self._experts.values())
            router.actors = (fade_work * router.work[1] * router.actors + done[1] * serving) / waited
        router.work = fade_work * router.work + done
        router.time_s = fade * router.time_s + span
        router.since, router.last, router.totals = now, values, totals
        router.incarnation, router.pending_tokens = report.incarnation, report.pending_tokens

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
        self._advance(now)
        if served:
            self._count(actor.numbers, delta, since, now)

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
        for expert in ids:
            self._number.setdefault(expert, len(self._number))
        actor.gone.update(zip(actor.ids, actor.rows.tolist(), strict=True))
        served = dict(zip(actor.ids, actor.decayed.tolist(), strict=True))
        actor.rows = np.array([actor.gone.pop(expert, 0.0) for expert in ids])
        actor.decayed = np.array([served.get(expert, 0.0) for expert in ids])
        actor.ids, actor.numbers = ids, np.array([self._number[expert] for expert in ids], np.int64)
        if len(self._number) > len(self._rows):
            grown = 2 * len(self._number) - len(self._rows)
            self._rows = np.append(self._rows, np.zeros(grown))
            self._buckets = np.pad(self._buckets, ((0, 0), (0, grown)))

    def _remember(self, actor: _Expert, span: float, delta: Vector) -> None:
        actor.recent.append((span, actor.numbers, delta))
        actor.recent_s += span
        while actor.recent_s - actor.recent[0][0] >= RECENT_S:
            actor.recent_s -= actor.recent.popleft()[0]

    def _wait(self, actor: _Expert, report: ExpertReport, now: float) -> None:
        while actor.waits and (actor.waits[-1][1] <= report.queue_wait_p99_s):
            actor.waits.pop()  # never again the worst: the new one is as bad and stays longer
        actor.waits.append((now, report.queue_wait_p99_s))

    def _count(self, numbers: NDArray[np.int64], delta: Vector, since: float, now: float) -> None:
        """Rows that were served between `since` and `now`, evenly as far as the buckets are concerned."""
        self._rows[numbers] += delta
        self._served_at = now
        size = len(self._buckets)
        for second in range(max(int(since), int(now) - size + 1), int(now) + 1):
            part = (min(now, second + 1) - max(since, second)) / (now - since) if now > since else 1.0
            if part:
                self._buckets[second % size, numbers] += part * delta

    def _advance(self, now: float) -> None:
        """Let the experts' windows fade up to `now`, and empty the buckets that come round again."""
        if now == self._at and self._second is not None:
            return
        span = max(0.0, now - self._at)
        fade = math.exp(-span / self.window_s)
        self._rows *= fade
        self._time_s = fade * self._time_s + self.window_s * (1 - fade)
        self._at = max(now, self._at)
        second = int(now)
        last = second if self._second is None else self._second
        for passed in range(max(last + 1, second - len(self._buckets) + 1), second + 1):
            self._buckets[passed % len(self._buckets)] = 0.0
        self._second = max(last, second)

    # -- what they add up to --------------------------------------------------------------------------------------

    def expert_rates(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert, over the exponential window."""
        self._advance(now)
        rates = self._rows / self._time_s if self._time_s > 0 else self._rows
        return dict(zip(self._number, rates[: len(self._number)].tolist(), strict=True))

    def recent(self) -> tuple[dict[ExpertId, float], dict[str, float]]:
        """Rows per second of each expert and of each actor in its last reports: what people see move.

        An actor's rate is the mean over the time of its own reports, so that it does not matter when one asks.
        """
        experts, actors = np.zeros(len(self._rows)), {}
        for actor_id, actor in self._experts.items():
            span = sum(seconds for seconds, _, _ in actor.recent)
            actors[actor_id] = sum(float(rows.sum()) for _, _, rows in actor.recent) / span if span else 0.0
            for _, numbers, rows in actor.recent if span else ():
                experts[numbers] += rows / span
        return dict(zip(self._number, experts[: len(self._number)].tolist(), strict=True)), actors

    def peak(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert in the sliding window's busiest second."""
        self._advance(now)
        most = self._buckets[:, : len(self._number)].max(axis=0)
        return dict(zip(self._number, most.tolist(), strict=True))

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
        return {actor_id: self._router_load(router, now) for actor_id, router in self._routers.items()}

    def _router_load(self, router: _Router, now: float) -> RouterLoad:
        span = max(0.0, now - router.since)
        fade = math.exp(-span / self.window_s)
        time_s = fade * router.time_s + span
        means = (fade * router.sums + span * router.last) / time_s if time_s > 0 else router.last
        running, waiting, kv_usage = means.tolist()
        step_s, expert_s, decode_tokens, decode_s, prefill_tokens, prefill_s = router.work.tolist()
        return RouterLoad(
            running,
            waiting,
            kv_usage,
            router.pending_tokens,
            tpot_s=decode_s / decode_tokens if decode_tokens > _FADED else 0.0,
            prefill_rate=prefill_tokens / prefill_s if prefill_tokens > _FADED else 0.0,
            expert_part=min(1.0, expert_s / step_s) if step_s > 0 else 0.0,
            actors=router.actors,
            requests=float(router.ended[0]),
            late=float(router.ended[1]),
        )

    def idle_s(self, now: float) -> float:
        """Seconds since a row was last served (since the first report where none was; 0 before any report)."""
        since = self._served_at if self._served_at is not None else self._since
        return 0.0 if since is None else max(0.0, now - since)

    def skew_observed(self, now: float) -> dict[int, float]:
        """Layer -> max/mean of the rows per second that each actor really served, of those that host any of it."""
        layers: dict[int, dict[str, float]] = {}
        for actor_id, actor in self._experts.items():
            fade = math.exp(-max(0.0, now - actor.since) / self.window_s)
            for expert, rows in zip(actor.ids, actor.decayed.tolist(), strict=True):
                served = layers.setdefault(expert.layer, {})
                served[actor_id] = served.get(actor_id, 0.0) + fade * rows
        return {layer: _skew(served) for layer, served in sorted(layers.items())}


def skew(load: Mapping[ExpertId, float], placement: Placement) -> dict[int, float]:
    """Layer -> max/mean load of the actors that host an expert of it; 1 where there is no load.

    An expert's load is divided evenly over its replicas.
    """
    layers: dict[int, dict[str, float]] = {}
    for expert, actors in placement.replicas.items():
        served = layers.setdefault(expert.layer, {})
        for actor in actors:
            served[actor] = served.get(actor, 0.0) + load.get(expert, 0.0) / len(actors)
    return {layer: _skew(served) for layer, served in sorted(layers.items())}


def _skew(served: Mapping[str, float]) -> float:
    total = sum(served.values())
    return max(served.values()) * len(served) / total if total > 0 else 1.0


def _counts(report: ExpertReport) -> Vector:
    return np.fromiter(report.rows.values(), np.float64, len(report.rows))

"""What the routers' reports add up to. No clock: times come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from moeray.control.demand import Vector
from moeray.control.reports import RouterReport

STEPS = 0.7
"""Time constant of what is known of a router's steps, in windows. A request's mean is kept to its objective, which a
few slow seconds do not spoil: answered at once, each is a growth that the next minute takes back."""
PACE_S = 30.0
"""Time constant of how fast prompts come: one long prompt is no rush."""
LATE_S = 600.0
"""Time constant of how many requests were late: long enough for one in a hundred to be seen."""
_FADED = 0.1
"""Fewer tokens than this are a memory of what was long ago."""


@dataclass(frozen=True)
class RouterLoad:
    """What a router has to do. Over the last window, means of `running` and `waiting` sequences and of `kv_usage` (0
    to 1). Over the last steps: `tpot_s`, what a decoding sequence waited for a token, `prefill_rate`, prompt tokens per
    second of steps with prefills (both 0 where there were none), and `expert_part` of the steps' time (0 to 1), in
    which a layer waited for as many expert `actors` as there were then. At present: `pending_tokens` of prompts, still
    to be computed. Over a longer time: `prompt_rate`, prompt tokens per second that came. Over a long one: `requests`
    that ended, and those of them that were `late`."""

    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    pending_tokens: float = 0.0
    prompt_rate: float = 0.0
    tpot_s: float = 0.0
    prefill_rate: float = 0.0
    expert_part: float = 0.0
    actors: float = 0.0
    requests: float = 0.0
    late: float = 0.0


@dataclass
class _Router:
    """`sums` and `time_s` decay with the window, `work`, the increments of `totals`, faster, `ended` (requests, late
    ones), the increments of `ends`, slowly, `came` (prompt tokens, seconds) by `PACE_S`; `last` is as reported."""

    incarnation: str
    since: float
    time_s: float = 0.0
    sums: Vector = field(default_factory=lambda: np.zeros(3))
    last: Vector = field(default_factory=lambda: np.zeros(3))
    totals: Vector = field(default_factory=lambda: np.zeros(6))
    work: Vector = field(default_factory=lambda: np.zeros(6))
    actors: float = 0.0
    pending_tokens: int = 0
    came: Vector = field(default_factory=lambda: np.zeros(2))
    ends: Vector = field(default_factory=lambda: np.zeros(2))
    ended: Vector = field(default_factory=lambda: np.zeros(2))


class RouterBook:
    """Folds the routers' reports into windows of `window_s`. Times are seconds of any one clock."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._routers: dict[str, _Router] = {}

    def forget(self, actor_id: str) -> None:
        self._routers.pop(actor_id, None)

    def fold(self, report: RouterReport, now: float, serving: int) -> None:
        """Take one report, which arrived at `now`; `serving`: the expert actors that host any expert."""
        tokens, prefilled = report.decode_tokens, report.prefill_tokens
        totals = np.array([report.step_s, report.expert_s, tokens, report.decode_s, prefilled, report.prefill_s])
        ends = np.array([report.requests, report.late], np.float64)
        router = self._routers.get(report.actor_id)
        if router is None:  # what it counted before this book knew it has no known time span
            router = self._routers[report.actor_id] = _Router(
                report.incarnation, now, totals=totals, ends=ends, pending_tokens=report.pending_tokens
            )
        span = max(0.0, now - router.since)
        fade = math.exp(-span / self.window_s)
        values = np.array([report.running, report.waiting, report.kv_usage], np.float64)
        again = router.incarnation == report.incarnation
        before = router.totals if again else 0.0
        router.ended = math.exp(-span / LATE_S) * router.ended + (ends - (router.ends if again else 0.0))
        router.ends = ends
        router.sums = fade * router.sums + span * values
        came = totals[4] + report.pending_tokens - (router.totals[4] + router.pending_tokens if again else 0.0)
        router.came = math.exp(-span / PACE_S) * router.came + (came, span)
        done, fade_work = totals - before, math.exp(-span / (STEPS * self.window_s))
        # Weighed by the time that was waited for them: the mean of those behind `expert_part`.
        waited = fade_work * router.work[1] + done[1]
        if waited > 0:
            router.actors = (fade_work * router.work[1] * router.actors + done[1] * serving) / waited
        router.work = fade_work * router.work + done
        router.time_s = fade * router.time_s + span
        router.since, router.last, router.totals = now, values, totals
        router.incarnation, router.pending_tokens = report.incarnation, report.pending_tokens

    def loads(self, now: float) -> dict[str, RouterLoad]:
        """The load of each router; the last report holds until `now`."""
        return {actor_id: self._load(router, now) for actor_id, router in self._routers.items()}

    def _load(self, router: _Router, now: float) -> RouterLoad:
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
            # What is found in the prefix cache, or given up, counts when it comes and is taken back when it goes.
            max(0.0, float(router.came[0])) / max(PACE_S, float(router.came[1])),
            tpot_s=decode_s / decode_tokens if decode_tokens > _FADED else 0.0,
            prefill_rate=prefill_tokens / prefill_s if prefill_tokens > _FADED else 0.0,
            expert_part=min(1.0, expert_s / step_s) if step_s > 0 else 0.0,
            actors=router.actors,
            requests=float(router.ended[0]),
            late=float(router.ended[1]),
        )

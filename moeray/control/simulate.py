"""A discrete-event simulation of routers that share expert actors.

Each router does continuous batching as `engine.scheduler` does (without KV limits, preemption and prefix reuse).
Between two events of a router, its steps are alike and are taken together. A step lasts

    trunk(tokens) + attention(contexts) + hops + slowest expert actor(tokens) / (1 - U)

where U is how busy the other routers keep the busiest actor: the arrival theorem of closed queueing networks (Reiser
and Lavenberg 1980) with Schweitzer's approximation, so that R routers slow each other down at most R times.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from moeray.control.cost import StepCosts, StepTable
from moeray.control.objectives import Objectives
from moeray.control.reports import RouterReport
from moeray.control.sim_router import SimRouter
from moeray.control.trace import Trace
from moeray.settings.engine import LEAST_CHUNK, EngineConfig

Floats = NDArray[np.float64]

LONGEST_RUN = 64
"""Steps that are taken together at most: contexts grow meanwhile, and the mean stands for all."""

_OUTSTANDING = attrgetter("outstanding")


@dataclass(frozen=True, eq=False)
class Latencies:
    """Of each request, seconds since its arrival: `first_s` to the first token, `last_s` to the last."""

    first_s: Floats
    last_s: Floats


class Engine:
    """All routers, driven by `advance`. `table` may be exchanged at any moment with `publish`."""

    def __init__(
        self,
        trace: Trace,
        settings: EngineConfig,
        costs: StepCosts,
        table: StepTable,
        routers: int,
        objectives: Objectives = Objectives(),  # noqa: B008 - frozen
    ) -> None:
        """`objectives`: what reports count lateness by, and how long steps may last."""
        self._settings, self._costs, self._objectives = settings, costs, objectives
        self._arrival: list[float] = trace.arrival_s.tolist()
        self._prompt: list[int] = trace.prompt.tolist()
        self._output: list[int] = trace.output.tolist()
        self._first = [math.nan] * len(trace)
        self._last = [math.nan] * len(trace)
        self._next = 0
        self._unfinished = len(trace)
        self._events: list[tuple[float, int, int, SimRouter]] = []
        self._pushed = 0
        self._named = 0
        self._busy = 0.0
        self.table = table
        self.now = 0.0
        self.routers: list[SimRouter] = []
        self.prompt_tokens = self.generation_tokens = 0
        self.steps_by_tokens = [0.0] * len(costs.trunk_s)  # since the caller last cleared it
        for _ in range(routers):
            self.add_router()

    # -- what a driver may do ---------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self._unfinished == 0

    def latencies(self) -> Latencies:
        """Of all requests, as their clients see them; NaN for what has not come yet."""
        arrival, way_s = np.array(self._arrival), self._costs.costs.request_s
        return Latencies(np.array(self._first) - arrival + way_s, np.array(self._last) - arrival + way_s)

    def late(self, ttft_s: float, since: int = 0) -> tuple[int, int]:
        """Of the requests from number `since` on that came at least `ttft_s` ago: how many had no first token within
        that time, and the number of the first request that came later."""
        due = bisect_right(self._arrival, self.now - ttft_s, since)
        late = sum(not self._first[i] - self._arrival[i] <= ttft_s for i in range(since, due))
        return late, due

    def add_router(self) -> SimRouter:
        router = SimRouter(f"router-{self._named}")
        self._named += 1
        self.routers.append(router)
        return router

    def close_router(self, router: SimRouter) -> None:
        """It takes no new requests, and is gone when it has finished those it has."""
        router.closing = True
        self._leave_if_empty(router)

    def resize_routers(self, count: int) -> None:
        """So many routers take requests from now on; those with least to do close, closing ones come back first."""
        closing = [router for router in self.routers if router.closing]
        for router in sorted(closing, key=lambda r: -r.outstanding)[: max(count - self.open_routers, 0)]:
            router.closing = False
        for _ in range(count - self.open_routers):
            self.add_router()
        taking = sorted((r for r in self.routers if not r.closing), key=lambda r: r.outstanding)
        for router in taking[: max(len(taking) - count, 0)]:
            self.close_router(router)

    @property
    def open_routers(self) -> int:
        """How many routers take requests."""
        return sum(not router.closing for router in self.routers)

    def publish(self, table: StepTable) -> None:
        """Another placement: in force at once, also within a step, since each layer is dispatched by the newest."""
        self.table = table
        for router in self.routers:
            if router.steps:
                done = (self.now - router.began) / router.step_s
                self._time_steps(router)
                router.began = self.now - done * router.step_s
                self._push(router)

    def advance(self, until: float) -> None:
        """Simulate to the moment `until`; steps, and parts of steps, until then are counted in `steps_by_tokens`."""
        events, arrival, count = self._events, self._arrival, len(self._arrival)
        while True:
            event_at = events[0][0] if events else math.inf
            arrival_at = arrival[self._next] if self._next < count else math.inf
            at = event_at if event_at <= arrival_at else arrival_at
            if at > until or at == math.inf:
                break
            self.now = at
            if event_at <= arrival_at:
                _, _, plan, router = heapq.heappop(events)
                if plan == router.plan:
                    self._finish_steps(router)
            else:
                self._arrive(self._next)
                self._next += 1
        if until != math.inf:
            self.now = until
        for router in self.routers:
            if router.steps:
                self._credit(router, min((self.now - router.began) / router.step_s, router.steps))

    def report_of(self, router: SimRouter) -> RouterReport:
        """What it would tell the controller now. The way of the rows counts as the trunk's here."""
        return router.report(self._prompt)

    # -- requests and steps -----------------------------------------------------------------------------------------

    def _arrive(self, request: int) -> None:
        router = min([r for r in self.routers if not r.closing], key=_OUTSTANDING)
        router.outstanding += 1
        router.waiting.append(request)
        if not router.steps:
            router.waking = True
            self._plan(router)
        elif router.running < self._settings.max_running and router.cut(self.now):
            self._push(router)

    def _push(self, router: SimRouter) -> None:
        router.plan += 1
        self._pushed += 1
        end = router.began + router.steps * router.step_s
        heapq.heappush(self._events, (end, self._pushed, router.plan, router))

    def _plan(self, router: SimRouter) -> None:
        """Choose the next batch and how many steps it stays the same."""
        decodes = len(router.decodes)
        takes = self._prefill_takes(router, decodes) if router.prefills or router.waiting else []
        steps = router.decodes[0][0] - router.step if decodes else 1 << 60
        if steps > LONGEST_RUN:
            steps = LONGEST_RUN
        if router.waking:
            steps = 1
        tokens = decodes
        if takes:
            for (_, left), take in zip(router.prefills, takes, strict=False):
                if left < steps * take:
                    steps = left // take
            tokens += sum(takes)
        if not tokens:
            self._rest(router)
            return
        router.takes, router.tokens = takes, tokens
        router.began, router.steps, router.credited, router.worked = self.now, steps, 0, 0.0
        router.attention_s = self._attention_s(router, takes, steps)
        self._time_steps(router)
        self._push(router)

    def _time_steps(self, router: SimRouter) -> None:
        """How long a step of its batch takes with the present placement, beside what the other routers do."""
        router.step_s, router.expert_s = self._step_s(router, len(router.decodes), router.tokens, router.attention_s)
        if router.waking:
            router.step_s += self._costs.costs.wake_s
        self._set_busy(router, self.table.bottleneck_s[router.tokens] / router.step_s)

    def _attention_s(self, router: SimRouter, takes: Sequence[int], steps: int) -> float:
        """Of one of its next steps, in the mean: each takes so many tokens of the first prompts."""
        costs = self._costs
        attention_s = costs.decode_context_s * (router.context + len(router.decodes) * (steps - 1) / 2)
        if takes:
            pairs = 0.0
            for (request, left), take in zip(router.prefills, takes, strict=False):
                pairs += take * (self._prompt[request] - left + take * steps / 2)
            attention_s += costs.prefill_context_s * pairs
        return attention_s

    def _step_s(self, router: SimRouter, decodes: int, tokens: int, attention_s: float) -> tuple[float, float]:
        """The same for any batch, and the part of it that is spent on experts."""
        others, most = self._busy - router.busy, 1 - 1 / len(self.routers)
        others = 0.0 if others < 0 else others if others < most else most
        experts_s = self.table.slowest_s[tokens] / (1 - others)
        return self._costs.trunk_s[tokens] + self._costs.decode_s * decodes + attention_s + experts_s, experts_s

    def _rest(self, router: SimRouter) -> None:
        router.takes, router.tokens, router.steps, router.credited, router.worked = [], 0, 0, 0, 0.0
        router.plan += 1
        self._set_busy(router, 0.0)
        self._leave_if_empty(router)

    def _set_busy(self, router: SimRouter, busy: float) -> None:
        self._busy += busy - router.busy
        router.busy = busy

    def _leave_if_empty(self, router: SimRouter) -> None:
        if router.closing and not router.outstanding:
            self.routers.remove(router)

    def _prefill_takes(self, router: SimRouter, decodes: int) -> list[int]:
        """Tokens of the step for each of the first prefills."""
        settings = self._settings
        budget = settings.max_batch_tokens - decodes
        if decodes and budget > settings.prefill_chunk:
            budget = settings.prefill_chunk
        if decodes and self._objectives.step_s is not None:
            budget = self._paced(router, decodes, budget, self._objectives.step_s)
        return router.share_out(budget, self._prompt, settings.max_running)

    def _paced(self, router: SimRouter, decodes: int, chunk: int, step_s: float) -> int:
        """Prefill tokens beside decoding sequences: those at which `engine.pace` settles."""

        def lasts_s(chunk: int) -> float:
            return self._step_s(router, decodes, decodes + chunk, self._attention_s(router, [chunk], 1))[0]

        while chunk > LEAST_CHUNK and lasts_s(chunk) > step_s:
            chunk = max(LEAST_CHUNK, chunk // 2)
        return chunk

    def _credit(self, router: SimRouter, done: float) -> None:
        """Count `done` of its steps: the work also of one that has not ended, the tokens of those that have."""
        steps, more = int(done + 1e-6), done - router.worked
        if steps < router.credited:
            steps = router.credited
        ended, decodes = steps - router.credited, len(router.decodes)
        prefilled, step_s, totals = router.tokens - decodes, router.step_s, router.totals
        self.steps_by_tokens[router.tokens] += more
        self.generation_tokens += ended * decodes
        self.prompt_tokens += ended * prefilled
        totals[0] += more
        totals[1] += more * step_s
        totals[2] += more * router.expert_s
        totals[3] += more * decodes
        totals[4] += more * decodes * step_s
        if prefilled:
            totals[5] += more * prefilled
            totals[6] += more * step_s
        router.worked, router.credited = done, steps

    def _finish_steps(self, router: SimRouter) -> None:
        steps, now = router.steps, self.now
        self._credit(router, steps)
        router.waking = False
        router.step += steps
        decodes, step = router.decodes, router.step
        router.context += steps * len(decodes)
        while decodes and decodes[0][0] == step:
            request = heapq.heappop(decodes)[1]
            router.context -= self._prompt[request] + self._output[request] - 1
            self._end(router, request)
        if router.takes:
            ended = False
            for prefill, take in zip(router.prefills, router.takes, strict=False):
                prefill[1] -= take * steps
                if not prefill[1]:
                    ended = True
                    self._first_token(router, prefill[0], now)
            if ended:
                router.prefills = [prefill for prefill in router.prefills if prefill[1]]
        self._plan(router)

    def _first_token(self, router: SimRouter, request: int, now: float) -> None:
        self._first[request] = now
        self.generation_tokens += 1
        if self._output[request] == 1:
            self._end(router, request)
        else:
            router.context += self._prompt[request]
            heapq.heappush(router.decodes, (router.step + self._output[request] - 1, request))

    def _end(self, router: SimRouter, request: int) -> None:
        router.outstanding -= 1
        self._last[request] = self.now
        came = self._arrival[request]
        router.requests += 1
        router.late += self._objectives.late(self._first[request] - came, self.now - came, self._output[request])
        self._unfinished -= 1

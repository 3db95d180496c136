"""The oracle: it knows the load of each moment, and its actors come and go without delay and at no cost.

A local search from the best static schedule: again and again, all intervals are given fewer actors, and those whose
requests then miss the SLO too often get theirs back. It is placed for the popularity of each moment. What it finds is
a system that really meets the SLO in simulation, so it is a lower bound of what a perfect oracle saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeray.control.fixed import FixedRuns, Schedule
from moeray.control.outcome import ATTAINED, Outcome, Slo

INTERVAL_S = 60.0
_STEPS = (0.6, 0.75, 0.88, 0.95)
"""What is left of an interval's actors in a round, coarse to fine."""
_REPAIRS = 5
"""How often a round gives actors back."""

Report = Callable[[str, int, int], None]
Ints = NDArray[np.int64]


@dataclass
class _Search:
    """`actors` is the cheapest schedule so far that meets the SLO; `allowed`: late requests of each interval."""

    runs: FixedRuns
    slo: Slo
    interval_s: float
    actors: Ints
    interval_of: Ints
    allowed: Ints
    best: Outcome
    tried: set[tuple[int, ...]] = field(default_factory=set)

    def round(self, part: float) -> bool:
        """Try to do with `part` of the actors everywhere, then only where it went well. False: nothing was gained."""
        lower = np.maximum(np.floor(part * self.actors).astype(np.int64), self.runs.world.fewest_actors)
        return self.attempt(np.minimum(lower, self.actors))

    def attempt(self, trial: Ints) -> bool:
        """Try these numbers, giving those back that were missed. False: nothing was gained."""
        for _ in range(_REPAIRS):
            if (trial == self.actors).all() or tuple(trial) in self.tried:
                return False
            self.tried.add(tuple(trial))
            result = self._run(trial)
            if result.attainment >= ATTAINED:
                self.actors, self.best = trial, result
                return True
            missed = self._missed(result) & (trial < self.actors)
            if not missed.any():
                return False
            trial = np.where(missed, self.actors, trial)
        return False

    def _missed(self, result: Outcome) -> NDArray[np.bool_]:
        """The intervals with more late requests than are allowed (with any more than the best has, where the sum of
        what is allowed is too much), and the one before each run of them, as a backlog comes from before."""
        late = self._late(result)
        over = late > self.allowed
        if not over.any():
            over = late > self._late(self.best)
        before = np.append(over[1:], False)
        return np.asarray(over | before, np.bool_)

    def _run(self, actors: Ints) -> Outcome:
        schedule = Schedule(actors.tolist(), [self.runs.routers], self.interval_s, True)
        result = self.runs.run("oracle", schedule, self.slo)
        assert result is not None
        return result

    def _late(self, result: Outcome) -> Ints:
        late = ~self.slo.met(result.latencies, self.runs.world.trace)
        return np.bincount(self.interval_of, weights=late, minlength=len(self.actors)).astype(np.int64)


def best_oracle(runs: FixedRuns, slo: Slo, static: Outcome, interval_s: float, report: Report) -> Outcome:
    """The cheapest schedule found; the static system's is the first."""
    trace = runs.world.trace
    count = max(1, math.ceil(static.end_s / interval_s))
    interval_of = np.minimum((trace.arrival_s / interval_s).astype(np.int64), count - 1)
    actors = np.full(count, max(sample.actors for sample in static.curve))
    came = np.bincount(interval_of, minlength=count)
    search = _Search(runs, slo, interval_s, actors, interval_of, np.zeros(count, np.int64), static)
    search.allowed = np.maximum((came * (1 - ATTAINED)).astype(np.int64), search._late(static))
    # Where nothing comes, nothing is needed, and no late request would tell it from an interval that is needed.
    search.attempt(np.where(_quiet(static, interval_s, count), runs.world.fewest_actors, actors))
    for i, part in enumerate(_STEPS):
        report("oracle", i, len(_STEPS))
        while search.round(part):
            pass
    report("oracle", len(_STEPS), len(_STEPS))
    return replace(search.best, name="oracle")  # it may still be the static one


def _quiet(static: Outcome, interval_s: float, count: int) -> NDArray[np.bool_]:
    """The intervals in which nothing comes and nothing is served by the static system."""
    quiet = np.ones(count, np.bool_)
    for sample in static.curve:
        quiet[min(int(sample.at_s / interval_s + 1e-9), count - 1)] &= sample.demand == 0 and sample.served == 0
    return quiet

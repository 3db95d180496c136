"""Runs whose number of actors is laid down in advance, and the best static placement among them.

The static one is the smallest system that meets the SLO, with its experts placed by the load of the whole trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeray.control.cost import StepTable
from moeray.control.objectives import Objectives
from moeray.control.outcome import ATTAINED, Outcome, Sample, Slo, outcome
from moeray.control.placement import Placement
from moeray.control.simulate import Engine
from moeray.control.world import World
from moeray.errors import PlacementError, SimulationError

_LOOK_S = 60.0
"""How often a run is looked at."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """`actors[i]` from second i * interval_s on (the last one for ever). `known`: placed for the popularity of the
    moment, else for that of the whole trace. `routers` likewise."""

    actors: Sequence[int]
    routers: Sequence[int]
    interval_s: float
    known: bool


class FixedRuns:
    """Runs schedules; tables of systems that were built once are kept."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.routers = world.config.router.actors_span[1]
        self._placements: dict[tuple[int, int | None], Placement] = {}
        self._tables: dict[tuple[int, int, bool], tuple[StepTable, int]] = {}

    def constant(self, actors: int) -> Schedule:
        """A static system, with all its routers."""
        return Schedule([actors], [self.routers], _LOOK_S, False)

    def run(self, name: str, schedule: Schedule, slo: Slo, *, patient: bool = True) -> Outcome | None:
        """Simulate. None when not `patient` and the SLO is out of reach before the end.

        Raises PlacementError where the experts do not fit.
        """
        world, trace = self.world, self.world.trace
        period = min(schedule.interval_s, world.popularity.period_s, _LOOK_S)
        table, objectives = self._at(schedule, 0.0)[0], Objectives.of(world.config.control)
        engine = Engine(trace, world.config.engine, world.step_costs, table, 1, objectives)
        curve, served, late, checked = [], [], 0, 0
        while not engine.done:
            table, replicas = self._at(schedule, engine.now)
            if table is not engine.table:
                engine.publish(table)
            engine.resize_routers(_at(schedule.routers, schedule.interval_s, engine.now))
            curve.append(self._sample(engine.now, len(table.actors), len(engine.routers), replicas))
            engine.advance(engine.now + period)
            served.append(engine.prompt_tokens + engine.generation_tokens)
            if not patient:
                more, checked = engine.late(slo.ttft_s, checked)
                late += more
                if late > (1 - ATTAINED) * len(trace):
                    return None
        end = max(float(np.max(engine.latencies().last_s + trace.arrival_s)), trace.duration_s)
        return outcome(name, trace, engine.latencies(), curve, served, end, slo)

    def static(self, actors: int, slo: Slo) -> Outcome | None:
        """So many actors all the time. None where the experts do not fit, or the SLO is missed."""
        try:
            result = self.run("static", self.constant(actors), slo, patient=False)
        except PlacementError:
            return None
        return result if result is not None and result.attainment >= ATTAINED else None

    def _at(self, schedule: Schedule, now: float) -> tuple[StepTable, int]:
        key = _at(schedule.actors, schedule.interval_s, now), self.world.popularity.epoch_at(now + 1e-9), schedule.known
        if key not in self._tables:
            self._tables[key] = self._build(*key)
        return self._tables[key]

    def _build(self, actors: int, epoch: int, known: bool) -> tuple[StepTable, int]:
        world = self.world
        hosts = world.hosts(actors)
        key = actors, epoch if known else None
        if key not in self._placements:
            popularity = world.popularity.of_epoch(epoch) if known else world.hindsight
            self._placements[key] = world.settled_placement(hosts, popularity.load)
        placement = self._placements[key]
        return world.table_of(placement, hosts, epoch), sum(map(len, placement.replicas.values()))

    def _sample(self, now: float, actors: int, routers: int, replicas: int) -> Sample:
        world = self.world
        price = world.price_of(actors) + routers * world.config.router.price_per_hour
        nodes = math.ceil(actors / world.actors_per_node)
        return Sample(now, actors, actors, nodes, routers, replicas, price)


def default_slo(runs: FixedRuns, factor: float) -> Slo:
    """`factor` times the p99 of a system that has all the actors it may have, all the time."""
    best = runs.run("all actors", runs.constant(runs.world.most_actors), Slo(math.inf, math.inf))
    assert best is not None
    return Slo(factor * best.p99.ttft_s, factor * best.p99.tpot_s)


def best_static(runs: FixedRuns, slo: Slo) -> Outcome:
    """The smallest constant number of actors that meets the SLO. Raises SimulationError where none does."""
    world = runs.world
    low, high = world.fewest_actors, world.most_actors
    best = runs.static(high, slo)
    if best is None:
        raise SimulationError(_out_of_reach(runs, slo, high))
    # A system that is far too small takes longest to simulate, so come from above.
    while low < high:
        middle = max(low, int(math.sqrt(low * high)) if high > 4 * low else (low + high) // 2)
        if (result := runs.static(middle, slo)) is not None:
            high, best = middle, result
        else:
            low = middle + 1
    return best


def _at(counts: Sequence[int], interval_s: float, now: float) -> int:
    return counts[min(int(now / interval_s + 1e-9), len(counts) - 1)]


def _out_of_reach(runs: FixedRuns, slo: Slo, most: int) -> str:
    result = runs.run("", runs.constant(most), slo)
    assert result is not None
    return (
        f"{most} actors, the most there may be, meet the SLO for {result.attainment:.1%} of the requests (p99: first "
        f"token {result.p99.ttft_s:.3g} s, between tokens {result.p99.tpot_s:.3g} s); raise --slo, max_actors or the "
        "routers, or lower --scale"
    )

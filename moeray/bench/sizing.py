"""How much of a trace a machine can take: so much that its routers compute for half of the time."""

from __future__ import annotations

import math

from moeray.control.cost import StepTable
from moeray.control.simulate import Engine
from moeray.control.world import World

HALF_BUSY = 0.5
"""With less, requests hardly meet each other, and what is measured is how a machine rests; with more, a queue whose
wait hangs on each percent."""
_LEAST, _MOST = 20, 64.0
"""As few requests, and as many times those of the trace."""
_HALVINGS = 8


def fitting_scale(world: World) -> float:
    """The factor for the trace's requests (`Trace.scaled`) with which the world's routers are simulated to be busy for
    `HALF_BUSY` of the time, served by the actors that its config starts with; to two digits."""
    table = starting_table(world)
    low, high = min(1.0, _LEAST / len(world.trace)), 1.0
    while high < _MOST and busy_part(world, table, high) < HALF_BUSY:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if busy_part(world, table, middle) < HALF_BUSY else (low, middle)
    return float(f"{math.sqrt(low * high):.2g}")


def starting_table(world: World) -> StepTable:
    """What steps cost with the actors that the world's config starts with."""
    hosts = world.hosts(sum(group.actors for group in world.groups.values()))
    return world.table_of(world.settled_placement(hosts, world.hindsight.load), hosts, 0)


def busy_part(world: World, table: StepTable, scale: float) -> float:
    """The part of the time in which the routers compute, with so many times the trace's requests: 0 to 1."""
    trace = world.trace.scaled(scale)
    engine = Engine(trace, world.config.engine, world.step_costs, table, world.config.router.actors)
    routers = tuple(engine.routers)
    engine.advance(math.inf)
    return sum(router.totals[1] for router in routers) / (len(routers) * max(trace.duration_s, engine.now))

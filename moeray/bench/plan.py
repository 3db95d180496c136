"""How long the controller thinks: replicas, placement and plan for a model as large as they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeray.bench.environment import surroundings
from moeray.control.eplb import place, replicate
from moeray.control.placement import Host, Placement
from moeray.control.plan import plan_diff
from moeray.settings.control import ControlConfig
from moeray.types import ExpertId

Load = Mapping[ExpertId, float]


@dataclass(frozen=True)
class Problem:
    """`spares`: replicas beyond the first, as a part of all experts. `skew`: the spread of the experts' loads (sigma of
    their logarithm); `drift`: the same of their change in a drifted load. `fast`: the share of every second actor,
    that of the others being 1."""

    layers: int = 61
    experts: int = 256
    actors: int = 1000
    spares: float = 0.05
    skew: float = 0.7
    drift: float = 0.1
    fast: float = 1.0
    seed: int = 0


def measure(problem: Problem, repeat: int, settings: ControlConfig | None = None) -> dict[str, Any]:
    """Medians in milliseconds, by the clock and of this process's CPU time, for each change of the load."""
    settings = settings or ControlConfig()
    rng = np.random.default_rng(problem.seed)
    hosts = _hosts(problem)
    first = rng.lognormal(0.0, problem.skew, (problem.layers, problem.experts)) * 1000
    changes: list[tuple[str, Placement, Any]] = [("from scratch", Placement(), first)]
    base = _plan(problem, hosts, _load(first), Placement(), settings)[0]
    drifted = first * rng.lognormal(0.0, problem.drift, first.shape)
    changes += [("unchanged load", base, first), ("drifted load", base, drifted)]
    changes += [("new load", base, rng.permuted(first, axis=1))]
    rows = [_row(name, problem, hosts, _load(now), current, settings, repeat) for name, current, now in changes]
    return {"problem": asdict(problem), "repeat": repeat, "rows": rows} | surroundings()


def _hosts(problem: Problem) -> list[Host]:
    room = 4 * (problem.layers * problem.experts // problem.actors + 1)
    shares = (1.0, problem.fast)
    return [Host(f"experts-{i}", room, shares[i % 2], f"node-{i // 8}") for i in range(problem.actors)]


def _load(rows: Any) -> Load:
    return {ExpertId(layer, e): rate for layer, row in enumerate(rows.tolist()) for e, rate in enumerate(row)}


def _row(
    name: str, problem: Problem, hosts: Sequence[Host], load: Load, current: Placement, settings: ControlConfig,
    repeat: int,
) -> dict[str, Any]:  # fmt: skip
    walls, cpus, moves = [], [], 0
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        _, moves = _plan(problem, hosts, load, current, settings)
        walls.append(1e3 * (time.perf_counter() - wall))
        cpus.append(1e3 * (time.process_time() - cpu))
    median: Callable[[list[float]], float] = statistics.median
    return {"change": name, "milliseconds": median(walls), "cpu_milliseconds": median(cpus), "moves": moves}


def _plan(
    problem: Problem, hosts: Sequence[Host], load: Load, current: Placement, settings: ControlConfig
) -> tuple[Placement, int]:
    """The next placement and how many replicas move."""
    slots = int(problem.experts * (1 + problem.spares))
    layers: dict[int, dict[ExpertId, float]] = {}
    for expert, rate in load.items():
        layers.setdefault(expert.layer, {})[expert] = rate
    replicas: dict[ExpertId, int] = {}
    for layer in layers.values():
        replicas |= replicate(layer, slots, most=len(hosts))
    target = place(
        load, hosts, experts={layer: len(row) for layer, row in layers.items()}, expert_bytes=dict.fromkeys(layers, 1),
        replicas=replicas, current=current, migration_cost=settings.migration_cost, max_skew=settings.max_skew,
    )  # fmt: skip
    return target, plan_diff(current, target).moves

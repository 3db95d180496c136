"""What a policy sees and what it may wish for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moeray.control.placement import Placement
from moeray.control.router_load import RouterLoad
from moeray.settings.control import ControlConfig
from moeray.types import ExpertId


@dataclass(frozen=True)
class ExpertActorView:
    """One expert actor that takes rows. `busy`: part of the last window that it computed (0 to 1); `rate`: rows per
    second of computing (0 where unknown); `queue_wait_p99_s`: the worst recent p99 wait of a forward."""

    actor_id: str
    group: str
    node_id: str
    busy: float = 0.0
    rate: float = 0.0
    queue_wait_p99_s: float = 0.0


@dataclass(frozen=True)
class RouterView:
    """One router."""

    actor_id: str
    node_id: str
    load: RouterLoad = field(default_factory=RouterLoad)


@dataclass(frozen=True)
class GroupLimits:
    """How far a group (or the routers) may scale. `actors` counts those wanted at present, starting ones included;
    `device`: what they run on."""

    actors: int
    min_actors: int
    max_actors: int
    price_per_hour: float = 1.0
    device: str = "cpu"


@dataclass(frozen=True)
class PolicyInput:
    """All that a policy may look at.

    `now`: unix seconds, for schedules; `idle_s`: how long no row was served. `load`: rows per second of each expert
    (the exponential window; experts without load may be absent); `peak`: the same from the sliding window's busiest
    second. `groups`: the expert groups by name; `base_replicas`: how many replicas each expert has at the least.
    `busiest`: of each group the most actors that were busy at once in the last `settings.reserve_s`. `load_s`: of how
    many seconds `load` is the mean: `settings.window_s`, less while the controller has not watched so long, more where
    all is known beforehand.
    """

    now: float
    idle_s: float
    load: Mapping[ExpertId, float]
    peak: Mapping[ExpertId, float]
    experts: tuple[ExpertActorView, ...]
    routers: tuple[RouterView, ...]
    placement: Placement
    groups: Mapping[str, GroupLimits]
    router_limits: GroupLimits
    base_replicas: int
    settings: ControlConfig
    busiest: Mapping[str, float] = field(default_factory=dict)
    load_s: float = math.inf


@dataclass(frozen=True)
class Wish:
    """What one policy wants; what it has no opinion on is left out. `reasons`: one line each, for people."""

    actors: Mapping[str, int] = field(default_factory=dict)
    routers: int | None = None
    replicas: Mapping[ExpertId, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


Policy = Callable[[PolicyInput], Wish]

"""What must change to come from one placement to the next. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeray.control.placement import Placement
from moeray.types import ExpertId


@dataclass(frozen=True)
class Diff:
    """`host` and `drop`: the experts that each actor gains and loses, sorted; actors without a change are left out.
    `moves`: replicas that come to an actor, which is what a change costs (dropping one is free)."""

    host: Mapping[str, tuple[ExpertId, ...]] = field(default_factory=dict)
    drop: Mapping[str, tuple[ExpertId, ...]] = field(default_factory=dict)

    @property
    def moves(self) -> int:
        return sum(len(experts) for experts in self.host.values())


def plan_diff(current: Placement, target: Placement) -> Diff:
    """The steps from `current` to `target`. An expert that only one of them knows is hosted or dropped as a whole."""
    host: dict[str, list[ExpertId]] = {}
    drop: dict[str, list[ExpertId]] = {}
    for expert, wanted in target.replicas.items():
        had = current.replicas.get(expert, ())
        if had == wanted:
            continue
        for actor in wanted:
            if actor not in had:
                host.setdefault(actor, []).append(expert)
        for actor in had:
            if actor not in wanted:
                drop.setdefault(actor, []).append(expert)
    for expert in current.replicas.keys() - target.replicas.keys():
        for actor in current.replicas[expert]:
            drop.setdefault(actor, []).append(expert)
    return Diff(_sorted(host), _sorted(drop))


def _sorted(experts: Mapping[str, list[ExpertId]]) -> dict[str, tuple[ExpertId, ...]]:
    return {actor: tuple(sorted(experts[actor])) for actor in sorted(experts)}

"""The picture of a system that the endpoint's live page draws: gathered only while somebody looks, once for all."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeray.actors.audit import Audit
from moeray.actors.autoscaler import Autoscaler
from moeray.actors.decisions import story
from moeray.actors.figures import LATENCY_S, Sample, figures
from moeray.actors.placement_keeper import PlacementKeeper
from moeray.actors.roster import ROUTER, Actor, Roster
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, RouterReport
from moeray.recorder import Snapshot
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig
from moeray.types import ExpertId

DECISIONS = 24
ANSWER_S = 2.0
"""A loop that is busy for longer gives no picture; who looks must not queue up behind it."""
KEEP_S = 0.9
"""A picture is shown again for so long: pages ask each second."""


class Console:
    """Any thread may look. `state`: status and detail; `take`: the moment, None where there is nothing to be seen."""

    def __init__(
        self, state: Callable[[], Mapping[str, Any]], take: Callable[[], Moment | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._state = state
        self._take = take
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque()
        self._picture: dict[str, Any] = {}
        self._until = float("-inf")

    def look(self) -> dict[str, Any]:
        """The picture, `at` a moment in unix seconds; those who look at the same time get the same one."""
        with self._lock:
            if self._clock() >= self._until:
                self._picture = self._draw()
                self._until = self._clock() + KEEP_S
            return self._picture

    def _draw(self) -> dict[str, Any]:
        state, taken = self._state(), self._take()
        drawn = {"at": round(time.time(), 3), "status": state["status"], "detail": state["detail"]}
        if taken is None:
            return drawn
        return {**drawn, **taken.facts, "layers": layers(taken.placement, taken.rates), "figures": self._figures(taken)}

    def _figures(self, taken: Moment) -> dict[str, float | None]:
        self._samples.append(Sample.of(self._clock(), taken.counted))
        while self._samples[0].at < self._samples[-1].at - LATENCY_S:
            self._samples.popleft()
        return figures(self._samples)


@dataclass(frozen=True)
class Moment:
    """What is taken on the controller's loop, which has more to do: the rest of the picture is drawn elsewhere.

    `rates`: rows per second of each expert; `counted`: what `merge` adds up to the system's metrics.
    """

    facts: Mapping[str, Any]
    placement: Placement
    rates: Mapping[ExpertId, float]
    counted: Sequence[Snapshot]


def moment(
    config: Config, standing: Mapping[str, Any], roster: Roster, autoscaler: Autoscaler, places: PlacementKeeper,
    audit: Audit, counted: Sequence[Snapshot],
) -> Moment:  # fmt: skip
    """How the system stands: its groups and actors, what each expert serves, and what was decided last."""
    experts, actors = autoscaler.recent()
    kept = ("epoch", "changing", "autoscaling", "replicas", "without_replica")
    facts = {
        **{key: standing[key] for key in kept},
        "skew": max(standing["skew"].values(), default=1.0),
        "groups": _groups(config, standing),
        "actors": _actors(roster, places, actors, autoscaler.busy()),
        "decisions": story(audit.recent, DECISIONS),
    }
    return Moment(facts, places.placement, experts, counted)


def layers(placement: Placement, rates: Mapping[ExpertId, float]) -> list[dict[str, Any]]:
    """For each MoE layer its experts' rows per second and replicas, both in the experts' order."""
    by_layer: dict[int, list[ExpertId]] = {}
    for expert in placement.replicas:
        by_layer.setdefault(expert.layer, []).append(expert)
    return [
        {
            "layer": layer,
            "rates": [round(rates.get(expert, 0.0), 1) for expert in sorted(experts)],
            "replicas": [len(placement.replicas[expert]) for expert in sorted(experts)],
        }
        for layer, experts in sorted(by_layer.items())
    ]


def _groups(config: Config, standing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each group (`router` last): actors wanted and ready, those in reserve, and how far it may scale."""
    kinds: dict[str, ExpertGroupConfig | RouterConfig] = {group.name: group for group in config.experts.resolved()}
    kinds[ROUTER] = config.router
    return [
        {
            "group": name, "wanted": standing["wanted"][name], "ready": standing["ready"][name],
            "reserve": standing["reserve"].get(name, 0), "min": kind.actors_span[0], "max": kind.actors_span[1],
        }
        for name, kind in kinds.items()
    ]  # fmt: skip


def _actors(
    roster: Roster, places: PlacementKeeper, rates: Mapping[str, float], busy: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each actor, by what it last reported."""
    hosted = {member.actor_id: member.hosted for member in roster.members(places.placement)}
    loading = set(places.change.adds) if places.change else set()
    return [
        _place(actor)
        | {"state": _state(actor, hosted[actor.actor_id], actor.actor_id in loading)}
        | (_router(actor) if actor.is_router else _expert(actor, hosted, rates, busy))
        for actor in roster
    ]


def _place(actor: Actor) -> dict[str, Any]:
    report = actor.report
    return {
        "actor": actor.actor_id, "kind": "router" if actor.is_router else "expert", "group": actor.group,
        "device": report.device if report else "", "node": report.node_id if report else "",
    }  # fmt: skip


def _expert(
    actor: Actor, hosted: Mapping[str, int], rates: Mapping[str, float], busy: Mapping[str, float]
) -> dict[str, Any]:
    said = actor.latest if isinstance(actor.latest, ExpertReport) else ExpertReport(actor.actor_id, "")
    return {
        "experts": hosted[actor.actor_id], "rows_per_s": round(rates.get(actor.actor_id, 0.0), 1),
        "busy": round(busy.get(actor.actor_id, 0.0), 3), "queue": said.in_flight,
    }  # fmt: skip


def _router(actor: Actor) -> dict[str, Any]:
    said = actor.latest if isinstance(actor.latest, RouterReport) else RouterReport(actor.actor_id, "")
    return {"running": said.running, "kv_usage": round(said.kv_usage, 4), "queue": said.waiting}


def _state(actor: Actor, hosted: int, loading: bool) -> str:
    if actor.phase is Phase.LEAVING:
        return "draining"
    if actor.phase is Phase.READY and not actor.is_router and not hosted:
        return "loading" if loading else "warm"
    return actor.phase.value

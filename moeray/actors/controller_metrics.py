"""What the controller itself counts, and how the system stands. Owned by the controller's loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import moeray
from moeray.actors.roster import ROUTER, Actor
from moeray.actors.vigil import new_incarnation
from moeray.actors.watch import Loss
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.control.update import kinds_of
from moeray.recorder import Reading, Recorder
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig

CONTROLLER = "controller"
PLANS = ("first", "repair", "scale", "rebalance")
RESULTS = ("done", "rolled_back")
_PLACEMENT = {
    "moeray_placement_epoch": "epoch",
    "moeray_replicas": "replicas",
    "moeray_experts_without_replica": "without_replica",
    "moeray_experts_without_spare": "without_spare",
}
STATES = ("pending", "starting", "ready", "warm", "draining")


class ControllerMetrics:
    """Counters are there at 0 for all that can happen."""

    def __init__(self, config: Config) -> None:
        self._incarnation = new_incarnation()
        self._recorder = Recorder(model_name=config.served_model_name)
        self._groups: dict[str, ExpertGroupConfig | RouterConfig] = {}
        self.configure(config)
        for kind in PLANS:
            for result in RESULTS:
                self._recorder.counter("moeray_plans_total", kind=kind, result=result)
        self._mapped = self._recorder.counter("moeray_migrations_total", change="mapped")
        self._dropped = self._recorder.counter("moeray_migrations_total", change="dropped")

    def configure(self, config: Config) -> None:
        """Go by a newer config. A group that it has no more may still have actors that leave."""
        for gone in self._groups.keys() - kinds_of(config).keys():
            self._recorder.gauge("moeray_actors_desired", group=gone).set(0)
            for bound in ("min", "max"):
                self._recorder.gauge("moeray_actors_limit", group=gone, bound=bound).set(0)
        self._groups |= kinds_of(config)
        for group in kinds_of(config):
            self.lived(group, 0.0)
            for direction in ("up", "down"):
                self._recorder.counter("moeray_decisions_total", group=group, direction=direction)
            for reason in Loss:
                self._losses(group, reason)
        self._say_what_holds(config)

    def _say_what_holds(self, config: Config) -> None:
        self._recorder.gauge("moeray_info", version=moeray.__version__, system=config.serve.name).set(1)
        control = config.control
        objectives = {"ttft": control.slo_ttft_s, "tpot": control.slo_tpot_s, "queue_wait": control.slo_queue_wait_s}
        for name, seconds in objectives.items():
            if seconds is None:
                self._recorder.forget_gauge("moeray_slo_objective_seconds", objective=name)
            else:
                self._recorder.gauge("moeray_slo_objective_seconds", objective=name).set(seconds)
        self._recorder.gauge("moeray_slo_attainment_objective_ratio").set(control.slo_attainment)
        for group, kind in kinds_of(config).items():
            for bound, count in zip(("min", "max"), kind.actors_span, strict=True):
                self._recorder.gauge("moeray_actors_limit", group=group, bound=bound).set(count)

    # -- what happens ---------------------------------------------------------------------------------------------

    def lived(self, group: str, seconds: float) -> None:
        """Actors of the group have lived for so long, all added up."""
        self._recorder.counter("moeray_actor_seconds_total", group=group).add(seconds)
        cost = self._groups[group].price_per_hour * seconds / 3600
        self._recorder.counter("moeray_actor_cost_total", group=group).add(cost)

    def lost(self, group: str, reason: Loss) -> None:
        self._losses(group, reason).add()

    def _losses(self, group: str, reason: Loss) -> Any:
        return self._recorder.counter("moeray_actor_losses_total", kind=_kind(group), group=group, reason=reason.value)

    def decided(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """The numbers that are wanted were these, and are others now."""
        for group, count in after.items():
            if count != before.get(group, 0):
                direction = "up" if count > before.get(group, 0) else "down"
                self._recorder.counter("moeray_decisions_total", group=group, direction=direction).add()

    def planned(self, kind: str, result: str) -> None:
        """A change of the placement has ended."""
        self._recorder.counter("moeray_plans_total", kind=kind, result=result).add()

    def mapped(self, replicas: int) -> None:
        """An actor has mapped so many experts."""
        self._mapped.add(replicas)

    def dropped(self, replicas: int) -> None:
        self._dropped.add(replicas)

    # -- how it stands --------------------------------------------------------------------------------------------

    def stand(self, standing: Mapping[str, Any], actors: Iterable[Actor], hosting: Iterable[str]) -> None:
        """`standing` as the controller tells it; `hosting`: the actors that the placement names."""
        for group, count in standing["wanted"].items():
            self._recorder.gauge("moeray_actors_desired", group=group).set(count)
        for layer, ratio in standing["skew"].items():
            self._recorder.gauge("moeray_layer_skew_ratio", layer=layer).set(ratio)
        self._recorder.gauge("moeray_autoscaling_enabled").set(standing["autoscaling"])
        if standing["epoch"]:  # before there is a placement, no expert has a spare or lacks one
            for name, key in _PLACEMENT.items():
                self._recorder.gauge(name).set(standing[key])
        self._count_states(actors, frozenset(hosting))

    def _count_states(self, actors: Iterable[Actor], hosting: frozenset[str]) -> None:
        counts = {(group, state): 0 for group in self._groups for state in STATES}
        now = time.monotonic()
        for actor in actors:
            counts[actor.group, _state(actor, hosting, now)] += 1
        for (group, state), count in counts.items():
            self._recorder.gauge("moeray_actors", kind=_kind(group), group=group, state=state).set(count)

    def reading(self) -> Reading:
        return Reading(CONTROLLER, self._incarnation, *self._recorder.read())


def _kind(group: str) -> str:
    return "router" if group == ROUTER else "expert"


def _state(actor: Actor, hosting: frozenset[str], now: float) -> str:
    if actor.phase is Phase.STARTING:
        return "pending" if actor.is_pending(now) else "starting"
    if actor.phase is Phase.LEAVING:
        return "draining"
    return "ready" if actor.is_router or actor.actor_id in hosting else "warm"

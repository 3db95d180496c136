"""Keeps the system as it is wanted: hears of its actors, decides, and has the fleet and the placement follow.

Owned by the controller's loop, on whose thread everything here runs.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from moeray.actors.accounts import Accounts
from moeray.actors.adoption import Found
from moeray.actors.audit import Audit
from moeray.actors.autoscaler import Autoscaler, summary, wish_tree
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.fleet_keeper import FleetKeeper
from moeray.actors.handover import Handover
from moeray.actors.hosting import Cluster
from moeray.actors.loop import Loop
from moeray.actors.opening import Model
from moeray.actors.orders import Orders
from moeray.actors.placement_keeper import PlacementKeeper
from moeray.actors.readiness import Readiness
from moeray.actors.roster import Actor, Roster
from moeray.actors.spec import DatedConfig, SystemInfo
from moeray.actors.standing import standing
from moeray.actors.watch import Loss
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.control.reports import Report, RouterReport
from moeray.control.update import check_change
from moeray.errors import ActorLostError, MoerayError
from moeray.recorder import Reading

log = logging.getLogger(__name__)

EARLY_LOSSES = 3
"""So many actors may die before the system is up; one more, and the start is given up."""
HEAL_REPORTS = 3
"""A router that reports rows without a taker so often in a row, while nothing is being changed, is helped."""


class SystemKeeper:
    """Implements `FleetEvents`. Made when the model has been opened; nothing happens before `begin`."""

    def __init__(
        self, dated: DatedConfig, cluster: Cluster, loop: Loop, roster: Roster, audit: Audit, autoscaler: Autoscaler,
        metrics: ControllerMetrics, readiness: Readiness, model: Model, token: bytes, system: str, found: Found | None,
        orders: Orders | None,
    ) -> None:  # fmt: skip
        """`found`: what an earlier controller has left running, and `orders` what was wanted of it at last, of which
        there may be one without the other."""
        config = dated.config
        self.dated = dated
        self.roster = roster
        self.audit = audit
        self.autoscaler = autoscaler
        self.metrics = metrics
        self._loop = loop
        self._readiness = readiness
        self._model = model
        self._token = token
        self._system = system
        self._found = found
        self._orders = orders
        self.fleet = FleetKeeper(dated, cluster, loop, roster, audit, self, token, system, model.revision)
        self.places = PlacementKeeper(
            config, roster, audit, model.shape, autoscaler, autoscaler.wanted, readiness.fail, metrics
        )
        self.accounts = Accounts(config.metrics, roster, metrics, model.shape.experts, found.books if found else None)
        self._begun = False
        self._next_decision = 0.0
        self._next_look = 0.0
        self._orphaned: dict[str, int] = {}
        self._early_losses = 0
        self.handover = Handover(cluster, roster, orders)

    @property
    def config(self) -> Config:
        return self.dated.config

    def begin(self) -> None:
        """Take over what was found; from now on it is kept."""
        if self._orders is not None:
            self.roster.count_from(self._orders.numbers)
        if self._found is not None:
            self._found.enter(self.roster, self._loop, self.fleet, self.places)
            self._follow_orders()
            self._readiness.take_over()
        self._begun = True

    def _follow_orders(self) -> None:
        """Go on from what was wanted at last: at once where a system runs. One of which nothing is left comes up as its
        config says before, since there may be no room any more for all that it was scaled to."""
        orders, self._orders = self._orders, None
        self.autoscaler.adopt(self.places.placement, orders)
        for actor_id, by in (orders.leaving if orders is not None else {}).items():
            if self.roster.get(actor_id) is not None:
                self.fleet.departures.tell([actor_id], None if by is None else by - time.time())

    # -- what the fleet tells -------------------------------------------------------------------------------------

    def on_ready(self, actor: Actor) -> None:
        assert self._begun
        if actor.is_router:
            self.places.welcome(actor)
        self.replan()
        self._look_ready()

    def on_lost(self, actor: Actor, why: Loss, detail: str) -> None:
        self.metrics.lost(actor.group, why)
        self._note_early_loss(actor, detail)
        if not self._begun:
            return
        self._forget(actor)
        self.places.on_lost(actor)
        self._reconcile()
        self._look_ready()

    def _note_early_loss(self, actor: Actor, detail: str) -> None:
        if not self._readiness.decided:
            self._early_losses += 1
            if self._early_losses > EARLY_LOSSES:
                self._readiness.fail(MoerayError(f"{actor.actor_id} died while the system started: {detail}"))

    def on_reading(self, actor: Actor, reading: Reading) -> None:
        self.accounts.take(reading)

    def on_left(self, actor: Actor) -> None:
        assert self._begun
        self._forget(actor)
        self.places.on_left(actor)
        self._look_ready()

    def _forget(self, actor: Actor) -> None:
        self.autoscaler.forget(actor.actor_id)
        self._orphaned.pop(actor.actor_id, None)

    def on_start_failed(self, actor: Actor, error: Exception) -> None:
        if isinstance(error, ActorLostError):
            self._note_early_loss(actor, str(error))
            return
        known = error if isinstance(error, MoerayError) else MoerayError(f"{actor.actor_id} did not start: {error}")
        self._readiness.fail(known)

    def on_report(self, actor: Actor, report: Report) -> None:
        self.autoscaler.fold(report)
        self.accounts.report(report)
        if isinstance(report, RouterReport) and self._begun:
            orphaned = self._orphaned.get(actor.actor_id, 0) + 1 if report.orphans else 0
            self._orphaned[actor.actor_id] = orphaned
            if orphaned >= HEAL_REPORTS:
                self._orphaned[actor.actor_id] = 0
                self.places.heal()

    # -- what it does by itself -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look at everything once more; to be called again and again."""
        if not self._begun:
            return
        now, control = time.monotonic(), self.config.control
        self.accounts.tick(now)
        if now >= self._next_look:
            self._next_look = now + control.report_s
            self.fleet.departures.look_at_nodes()
        if self._readiness.decided and now >= self._next_decision:
            self._next_decision = now + control.interval_s
            self._decide()
        for router in self.places.late_routers():
            self.fleet.lose(
                router, Loss.UNACKNOWLEDGED, f"it did not acknowledge a placement within {control.lease_s:g} s"
            )
        self.places.look_at_mapping()
        self.follow()
        self._reconcile(refill=self.places.change is None)
        for actor in self.places.emptied():
            self.fleet.departures.retire(actor)
        self._look_ready()
        self.hand_orders()

    def hand_orders(self) -> None:
        """Have what is wanted kept for the next controller; see `Handover.kept`."""
        if self._orders is None:  # else they are followed first, and kept as they are until then
            self.handover.hand(self.autoscaler.wish, self.autoscaler.paused, self.fleet.departures.told())

    def _decide(self) -> None:
        before = self.autoscaler.wanted()
        decision = self.autoscaler.decide(self.places.placement)
        if decision is not None:
            wish, seen = decision
            self.metrics.decided(before, self.autoscaler.wanted())
            self.audit.write("decision", **wish_tree(wish), inputs=summary(seen))

    def follow(self) -> None:
        """Have the fleet and the placement follow what is wanted."""
        self._reconcile()
        self.replan()

    def _reconcile(self, refill: bool = False) -> None:
        """Bring the numbers that are wanted to those who make them true. The reserve is filled up (`refill`) when
        nothing more urgent is under way, since the start of a process competes with it."""
        self.fleet.wanted = self.autoscaler.wanted()
        self.places.replicas = self.autoscaler.wish.replicas
        self.fleet.reconcile(self.places.placement, refill=refill)

    def replan(self, force: bool = False) -> None:
        """Change the placement where that is needed; `force`: where it is better in any degree."""
        if self.places.placement.replicas or self._all_ready():
            self.places.replan(force)

    def _all_ready(self) -> bool:
        """The first placement waits for the whole first set of expert actors."""
        ready: dict[str, int] = {}
        for actor in self.roster.experts(Phase.READY):
            ready[actor.group] = ready.get(actor.group, 0) + 1
        return all(ready.get(name, 0) >= count for name, count in self.autoscaler.wish.actors.items())

    def _look_ready(self) -> None:
        """Who serves may have changed: say so to those who ask, and end the start when all is there."""
        if not self._begun or not self.places.placement.replicas:
            return
        info = self._readiness.info
        routers = self._open_routers()
        if info is None and (not routers or self.places.change is not None):
            return
        addresses = tuple(router.address for router in routers if router.address)
        if info is None or info.routers != addresses:
            facts = [router.facts for router in routers] or [_facts(info)]
            self._readiness.info = SystemInfo(
                self.config.model, self._model.revision, self._token, self._system, addresses,
                min(f["max_context"] for f in facts), facts[0]["vocab_size"], self._model.eos_token_ids,
            )  # fmt: skip
        self._readiness.succeed()
        if self._orders is not None:
            self._follow_orders()
            self.audit.write("restored", actors=self.autoscaler.wanted(), paused=self.autoscaler.paused)

    def _open_routers(self) -> list[Actor]:
        """Those that take requests: where all are about to leave, they do until another one is there."""
        leaving = self.roster.routers(Phase.LEAVING)
        return self.roster.serving_routers() or [r for r in leaving if r.epoch >= 1 and r.address and not r.draining]

    def standing(self) -> dict[str, Any]:
        """How the system stands, as plain data."""
        return standing(self.config, self.roster, self.autoscaler, self.places, self.audit)

    # -- another config -------------------------------------------------------------------------------------------

    def configure(self, dated: DatedConfig) -> bool:
        """See `Controller.configure`."""
        if dated.since <= self.dated.since:  # another endpoint was faster
            return False
        update = check_change(self.config, dated.config, self._token)
        if not update.changed:  # an endpoint was started by the same config
            self.dated = DatedConfig(self.config, dated.since)
            return False
        self._take(dated.public())
        self.audit.write("config", changed=update.changed, renewed=update.renewed)
        self.follow()
        return True

    def _take(self, dated: DatedConfig) -> None:
        self.autoscaler.configure(dated.config)  # may refuse it: first
        self.dated = dated
        self.metrics.configure(dated.config)
        self.fleet.configure(dated)
        self.places.configure(dated.config)


def _facts(info: SystemInfo | None) -> dict[str, Any]:
    """Of a router, while there is none: those of the ones before."""
    assert info is not None
    return {"max_context": info.max_context, "vocab_size": info.vocab_size}

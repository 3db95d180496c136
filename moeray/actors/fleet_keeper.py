"""Keeps as many actors as are wanted. Owned by the controller's loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from moeray.actors.audit import Audit
from moeray.actors.departures import Departures
from moeray.actors.hosting import Cluster
from moeray.actors.launcher import Launcher
from moeray.actors.loop import Loop, started_pool
from moeray.actors.roster import ROUTER, Actor, Roster
from moeray.actors.spec import DatedConfig
from moeray.actors.watch import Loss
from moeray.actors.watchers import Watchers
from moeray.control.fleet import Phase, fleet_steps, reserve_of, to_reserve
from moeray.control.placement import Placement
from moeray.control.reports import Report
from moeray.control.update import compare
from moeray.recorder import Reading
from moeray.settings.experts import ExpertGroupConfig

log = logging.getLogger(__name__)


class FleetEvents(Protocol):
    """What the keeper tells the one who holds the placement."""

    def on_ready(self, actor: Actor) -> None: ...

    def on_lost(self, actor: Actor, why: Loss, detail: str) -> None: ...

    def on_reading(self, actor: Actor, reading: Reading) -> None: ...

    def on_left(self, actor: Actor) -> None: ...

    def on_report(self, actor: Actor, report: Report) -> None: ...

    def on_start_failed(self, actor: Actor, error: Exception) -> None: ...


class FleetKeeper:
    """`wanted`: actors of each group, routers included, those in reserve not; `reserve`: the warm pool, by group.

    Implements `StartEvents` and `LeaveEvents`: it alone takes actors into the roster and out of it.
    """

    def __init__(
        self, dated: DatedConfig, cluster: Cluster, loop: Loop, roster: Roster, audit: Audit, events: FleetEvents,
        token: bytes, system: str, revision: str | None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        config = dated.config
        self._dated = dated
        self._roster = roster
        self._audit = audit
        self._events = events
        self._clock = clock
        self._kinds: dict[str, ExpertGroupConfig] = {group.name: group for group in config.experts.resolved()}
        self.wanted: dict[str, int] = {name: group.actors for name, group in self._kinds.items()}
        self.wanted[ROUTER] = config.router.actors
        self.reserve = reserve_of(config)
        # Whatever asks Ray's head, which may be away for a while: never on the loop.
        self._pool = started_pool(4, "controller-launch")
        self._launcher = Launcher(cluster, loop, roster, self._pool, self, token, system, revision, clock)
        self.watchers = Watchers(config, loop, roster, cluster.node_id, token, system, events.on_report, self.lose)
        self.departures = Departures(config.control, cluster, loop, roster, audit, self._pool, self, clock)

    def configure(self, dated: DatedConfig) -> None:
        """Hold a newer config: every actor hears of it, and those started with what it no longer says are replaced."""
        self._dated = dated
        self._kinds = {group.name: group for group in dated.config.experts.resolved()}
        self.reserve = reserve_of(dated.config)
        self._launcher.forgive()
        self.watchers.configure(dated.config)
        self.departures.control = dated.config.control
        for actor in self._roster:
            if actor.kind is not None:
                actor.kind = self._kinds.get(actor.group, actor.kind)
            actor.outdated = actor.group in compare(actor.started, dated.config).renewed
            self._tell_config(actor)

    def _tell_config(self, actor: Actor) -> None:
        """For what an actor reads in it, and for a controller that comes after this one."""
        if actor.calls is not None and actor.report is not None:
            actor.calls.tell("configure", self._dated.config, self._dated.since)

    # -- towards the wish -----------------------------------------------------------------------------------------

    def reconcile(self, placement: Placement, *, refill: bool) -> None:
        """Start, give up and empty actors, as the difference of wish and fact asks.

        `refill` false: the reserve is not filled up for now.
        """
        now = self._clock()
        doomed = self.departures.doomed(now)
        members = self._roster.members(placement)
        reserve = to_reserve(members, self.wanted, self.reserve, starved=self._is_starved(now))
        total = {group: count + reserve.get(group, 0) for group, count in self.wanted.items()}
        steps = fleet_steps(members, total, doomed)
        for group in steps.start if refill else fleet_steps(members, self.wanted, doomed).start:
            if self._launcher.may_start(group):
                self._start(group)
        for actor_id in steps.cancel:
            self._discard(actor_id, "its start is no longer wanted")
        for actor_id in steps.leave:
            self.departures.leave(self._roster[actor_id], doomed.get(actor_id))
        for actor_id in steps.stay:
            self.departures.stay(self._roster[actor_id])
        self._launcher.give_up_overdue(self._dated.config.control.start_s)
        self.departures.hasten(doomed)
        self.departures.drain_routers()
        self.departures.end_overdue()

    def _is_starved(self, now: float) -> bool:
        """No router is to stay but those for which there is no room, which the warm pool has."""
        routers = self._roster.routers(Phase.STARTING, Phase.READY)
        return bool(routers) and all(actor.is_pending(now) for actor in routers)

    def _start(self, group: str) -> None:
        able = sum(a.group == group and a.phase is Phase.READY for a in self._roster)
        actor = self._roster.new(self._kinds.get(group), self._dated.config, self._clock())
        self._audit.write("start", actor=actor.actor_id, wanted=self.wanted[group], reserve=self.reserve.get(group, 0))
        self._launcher.start(actor, self._dated, background=able >= self.wanted[group])

    # -- what becomes of the actors -------------------------------------------------------------------------------

    def on_listening(self, actor: Actor) -> None:
        self.watchers.watch(actor)
        if actor.started is not self._dated.config:  # it is new, and there is a newer config already
            self._tell_config(actor)

    def on_loaded(self, actor: Actor) -> None:
        self._audit.write("ready", actor=actor.actor_id, node=actor.node_id)
        self._events.on_ready(actor)

    def on_failed(self, actor: Actor, error: Exception, retry_s: float) -> None:
        self._audit.write("start_failed", actor=actor.actor_id, error=str(error), retry_s=retry_s)
        self._discard(actor.actor_id, f"it did not start: {error}")
        self._events.on_start_failed(actor, error)

    def lose(self, actor: Actor, why: Loss, detail: str) -> None:
        """The actor is gone or must be: forget it, end what may be left of it, tell the one who holds the placement."""
        if self._roster.get(actor.actor_id) is not actor:
            return
        if actor.stopping:
            self.departures.say_nothing_more(actor)
            return
        log.warning("actor %s is lost: %s", actor.actor_id, detail)
        self._audit.write("lost", actor=actor.actor_id, reason=detail, node=actor.node_id)
        self._discard(actor.actor_id, detail)
        self._events.on_lost(actor, why, detail)

    def on_reading(self, actor: Actor, reading: Reading) -> None:
        self._events.on_reading(actor, reading)

    def on_stopped(self, actor: Actor) -> None:
        self._discard(actor.actor_id, "it has left")
        self._events.on_left(actor)

    def _discard(self, actor_id: str, why: str) -> None:
        actor = self._roster.remove(actor_id)
        if actor is None:
            return
        log.info("actor %s is given up: %s", actor_id, why)
        self.departures.forget(actor)
        self.watchers.forget(actor)
        if actor.handle:
            self._launcher.kill(actor.handle)

    def close(self) -> None:
        """Wait for starts and kills under way, and for the watchers. Called when the loop has ended."""
        self.watchers.close()
        self._pool.shutdown(wait=True)
        self._launcher.close()

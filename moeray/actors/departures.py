"""How actors go: who must whatever is wanted, and how each is drained and stopped. Owned by the controller's loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from moeray.actors.audit import Audit
from moeray.actors.hosting import Cluster
from moeray.actors.loop import Loop
from moeray.actors.roster import Actor, Calls, Roster
from moeray.control.fleet import Phase
from moeray.errors import MoerayError
from moeray.recorder import Reading
from moeray.settings.control import ControlConfig

log = logging.getLogger(__name__)

STOP_S = 10.0
"""An actor that has closed its channels has so long to put away the rest."""
MIGRATE_S = 3.0
"""A router that must go by a deadline hands its requests over so long before it."""


def check_known(actor_ids: Sequence[str], known: Sequence[str]) -> None:
    """Raises MoerayError where a name is not among those known."""
    for actor_id in actor_ids:
        if actor_id not in known:
            raise MoerayError(f"there is no actor {actor_id!r}; the actors are {', '.join(sorted(known))}")


class LeaveEvents(Protocol):
    """What comes of an actor that goes: all that it has counted, and its end."""

    def on_reading(self, actor: Actor, reading: Reading) -> None: ...

    def on_stopped(self, actor: Actor) -> None: ...


class Departures:
    """Knows what was told to leave and which nodes are about to go; `pool` asks Ray's head for those."""

    def __init__(
        self, control: ControlConfig, cluster: Cluster, loop: Loop, roster: Roster, audit: Audit,
        pool: ThreadPoolExecutor, events: LeaveEvents, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.control = control
        self._cluster = cluster
        self._loop = loop
        self._roster = roster
        self._audit = audit
        self._pool = pool
        self._events = events
        self._clock = clock
        self._told: dict[str, float | None] = {}
        self._node_deadlines: Mapping[str, float] = {}
        self._asking_nodes = False

    # -- who ------------------------------------------------------------------------------------------------------

    def tell(self, actor_ids: Sequence[str], within_s: float | None, nodes: Collection[str] = ()) -> list[str]:
        """Empty and stop these actors, and whoever runs on these nodes; others are started for them. Returns who was
        told. Raises MoerayError, and tells none, where a name is not here."""
        check_known(actor_ids, [actor.actor_id for actor in self._roster])
        there = (actor.actor_id for actor in self._roster if actor.node_id in nodes)
        told = list(dict.fromkeys([*actor_ids, *there]))
        self._told |= dict.fromkeys(told, None if within_s is None else self._clock() + within_s)
        return told

    def forget(self, actor: Actor) -> None:
        """The actor has left the roster."""
        self._told.pop(actor.actor_id, None)

    def told(self) -> dict[str, float | None]:
        """Who was told to leave and is still there, and by when in unix seconds."""
        ahead = time.time() - self._clock()
        return {name: None if by is None else round(by + ahead, 1) for name, by in self._told.items()}

    def doomed(self, now: float) -> dict[str, float | None]:
        """Actors that must go whatever is wanted, and by when on the loop's clock."""
        doomed = dict(self._told)
        for actor in self._roster:
            if actor.leaving:
                doomed[actor.actor_id] = _sooner(doomed.get(actor.actor_id), now + self.control.drain_s)
            if actor.node_id in self._node_deadlines:
                by = now + self._node_deadlines[actor.node_id]
                doomed[actor.actor_id] = _sooner(doomed.get(actor.actor_id), by)
        return doomed

    def look_at_nodes(self) -> None:
        """Ask the cluster, off the loop, which nodes are about to go."""
        if not self._asking_nodes:
            self._asking_nodes = True
            self._loop.when_done(self._pool.submit(self._cluster.draining), self._on_nodes)

    def _on_nodes(self, nodes: Mapping[str, float] | None, error: Exception | None) -> None:
        self._asking_nodes = False
        if error is not None or nodes is None:
            log.debug("the cluster does not say which nodes drain: %s", error)
            return
        for node in nodes.keys() - self._node_deadlines.keys():
            self._audit.write("node_draining", node=node, seconds_left=_rounded(nodes[node]))
        self._node_deadlines = nodes

    # -- how ------------------------------------------------------------------------------------------------------

    def leave(self, actor: Actor, by: float | None) -> None:
        """From now on the actor is to be emptied."""
        actor.phase, actor.leave_by = Phase.LEAVING, by
        self._audit.write("leave", actor=actor.actor_id, within_s=None if by is None else _rounded(by - self._clock()))

    def hasten(self, doomed: Mapping[str, float | None]) -> None:
        """Those that leave already may have to be gone sooner than was said."""
        for actor in self._roster:
            if actor.phase is Phase.LEAVING and (by := doomed.get(actor.actor_id)) is not None:
                actor.leave_by = _sooner(actor.leave_by, by)

    def stay(self, actor: Actor) -> None:
        """It is wanted again, and nothing has been taken from it yet that it does not get back."""
        actor.phase, actor.leave_by = Phase.READY, None
        self._audit.write("stay", actor=actor.actor_id)

    def retire(self, actor: Actor) -> None:
        """An expert actor that no router names any more: let it finish what it has, then stop it."""
        drain_s = self._drain_time(actor)
        self._finish(actor, drain_s, drain_s)

    def drain_routers(self) -> None:
        """Those that leave, once another router serves or none can come in time."""
        now = self._clock()
        for actor in self._roster.routers(Phase.LEAVING):
            last_call = actor.leave_by is not None and now >= actor.leave_by - MIGRATE_S
            if self._roster.serving_routers() or last_call:
                drain_s = self._drain_time(actor)
                self._finish(actor, drain_s, max(0.0, drain_s - MIGRATE_S), False)

    def _drain_time(self, actor: Actor) -> float:
        left = math.inf if actor.leave_by is None else max(0.0, actor.leave_by - self._clock())
        return min(self.control.drain_s, left)

    def _finish(self, actor: Actor, drain_s: float, *how: Any) -> None:
        """Have the actor drain, for which it has `drain_s`, tell what it has counted, and stop."""
        if actor.draining or actor.calls is None or actor.handle is None:
            return
        actor.draining = True
        actor.gone_by = self._clock() + drain_s + STOP_S
        # A router that drains computes on, and hears of placements meanwhile: they do not wait behind its drain.
        calls = Calls(actor.handle, self._loop) if actor.is_router else actor.calls

        def drained(done: Any, error: Exception | None) -> None:
            if error is not None or not done:
                log.warning("actor %s leaves with work in flight: %s", actor.actor_id, error or "it took too long")
            calls.put("metrics", then=read)  # nothing more will happen to it: this is all that it has counted
            calls.put("stop", then=lambda _, error: self.gone(actor))

        def read(reading: Reading | None, error: Exception | None) -> None:
            actor.stopping = True
            if reading is not None and self._roster.get(actor.actor_id) is actor:
                self._events.on_reading(actor, reading)

        calls.put("drain", *how, then=drained)

    def say_nothing_more(self, actor: Actor) -> None:
        """One that is `stopping` has closed its channel, or hangs: it is ended if it does not end by itself."""
        actor.gone_by = _sooner(actor.gone_by, self._clock() + STOP_S)

    def end_overdue(self) -> None:
        """Those that were to have ended by now, whatever call to them is not answered."""
        now = self._clock()
        for actor in list(self._roster):
            if actor.gone_by is not None and now >= actor.gone_by:
                self.gone(actor)

    def gone(self, actor: Actor) -> None:
        """It has stopped, or is to be taken for it."""
        if self._roster.get(actor.actor_id) is actor:
            self._audit.write("stopped", actor=actor.actor_id)
            self._events.on_stopped(actor)


def _sooner(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)


def _rounded(seconds: float) -> float | None:
    """As the audit log has it; None for no end, since JSON knows no infinity."""
    return round(seconds, 1) if math.isfinite(seconds) else None

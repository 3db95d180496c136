"""Keeps as many actors as are wanted: starts, watches, empties and stops them. Owned by the controller's loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moeray.actors.audit import Audit
from moeray.actors.hosting import ActorHandle, Cluster
from moeray.actors.loop import Loop
from moeray.actors.roster import ROUTER, Actor, Calls, Roster
from moeray.actors.spec import ActorReport, ActorSpec, DatedConfig
from moeray.actors.watch import Loss, Watcher
from moeray.config import Config
from moeray.control.fleet import Phase, fleet_steps, to_reserve
from moeray.control.placement import Placement
from moeray.control.reports import Report, RouterReport
from moeray.control.update import compare
from moeray.errors import MoerayError
from moeray.recorder import Reading
from moeray.settings.experts import ExpertGroupConfig
from moeray.types import Address
from moeray.wire.channel import connect

log = logging.getLogger(__name__)

START_RETRY_S = (1.0, 60.0)
"""A group whose actors do not start is tried again after the first pause, doubled each time up to the second."""
ROOM_S = 10.0
"""A router that has no process after so long waits for room, which the warm pool has."""
MIGRATE_S = 3.0
"""A router that must go by a deadline hands its requests over so long before it."""


class FleetEvents(Protocol):
    """What the keeper tells the one who holds the placement."""

    def on_ready(self, actor: Actor) -> None: ...

    def on_lost(self, actor: Actor, why: Loss, detail: str) -> None: ...

    def on_reading(self, actor: Actor, reading: Reading) -> None: ...

    def on_left(self, actor: Actor) -> None: ...

    def on_report(self, actor: Actor, report: Report) -> None: ...

    def on_start_failed(self, actor: Actor, error: Exception) -> None: ...


@dataclass
class _Backoff:
    pause_s: float = 0.0
    until: float = 0.0


class FleetKeeper:
    """`wanted`: actors of each group, routers included, those in reserve not; `reserve`: the warm pool, by group."""

    def __init__(
        self, dated: DatedConfig, cluster: Cluster, loop: Loop, roster: Roster, audit: Audit, events: FleetEvents,
        token: bytes, system: str, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        config = dated.config
        self._config = config
        self._since = dated.since
        self._cluster = cluster
        self._loop = loop
        self._roster = roster
        self._audit = audit
        self._events = events
        self._token = token
        self._system = system
        self._clock = clock
        self._kinds: dict[str, ExpertGroupConfig] = {group.name: group for group in config.experts.resolved()}
        self.wanted: dict[str, int] = {name: group.actors for name, group in self._kinds.items()}
        self.wanted[ROUTER] = config.router.actors
        self.reserve = reserve_of(config)
        self.revision: str | None = config.revision
        self._told_to_leave: dict[str, float | None] = {}
        self._node_deadlines: Mapping[str, float] = {}
        self._asking_nodes = False
        self._roomless_since = math.inf
        self._backoff: dict[str, _Backoff] = {}
        self._suspects: set[str] = set()
        self._launching: dict[str, Future[ActorHandle]] = {}
        # Starting and killing ask Ray's head, which may be away for a while: never on the loop.
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="controller-launch")

    def configure(self, dated: DatedConfig) -> None:
        """Hold a newer config: every actor hears of it, and those started with what it no longer says are replaced."""
        self._config, self._since = dated.config, dated.since
        self._kinds = {group.name: group for group in dated.config.experts.resolved()}
        self.reserve = reserve_of(dated.config)
        self._backoff.clear()
        for actor in self._roster:
            self._fit(actor)
            if actor.watcher:
                actor.watcher.settings = dated.config.control
            self._tell_config(actor)

    def _fit(self, actor: Actor) -> None:
        if actor.kind is not None:
            actor.kind = self._kinds.get(actor.group, actor.kind)
        actor.outdated = actor.group in compare(actor.started, self._config).renewed

    def _tell_config(self, actor: Actor) -> None:
        """For what an actor reads in it, and for a controller that comes after this one."""
        if actor.calls is not None and actor.report is not None:
            then = _log_error(actor.actor_id, "configure")
            actor.calls.put("configure", self._config, self._since, then=then)

    # -- towards the wish -----------------------------------------------------------------------------------------

    def reconcile(self, placement: Placement, *, refill: bool) -> None:
        """Start, give up and empty actors, as the difference of wish and fact asks.

        `refill` false: the reserve is not filled up for now.
        """
        now = self._clock()
        doomed = self._doomed(now)
        members = self._roster.members(placement)
        reserve = to_reserve(members, self.wanted, self.reserve, starved=self._is_starved(now))
        total = {group: count + reserve.get(group, 0) for group, count in self.wanted.items()}
        steps = fleet_steps(members, total, doomed)
        for group in steps.start if refill else fleet_steps(members, self.wanted, doomed).start:
            if now >= self._backoff.setdefault(group, _Backoff()).until:
                self._start(group)
        for actor_id in steps.cancel:
            self._discard(actor_id, "its start is no longer wanted")
        for actor_id in steps.leave:
            self._leave(actor_id, doomed.get(actor_id))
        for actor in self._roster.routers(Phase.LEAVING):
            self._drain_router(actor, now)

    def _is_starved(self, now: float) -> bool:
        """No router serves, and none that is to start has had a process for so long: there is no room for it."""
        routers = self._roster.routers(Phase.STARTING, Phase.READY)
        if not routers or any(actor.report for actor in routers):
            self._roomless_since = math.inf
        else:
            self._roomless_since = min(self._roomless_since, now)
        return now - self._roomless_since >= ROOM_S

    def _doomed(self, now: float) -> dict[str, float | None]:
        """Actors that must go whatever is wanted, and by when."""
        doomed = {
            a.actor_id: self._told_to_leave[a.actor_id] for a in self._roster if a.actor_id in self._told_to_leave
        }
        for actor in self._roster:
            if actor.leaving:
                doomed.setdefault(actor.actor_id, now + self._config.control.drain_s)
            if actor.node_id in self._node_deadlines:
                doomed[actor.actor_id] = now + self._node_deadlines[actor.node_id]
        return doomed

    def tell_to_leave(self, actor_id: str, within_s: float | None) -> None:
        """Empty and stop this actor; another is started for it. Raises MoerayError for a name that is not here."""
        if self._roster.get(actor_id) is None:
            known = ", ".join(sorted(a.actor_id for a in self._roster))
            raise MoerayError(f"there is no actor {actor_id!r}; the actors are {known}")
        self._told_to_leave[actor_id] = None if within_s is None else self._clock() + within_s

    def leaving_by(self) -> dict[str, float | None]:
        """Who was told so and is still there, and by when in unix seconds."""
        ahead = time.time() - self._clock()
        told = {a.actor_id: self._told_to_leave[a.actor_id] for a in self._roster if a.actor_id in self._told_to_leave}
        return {name: None if by is None else round(by + ahead, 1) for name, by in told.items()}

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

    # -- starting -------------------------------------------------------------------------------------------------

    def _start(self, group: str) -> None:
        kind = self._kinds.get(group)
        actor = self._roster.new(kind, self._config)
        device, threads = (
            (kind.device, kind.threads) if kind else (self._config.router.device, self._config.router.threads)
        )
        spec = ActorSpec(
            actor.actor_id, group, device, threads, self._config, self._token, self._system,
            not self._short(group), self._since,
        )  # fmt: skip
        self._audit.write("start", actor=actor.actor_id, wanted=self.wanted[group], reserve=self.reserve.get(group, 0))
        future: Future[ActorHandle]
        if kind:
            future = self._pool.submit(self._cluster.start_expert, spec, kind)
        else:
            future = self._pool.submit(self._cluster.start_router, spec, self._config.router)
        self._launching[actor.actor_id] = future
        self._loop.when_done(future, lambda handle, error: self._on_handle(actor, handle, error))

    def _short(self, group: str) -> bool:
        """Fewer actors of the group can work than are wanted: the one that starts is waited for."""
        return sum(a.group == group and a.phase is Phase.READY for a in self._roster) < self.wanted[group]

    def _on_handle(self, actor: Actor, handle: ActorHandle | None, error: Exception | None) -> None:
        self._launching.pop(actor.actor_id, None)
        if handle is None:
            self._failed(actor, error or MoerayError("no actor was made"))
            return
        actor.handle, actor.calls = handle, Calls(handle, self._loop)
        if self._roster.get(actor.actor_id) is not actor:  # given up meanwhile
            self._kill(handle)
            return
        actor.calls.put("start", then=lambda answer, failure: self._on_started(actor, answer, failure))

    def _on_started(self, actor: Actor, answer: tuple[ActorReport, Address] | None, error: Exception | None) -> None:
        if self._roster.get(actor.actor_id) is not actor:
            return
        if answer is None:
            self._failed(actor, error or MoerayError("it did not say where it listens"))
            return
        actor.report, actor.address = answer
        self.watch(actor)
        if actor.started is not self._config:  # it is new, and there is a newer config already
            self._tell_config(actor)
        assert actor.calls is not None
        method = "load_trunk" if actor.is_router else "prepare"
        actor.calls.put(method, self.revision, then=lambda facts, failure: self._on_loaded(actor, facts, failure))

    def _on_loaded(self, actor: Actor, facts: Any, error: Exception | None) -> None:
        if self._roster.get(actor.actor_id) is not actor:
            return
        if error is not None:
            self._failed(actor, error)
            return
        actor.facts = facts or {}
        actor.phase = Phase.READY
        self._backoff.pop(actor.group, None)
        self._audit.write("ready", actor=actor.actor_id, node=actor.node_id)
        self._events.on_ready(actor)

    def _failed(self, actor: Actor, error: Exception) -> None:
        backoff = self._backoff.setdefault(actor.group, _Backoff())
        backoff.pause_s = min(max(2 * backoff.pause_s, START_RETRY_S[0]), START_RETRY_S[1])
        backoff.until = self._clock() + backoff.pause_s
        self._audit.write("start_failed", actor=actor.actor_id, error=str(error), retry_s=backoff.pause_s)
        log.error("actor %s did not start: %s", actor.actor_id, error)
        self._discard(actor.actor_id, f"it did not start: {error}")
        self._events.on_start_failed(actor, error)

    # -- watching -------------------------------------------------------------------------------------------------

    def watch(self, actor: Actor) -> None:
        """Follow the actor's reports over a channel of our own."""
        assert actor.address is not None
        spec = ActorSpec("", actor.group, "cpu", 0, self._config, self._token, self._system)
        identity = replace(spec.identity(self._cluster.node_id), actor_id=f"controller-of-{actor.actor_id}")
        post = self._loop.post
        actor.watcher = Watcher(
            actor.address,
            lambda address: connect(address, identity, self._config.wire, timeout=self._config.control.silence_s),
            self._config.control,
            lambda actor_id, report: post(lambda: self._on_report(actor, report)),
            lambda actor_id, why, detail: post(lambda: self.lose(actor, why, detail)),
        )

    def _on_report(self, actor: Actor, report: Report) -> None:
        if self._roster.get(actor.actor_id) is not actor:
            return
        actor.latest = report
        if actor.actor_id in self._suspects:
            self._suspects.discard(actor.actor_id)
            log.info("actor %s is well after all", actor.actor_id)
            for router in self._roster.routers(Phase.READY, Phase.LEAVING):
                if router.calls:
                    router.calls.put("restore", actor.actor_id, then=_log_error(router.actor_id, "restore"))
        if isinstance(report, RouterReport):
            self._suspect(report)
        self._events.on_report(actor, report)

    def _suspect(self, report: RouterReport) -> None:
        """A router gave an actor up: out of memory ends it, anything else is first asked for."""
        for actor_id, reason in report.lost:
            accused = self._roster.get(actor_id)
            if accused is None:
                continue
            if reason == "out_of_memory":
                self.lose(accused, Loss.OUT_OF_MEMORY, "out of memory")
            elif accused.watcher:
                self._suspects.add(actor_id)
                accused.watcher.probe()

    def lose(self, actor: Actor, why: Loss, detail: str) -> None:
        """The actor is gone or must be: forget it, end what may be left of it, tell the one who holds the placement."""
        if self._roster.get(actor.actor_id) is not actor:
            return
        log.warning("actor %s is lost: %s", actor.actor_id, detail)
        self._audit.write("lost", actor=actor.actor_id, reason=detail, node=actor.node_id)
        self._discard(actor.actor_id, detail)
        self._events.on_lost(actor, why, detail)

    # -- leaving --------------------------------------------------------------------------------------------------

    def _leave(self, actor_id: str, by: float | None) -> None:
        actor = self._roster.get(actor_id)
        assert actor is not None
        actor.phase, actor.leave_by = Phase.LEAVING, by
        self._audit.write("leave", actor=actor_id, within_s=None if by is None else _rounded(by - self._clock()))

    def retire(self, actor: Actor) -> None:
        """An expert actor that no router names any more: let it finish what it has, then stop it."""
        self._finish(actor, "drain", self._drain_time(actor))

    def _drain_router(self, actor: Actor, now: float) -> None:
        """Once another router serves, or none can come in time."""
        if not self._roster.serving_routers() and (actor.leave_by is None or now < actor.leave_by - MIGRATE_S):
            return
        self._finish(actor, "drain", max(0.0, self._drain_time(actor) - MIGRATE_S), False)

    def _drain_time(self, actor: Actor) -> float:
        left = float("inf") if actor.leave_by is None else max(0.0, actor.leave_by - self._clock())
        return min(self._config.control.drain_s, left)

    def _finish(self, actor: Actor, method: str, *args: Any) -> None:
        if actor.draining or actor.calls is None or actor.handle is None:
            return
        actor.draining = True
        # A router that drains computes on, and hears of placements meanwhile: they do not wait behind its drain.
        calls = Calls(actor.handle, self._loop) if actor.is_router else actor.calls

        def stopped(_: Any, error: Exception | None) -> None:
            if self._roster.get(actor.actor_id) is actor:
                self._audit.write("stopped", actor=actor.actor_id)
                self._discard(actor.actor_id, "it has left")
                self._events.on_left(actor)

        def drained(done: Any, error: Exception | None) -> None:
            if error is not None or not done:
                log.warning("actor %s leaves with work in flight: %s", actor.actor_id, error or "it took too long")
            if actor.watcher:
                actor.watcher.close()
            calls.put("metrics", then=read)  # nothing more will happen to it: this is all that it has counted
            calls.put("stop", then=stopped)

        def read(reading: Reading | None, error: Exception | None) -> None:
            if reading is not None and self._roster.get(actor.actor_id) is actor:
                self._events.on_reading(actor, reading)

        calls.put(method, *args, then=drained)

    def _discard(self, actor_id: str, why: str) -> None:
        actor = self._roster.remove(actor_id)
        self._told_to_leave.pop(actor_id, None)
        self._suspects.discard(actor_id)
        if actor is None:
            return
        log.info("actor %s is given up: %s", actor_id, why)
        if actor.watcher:
            actor.watcher.close()
        if actor.handle:
            self._kill(actor.handle)

    def _kill(self, handle: ActorHandle) -> None:
        self._loop.when_done(self._pool.submit(handle.kill), _log_error(handle.actor_id, "kill"))

    def close(self) -> None:
        """Wait for starts and kills under way, and for the watchers. Called when the loop has ended.

        Actors whose start nobody has taken note of are ended here.
        """
        for actor in self._roster:
            if actor.watcher:
                actor.watcher.close()
        for actor in self._roster:
            if actor.watcher:
                actor.watcher.join(5.0)
        self._pool.shutdown(wait=True)
        for future in self._launching.values():
            if future.exception() is None:
                future.result().kill()


def _log_error(actor_id: str, what: str) -> Callable[[Any, Exception | None], None]:
    def then(_: Any, error: Exception | None) -> None:
        if error is not None:
            log.warning("%s of %s failed: %s", what, actor_id, error)

    return then


def _rounded(seconds: float) -> float | None:
    """As the audit log has it; None for no end, since JSON knows no infinity."""
    return round(seconds, 1) if math.isfinite(seconds) else None


def reserve_of(config: Config) -> dict[str, int]:
    """The warm pool belongs to the cheapest group, the first of equals."""
    cheapest = min(config.experts.resolved(), key=lambda group: group.price_per_hour)
    return {cheapest.name: config.control.warm_pool} if config.control.warm_pool else {}

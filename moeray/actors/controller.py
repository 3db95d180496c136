"""The controller: brings the system up, watches it, mends it and scales it, and answers questions about it.

One thread, the loop, owns all that changes; every call from outside is an event in its inbox.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from moeray.actors.accounts import Accounts, Statement, remember
from moeray.actors.adoption import Found, adopt
from moeray.actors.audit import Audit, audit_path
from moeray.actors.autoscaler import Autoscaler, summary, wish_tree
from moeray.actors.console import ANSWER_S, Console, Moment, moment
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.fleet_keeper import FleetKeeper
from moeray.actors.hosting import ActorHandle, Cluster
from moeray.actors.loop import Loop
from moeray.actors.overview import Overview
from moeray.actors.placement_keeper import ModelShape, PlacementKeeper
from moeray.actors.roster import Actor, Roster
from moeray.actors.spec import DatedConfig, SystemInfo
from moeray.actors.standing import dry_run, standing
from moeray.actors.watch import Loss
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.control.ledger import merge
from moeray.control.reports import Report, RouterReport
from moeray.control.update import compare
from moeray.errors import ConfigError, MoerayError, NotReadyError
from moeray.exposition import exposition
from moeray.model.loading import eos_token_ids, open_model
from moeray.recorder import Reading, Snapshot

log = logging.getLogger(__name__)

_T = TypeVar("_T")

STOP_TIMEOUT_S = 30.0
EARLY_LOSSES = 3
"""So many actors may die before the system is up; one more, and the start is given up."""
HEAL_REPORTS = 3
"""A router that reports rows without a taker so often in a row, while nothing is being changed, is helped."""


class Controller:
    """`start` runs once, in a thread of its caller's; the rest may be called from any thread meanwhile.

    Started by whoever owns the system; `stop` ends every actor. A controller that dies leaves its actors serving, and
    the next one over the same cluster takes them over.
    """

    def __init__(self, config: Config, cluster: Cluster, since: float = 0.0) -> None:
        self._cluster = cluster
        self._token = config.wire.token.encode() if config.wire.token else secrets.token_bytes(32)
        self._config, self._since = _public(config), since
        self._system = secrets.token_hex(4)
        self._roster = Roster()
        self._audit = Audit(audit_path(config))
        self._autoscaler = Autoscaler(self._config, self._roster)
        self._loop = Loop("controller", self._tick, min(0.25, config.control.report_s))
        self._ready: Future[None] = Future()
        self._phase = "starting"
        self._error: str | None = None
        self._info: SystemInfo | None = None
        self._eos: tuple[int, ...] = ()
        self._fleet: FleetKeeper | None = None
        self._places: PlacementKeeper | None = None
        self._overview = Overview(self._config)
        self._console = Console(self.state, self._moment)
        self._metrics = ControllerMetrics(self._config)
        self._accounts: Accounts | None = None
        self._next_decision = 0.0
        self._next_look = 0.0
        self._orphaned: dict[str, int] = {}
        self._early_losses = 0
        self._stopped = False

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> SystemInfo:
        """Bring the whole system up, or take over the one that runs. Raises the one MoerayError that stopped it."""
        try:
            self._start()
        except MoerayError as error:
            self._error = str(error)
            self.stop()
            raise
        assert self._info is not None
        return self._info

    def _start(self) -> None:
        self._phase = "looking for running actors"
        found = adopt(self._cluster.find(), DatedConfig(self._config, self._since))
        if found is None and self._config.control.check_room:
            self._cluster.check(self._config.experts.resolved(), self._config.router)
        elif found is not None:
            self._token, self._system = found.token, found.system
            self._config, self._since = found.dated.config, found.dated.since
            self._autoscaler.configure(self._config)
            self._metrics.configure(self._config)
        config = self._config
        self._phase = "opening the model"
        fleet = FleetKeeper(
            DatedConfig(config, self._since),
            self._cluster,
            self._loop,
            self._roster,
            self._audit,
            self,
            self._token,
            self._system,
        )
        self._fleet = fleet
        self._loop.start()
        files = open_model(config.model, found.revision if found else config.revision, node="of the controller")
        self._eos = eos_token_ids(files)
        fleet.revision = files.checkpoint.source.revision
        shape = ModelShape(files.expert_counts(), files.expert_bytes(), files.weights.trunk_bytes())
        places = PlacementKeeper(
            config, self._roster, self._audit, shape, self._autoscaler, self._autoscaler.wanted, self._cannot_place,
            self._metrics,
        )  # fmt: skip
        self._phase = "starting actors"
        self._audit.write("controller", system=self._system, model=config.model, adopted=found is not None)
        books = found.books if found else None
        accounts = Accounts(config.metrics, self._roster, self._metrics, shape.experts, books)
        self._loop.ask(lambda: self._begin(places, accounts, found))
        self._await_ready()

    def _begin(self, places: PlacementKeeper, accounts: Accounts, found: Found | None) -> None:
        assert self._fleet is not None
        self._accounts = accounts
        if found is not None:
            placement = found.enter(self._roster, self._loop, self._fleet, places)
            self._autoscaler.adopt(placement)
            if said := self._audit.last("pause", "resume"):  # by hand; where nobody did, the config holds
                self._autoscaler.paused = said == "pause"
        self._places = places

    def _cannot_place(self, error: MoerayError) -> None:
        """The first placement failed, and with it the start; a later one is tried again."""
        if not self._ready.done():
            self._ready.set_exception(error)

    def _await_ready(self) -> None:
        limit_s = self._config.control.start_s
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            try:
                self._ready.result(timeout=0.5)
                return
            except FutureTimeoutError:
                self._phase = self._overview.phase(self._snapshot()) or self._phase
        raise MoerayError(
            f"the system is still {self._phase} after {limit_s:g} s (control.start_s); "
            "`ray status` shows whether the cluster has room"
        )

    # -- the loop's events ----------------------------------------------------------------------------------------

    def on_ready(self, actor: Actor) -> None:
        assert self._places is not None
        if actor.is_router and self._places.placement.replicas:
            self._places.publish_to(actor)
        self._replan()
        self._look_ready()

    def on_lost(self, actor: Actor, why: Loss, detail: str) -> None:
        self._metrics.lost(actor.group, why)
        if not self._ready.done():
            self._early_losses += 1
            if self._early_losses > EARLY_LOSSES:
                self._ready.set_exception(MoerayError(f"{actor.actor_id} died while the system started: {detail}"))
        if self._places is None:
            return
        self._forget(actor)
        self._places.on_lost(actor)
        self._reconcile()
        self._look_ready()

    def on_reading(self, actor: Actor, reading: Reading) -> None:
        if self._accounts is not None:
            self._accounts.take(reading)

    def on_left(self, actor: Actor) -> None:
        assert self._places is not None
        self._forget(actor)
        self._places.on_left(actor)
        self._look_ready()

    def _forget(self, actor: Actor) -> None:
        self._autoscaler.forget(actor.actor_id)
        self._orphaned.pop(actor.actor_id, None)

    def on_start_failed(self, actor: Actor, error: Exception) -> None:
        if not self._ready.done():
            known = error if isinstance(error, MoerayError) else MoerayError(f"{actor.actor_id} did not start: {error}")
            self._ready.set_exception(known)

    def on_report(self, actor: Actor, report: Report) -> None:
        self._autoscaler.fold(report)
        if self._accounts is not None:
            self._accounts.report(report)
        if isinstance(report, RouterReport) and self._places is not None:
            orphaned = self._orphaned.get(actor.actor_id, 0) + 1 if report.orphans else 0
            self._orphaned[actor.actor_id] = orphaned
            if orphaned >= HEAL_REPORTS:
                self._orphaned[actor.actor_id] = 0
                self._places.heal()

    def _tick(self) -> None:
        if self._places is None or self._stopped:
            return
        now = time.monotonic()
        assert self._fleet is not None
        assert self._accounts is not None
        self._accounts.tick(now)
        if now >= self._next_look:
            self._next_look = now + self._config.control.report_s
            self._fleet.look_at_nodes()
        if self._ready.done() and now >= self._next_decision:
            self._next_decision = now + self._config.control.interval_s
            self._decide()
        for router in self._places.late_routers():
            self._fleet.lose(
                router,
                Loss.UNACKNOWLEDGED,
                f"it did not acknowledge a placement within {self._config.control.lease_s:g} s",
            )
        self._reconcile()
        self._replan()
        self._reconcile(refill=self._places.change is None)
        for actor in self._places.emptied():
            self._fleet.retire(actor)
        self._look_ready()

    def _decide(self) -> None:
        assert self._places is not None
        before = self._autoscaler.wanted()
        decision = self._autoscaler.decide(self._places.placement)
        if decision is not None:
            wish, seen = decision
            self._metrics.decided(before, self._autoscaler.wanted())
            self._audit.write("decision", **wish_tree(wish), inputs=summary(seen))

    def _reconcile(self, refill: bool = False) -> None:
        """Bring the numbers that are wanted to those who make them true. The reserve is filled up (`refill`) when
        nothing more urgent is under way, since the start of a process competes with it."""
        assert self._fleet is not None
        assert self._places is not None
        self._fleet.wanted = self._autoscaler.wanted()
        self._places.replicas = self._autoscaler.wish.replicas
        self._fleet.reconcile(self._places.placement, refill=refill)

    def _replan(self, force: bool = False) -> None:
        assert self._places is not None
        if self._places.placement.replicas or self._all_ready():
            self._places.replan(force)

    def _all_ready(self) -> bool:
        """The first placement waits for the whole first set of expert actors."""
        ready: dict[str, int] = {}
        for actor in self._roster.experts(Phase.READY):
            ready[actor.group] = ready.get(actor.group, 0) + 1
        return all(ready.get(name, 0) >= count for name, count in self._autoscaler.wish.actors.items())

    def _look_ready(self) -> None:
        """Who serves may have changed: say so to those who ask, and end the start when all is there."""
        places = self._places
        if places is None or not places.placement.replicas:
            return
        routers = [r for r in self._roster.routers(Phase.READY) if r.epoch >= 1 and r.address]
        if self._info is None and (not routers or places.change is not None):
            return
        addresses = tuple(router.address for router in routers if router.address)
        if self._info is None or self._info.routers != addresses:
            facts = [router.facts for router in routers] or [self._facts()]
            self._info = SystemInfo(
                self._config.model, self._fleet.revision if self._fleet else None, self._token, self._system,
                addresses, min(f["max_context"] for f in facts), facts[0]["vocab_size"], self._eos,
            )  # fmt: skip
        if not self._ready.done():
            self._phase = "ready"
            self._ready.set_result(None)

    def _facts(self) -> dict[str, Any]:
        assert self._info is not None
        return {"max_context": self._info.max_context, "vocab_size": self._info.vocab_size}

    # -- questions ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """`status` ("loading", "ready", "stopping" or "failed"), `detail` in a line, `info` (SystemInfo) if ready."""
        if self._error is not None:
            return {"status": "failed", "detail": self._error, "info": None}
        if self._stopped:
            return {"status": "stopping", "detail": "stopping", "info": None}
        if self._info is None or not self._ready.done():
            return {"status": "loading", "detail": self._phase, "info": None}
        return {"status": "ready", "detail": "ready", "info": self._info}

    def status(self) -> dict[str, Any]:
        """The running system as plain data: its actors with what each says of itself, and what is wanted."""
        snapshot = self._snapshot()
        state = self.state()
        return {
            "model": self._config.model,
            "status": state["status"],
            "detail": state["detail"],
            **(self._loop.ask(self._standing) if self._places is not None and not self._stopped else {"epoch": 0}),
            "actors": self._overview.rows(snapshot),
        }

    def _standing(self) -> dict[str, Any]:
        assert self._places is not None
        node = self._cluster.node_id
        return standing(self._config, node, self._roster, self._autoscaler, self._places, self._audit)

    def console(self) -> dict[str, Any]:
        """What the endpoint's live page shows, as plain data; gathered once a second at most, however many ask."""
        return self._console.look()

    def _moment(self) -> Moment | None:
        places, accounts = self._places, self._accounts
        if places is None or accounts is None or self._stopped:
            return None

        def take() -> Moment:
            counted = accounts.counted()
            return moment(self._config, self._standing(), self._roster, self._autoscaler, places, self._audit, counted)

        return self._loop.ask(take, ANSWER_S)

    @property
    def epoch(self) -> int:
        """The placement's; 0 before there is one."""
        return self._places.placement.epoch if self._places else 0

    def load(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far), over all replicas; experts with none included."""
        known = list(self._places.placement.replicas) if self._places else []
        return self._overview.load(self._snapshot(), known)

    def metrics(self, accept: str = "", reading: Reading | None = None) -> tuple[bytes, str]:
        """(every series of the system as text, its content type); `accept` is an HTTP header, `reading` the asking
        endpoint's own. Raises NotReadyError while a system is being taken over: a scrape that fails is no reset.
        """
        return exposition(self.series(reading), accept)

    def series(self, reading: Reading | None = None) -> Snapshot:
        """Every series of the system, up to this moment. Raises NotReadyError as `metrics` does."""
        if self._accounts is None or self._stopped:
            raise NotReadyError(f"nothing is counted yet: the system is {self.state()['detail']}")
        told = [*self._overview.readings(self._snapshot()), *([reading] if reading else [])]
        parts, books, keepers = self._loop.ask(lambda: self._statement(told))
        remember(books, keepers)
        return merge(parts)

    def _statement(self, told: Sequence[Reading]) -> Statement:
        assert self._accounts is not None
        assert self._places is not None
        return self._accounts.statement(told, self._standing(), self._places.placement.actors())

    def hear(self, reading: Reading) -> None:
        """An endpoint tells what it has counted."""
        if self._accounts is not None:
            self._loop.post(partial(self._accounts.take, reading))

    def _snapshot(self) -> Mapping[str, Actor]:
        return {actor.actor_id: actor for actor in self._roster}

    # -- another config -------------------------------------------------------------------------------------------

    def configure(self, config: Config, since: float) -> bool:
        """Take a newer config while all goes on; False where it changes nothing or is no newer, and during the start.

        Limits, objectives and policies hold from now on. Actors that were started with what it no longer says are
        replaced one after the other, each when another can work in its place. Raises ConfigError, and changes nothing,
        where it needs another system.
        """
        if since <= self._since or self._places is None or not self._ready.done() or self._stopped:
            return False
        return self._loop.ask(lambda: self._configure(config, since))

    def _configure(self, config: Config, since: float) -> bool:
        if since <= self._since:  # another endpoint was faster
            return False
        update = compare(self._config, config)
        other_token = config.wire.token is not None and config.wire.token.encode() != self._token
        if refused := [*update.refused, *(["wire.token"] if other_token else [])]:
            raise ConfigError(
                f"a system that runs cannot change {', '.join(refused)}; stop it first, or choose another serve.name: "
                "the new system starts beside the old one, which ends when no endpoint asks for it any more"
            )
        if not update.changed:  # an endpoint was started by the same config
            self._since = since
            return False
        self._take(DatedConfig(_public(config), since))
        self._audit.write("config", changed=update.changed, renewed=update.renewed)
        self._reconcile()
        self._replan()
        return True

    def _take(self, dated: DatedConfig) -> None:
        assert self._fleet is not None
        assert self._places is not None
        self._autoscaler.configure(dated.config)  # may refuse it: first
        self._config, self._since = dated.config, dated.since
        self._metrics.configure(dated.config)
        self._fleet.configure(dated)
        self._places.configure(dated.config)

    def refuse(self, error: str) -> None:
        """An endpoint was given a config that nobody can take: it is written down, and shown with the decisions."""
        self._ask(lambda: self._audit.write("config_refused", error=error))

    # -- commands -------------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """What would be done now and why; nothing is changed."""

        def run() -> dict[str, Any]:
            assert self._places is not None
            return dry_run(self._autoscaler, self._places)

        return self._ask(run)

    def scale(self, group: str, count: int) -> dict[str, int]:
        """Set the number of a group's actors (`router` for the routers). Raises ConfigError beyond its limits."""

        def run() -> dict[str, int]:
            before = self._autoscaler.wanted()
            self._autoscaler.scale(group, count)
            self._metrics.decided(before, self._autoscaler.wanted())
            self._audit.write("scale", group=group, actors=count, by="hand")
            self._reconcile()
            self._replan()
            return self._autoscaler.wanted()

        return self._ask(run)

    def drain(self, actor_id: str, within_s: float | None = None) -> None:
        """Empty one actor and stop it, within `within_s` seconds where given; another is started in its place."""

        def run() -> None:
            assert self._fleet is not None
            self._fleet.tell_to_leave(actor_id, within_s)
            self._audit.write("drain", actor=actor_id, within_s=within_s, by="hand")
            self._reconcile()
            self._replan()

        self._ask(run)

    def rebalance(self) -> bool:
        """Balance the placement by the load of now; False where nothing is to be moved, or a change is under way."""

        def run() -> bool:
            assert self._places is not None
            if self._places.change is not None:
                return False
            self._audit.write("rebalance", by="hand")
            self._replan(force=True)
            return self._places.change is not None

        return self._ask(run)

    def pause(self, paused: bool) -> None:
        """Stop or resume scaling by policy. Repair and manual commands go on."""

        def run() -> None:
            self._autoscaler.paused = paused
            self._audit.write("pause" if paused else "resume", by="hand")

        self._ask(run)

    def _ask(self, question: Callable[[], _T]) -> _T:
        if not self._ready.done() or self._error is not None or self._stopped:
            raise NotReadyError(f"the system is {self._phase}; try again when it is ready")
        return self._loop.ask(question)

    # -- stop -----------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Stop controlling and leave the actors as they are, for another controller to take over."""
        self._stopped = True
        self._loop.stop(STOP_TIMEOUT_S)
        if self._fleet is not None:
            self._fleet.close()

    def stop(self) -> None:
        """End every actor: routers first, so that no row is sent to an actor that is going. Idempotent."""
        if self._stopped:
            return
        self.abandon()
        _end([actor.handle for actor in self._roster.routers() if actor.handle])
        _end([actor.handle for actor in self._roster.experts() if actor.handle])
        self._cluster.close()


def _public(config: Config) -> Config:
    """The config as actors get it: the token travels beside it."""
    return replace(config, wire=replace(config.wire, token=None))


def _end(handles: Sequence[ActorHandle]) -> None:
    """Stop all of them side by side, within one deadline."""
    futures = [(handle, handle.call("stop")) for handle in handles]
    until = time.monotonic() + STOP_TIMEOUT_S
    for handle, future in futures:
        try:
            future.result(timeout=max(0.0, until - time.monotonic()))
        except (MoerayError, FutureTimeoutError) as error:
            log.warning("actor %s did not stop in good order: %s", handle.actor_id, error)
        handle.kill()

"""The controller: brings the system up, answers questions about it, does what it is told, and ends it.

One thread, the loop, owns all that changes (`SystemKeeper`); every call from outside is an event in its inbox.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from moeray.actors.accounts import remember
from moeray.actors.adoption import Found, adopt
from moeray.actors.audit import Audit, audit_path
from moeray.actors.autoscaler import Autoscaler
from moeray.actors.commands import COMMANDS, Commands
from moeray.actors.console import ANSWER_S, Console, Moment, moment
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.hosting import Cluster, kill, stop_all
from moeray.actors.loop import Loop
from moeray.actors.opening import open_in_time
from moeray.actors.orders import Orders, decode, newest
from moeray.actors.overview import Overview
from moeray.actors.readiness import Readiness
from moeray.actors.roster import Actor, Roster
from moeray.actors.spec import DatedConfig
from moeray.actors.system_keeper import SystemKeeper
from moeray.config import Config
from moeray.control.ledger import merge
from moeray.control.update import check_change
from moeray.errors import MoerayError, NotReadyError
from moeray.exposition import exposition
from moeray.recorder import Reading, Snapshot

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0


class Controller:
    """`start` runs once, in a thread of its caller's; the rest may be called from any thread meanwhile. `left_running`:
    it failed, and actors of the one before it may serve on: another controller is to try.

    Started by whoever owns the system; `stop` ends every actor. A controller that dies leaves its actors serving, and
    the next one over the same cluster takes them over.
    """

    def __init__(self, config: Config, cluster: Cluster, since: float = 0.0) -> None:
        self._cluster = cluster
        self._alone = False  # there is no system to take over
        self.left_running = False
        self._token = config.wire.token.encode() if config.wire.token else secrets.token_bytes(32)
        self._first = DatedConfig(config, since).public()
        self._system = secrets.token_hex(4)
        self._roster = Roster()
        self._audit = Audit(audit_path(config))
        self._autoscaler = Autoscaler(self._first.config, self._roster, self._on_policy_failed)
        self._metrics = ControllerMetrics(self._first.config)
        self._loop = Loop("controller", self._tick, min(0.25, config.control.report_s))
        self._readiness = Readiness()
        self._keeper: SystemKeeper | None = None
        self._overview = Overview(self._first.config)
        self._console = Console(self.state, self._moment)
        self.commands = Commands(
            self._loop, self._autoscaler, self._audit, self._metrics, self._readiness, self._keeping
        )
        self._stopped = threading.Event()
        self._stopping = threading.Lock()
        self._ended = False

    def _on_policy_failed(self, error: str) -> None:
        log.error("%s", error)
        self._audit.write("policy_failed", error=error)

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the whole system up, or take over the one that runs, which nothing that fails here ends.

        Raises the one MoerayError that stopped it; `state` tells of it once all is stopped.
        """
        try:
            self._start()
        except Exception as error:  # said to those who ask, since nobody may read what this thread raises
            if self._alone:
                self.stop()
            else:
                self.abandon()
                self.left_running = True
            self._readiness.error = str(error) if isinstance(error, MoerayError) else repr(error)
            raise

    def _start(self) -> None:
        self._readiness.phase = "looking for running actors"
        found = self._look_around()
        dated = found.dated if found else self._first
        model = open_in_time(dated.config, found, self._stopped, self._readiness)
        keeper = SystemKeeper(
            dated, self._cluster, self._loop, self._roster, self._audit, self._autoscaler, self._metrics,
            self._readiness, model, self._token, self._system, found, self._last_orders(found),
        )  # fmt: skip
        self._readiness.phase = "starting actors"
        self._audit.write("controller", system=self._system, model=dated.config.model, adopted=found is not None)
        self._loop.start()
        self._loop.ask(lambda: self._begin(keeper))
        self._readiness.wait(dated.config.control.start_s, lambda: self._overview.phase(self._snapshot()))

    def _look_around(self) -> Found | None:
        """What an earlier controller has left running; without it, there has to be room for a new system."""
        config = self._first.config
        found = adopt(self._cluster.find(), self._first)
        self._alone = found is None
        if found is None:
            self._audit.check()
            if config.control.check_room:
                self._cluster.check(config.experts.resolved(), config.router)
        else:
            self._token, self._system = found.token, found.system
            self._autoscaler.configure(found.dated.config)
            self._metrics.configure(found.dated.config)
        return found

    def _last_orders(self, found: Found | None) -> Orders | None:
        """Those that an actor keeps, or the cluster where all who kept them died with the controller."""
        kept = None
        try:
            if (data := self._cluster.recall()) is not None:
                kept = decode(data)
        except (MoerayError, ValueError) as error:
            log.warning("what the cluster keeps of an earlier controller's orders is left: %s", error)
        return newest(found.orders if found else None, kept)

    def _begin(self, keeper: SystemKeeper) -> None:
        self._keeper = keeper
        keeper.begin()

    def _tick(self) -> None:
        if self._keeper is not None and not self._stopped.is_set():
            self._keeper.tick()

    # -- questions ------------------------------------------------------------------------------------------------

    def call(self, method: str, *args: Any) -> Any:
        """One of the commands or of the questions by its name, as endpoints know them."""
        return getattr(self.commands if method in COMMANDS else self, method)(*args)

    def _keeping(self) -> SystemKeeper | None:
        return None if self._stopped.is_set() else self._keeper

    def state(self) -> dict[str, Any]:
        """`status` ("loading", "ready", "stopping" or "failed"), `detail` in a line, `info` (SystemInfo) if ready."""
        return self._readiness.state(stopping=self._stopped.is_set())

    def status(self) -> dict[str, Any]:
        """The running system as plain data: its actors with what each says of itself, and what is wanted."""
        snapshot, state, keeper = self._snapshot(), self.state(), self._keeping()
        return {
            "model": self._first.config.model,
            "status": state["status"],
            "detail": state["detail"],
            "controller": {"node": self._cluster.node_id, "pid": os.getpid()},
            **(self._loop.ask(keeper.standing) if keeper is not None else {"epoch": 0}),
            "actors": self._overview.rows(snapshot),
        }

    def console(self) -> dict[str, Any]:
        """What the endpoint's live page shows, as plain data; gathered once a second at most, however many ask."""
        return self._console.look()

    def _moment(self) -> Moment | None:
        keeper = self._keeping()
        if keeper is None:
            return None

        def take() -> Moment:
            counted = keeper.accounts.counted()
            return moment(
                keeper.config, keeper.standing(), self._roster, self._autoscaler, keeper.places, self._audit, counted
            )

        return self._loop.ask(take, ANSWER_S)

    @property
    def config(self) -> Config:
        """That which the system goes by: the one that it was made with, or a newer one that it has taken since."""
        return self._keeper.config if self._keeper else self._first.config

    @property
    def epoch(self) -> int:
        """The placement's; 0 before there is one."""
        return self._keeper.places.placement.epoch if self._keeper else 0

    def load(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far), over all replicas; experts with none included."""
        known = list(self._keeper.places.placement.replicas) if self._keeper else []
        return self._overview.load(self._snapshot(), known)

    def metrics(self, accept: str = "", reading: Reading | None = None) -> tuple[bytes, str]:
        """(every series of the system as text, its content type); `accept` is an HTTP header, `reading` the asking
        endpoint's own. Raises NotReadyError while a system is being taken over: a scrape that fails is no reset.
        """
        return exposition(self.series(reading), accept)

    def series(self, reading: Reading | None = None) -> Snapshot:
        """Every series of the system, up to this moment. Raises NotReadyError as `metrics` does."""
        keeper = self._keeping()
        if keeper is None:
            raise NotReadyError(f"nothing is counted yet: the system is {self.state()['detail']}")
        told = [*self._overview.readings(self._snapshot()), *([reading] if reading else [])]
        parts, books, keepers = self._loop.ask(
            lambda: keeper.accounts.statement(told, keeper.standing(), keeper.places.placement.actors())
        )
        remember(books, keepers)
        return merge(parts)

    def hear(self, reading: Reading) -> None:
        """An endpoint tells what it has counted."""
        if self._keeper is not None:
            self._loop.post(partial(self._keeper.accounts.take, reading))

    def suspect(self, actor_ids: Sequence[str]) -> None:
        """An endpoint gets no answer from these routers: they are asked now."""
        if self._keeper is not None:
            self._loop.post(partial(self._keeper.fleet.watchers.probe, actor_ids))

    def _snapshot(self) -> Mapping[str, Actor]:
        return {actor.actor_id: actor for actor in self._roster}

    # -- another config -------------------------------------------------------------------------------------------

    def configure(self, config: Config, since: float) -> bool:
        """Take a newer config while all goes on; False where it changes nothing or is no newer, and during the start.

        Limits, objectives and policies hold from now on. Actors that were started with what it no longer says are
        replaced one after the other, each when another can work in its place. Raises ConfigError, and changes nothing,
        where it needs another system, also during the start.
        """
        keeper = self._keeping()
        if keeper is None or not self._readiness.decided:
            if since > self._first.since:
                check_change(self._first.config, config, self._token)
            return False
        if since <= keeper.dated.since:
            return False
        return self._loop.ask(lambda: keeper.configure(DatedConfig(config, since)))

    # -- stop -----------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Stop controlling and leave the actors as they are, for another controller to take over."""
        self._stopped.set()
        self._loop.stop(STOP_TIMEOUT_S)
        if self._keeper is not None:
            self._keeper.fleet.close()

    def stop(self) -> None:
        """End every actor: routers first, so that no row is sent to an actor that is going. Idempotent; whoever asks
        while that is under way waits for it."""
        with self._stopping:
            if self._ended:
                return
            self.abandon()
            for actor in self._roster:
                if actor.handle and actor.report is None:  # it may have no process that could answer
                    kill(actor.handle)
            for actors in (self._roster.routers(), self._roster.experts()):
                stop_all([actor.handle for actor in actors if actor.handle and actor.report], STOP_TIMEOUT_S)
            if self._keeper is None:  # what an earlier controller has left, and this one had not taken over yet
                stop_all(self._cluster.find(), STOP_TIMEOUT_S)
            self._cluster.close()
            self._ended = True

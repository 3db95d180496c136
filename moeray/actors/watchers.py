"""Watches every actor, and asks those that a router gives up. Owned by the controller's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from moeray.actors.loop import Loop
from moeray.actors.roster import Actor, Roster
from moeray.actors.spec import ActorSpec
from moeray.actors.watch import Loss, Watcher
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.control.reports import Report, RouterReport
from moeray.wire.channel import connect

log = logging.getLogger(__name__)

CLOSE_S = 5.0


class Watchers:
    """One channel to each actor. `on_report` and `on_lost` are called on the loop, for actors of the roster."""

    def __init__(
        self, config: Config, loop: Loop, roster: Roster, node_id: str, token: bytes, system: str,
        on_report: Callable[[Actor, Report], None], on_lost: Callable[[Actor, Loss, str], None],
    ) -> None:  # fmt: skip
        self._config = config
        self._loop = loop
        self._roster = roster
        self._node_id = node_id
        self._token = token
        self._system = system
        self._on_report = on_report
        self._on_lost = on_lost
        self._suspects: set[str] = set()

    def configure(self, config: Config) -> None:
        self._config = config
        for actor in self._roster:
            if actor.watcher:
                actor.watcher.settings = config.control

    def watch(self, actor: Actor) -> None:
        """Follow the reports of an actor that listens."""
        assert actor.address is not None
        spec = ActorSpec("", actor.group, "cpu", 0, self._config, self._token, self._system)
        identity = replace(spec.identity(self._node_id), actor_id=f"controller-of-{actor.actor_id}")
        post = self._loop.post
        actor.watcher = Watcher(
            actor.address,
            lambda address: connect(address, identity, self._config.wire, timeout=self._config.control.silence_s),
            self._config.control,
            lambda actor_id, report: post(lambda: self._take(actor, report)),
            lambda actor_id, why, detail: post(lambda: self._on_lost(actor, why, detail)),
        )

    def forget(self, actor: Actor) -> None:
        """The actor has left the roster."""
        self._suspects.discard(actor.actor_id)
        if actor.watcher:
            actor.watcher.close()

    def _take(self, actor: Actor, report: Report) -> None:
        if self._roster.get(actor.actor_id) is not actor:
            return
        actor.latest = report
        if actor.actor_id in self._suspects:
            self._clear(actor)
        if isinstance(report, RouterReport):
            self._suspect(report)
        self._on_report(actor, report)

    def _suspect(self, report: RouterReport) -> None:
        """A router gave an actor up: out of memory ends it, anything else is first asked for."""
        for actor_id, reason in report.lost:
            accused = self._roster.get(actor_id)
            if accused is None:
                continue
            if reason == "out_of_memory":
                self._on_lost(accused, Loss.OUT_OF_MEMORY, "out of memory")
            elif accused.watcher:
                self._suspects.add(actor_id)
                accused.watcher.probe()

    def probe(self, actor_ids: Sequence[str]) -> None:
        """Ask these now: who does not answer soon is lost."""
        for actor_id in actor_ids:
            actor = self._roster.get(actor_id)
            if actor is not None and actor.watcher:
                actor.watcher.probe()

    def _clear(self, actor: Actor) -> None:
        self._suspects.discard(actor.actor_id)
        log.info("actor %s is well after all", actor.actor_id)
        for router in self._roster.routers(Phase.READY, Phase.LEAVING):
            if router.calls:
                router.calls.tell("restore", actor.actor_id)

    def close(self) -> None:
        """End all watching, and wait for it."""
        watchers = [actor.watcher for actor in self._roster if actor.watcher]
        for watcher in watchers:
            watcher.close()
        for watcher in watchers:
            watcher.join(CLOSE_S)

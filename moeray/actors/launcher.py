"""Starts actors and ends their processes. Owned by the controller's loop, which never waits for Ray's head here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from moeray.actors.hosting import ActorHandle, Cluster
from moeray.actors.loop import Loop
from moeray.actors.roster import Actor, Calls, Roster
from moeray.actors.spec import ActorReport, ActorSpec, DatedConfig
from moeray.control.backoff import Backoff
from moeray.control.fleet import Phase
from moeray.errors import MoerayError
from moeray.types import Address

log = logging.getLogger(__name__)


class StartEvents(Protocol):
    """What becomes of an actor that is started, as long as the roster has it."""

    def on_listening(self, actor: Actor) -> None: ...

    def on_loaded(self, actor: Actor) -> None: ...

    def on_failed(self, actor: Actor, error: Exception, retry_s: float) -> None: ...


class Launcher:
    """An actor gets a process, then listens, then loads what it works with; each step is told to `events`.

    `pool` asks Ray's head, which may be away for a while.
    """

    def __init__(
        self, cluster: Cluster, loop: Loop, roster: Roster, pool: ThreadPoolExecutor, events: StartEvents,
        token: bytes, system: str, revision: str | None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._loop = loop
        self._roster = roster
        self._pool = pool
        self._events = events
        self._token = token
        self._system = system
        self._revision = revision
        self._clock = clock
        self._backoff: dict[str, Backoff] = {}
        self._launching: dict[str, Future[ActorHandle]] = {}

    def may_start(self, group: str) -> bool:
        """Whether the group's last failure is long enough ago."""
        return group not in self._backoff or self._clock() >= self._backoff[group].until

    def forgive(self) -> None:
        """Another config: what failed may be tried at once."""
        self._backoff.clear()

    def start(self, actor: Actor, dated: DatedConfig, *, background: bool) -> None:
        """Start an actor that was put into the roster. `background`: nobody waits for it, so it gives way."""
        router = dated.config.router
        device, threads = (actor.kind.device, actor.kind.threads) if actor.kind else (router.device, router.threads)
        spec = ActorSpec(
            actor.actor_id, actor.group, device, threads, dated.config, self._token, self._system, background,
            dated.since,
        )  # fmt: skip
        future: Future[ActorHandle]
        if actor.kind:
            future = self._pool.submit(self._cluster.start_expert, spec, actor.kind)
        else:
            future = self._pool.submit(self._cluster.start_router, spec, router)
        self._launching[actor.actor_id] = future
        self._loop.when_done(future, lambda handle, error: self._on_handle(actor, handle, error))

    def give_up_overdue(self, start_s: float) -> None:
        """Starts that have taken longer than any may: such as of a process that hangs before it listens."""
        for actor in self._roster:
            if actor.phase is Phase.STARTING and self._clock() - actor.asked >= start_s:
                self._fail(actor, MoerayError(f"it is not ready after {start_s:g} s (control.start_s)"))

    def _on_handle(self, actor: Actor, handle: ActorHandle | None, error: Exception | None) -> None:
        self._launching.pop(actor.actor_id, None)
        if handle is None:
            self._fail(actor, error or MoerayError("no actor was made"))
        elif self._gone(actor):
            self.kill(handle)
        else:
            actor.handle, actor.calls = handle, Calls(handle, self._loop)
            actor.calls.put("start", then=lambda answer, failure: self._on_started(actor, answer, failure))

    def _on_started(self, actor: Actor, answer: tuple[ActorReport, Address] | None, error: Exception | None) -> None:
        if answer is None:
            self._fail(actor, error or MoerayError("it did not say where it listens"))
            return
        if self._gone(actor):
            return
        actor.report, actor.address = answer
        self._events.on_listening(actor)
        assert actor.calls is not None
        method = "load_trunk" if actor.is_router else "prepare"
        actor.calls.put(method, self._revision, then=lambda facts, failure: self._on_loaded(actor, facts, failure))

    def _on_loaded(self, actor: Actor, facts: Any, error: Exception | None) -> None:
        if error is not None:
            self._fail(actor, error)
        elif not self._gone(actor):
            actor.facts = facts or {}
            actor.phase = Phase.READY
            self._backoff.pop(actor.group, None)
            self._events.on_loaded(actor)

    def _fail(self, actor: Actor, error: Exception) -> None:
        if self._gone(actor):
            return
        backoff = self._backoff.setdefault(actor.group, Backoff())
        backoff.fail(self._clock())
        log.error("actor %s did not start: %s", actor.actor_id, error)
        self._events.on_failed(actor, error, backoff.pause_s)

    def _gone(self, actor: Actor) -> bool:
        """It was given up meanwhile."""
        return self._roster.get(actor.actor_id) is not actor

    def kill(self, handle: ActorHandle) -> None:
        """End the process, off the loop."""

        def killed(_: None, error: Exception | None) -> None:
            if error is not None:
                log.warning("kill of %s failed: %s", handle.actor_id, error)

        self._loop.when_done(self._pool.submit(handle.kill), killed)

    def close(self) -> None:
        """End the actors whose start nobody has taken note of. Called when the loop and the pool have ended."""
        for future in self._launching.values():
            if future.exception() is None:
                future.result().kill()

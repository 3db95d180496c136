"""The actors of a system as the controller knows them. Owned by the controller's loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeray.actors.hosting import ActorHandle, call
from moeray.actors.loop import Loop
from moeray.actors.spec import ActorReport
from moeray.actors.watch import Watcher
from moeray.config import Config
from moeray.control.fleet import Member, Phase
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, Report, RouterReport
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import ROUTER as ROUTER
from moeray.types import Address

log = logging.getLogger(__name__)

BASE_BYTES = 512 << 20
"""What an actor's process needs beside its weights."""

COPIES = 3
"""So many actors keep what the next controller is to know."""

ROOM_S = 10.0
"""An actor of which nothing is heard for so long after it was asked for most likely waits for room."""

Then = Callable[[Any, Exception | None], None]


class Calls:
    """Control calls to one actor, one at a time and in order: a late answer can never undo a newer order."""

    def __init__(self, handle: ActorHandle, loop: Loop) -> None:
        self._handle = handle
        self._loop = loop
        self._waiting: deque[tuple[str, tuple[Any, ...], Then]] = deque()
        self._busy = False

    def put(self, method: str, *args: Any, then: Then) -> None:
        """Call `method` behind those before it; `then(result, error)` runs on the loop."""
        self._waiting.append((method, args, then))
        self._next()

    def tell(self, method: str, *args: Any) -> None:
        """As `put`, where nobody waits for the answer: a failure is logged."""

        def told(_: Any, error: Exception | None) -> None:
            if error is not None:
                log.warning("%s of %s failed: %s", method, self._handle.actor_id, error)

        self.put(method, *args, then=told)

    def _next(self) -> None:
        if self._busy or not self._waiting:
            return
        self._busy = True
        method, args, then = self._waiting.popleft()
        self._loop.when_done(call(self._handle, method, *args), lambda result, error: self._done(then, result, error))

    def _done(self, then: Then, result: Any, error: Exception | None) -> None:
        self._busy = False
        try:
            then(result, error)
        finally:
            self._next()


@dataclass
class Actor:
    """One actor. `group` is an expert group's name or `router`; `kind` is None for a router.

    `handle` and `calls` come with its process, `report` and `address` once it listens, `facts` with a router's trunk.
    `started`: the config that it was started with, and `outdated` says that its group is to be started anew.
    `asked`: when it was asked for, and `leave_by`: when an actor that leaves must be gone, on the loop's clock;
    `draining`: nothing new is sent to it; `stopping`: it has told all that it counted, and nothing of it is missed;
    `gone_by`: by when one that drains has ended, or is ended.
    """

    actor_id: str
    kind: ExpertGroupConfig | None
    order: int
    started: Config
    phase: Phase = Phase.STARTING
    handle: ActorHandle | None = None
    calls: Calls | None = None
    report: ActorReport | None = None
    address: Address | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    watcher: Watcher | None = None
    latest: Report | None = None
    asked: float = 0.0
    leave_by: float | None = None
    draining: bool = False
    stopping: bool = False
    gone_by: float | None = None
    outdated: bool = False
    epoch: int = 0
    epoch_since: float = 0.0

    @property
    def group(self) -> str:
        return self.kind.name if self.kind else ROUTER

    @property
    def is_router(self) -> bool:
        return self.kind is None

    @property
    def node_id(self) -> str:
        return self.report.node_id if self.report else ""

    @property
    def hosted_bytes(self) -> int:
        """Of the experts that it has mapped, by its last report."""
        return self.latest.memory_bytes if isinstance(self.latest, ExpertReport) else 0

    @property
    def leaving(self) -> bool:
        """It was told to go from outside: SIGTERM, or a spot notice."""
        return isinstance(self.latest, ExpertReport | RouterReport) and self.latest.leaving

    def is_pending(self, now: float) -> bool:
        """It was asked for a while ago, and nothing is heard of it: most likely no node has room for it."""
        return self.report is None and now - self.asked >= ROOM_S


class Roster:
    """All living actors, by id."""

    def __init__(self) -> None:
        self._actors: dict[str, Actor] = {}
        self._started = 0
        self._numbers: dict[str, int] = {}

    def __iter__(self) -> Iterator[Actor]:
        return iter(list(self._actors.values()))

    def __getitem__(self, actor_id: str) -> Actor:
        return self._actors[actor_id]

    def get(self, actor_id: str) -> Actor | None:
        return self._actors.get(actor_id)

    def add(self, actor: Actor) -> None:
        self._actors[actor.actor_id] = actor
        self._started = max(self._started, actor.order + 1)
        self.count_from({actor.group: int(actor.actor_id.rpartition("-")[2]) + 1})

    def numbers(self) -> dict[str, int]:
        """Group -> the number that its next actor gets."""
        return dict(self._numbers)

    def count_from(self, numbers: Mapping[str, int]) -> None:
        """Smaller numbers were given to actors before, of an earlier controller perhaps."""
        for group, number in numbers.items():
            self._numbers[group] = max(self._numbers.get(group, 0), number)

    def remove(self, actor_id: str) -> Actor | None:
        return self._actors.pop(actor_id, None)

    def new(self, kind: ExpertGroupConfig | None, config: Config, now: float) -> Actor:
        """A record for an actor that is about to be started, under a name that was never used before."""
        group = kind.name if kind else ROUTER
        actor = Actor(f"{group}-{self._numbers.get(group, 0)}", kind, self._started, config, asked=now)
        self.add(actor)
        return actor

    def experts(self, *phases: Phase) -> list[Actor]:
        return [a for a in self if not a.is_router and (not phases or a.phase in phases)]

    def routers(self, *phases: Phase) -> list[Actor]:
        return [a for a in self if a.is_router and (not phases or a.phase in phases)]

    def serving_routers(self) -> list[Actor]:
        """Those that hold a placement, and stay."""
        return [a for a in self.routers(Phase.READY) if a.epoch >= 1 and a.address]

    def keepers(self) -> list[Actor]:
        """Those that keep what the next controller is to know: routers first."""
        present = [a for a in (*self.routers(), *self.experts()) if a.report and a.handle and not a.draining]
        return present[:COPIES]

    def members(self, placement: Placement) -> list[Member]:
        """The roster as decisions read it."""
        hosted: dict[str, int] = {}
        for held in placement.replicas.values():
            for actor_id in held:
                hosted[actor_id] = hosted.get(actor_id, 0) + 1
        return [
            Member(a.actor_id, a.group, a.phase, a.node_id, hosted.get(a.actor_id, 0), a.order, a.outdated, a.draining)
            for a in self
        ]

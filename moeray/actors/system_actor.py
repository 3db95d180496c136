"""What routers and expert actors have in common: their place in the system, and what they keep for its controller."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar

from moeray.actors.folders import remove_runtime_dir
from moeray.actors.orders import Orders, newest
from moeray.actors.spec import ActorReport, ActorSpec, DatedConfig
from moeray.actors.vigil import Vigil, new_incarnation
from moeray.config import Config
from moeray.control.ledger import Books, newer
from moeray.errors import WireError
from moeray.model.loading import pick_device
from moeray.tree import to_tree
from moeray.types import Address, Lifecycle
from moeray.wire.channel import Listener

log = logging.getLogger(__name__)


class SystemActor:
    """Control methods are thread-safe; whoever calls one is a controller, of which an actor has to hear now and then.

    What it computes, who answers at its `_listener` and how it ends are the subclass's, which calls `_listen` at its
    start and `_leave_place` at its end.
    """

    KIND: ClassVar[str]
    _listener: Listener

    def __init__(self, spec: ActorSpec, node_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._dated = DatedConfig(spec.config, spec.since)
        self._node_id = node_id
        self._device = pick_device(spec.device)
        self._incarnation = new_incarnation()
        self._clock = clock
        self._state = Lifecycle.STARTING
        self._lifecycle = threading.Lock()
        self._leaving = False
        self._revision: str | None = None
        self._address: Address | None = None
        self._free_bytes = 0  # before it held anything: room for all that it hosts
        self._vigil: Vigil | None = None
        self._books: Books | None = None
        self._orders: Orders | None = None

    def _listen(self, free_bytes: int, orphaned: Callable[[], None]) -> tuple[ActorReport, Address]:
        """From now on it hears of a controller, or `orphaned` is called. What `start` answers."""
        self._address = address = self._listener.start()
        self._free_bytes = free_bytes
        self._vigil = Vigil(self._spec.config.control.orphan_s, orphaned, self._clock)
        report = ActorReport(self._spec.actor_id, self._node_id, os.getpid(), str(self._device), free_bytes)
        return report, address

    def _heard(self) -> None:
        """A controller speaks, and counts on whoever can be reached at an actor's address."""
        if self._vigil:
            self._vigil.heard()
            try:
                self._listener.renew()
            except WireError as error:  # such as of XDG_RUNTIME_DIR after the user's last logout
                if not self._leaving:
                    log.error("%s; another actor takes the place of this one", error)
                    self.leave()

    def _end_vigil(self) -> None:
        if self._vigil:
            self._vigil.close()

    def _leave_place(self) -> None:
        """It listens no more."""
        remove_runtime_dir(self._node_id, self._spec.system)

    # -- control --------------------------------------------------------------------------------------------------

    def configure(self, config: Config, since: float) -> None:
        """Hold a newer config: what the actor was started with stays as it is, and the rest is taken from this one."""
        self._heard()
        self._dated = DatedConfig(config, since)
        if self._vigil:
            self._vigil.allow(config.control.orphan_s)

    def leave(self) -> None:
        """This process was told to end soon (SIGTERM, a spot notice): say so in every report, and serve on until the
        controller has moved its work away."""
        self._leaving = True

    def remember(self, books: Books) -> None:
        """Keep what the controller has counted, for the next controller."""
        self._heard()
        self._books = newer(self._books, books)

    def keep_orders(self, orders: Orders) -> None:
        """Keep what is wanted of the system, for the next controller."""
        self._heard()
        self._orders = newest(self._orders, orders)

    # -- what it says of itself -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """All that a controller needs to take this actor over, as plain data; holds the token."""
        self._heard()
        return {
            "actor_id": self._spec.actor_id, "kind": self.KIND, "group": self._spec.group,
            "system": self._spec.system, "token": self._spec.token,
            "node": self._node_id, "pid": os.getpid(), "device": str(self._device),
            "free_bytes": self._free_bytes, "address": asdict(self._address) if self._address else None,
            "revision": self._revision, "incarnation": self._incarnation,
            "state": self._state.value, "leaving": self._leaving,
            "started": to_tree(self._spec.config), "config": to_tree(self._dated.config), "since": self._dated.since,
            "books": self._books, "orders": self._orders,
        }  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Plain data for `moeray status`."""
        self._heard()
        return {
            "actor": self._spec.actor_id, "kind": self.KIND, "group": self._spec.group,
            "node": self._node_id, "pid": os.getpid(), "device": str(self._device),
            "state": self._state.value, "leaving": self._leaving,
        }  # fmt: skip

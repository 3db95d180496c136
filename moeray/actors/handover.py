"""Has what is wanted kept for the next controller: by some actors, and by the cluster. Owned by the loop."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from moeray.actors.hosting import Cluster
from moeray.actors.orders import Orders, encode
from moeray.actors.roster import Roster
from moeray.control.policy import Wish

log = logging.getLogger(__name__)

RETELL_S = 5.0
"""Orders that no actor could take are told again after this time."""


class Handover:
    """`last`: the orders that the controller before this one has left. `kept` is set while an actor has the newest."""

    def __init__(self, cluster: Cluster, roster: Roster, last: Orders | None) -> None:
        self._cluster = cluster
        self._roster = roster
        self._ordered_at = last.at if last is not None else 0.0
        self._handed: tuple[Orders, list[str]] | None = None
        self._unkept = 0  # keepers that could not take those orders
        self._retell_at = math.inf
        self.kept = threading.Event()
        self.kept.set()

    def hand(self, wish: Wish, paused: bool, leaving: Mapping[str, float | None]) -> None:
        """See `Orders`. To be called again and again: it tells them where they, or their keepers, have changed."""
        at = max(time.time(), math.nextafter(self._ordered_at, math.inf))
        orders = Orders(at, wish, paused, leaving, self._roster.numbers())
        keepers = self._roster.keepers()
        told = orders, [actor.actor_id for actor in keepers]
        if told == self._handed and time.monotonic() < self._retell_at:
            return
        if self._handed is None or orders != self._handed[0]:
            self._cluster.keep(encode(orders))
        self._handed, self._ordered_at, self._unkept, self._retell_at = told, orders.at, 0, math.inf
        if keepers:
            self.kept.clear()
        for actor in keepers:
            assert actor.calls is not None
            actor.calls.put("keep_orders", orders, then=partial(self._on_kept, actor.actor_id, orders))

    def _on_kept(self, actor_id: str, orders: Orders, _: Any, error: Exception | None) -> None:
        if error is not None:
            log.warning("actor %s does not keep what is wanted: %s", actor_id, error)
            if self._handed is not None and self._handed[0] is orders:
                self._unkept += 1
                if self._unkept == len(self._handed[1]):
                    self._retell_at = time.monotonic() + RETELL_S
        elif self._handed is not None and self._handed[0] is orders:  # else there are newer ones
            self.kept.set()

"""A router's copy of the placement, with what the router itself has learnt: which actors are gone.

One writer at a time (the control thread publishes, the step loop reports losses); readers may wait for a change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from moeray.control.placement import Placement
from moeray.types import Address, ExpertId


class PlacementView:
    """Thread-safe. `version` rises with every change, so that a waiter can tell that something happened."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self._placement = Placement()
        self._addresses: dict[str, Address] = {}
        self._lost: set[str] = set()
        self._refused: set[tuple[str, ExpertId]] = set()
        self._by_layer: dict[int, dict[int, tuple[str, ...]]] = {}

    @property
    def version(self) -> int:
        with self._changed:
            return self._version

    @property
    def epoch(self) -> int:
        with self._changed:
            return self._placement.epoch

    def publish(self, placement: Placement, addresses: Mapping[str, Address]) -> bool:
        """Take a newer placement; an older epoch is ignored (False). Actors that it names are believed alive again
        only at a new address."""
        with self._changed:
            if placement.epoch < self._placement.epoch:
                return False
            moved = {actor for actor, address in addresses.items() if self._addresses.get(actor) != address}
            self._lost -= moved
            self._refused.clear()
            self._placement, self._addresses = placement, dict(addresses)
            self._rebuild()
            return True

    def lose(self, actor_id: str) -> None:
        """The actor's channel broke or it answered too late: use it no more."""
        with self._changed:
            self._lost.add(actor_id)
            self._rebuild()

    def refuse(self, actor_id: str, experts: Iterable[ExpertId]) -> None:
        """The actor says that it does not host these experts: our epoch was stale."""
        with self._changed:
            self._refused |= {(actor_id, expert) for expert in experts}
            self._rebuild()

    def _rebuild(self) -> None:
        by_layer: dict[int, dict[int, tuple[str, ...]]] = {}
        for expert, actors in self._placement.replicas.items():
            usable = tuple(a for a in actors if a not in self._lost and (a, expert) not in self._refused)
            by_layer.setdefault(expert.layer, {})[expert.expert] = usable
        self._by_layer = by_layer
        self._version += 1
        self._changed.notify_all()

    def replicas(self, layer: int) -> Mapping[int, Sequence[str]]:
        """Expert -> the actors that serve it now, for one layer."""
        with self._changed:
            return self._by_layer.get(layer, {})

    def address(self, actor_id: str) -> Address:
        with self._changed:
            return self._addresses[actor_id]

    def wait_change(self, version: int, timeout: float) -> bool:
        """Wait until `version` is no longer the newest; False when `timeout` seconds passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._version != version, timeout)

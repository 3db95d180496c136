"""A router's copy of the placement, with what the router itself has learnt: which actors are gone.

The control thread publishes, whoever dispatches reports losses; readers may wait for a change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeray.control.placement import Placement
from moeray.types import Address, ExpertId

Cut = Callable[[Sequence[str]], None]
"""Called with actors that are known to be dead, in the thread that publishes."""


@dataclass(frozen=True)
class Usable:
    """What can be used at one moment; never changed, so that a dispatch reads it without a lock.

    `version` rises with every change, so that a waiter can tell that something happened. `replicas`: layer -> expert ->
    the actors that serve it. `addresses`: where the actors that the newest placement knows listen. `rates`: relative
    speed of the actors whose rate is known; their mean is 1. `dead`: actors that a publisher has named so.
    """

    version: int = 0
    epoch: int = 0
    replicas: Mapping[int, Mapping[int, Sequence[str]]] = field(default_factory=dict)
    addresses: Mapping[str, Address] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()


class PlacementView:
    """Thread-safe. `now` is what can be used at this moment."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._placement = Placement()
        self._addresses: dict[str, Address] = {}
        self._rates: Mapping[str, float] = {}
        self._lost: set[str] = set()
        self._dead: set[str] = set()
        self._refused: set[tuple[str, ExpertId]] = set()
        self.now = Usable()
        self._cuts: list[Cut] = []

    @property
    def epoch(self) -> int:
        return self.now.epoch

    def publish(
        self,
        placement: Placement,
        addresses: Mapping[str, Address],
        *,
        rates: Mapping[str, float] | None = None,
        lost: Iterable[str] = (),
    ) -> bool:
        """Take a newer placement; an older epoch is ignored (False).

        `addresses`: every actor that may be sent rows. One that is new there, or has moved, is believed alive again.
        `rates`: rows per second of each actor, where known (above 0). `lost`: actors that are dead; whoever waits for
        their answer is woken at once. An actor that is merely absent may answer what it already has.
        """
        dead = list(lost)
        with self._changed:
            if placement.epoch < self._placement.epoch:
                return False
            moved = {actor for actor, address in addresses.items() if self._addresses.get(actor) != address}
            self._dead = ((self._dead & addresses.keys()) | set(dead)) - moved
            self._lost = ((self._lost & addresses.keys()) | self._dead) - moved
            self._refused.clear()
            self._placement, self._addresses = placement, dict(addresses)
            self._rates = _relative(rates or {})
            self._rebuild()
            cuts = list(self._cuts)
        for cut in cuts if dead else ():
            cut(dead)
        return True

    def lose(self, actor_id: str) -> bool:
        """The actor's channel broke or it answered too late: use it no more. True where that was news."""
        with self._changed:
            if actor_id in self._lost or actor_id not in self._addresses:
                return False
            self._lost.add(actor_id)
            self._rebuild()
            return True

    def restore(self, actor_id: str) -> None:
        """The actor was asked and is alive, at the same address: use it again."""
        with self._changed:
            if actor_id in self._lost | self._dead:
                self._dead.discard(actor_id)
                self._lost.discard(actor_id)
                self._rebuild()

    def retry(self, experts: Iterable[ExpertId]) -> None:
        """Believe in the replicas of these experts again, unless a publisher has named them dead.

        For rows that have no other hope: their actor may have been slow only, and the controller that would say so may
        be gone itself.
        """
        with self._changed:
            for expert in experts:
                actors = set(self._placement.replicas.get(expert, ()))
                self._lost -= actors - self._dead
                self._refused -= {(actor, expert) for actor in actors}
            self._rebuild()

    def refuse(self, actor_id: str, experts: Iterable[ExpertId]) -> None:
        """The actor says that it does not host these experts: our epoch was stale."""
        with self._changed:
            self._refused |= {(actor_id, expert) for expert in experts}
            self._rebuild()

    def _rebuild(self) -> None:
        by_layer: dict[int, dict[int, tuple[str, ...]]] = {}
        for expert, actors in self._placement.replicas.items():
            usable = tuple(
                a for a in actors
                if a in self._addresses and a not in self._lost and (a, expert) not in self._refused
            )  # fmt: skip
            by_layer.setdefault(expert.layer, {})[expert.expert] = usable
        self.now = Usable(
            self.now.version + 1, self._placement.epoch, by_layer, self._addresses, self._rates, frozenset(self._dead)
        )
        self._changed.notify_all()

    def wait_change(self, version: int, timeout: float) -> bool:
        """Wait until `version` is no longer the newest; False when `timeout` seconds passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.now.version != version, timeout)

    def wake(self) -> None:
        """Have whoever waits for a change look again."""
        with self._changed:
            self.now = replace(self.now, version=self.now.version + 1)
            self._changed.notify_all()

    def subscribe(self, cut: Cut) -> None:
        """Have `cut` called whenever actors are named dead."""
        with self._changed:
            self._cuts.append(cut)

    def unsubscribe(self, cut: Cut) -> None:
        with self._changed:
            self._cuts.remove(cut)


def _relative(rates: Mapping[str, float]) -> dict[str, float]:
    known = {actor: rate for actor, rate in rates.items() if rate > 0}
    mean = sum(known.values()) / len(known) if known else 1.0
    return {actor: rate / mean for actor, rate in known.items()}

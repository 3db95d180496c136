"""How far a placement can change at once: what is to go stays in memory until no router names it any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeray.control.placement import Host, Placement
from moeray.types import ExpertId


def next_stage(
    current: Placement, target: Placement, hosts: Sequence[Host], expert_bytes: Mapping[int, int]
) -> Placement | None:
    """The furthest that one change (to the epoch after `current`) comes on the way to `target` while no host ever holds
    more than it has room for: `target` itself wherever all of it fits at once, None where nothing can be moved.

    No expert has fewer replicas meanwhile than it has now or will have, whichever is less. Only where no other step is
    left, what is to go makes room first, down to one replica. `expert_bytes`: layer -> bytes of one expert.
    """
    rooms = _Rooms(hosts, expert_bytes)
    for expert, actors in current.replicas.items():
        for actor in actors:
            rooms.put(expert, actor)
    had = {expert: current.replicas.get(expert, ()) for expert in target.replicas}
    moving = [expert for expert, wanted in target.replicas.items() if set(had[expert]) != set(wanted)]
    come: dict[ExpertId, tuple[str, ...]] = {}
    for expert in sorted(moving, key=lambda expert: (len(had[expert]), expert)):
        come[expert] = tuple(a for a in target.replicas[expert] if a in had[expert] or rooms.take(expert, a))
    if all(come[expert] == target.replicas[expert] for expert in moving):
        return Placement(current.epoch + 1, target.replicas)
    for forced in (False, True):
        stage = dict(current.replicas)
        for expert, held in come.items():
            going = [actor for actor in had[expert] if actor not in held]
            waits = [actor for actor in going if not forced or rooms.refused(actor)]
            least = 1 if forced else min(len(had[expert]), len(target.replicas[expert]))
            stay = [actor for actor in going if actor not in waits]
            stage[expert] = (*held, *stay, *waits[: max(0, least - len(held) - len(stay))])
        if any(set(stage[expert]) != set(had[expert]) for expert in moving):
            return Placement(current.epoch + 1, stage)
    return None


class _Rooms:
    """What each host and each pool of hosts has left."""

    def __init__(self, hosts: Sequence[Host], expert_bytes: Mapping[int, int]) -> None:
        self._bytes = expert_bytes
        self._pool = {host.actor_id: host.pool or host.actor_id for host in hosts}
        self._own = {host.actor_id: host.capacity_bytes for host in hosts}
        self._shared = {self._pool[host.actor_id]: host.pool_bytes for host in hosts}
        self._pooled: set[tuple[str, ExpertId]] = set()
        self._full: set[str] = set()

    def put(self, expert: ExpertId, actor: str) -> None:
        """It holds the expert, room or not; of actors that are no hosts nothing is known."""
        pool = self._pool.get(actor)
        if pool is None:
            return
        self._own[actor] -= self._bytes[expert.layer]
        if (pool, expert) not in self._pooled:
            self._pooled.add((pool, expert))
            self._shared[pool] -= self._bytes[expert.layer]

    def take(self, expert: ExpertId, actor: str) -> bool:
        """Have it hold the expert, if there is room."""
        size, pool = self._bytes[expert.layer], self._pool[actor]
        fits = self._own[actor] >= size and ((pool, expert) in self._pooled or self._shared[pool] >= size)
        if fits:
            self.put(expert, actor)
        else:
            self._full.add(pool)
        return fits

    def refused(self, actor: str) -> bool:
        """Something found no room on this actor, or on one that shares its memory."""
        return self._pool.get(actor) in self._full

"""The expert actors of a simulated system: asked for, ready, leaving, gone; and on which nodes they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Member:
    """An actor. `ready_at`: when it can take experts; `gone_at`: when it stops costing money (None: it stays); `warm`:
    it waits in the pool of its group."""

    actor_id: str
    group: str
    node: int
    ready_at: float
    leaving: bool = False
    gone_at: float | None = None
    warm: bool = False


@dataclass
class Members:
    """Every actor that costs money, and the choice of who comes and who goes. `reserve`: the warm pool, by group."""

    actors_per_node: int
    start_s: float
    reserve: Mapping[str, int] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    _named: int = 0

    def step(self, now: float) -> None:
        """Let go of those that are gone, and fill the warm pool up."""
        self.members = [m for m in self.members if m.gone_at is None or m.gone_at > now]
        for group, count in self.reserve.items():
            for _ in range(count - sum(m.group == group and m.warm for m in self.members)):
                self._start(group, now + self.start_s, warm=True)

    def count(self, group: str) -> int:
        """Actors that the group is to have: starting ones too, leaving and warm ones not."""
        return sum(m.group == group and not m.leaving and not m.warm for m in self.members)

    def serving(self, now: float) -> list[Member]:
        """Those that may host experts."""
        return [m for m in self.members if not m.warm and m.ready_at <= now and not m.leaving]

    def nodes(self) -> int:
        return len({m.node for m in self.members})

    def grow(self, group: str, count: int, now: float) -> None:
        """Ask for actors; one that waits in the group's warm pool only needs to map its experts."""
        for _ in range(count):
            warm = next((m for m in self.members if m.group == group and m.warm and m.ready_at <= now), None)
            if warm is None:
                self._start(group, now + self.start_s)
            else:
                warm.warm = False

    def start_ready(self, group: str, count: int) -> None:
        """Those that are there when the simulation begins."""
        for _ in range(count):
            self._start(group, 0.0)

    def victims(self, group: str, count: int, now: float) -> list[Member]:
        """Who goes: first those that are not ready yet, then from the nodes with the fewest actors, so that nodes
        become empty."""
        sizes = Counter(m.node for m in self.members if not m.leaving)
        candidates = [m for m in self.members if m.group == group and not m.leaving and not m.warm]
        candidates.sort(key=lambda m: (m.ready_at <= now, sizes[m.node], -m.node, m.actor_id))
        return candidates[:count]

    def leave(self, members: Iterable[Member], gone_at: float) -> None:
        for member in members:
            member.leaving, member.gone_at = True, gone_at

    def _start(self, group: str, ready_at: float, warm: bool = False) -> None:
        self._named += 1
        self.members.append(Member(f"{group}-{self._named}", group, self._node(), ready_at, warm=warm))

    def _node(self) -> int:
        """The fullest node with room, else a new one."""
        sizes = Counter(m.node for m in self.members)
        free = [(-size, node) for node, size in sizes.items() if size < self.actors_per_node]
        return min(free)[1] if free else next(n for n in range(len(sizes) + 1) if n not in sizes)

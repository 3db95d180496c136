"""The greedy half of placement: a host for one more replica.

Among the hosts that stay within the layer's limit, the one with the least total load for its speed; where none does,
the one that ends lowest in this layer. Experts come heaviest first, so the heavy ones, which only fast hosts can take
within the limit, find these free (longest processing time first, Graham 1969, with the bound of a multifit).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

from moeray.control.board import Board, Part

CHOICE = 32
"""How many of the best hosts a spare may choose from for the sake of another node or a cheaper tier."""


class Picker:
    """Hosts in a heap, by total load (or, `by_room`, by most free bytes). One a node in hierarchical mode."""

    def __init__(self, board: Board, hosts: Sequence[int], *, by_room: bool = False) -> None:
        self._board = board
        self._hosts = hosts
        self._by_room = by_room
        self._heap = [(self._key(host), host) for host in hosts]
        heapify(self._heap)
        self._aside: list[tuple[float, int]] = []  # (-what it can still take within the limit, host)
        self._full: list[int] = []
        self._several_nodes = len({board.node[host] for host in hosts}) > 1
        self._slots_ends: dict[int, float] = {}

    def _key(self, host: int) -> float:
        return -self._board.free[host] if self._by_room else self._board.total[host] / self._board.speed[host]

    def limit(self, part: Part) -> float:
        """What no host need exceed in a part, about: the heaviest replica on the fastest host, or an even share."""
        slots = sum(part.wanted[e] for e in part.experts)
        if slots not in self._slots_ends:
            self._slots_ends[slots] = _slots_end(self._board.speeds[np.array(self._hosts)], slots)
        mean = sum(part.units[e] * part.wanted[e] for e in part.experts) / slots
        return max(max(part.units[e] for e in part.experts) / part.fastest, mean * self._slots_ends[slots]) * (1 + 1e-9)

    def fill(self, part: Part, missing: Sequence[int]) -> list[int]:
        """Give each expert of `missing` (the heaviest first; twice for two replicas) a host. Returns those without one.

        `part.load` holds what is there already.
        """
        left = [expert for expert in missing if not self._place(part, expert, part.units[expert])]
        self._next_part()
        return left

    def _place(self, part: Part, expert: int, unit: float) -> bool:
        self._readmit(unit)
        return (
            self._within(part, expert, unit) or self._beyond(part, expert, unit) or self._anywhere(part, expert, unit)
        )

    def _give(self, part: Part, expert: int, unit: float, host: int) -> None:
        self._board.put(part, expert, host)
        self._board.shift(part, host, unit)

    def _readmit(self, unit: float) -> None:
        while self._aside and -self._aside[0][0] >= unit:
            host = heappop(self._aside)[1]
            heappush(self._heap, (self._key(host), host))

    def _within(self, part: Part, expert: int, unit: float) -> bool:
        """The emptiest host that ends within the limit. Sets aside the hosts that would end beyond it."""
        if part.held[expert]:
            return self._spare(part, expert, unit)
        board, heap, limit, load = self._board, self._heap, part.limit, part.load
        while heap:
            host = heap[0][1]
            slack = limit * board.speed[host] - load[host]
            if unit > slack:
                heappop(heap)
                heappush(self._aside, (-slack, host))
            elif not board.room(part, expert, host):
                self._full.append(heappop(heap)[1])
            else:
                self._give(part, expert, unit, host)
                heapreplace(heap, (self._key(host), host))
                return True
        return False

    def _spare(self, part: Part, expert: int, unit: float) -> bool:
        """The same for a second replica or a later one, which rather goes to another node, and to the cheap tier."""
        board, heap, taken = self._board, self._heap, part.held[expert]
        nodes = {board.node[host] for host in taken} if self._several_nodes else ()
        seen: list[tuple[float, int]] = []
        best, best_taste = None, 4
        while heap and best_taste and len(seen) < CHOICE:
            entry = heappop(heap)
            host = entry[1]
            slack = part.limit * board.speed[host] - part.load[host]
            if host in taken:
                seen.append(entry)
            elif unit > slack:
                heappush(self._aside, (-slack, host))
            elif not board.room(part, expert, host):
                self._full.append(host)
            else:
                seen.append(entry)
                taste = 2 * (board.node[host] in nodes) + (board.hosts[host].tier != "cpu")
                if taste < best_taste:  # of equals the emptiest, which comes first
                    best, best_taste = host, taste
        for entry in seen:
            if entry[1] != best:
                heappush(heap, entry)
        if best is None:
            return False
        self._give(part, expert, unit, best)
        heappush(heap, (self._key(best), best))
        return True

    def _beyond(self, part: Part, expert: int, unit: float) -> bool:
        """No host stays within the limit: the one that ends lowest, of those with the most slack."""
        board, taken = self._board, part.held[expert]
        popped = [heappop(self._aside) for _ in range(min(CHOICE, len(self._aside)))]
        fit = [host for _, host in popped if host not in taken and board.room(part, expert, host)]
        best = min(fit, key=lambda host: self._end(part, unit, host), default=None)
        if best is not None:
            self._give(part, expert, unit, best)
        for _, host in popped:
            heappush(self._aside, (part.load[host] - part.limit * board.speed[host], host))
        return best is not None

    def _anywhere(self, part: Part, expert: int, unit: float) -> bool:
        """The exact answer, by looking at every host: one that is full by its own pool may hold the expert already."""
        taken = part.held[expert]
        fit = [host for host in self._hosts if host not in taken and self._board.room(part, expert, host)]
        best = min(fit, key=lambda host: self._end(part, unit, host), default=None)
        if best is not None:
            self._give(part, expert, unit, best)
        return best is not None

    def _end(self, part: Part, unit: float, host: int) -> tuple[float, float]:
        return (part.load[host] + unit) / self._board.speed[host], self._key(host)

    def _next_part(self) -> None:
        if self._aside or self._full:
            self._heap += [(self._key(host), host) for host in [host for _, host in self._aside] + self._full]
            heapify(self._heap)
            self._aside, self._full = [], []


def _slots_end(speeds: NDArray[np.float64], count: int) -> float:
    """The least t with sum(floor(t * speed)) >= count: when hosts that take replicas of weight 1 end with so many."""
    low, high = 0.0, (count + len(speeds)) / float(speeds.sum())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if np.floor(middle * speeds + 1e-9).sum() >= count else (middle, high)
    return high

"""The improving half of placement: move or swap replicas while the busiest host gets less busy and it pays.

A local search: each step takes load from the host that ends last, so the sorted loads fall and the search ends. Gains
are in units of load; a step has to gain more than what it moves costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence
from heapq import heapify, heappop, heappush, nsmallest
from typing import NamedTuple

import numpy as np

from moeray.control.board import Board, Part

PARTNERS = 4
"""How many of the least loaded hosts a step considers."""
LEAST_GAIN = 0.005
"""A step gains at least this part of what the busiest host has; less is noise."""
LEAST_TOTAL_GAIN = 0.02
"""The same for the load over all layers, of the mean host's."""
STUCK = 32
"""Give up on the totals after as many busy hosts in a row that could give nothing away."""


class _Step(NamedTuple):
    """Give `expert` to `to`, and take `back` from it in exchange (None: a plain move)."""

    gain: float
    expert: int
    to: int
    back: int | None = None


def improve_part(board: Board, part: Part, *, cost: float, max_skew: float) -> int:
    """Lower the part's busiest hosts, if max/mean is above `max_skew`: half the way from there to 1, since a layer that
    is left at the edge comes back with the next noise. `cost`: of one move. Returns the moves."""
    mean = sum(part.load) / part.power
    heaviest = max((part.units[e] for e in part.experts), default=0.0) / part.fastest
    if board.end(part) <= max(mean * max_skew, heaviest) * (1 + 1e-9):
        return 0  # as even as it should or can be
    least = max(mean * (1 + max_skew) / 2, heaviest) * (1 + 1e-9)
    search = _Search(board, part)
    moves = 0
    while moves < 4 * len(part.hosts):
        busiest = search.last()
        if busiest is None or busiest[1] <= least:
            break
        step = search.best_step(busiest[0], max(cost, LEAST_GAIN * busiest[1]))
        if step is None:
            break
        moves += search.apply(busiest[0], step)
    return moves


def welcome(board: Board, parts: Sequence[Part], newcomers: Sequence[int], *, cost: float) -> int:
    """Give hosts that have nothing yet their part, from the busiest of the others. Returns the moves.

    Without it, an actor that is added to ten would stay idle: it leaves max/mean within any sensible tolerance.
    """
    new = set(newcomers)
    moves = 0
    for part in parts if new else ():
        # Where a layer has fewer replicas than hosts, some are idle in it anyway: the totals tell.
        if len(part.hosts) <= sum(part.wanted[e] for e in part.experts):
            targets = sorted(new.intersection(part.hosts))
            moves += _welcome(_Search(board, part), sum(part.load) / part.power, targets, cost)
    return moves + (improve_totals(board, parts, cost=cost, max_skew=1.0, only=newcomers) if new else 0)


def _welcome(search: _Search, mean: float, newcomers: Sequence[int], cost: float) -> int:
    moves = 0
    stuck: set[int] = set()
    while newcomers and (busiest := search.last(stuck)) is not None and busiest[1] > mean:
        targets = nsmallest(PARTNERS, newcomers, key=search.end)
        step = search.best_move(busiest[0], max(cost, LEAST_GAIN * busiest[1]), targets)
        if step is None:
            stuck.add(busiest[0])
        else:
            moves += search.apply(busiest[0], step)
    return moves


class _Search:
    """One part's local search: which experts each host has, and the hosts' ends as vectors (one entry a host)."""

    def __init__(self, board: Board, part: Part) -> None:
        self._board, self._part = board, part
        self._hosts = np.array(part.hosts)
        self._at = {host: at for at, host in enumerate(part.hosts)}
        speed = board.speeds[self._hosts]
        # Of hosts that end equally early the one with the least total load is to come first.
        self._tie = 1e-9 * np.array(board.total)[self._hosts] / speed
        self._ends, self._slow = np.array(part.load)[self._hosts] / speed, 1 / speed
        self._on: dict[int, list[int]] = {}
        for expert in part.experts:
            for host in part.held[expert]:
                self._on.setdefault(host, []).append(expert)

    def last(self, but: Container[int] = ()) -> tuple[int, float] | None:
        """The host that ends last, and its end, of those that have experts."""
        ends = self._ends
        if not but:
            at = int(ends.argmax())
            return int(self._hosts[at]), float(ends[at])
        left = [(ends[self._at[host]], host) for host, mine in self._on.items() if mine and host not in but]
        end, host = max(left, default=(0.0, -1))
        return (host, float(end)) if host >= 0 else None

    def _first(self, unit: float, count: int) -> list[int]:
        """The hosts that end first with `unit` more."""
        ends = unit * self._slow + self._ends + self._tie
        count = min(count, len(ends))
        return [int(host) for host in self._hosts[np.argpartition(ends, count - 1)[:count]]]

    def best_step(self, host: int, least: float) -> _Step | None:
        """The step off `host` that gains most, if more than `least` (a swap, which moves two: twice that)."""
        mine = self._mine(host)
        targets = {to for unit in {mine[0][0], mine[-1][0]} for to in self._first(unit, PARTNERS)}
        if (best := self.best_move(host, least, sorted(targets))) is not None:
            return best
        others = [h for h in self._first(0.0, 2 * PARTNERS) if h != host and self._on.get(h)]
        if len(others) < PARTNERS:
            others = [h for h in nsmallest(PARTNERS + 1, self._on, key=self.end) if h != host and self._on[h]]
        theirs = {to: self._mine(to) for to in others[:PARTNERS]}
        best = max(_swaps(self._board, self._part, host, mine, theirs), key=_gain, default=None)
        return best if best is not None and best.gain > 2 * least else None

    def best_move(self, host: int, least: float, targets: Sequence[int]) -> _Step | None:
        """The plain move off `host` to one of `targets` that gains most, if more than `least`."""
        best = max(_moves(self._board, self._part, host, self._mine(host), targets), key=_gain, default=None)
        return best if best is not None and best.gain > least else None

    def _mine(self, host: int) -> list[tuple[float, int]]:
        """(load, expert) of a host's replicas, the lightest first."""
        return sorted((self._part.units[e], e) for e in self._on[host])

    def end(self, host: int) -> float:
        return self._part.load[host] / self._board.speed[host]

    def apply(self, host: int, step: _Step) -> int:
        """Do it, and return how many replicas moved."""
        self._move(step.expert, host, step.to)
        if step.back is None:
            return 1
        self._move(step.back, step.to, host)
        return 2

    def _move(self, expert: int, host: int, to: int) -> None:
        self._board.move(self._part, expert, host, to)
        self._on[host].remove(expert)
        self._on.setdefault(to, []).append(expert)
        for changed in (host, to):
            self._ends[self._at[changed]] = self.end(changed)


def _gain(step: _Step) -> float:
    return step.gain


def _moves(
    board: Board, part: Part, host: int, mine: Sequence[tuple[float, int]], targets: Sequence[int]
) -> list[_Step]:
    """Plain moves of each expert of `host` (as (load, expert), sorted) to each of the targets."""
    speed, load = board.speed, part.load
    now = load[host] / speed[host]
    steps = []
    for to in targets:
        for weight, expert in mine:
            gain = now - max((load[host] - weight) / speed[host], (load[to] + weight) / speed[to])
            if gain > 0 and to not in part.held[expert] and board.room(part, expert, to):
                steps.append(_Step(gain, expert, to))
    return steps


def _swaps(
    board: Board,
    part: Part,
    host: int,
    mine: Sequence[tuple[float, int]],
    theirs: Mapping[int, list[tuple[float, int]]],
) -> list[_Step]:
    """Exchanges with other hosts: for each expert here, the partner there that evens the two hosts best."""
    speed, load = board.speed, part.load
    now = load[host] / speed[host]
    steps = []
    for to, there in theirs.items():
        ideal = (now - load[to] / speed[to]) * speed[host] * speed[to] / (speed[host] + speed[to])
        for weight, expert in mine:
            at = bisect_left(there, (weight - ideal, -1))
            for other, back in there[max(0, at - 1) : at + 1]:
                by = weight - other
                gain = now - max((load[host] - by) / speed[host], (load[to] + by) / speed[to])
                if gain > 0 and _can_swap(board, part, expert, host, back, to):
                    steps.append(_Step(gain, expert, to, back))
    return steps


def _can_swap(board: Board, part: Part, expert: int, host: int, back: int, to: int) -> bool:
    """Both hosts free as many bytes as they take, so only pools (where a copy may cost or free nothing) matter."""
    if to in part.held[expert] or host in part.held[back]:
        return False
    pools = board.pool[host], board.pool[to]
    if pools == (-1, -1) or pools[0] == pools[1]:
        return True
    return board.room(part, expert, to) and board.room(part, back, host)


def improve_totals(
    board: Board, parts: Sequence[Part], *, cost: float, max_skew: float, only: Sequence[int] = ()
) -> int:
    """Lower the hosts with most load over all layers, without raising any layer's end. Returns the moves.

    A host that takes something is not looked at again in the same round: it ends before the one that it comes from.

    `only`: the hosts that may take some (none: all).
    """
    speed, total = board.speed, board.total
    mean = sum(total) / sum(speed)
    least = max(cost, LEAST_TOTAL_GAIN * mean)
    hot = [(-total[h] / speed[h], h) for h in range(len(total)) if total[h] / speed[h] > mean * max_skew + least]
    on, ends = _on(parts, {h for _, h in hot}), [board.end(part) for part in parts] if hot else []
    takers = set(only or range(len(total)))
    cool = [(total[h] / speed[h], h) for h in takers]
    heapify(hot)
    heapify(cool)
    moves = stuck = 0
    while hot and moves < 4 * len(total) and stuck < STUCK:
        key, host = heappop(hot)
        if -key <= mean * max_skew + least:
            break
        if -key != total[host] / speed[host]:
            continue  # its load has changed since; a newer entry follows
        targets = _coolest(board, cool, host)
        step = _total_step(board, parts, ends, on[host], host, targets)
        if step is not None and step[0] > least:
            _, at, expert, to = step
            board.move(parts[at], expert, host, to)
            on[host].remove((at, expert))
            heappush(hot, (-total[host] / speed[host], host))
            moves, stuck = moves + 1, 0
        else:
            stuck += 1
        for target in takers.intersection((*targets, host)):
            heappush(cool, (total[target] / speed[target], target))
    return moves


def _on(parts: Sequence[Part], hosts: set[int]) -> dict[int, list[tuple[int, int]]]:
    """The (part, expert) of the replicas of these hosts."""
    on: dict[int, list[tuple[int, int]]] = {}
    for at, part in enumerate(parts) if hosts else ():
        for expert in part.experts:
            for host in part.held[expert]:
                if host in hosts:
                    on.setdefault(host, []).append((at, expert))
    return on


def _coolest(board: Board, cool: list[tuple[float, int]], host: int) -> list[int]:
    """The least loaded hosts; the caller gives them back. Old entries are thrown away on the way."""
    found: list[int] = []
    while cool and len(found) < PARTNERS:
        key, target = heappop(cool)
        if key == board.total[target] / board.speed[target] and target != host and target not in found:
            found.append(target)
    return found


def _total_step(
    board: Board, parts: Sequence[Part], ends: Sequence[float], mine: Sequence[tuple[int, int]], host: int,
    targets: Sequence[int],
) -> tuple[float, int, int, int] | None:  # fmt: skip
    """(gain, part, expert, target) of the best move off the host, or None."""
    speed, total = board.speed, board.total
    best, gained = None, 0.0
    for to in targets:
        slack = total[host] / speed[host] * speed[to] - total[to]  # with as much more, it would be as busy as the host
        for at, expert in mine:
            part = parts[at]
            unit = part.units[expert]
            gain = min(unit / speed[host], (slack - unit) / speed[to])
            if gain <= gained or (part.load[to] + unit) / speed[to] > ends[at] * (1 + 1e-9):
                continue
            if to in part.hosts and to not in part.held[expert] and board.room(part, expert, to):
                best, gained = (gain, at, expert, to), gain
    return best

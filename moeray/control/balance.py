"""The improving half of placement: move or swap replicas while the busiest host gets less busy and it pays.

A local search: each step takes load from the host that ends last, so the sorted loads fall and the search ends. Gains
are in units of load; a step has to gain more than what it moves costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest

from moeray.control.board import Board, Part

PARTNERS = 4
"""How many of the least loaded hosts a step considers."""
LEAST_GAIN = 0.002
"""A step gains at least this part of the mean host's load; less is noise."""


@dataclass(frozen=True)
class _Step:
    """Give `expert` to `to`, and take `back` from it in exchange (None: a plain move)."""

    gain: float
    expert: int
    to: int
    back: int | None = None


def improve_part(board: Board, part: Part, *, cost: float, max_skew: float) -> int:
    """Lower the part's busiest hosts, if max/mean is above `max_skew`. `cost`: of one move. Returns the moves."""
    on = _on_hosts(part)
    moves = 0
    while moves < 4 * len(part.hosts) and (host := _worth_a_look(board, part, on, max_skew)) is not None:
        step = _best_step(board, part, on, host, cost)
        if step is None:
            break
        moves += _apply(board, part, on, host, step)
    return moves


def _on_hosts(part: Part) -> dict[int, list[int]]:
    on: dict[int, list[int]] = {}
    for expert in part.experts:
        for host in part.held[expert]:
            on.setdefault(host, []).append(expert)
    return on


def _worth_a_look(board: Board, part: Part, on: dict[int, list[int]], max_skew: float) -> int | None:
    """The host that ends last, or None when the layer is as even as it should or can be."""
    speed, load = board.speed, part.load
    host = max(on, key=lambda h: load[h] / speed[h], default=None)
    if host is None:
        return None
    mean = sum(load[h] for h in on) / sum(speed[h] for h in part.hosts)
    least = max(mean * max_skew, max(part.units[e] for e in part.experts) / max(speed[h] for h in part.hosts))
    return host if load[host] / speed[host] > least * (1 + 1e-9) else None


def _best_step(board: Board, part: Part, on: dict[int, list[int]], host: int, cost: float) -> _Step | None:
    mean = sum(part.load) / sum(board.speed[h] for h in part.hosts)
    least = max(cost, LEAST_GAIN * mean)
    mine = sorted((part.units[e], e) for e in on[host])
    moves = [step for unit in {mine[0][0], mine[-1][0]} for step in _moves(board, part, host, mine, unit)]
    best = max(moves, key=lambda step: step.gain, default=None)
    if best is not None and best.gain > least:
        return best
    best = max(_swaps(board, part, on, host, mine), key=lambda step: step.gain, default=None)
    return best if best is not None and best.gain > 2 * cost and best.gain > least else None


def _moves(board: Board, part: Part, host: int, mine: Sequence[tuple[float, int]], unit: float) -> list[_Step]:
    """Plain moves to the hosts that would end earliest with `unit` more."""
    speed, load = board.speed, part.load
    now = load[host] / speed[host]
    targets = nsmallest(PARTNERS, part.hosts, key=lambda h: ((load[h] + unit) / speed[h], board.total[h] / speed[h]))
    steps = []
    for to in targets:
        for weight, expert in mine:
            gain = now - max((load[host] - weight) / speed[host], (load[to] + weight) / speed[to])
            if gain > 0 and to not in part.held[expert] and board.room(part, expert, to):
                steps.append(_Step(gain, expert, to))
    return steps


def _swaps(
    board: Board, part: Part, on: dict[int, list[int]], host: int, mine: Sequence[tuple[float, int]]
) -> list[_Step]:
    """Exchanges with the hosts that end first: for each expert here, the partner that evens the two hosts best."""
    speed, load = board.speed, part.load
    now = load[host] / speed[host]
    others = nsmallest(PARTNERS, (h for h in on if h != host), key=lambda h: load[h] / speed[h])
    steps = []
    for to in others:
        theirs = sorted((part.units[e], e) for e in on[to])
        ideal = (now - load[to] / speed[to]) * speed[host] * speed[to] / (speed[host] + speed[to])
        for weight, expert in mine:
            at = bisect_left(theirs, (weight - ideal, -1))
            for other, back in theirs[max(0, at - 1) : at + 1]:
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


def _apply(board: Board, part: Part, on: dict[int, list[int]], host: int, step: _Step) -> int:
    board.move(part, step.expert, host, step.to)
    on[host].remove(step.expert)
    on.setdefault(step.to, []).append(step.expert)
    if step.back is None:
        if not on[host]:
            del on[host]
        return 1
    board.move(part, step.back, step.to, host)
    on[step.to].remove(step.back)
    on[host].append(step.back)
    return 2


def improve_totals(board: Board, parts: Sequence[Part], *, cost: float, max_skew: float) -> int:
    """Lower the hosts with most load over all layers, without raising any layer's end. Returns the moves."""
    speed, total = board.speed, board.total
    mean = sum(total) / sum(speed)
    least = max(cost, LEAST_GAIN * mean)
    ends = [max((part.load[h] / speed[h] for h in part.hosts), default=0.0) for part in parts]
    on: dict[int, list[tuple[int, int]]] | None = None
    hot = [(-total[h] / speed[h], h) for h in range(len(total))]
    cool = [(total[h] / speed[h], h) for h in range(len(total))]
    heapify(hot)
    heapify(cool)
    moves = 0
    while hot and moves < 4 * len(total):
        key, host = heappop(hot)
        if -key <= mean * max_skew + least:
            break
        if -key != total[host] / speed[host]:
            continue  # its load has changed since; a newer entry follows
        on = on if on is not None else _on_all(parts)
        targets = _coolest(board, cool, host)
        step = _total_step(board, parts, ends, on[host], host, targets)
        if step is not None and step[0] > least:
            _, at, expert, to = step
            board.move(parts[at], expert, host, to)
            on[host].remove((at, expert))
            on.setdefault(to, []).append((at, expert))
            for changed in (host, to):
                heappush(hot, (-total[changed] / speed[changed], changed))
            moves += 1
        for target in {*targets, host}:
            heappush(cool, (total[target] / speed[target], target))
    return moves


def _on_all(parts: Sequence[Part]) -> dict[int, list[tuple[int, int]]]:
    on: dict[int, list[tuple[int, int]]] = {}
    for at, part in enumerate(parts):
        for expert in part.experts:
            for host in part.held[expert]:
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
    best = None
    for at, expert in mine:
        part = parts[at]
        unit = part.units[expert]
        for to in targets:
            gain = total[host] / speed[host] - max((total[host] - unit) / speed[host], (total[to] + unit) / speed[to])
            if gain <= (best[0] if best else 0.0) or (part.load[to] + unit) / speed[to] > ends[at] * (1 + 1e-9):
                continue
            if to in part.hosts and to not in part.held[expert] and board.room(part, expert, to):
                best = (gain, at, expert, to)
    return best

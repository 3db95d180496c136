"""Which replica serves an expert's rows. Pure but for `Balancer`, which remembers the recent load.

Cost is time: an actor's rows divided by its rate (`slow` is one over the rate). An expert's weights are read once for
all of its rows, and with few of them that is what takes the time (Williams et al. 2009, the roofline), so an expert
costs as many rows as `work` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

MIN_PIECE = 16
"""Fewer rows than this are not worth reading an expert's weights in one more place."""
SPLIT_FROM = 2 * MIN_PIECE

READ = 4
"""So many rows are computed while an expert's bf16 weights are read from memory, on a CPU core with AVX-512."""

NEAR = 1.1
"""Costs that differ by less count as equal: measured rates never agree exactly."""
DECAY = 0.99
"""What is left of an actor's carried load after another layer."""
_GAIN = 0.9
"""An expert is split where that brings its actor down to this part of its cost."""
_MOVES_PER_ACTOR = 4

Pieces = Sequence[tuple[str, int]]
"""(actor, number of rows) of one expert, which sum to its rows."""

Choose = Callable[[Mapping[int, int], Mapping[int, Sequence[str]]], Mapping[int, Pieces]]
"""(rows of each expert, its usable replicas) -> who serves them, for every expert."""


def work(rows: int) -> int:
    """What an expert with so many rows costs, in rows."""
    return max(rows, READ)


def balance_rows(
    rows: Mapping[int, int],
    replicas: Mapping[int, Sequence[str]],
    rates: Mapping[str, float] | None = None,
    carry: Mapping[str, float] | None = None,
) -> dict[int, list[tuple[str, int]]]:
    """Keep the largest cost of an actor small: longest-processing-time list scheduling (Graham 1969), then hot experts
    are split between their replicas.

    `rates`: relative speed of each actor, 1 where absent. `carry`: what each had to do of late, which decides between
    equal costs. Deterministic: at last the first replica in order wins.
    """
    rates, carry = rates or {}, carry or {}
    pieces: dict[int, list[tuple[str, int]]] = {}
    free = []
    cost: dict[str, float] = {}
    for expert, count in rows.items():
        actors = replicas[expert]
        if len(actors) > 1:
            free.append(expert)
        else:
            actor = actors[0]
            pieces[expert] = [(actor, count)]
            cost[actor] = cost.get(actor, 0.0) + work(count) / rates.get(actor, 1.0)
    if not free:
        return pieces
    free.sort(key=lambda e: (-rows[e], e))
    for actor in {actor for expert in free for actor in replicas[expert]}:
        cost.setdefault(actor, 0.0)
    slow = {actor: 1.0 / rates.get(actor, 1.0) for actor in cost}
    rest = {actor: carry.get(actor, 0.0) for actor in cost}
    for expert in free:
        actor = _cheapest(replicas[expert], work(rows[expert]), cost, slow, rest)
        pieces[expert] = [(actor, rows[expert])]
        cost[actor] += work(rows[expert]) * slow[actor]
    if rows[free[0]] >= SPLIT_FROM:
        _split([expert for expert in free if rows[expert] >= SPLIT_FROM], replicas, slow, cost, pieces)
    return pieces


def _cheapest(
    actors: Sequence[str], more: int, cost: Mapping[str, float], slow: Mapping[str, float], carry: Mapping[str, float]
) -> str:
    """The actor that is done first with so much `more` work; among nearly equal ones the one rested longest."""
    best, best_done, least = "", math.inf, math.inf
    for actor in actors:
        done = cost[actor] + more * slow[actor]
        least = min(least, done)
        if best_done > NEAR * least or (done <= NEAR * least and (carry[actor], done) < (carry[best], best_done)):
            best, best_done = actor, done
    return best


def _split(
    hot: Sequence[int],
    replicas: Mapping[int, Sequence[str]],
    slow: Mapping[str, float],
    cost: dict[str, float],
    pieces: dict[int, list[tuple[str, int]]],
) -> None:
    """Move parts of hot experts from the costliest actor to their other replicas while that helps enough."""
    for _ in range(_MOVES_PER_ACTOR * len(cost)):
        source = max(sorted(cost), key=cost.__getitem__)
        moves = (_move(expert, source, to, slow, cost, pieces) for expert in hot for to in replicas[expert])
        best = min((move for move in moves if move), default=None)
        if best is None or best[0] > _GAIN * cost[source]:
            return
        _, expert, to, count = best
        held = dict(pieces[expert])
        held[source] -= count
        held[to] = held.get(to, 0) + count
        pieces[expert] = [(actor, n) for actor, n in held.items() if n]
        cost[source] -= count * slow[source]
        cost[to] += count * slow[to]


def _move(
    expert: int,
    source: str,
    to: str,
    slow: Mapping[str, float],
    cost: Mapping[str, float],
    pieces: Mapping[int, Pieces],
) -> tuple[float, int, str, int] | None:
    """(the larger cost of both afterwards, expert, to, rows): the move that evens out two actors, if it may be made."""
    held = dict(pieces[expert])
    here = held.get(source, 0)
    if to == source or not here:
        return None
    count = min(here, int((cost[source] - cost[to]) / (slow[source] + slow[to])))
    if 0 < here - count < MIN_PIECE:
        count = here - MIN_PIECE
    if count <= 0 or held.get(to, 0) + count < MIN_PIECE:
        return None
    return max(cost[source] - count * slow[source], cost[to] + count * slow[to]), expert, to, count


class Balancer:
    """`balance_rows` with a memory, so that over many small steps replicas share evenly. Not thread-safe.

    `carry`: what each actor had to do of late.
    """

    def __init__(self) -> None:
        self.carry: dict[str, float] = {}

    def of(self, rates: Mapping[str, float]) -> Choose:
        """The choice at these rates."""
        return lambda rows, replicas: self(rows, replicas, rates)

    def __call__(
        self, rows: Mapping[int, int], replicas: Mapping[int, Sequence[str]], rates: Mapping[str, float]
    ) -> dict[int, list[tuple[str, int]]]:
        pieces = balance_rows(rows, replicas, rates, self.carry)
        carry = {actor: load * DECAY for actor, load in self.carry.items() if load > 1e-6}
        for parts in pieces.values():
            for actor, count in parts:
                carry[actor] = carry.get(actor, 0.0) + work(count) / rates.get(actor, 1.0)
        self.carry = carry
        return pieces

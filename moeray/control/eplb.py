"""Where each replica of each expert goes: replicate the hot experts, pack them by load, move little.

After DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB): replicas go greedily to the expert with
the most load per replica, replicas are packed heaviest first, and in hierarchical mode each routing group's experts
stay on one node. Beyond it: hosts differ in speed, memory and price, and a placement that exists is kept where it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace

from moeray.control.balance import improve_part, improve_totals, welcome
from moeray.control.board import Board, Part, weights
from moeray.control.parts import keep, make_parts, placement_of
from moeray.control.picker import Picker
from moeray.control.placement import Host, Placement
from moeray.errors import PlacementError
from moeray.types import ExpertId

ROUNDS = 8
"""Layers and totals are improved in turn until neither changes, at most this often."""

_EMPTY = Placement()


def replicate(
    load: Mapping[ExpertId, float], slots: int, *, base: int = 1, most: int = 1 << 30, max_skew: float = 0.0
) -> dict[ExpertId, int]:
    """How many replicas of each expert of `load` (one layer): `base` each, and the rest of `slots` one by one to the
    expert with the most load per replica.

    Stops early where no further replica helps: when the heaviest expert has `most` (the number of actors), or when
    `skew_left` is down to `max_skew`.
    """
    heap = [(-rows / base, expert) for expert, rows in load.items()]
    heapify(heap)
    counts, total = dict.fromkeys(load, base), sum(load.values())
    for used in range(base * len(load), slots):
        if not heap:
            break
        rows, expert = heap[0]
        if counts[expert] >= most or -rows * min(most, used) <= max_skew * total:
            break
        counts[expert] += 1
        heapreplace(heap, (-load[expert] / counts[expert], expert))
    return counts


def skew_left(load: Mapping[ExpertId, float], counts: Mapping[ExpertId, int], actors: int) -> float:
    """The max/mean load per actor that no packing of one layer can go below: its heaviest replica, over the mean of the
    actors that have any."""
    total = sum(load.values())
    used = min(actors, sum(counts.values()))
    return max([rows / counts[expert] for expert, rows in load.items()]) * used / total if total > 0 else 1.0


def place(
    load: Mapping[ExpertId, float],
    hosts: Sequence[Host],
    *,
    experts: Mapping[int, int],
    expert_bytes: Mapping[int, int],
    replicas: int | Mapping[ExpertId, int] = 1,
    current: Placement = _EMPTY,
    migration_cost: float = 0.0,
    max_skew: float = 1.0,
    routing_groups: int = 1,
) -> Placement:
    """The next placement (epoch + 1): balanced by load over hosts by their share, within their memory.

    `load`: rows per second of each expert (without any, experts are spread evenly); `experts`: layer -> number of
    experts; `expert_bytes`: layer -> stored bytes of one; `replicas`: of every expert, or expert -> number (1 where
    left out). Replicas of an expert are on different hosts, rather on different nodes, and spares rather on CPUs.

    Replicas of `current` stay unless their host is gone or full or moving them pays: a layer whose max/mean is within
    `max_skew` is left alone (but hosts without any expert get their part), and a move must lower the busier host by
    more than `migration_cost` times the mean expert's load. `routing_groups` above 1 keeps each routing group's experts
    (consecutive ones) on one node.
    Raises PlacementError, with the numbers, when the experts do not fit.
    """
    wanted = _wanted(experts, replicas)
    _check_replicas(wanted, hosts)
    loads = weights(load, experts)
    cost = migration_cost * sum(map(sum, loads.values())) / max(1, sum(experts.values()))
    for base, by_room in ((current, False), (_EMPTY, False), (_EMPTY, True)):
        board = Board.of(hosts)
        parts = make_parts(board, loads, wanted, expert_bytes, routing_groups=routing_groups, base=base)
        keep(board, parts, base)
        kept = any(board.total)
        if _fill(board, parts, by_room=by_room):
            _improve(board, parts, cost if kept else 0.0, max_skew if kept else 1.0)
            return placement_of(board, parts, current)
    raise PlacementError(_no_room(wanted, hosts, expert_bytes))


def repair(
    current: Placement,
    hosts: Sequence[Host],
    load: Mapping[ExpertId, float],
    *,
    expert_bytes: Mapping[int, int],
    replicas: int = 1,
) -> Placement:
    """The next placement after a loss: replicas on actors that are not among `hosts` go, and experts that then have
    fewer than `replicas` (or than there are hosts) gain some, those without any first, then the heaviest, each on the
    host with the least load for its share that has room. Nothing else moves. A second replica or a later one that fits
    nowhere is left out. Raises PlacementError naming the experts without any that fit nowhere."""
    if not hosts:
        raise PlacementError(f"no expert actor is left to host {len(current.replicas)} experts; add nodes or actors")
    wanted = _wanted_of(current, hosts, replicas)
    board = Board.of(hosts)
    loads = weights(load, {layer: len(counts) for layer, counts in wanted.items()})
    parts = make_parts(board, loads, wanted, expert_bytes)
    keep(board, parts, current, trust=True)
    picker = Picker(board, range(len(hosts)))
    missing = sorted((-part.units[e], at, e) for at, part in enumerate(parts) for e in set(part.missing()))
    orphans = [(at, e) for _, at, e in missing if not parts[at].held[e]]
    homeless = [ExpertId(parts[at].layer, e) for at, e in orphans if picker.fill(parts[at], [e])]
    if homeless:
        raise PlacementError(_nowhere(homeless, hosts, expert_bytes))
    for _, at, expert in missing:
        picker.fill(parts[at], [expert] * (parts[at].wanted[expert] - len(parts[at].held[expert])))
    return placement_of(board, parts, current)


def _wanted(experts: Mapping[int, int], replicas: int | Mapping[ExpertId, int]) -> dict[int, list[int]]:
    if isinstance(replicas, int):
        return {layer: [replicas] * count for layer, count in sorted(experts.items())}
    wanted = {layer: [1] * count for layer, count in sorted(experts.items())}
    for (layer, expert), count in replicas.items():
        wanted[layer][expert] = count
    return wanted


def _wanted_of(current: Placement, hosts: Sequence[Host], replicas: int) -> dict[int, list[int]]:
    """As many as survive, but at least `replicas` where there are hosts for them; 0 for experts not in the table."""
    there = {host.actor_id for host in hosts}
    least = min(replicas, len(there))
    wanted: dict[int, list[int]] = {}
    for (layer, expert), actors in sorted(current.replicas.items()):
        row = wanted.setdefault(layer, [])
        row += [0] * (expert + 1 - len(row))
        row[expert] = max(least, sum(actor in there for actor in actors))
    return wanted


def _check_replicas(wanted: Mapping[int, Sequence[int]], hosts: Sequence[Host]) -> None:
    most = max((max(row, default=0) for row in wanted.values()), default=0)
    if len(hosts) < most:
        raise PlacementError(
            f"{most} replicas of an expert need as many actors, there are {len(hosts)}; add actors or ask for fewer"
        )


def _fill(board: Board, parts: Sequence[Part], *, by_room: bool) -> bool:
    """Drop replicas that are too many, then add those that are missing. False when some fit nowhere."""
    for part in parts:
        for expert in part.experts:
            while len(held := part.held[expert]) > part.wanted[expert]:
                worst = max(held, key=lambda host: board.total[host] / board.speed[host])
                board.take(part, expert, worst)
                board.shift(part, worst, -part.units[expert])
    pickers: dict[int, Picker] = {}
    for part in parts:
        if missing := part.missing():
            first = part.hosts[0]
            if first not in pickers:
                pickers[first] = Picker(board, part.hosts, by_room=by_room)
            if by_room:  # memory is what is short: no host is spared, and who needs most of them comes first
                part.limit = math.inf
                missing = sorted(missing, key=lambda expert: -part.wanted[expert])
            else:
                part.limit = pickers[first].limit(part)
            if pickers[first].fill(part, missing):
                return False
    return True


def _improve(board: Board, parts: Sequence[Part], cost: float, max_skew: float) -> None:
    for _ in range(ROUNDS):
        board.weigh(parts)
        moves = welcome(board, parts, [host for host, load in enumerate(board.total) if load == 0], cost=cost)
        moves += sum(improve_part(board, part, cost=cost, max_skew=max_skew) for part in parts)
        moves += improve_totals(board, parts, cost=cost, max_skew=max_skew)
        if not moves:
            return


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB"


def _no_room(wanted: Mapping[int, Sequence[int]], hosts: Sequence[Host], expert_bytes: Mapping[int, int]) -> str:
    need = sum(sum(row) * expert_bytes[layer] for layer, row in wanted.items())
    have = sum(host.capacity_bytes for host in hosts)
    pools = {host.pool: host.pool_bytes for host in hosts if host.pool}
    shared = f" (in {len(pools)} shared memories of {_gib(sum(pools.values()))})" if pools else ""
    return (
        f"the experts need {_gib(need)} ({max(map(max, wanted.values()))} replica(s) of each at most) but the "
        f"{len(hosts)} expert actors can hold {_gib(have)}{shared}; add nodes or actors, lower experts.replicas, "
        f"or use a smaller dtype"
    )


def _nowhere(homeless: Sequence[ExpertId], hosts: Sequence[Host], expert_bytes: Mapping[int, int]) -> str:
    names = ", ".join(f"{e.layer}/{e.expert}" for e in homeless[:8]) + (", ..." if len(homeless) > 8 else "")
    need = sum(expert_bytes[e.layer] for e in homeless)
    return (
        f"{len(homeless)} replica(s) ({_gib(need)}) of the experts layer/expert {names} fit on none of the "
        f"{len(hosts)} expert actors left; add nodes or actors, or lower experts.replicas"
    )

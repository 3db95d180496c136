"""Between placements and boards: cut a problem into parts, lay a placement on the board, read one off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from moeray.control.board import Board, Part
from moeray.control.placement import Placement
from moeray.errors import PlacementError
from moeray.types import ExpertId


def make_parts(
    board: Board,
    loads: Mapping[int, Sequence[float]],
    wanted: Mapping[int, list[int]],
    expert_bytes: Mapping[int, int],
    *,
    routing_groups: int = 1,
    base: Placement | None = None,
) -> list[Part]:
    """One part a layer, or with routing groups one a layer and node. Experts of which none is wanted are left out."""
    parts = []
    for layer, counts in wanted.items():
        units = [rows / max(1, count) for rows, count in zip(loads[layer], counts, strict=True)]
        held: list[tuple[int, ...]] = [()] * len(counts)
        there = [e for e, count in enumerate(counts) if count]
        if routing_groups == 1:
            shares: list[tuple[Sequence[int], Sequence[int]]] = [(there, range(len(board.hosts)))]
        else:
            shares = _by_node(board, layer, loads[layer], there, routing_groups, base)
        for experts, hosts in shares:
            speeds = board.speed if len(hosts) == len(board.speed) else [board.speed[host] for host in hosts]
            part = Part(layer, expert_bytes[layer], experts, hosts, units, counts, held, sum(speeds), max(speeds))
            parts.append(part)
    return parts


def _by_node(
    board: Board, layer: int, rows: Sequence[float], experts: Sequence[int], groups: int, base: Placement | None
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Give whole routing groups to nodes: heaviest first, to the node with the fewest groups and the least load for
    its speed. A group stays on the node of `base` that has most of it."""
    if len(rows) % groups:
        raise PlacementError(f"layer {layer} has {len(rows)} experts, which {groups} routing groups do not divide")
    size = len(rows) // groups
    hosts: dict[int, list[int]] = {}
    for host, node in enumerate(board.node):
        hosts.setdefault(node, []).append(host)
    speed = {node: sum(board.speed[host] for host in mates) for node, mates in hosts.items()}
    load = dict.fromkeys(hosts, 0.0)
    given: dict[int, list[int]] = {node: [] for node in hosts}
    homes = _homes(board, layer, size, base)
    for group in sorted(range(groups), key=lambda g: (g not in homes, -sum(rows[g * size : (g + 1) * size]), g)):
        most = -(-groups // len(hosts))
        open_nodes = [node for node in hosts if len(given[node]) < most]
        emptiest = min(open_nodes, key=lambda node: (load[node] / speed[node], node))
        node = homes.get(group, emptiest)
        given[node].append(group)
        load[node] += sum(rows[group * size : (group + 1) * size])
    home = {group: node for node, mine in given.items() for group in mine}
    return [([e for e in experts if home[e // size] == node], mates) for node, mates in hosts.items() if given[node]]


def _homes(board: Board, layer: int, size: int, base: Placement | None) -> dict[int, int]:
    """Routing group -> the node that has most replicas of it at present."""
    node_of = {host.actor_id: board.node[i] for i, host in enumerate(board.hosts)}
    votes: dict[int, list[int]] = {}
    for expert, actors in (base.replicas if base else {}).items():
        if expert.layer == layer:
            votes.setdefault(expert.expert // size, []).extend(node_of[a] for a in actors if a in node_of)
    return {group: max(sorted(set(nodes)), key=nodes.count) for group, nodes in votes.items() if nodes}


def keep(board: Board, parts: Sequence[Part], base: Placement, *, trust: bool = False) -> None:
    """Lay the replicas of `base` on the board, as far as their hosts are there and have room (`trust`: room or not).
    Counts all loads."""
    index = {actor: host for host, actor in enumerate(board.ids())}
    part_of = {part.layer: dict[int, Part]() for part in parts}
    for part in parts:
        part_of[part.layer].update(dict.fromkeys(part.experts, part))
    nothing: dict[int, Part] = {}
    for (layer, expert), actors in base.replicas.items():
        if (home := part_of.get(layer, nothing).get(expert)) is None:
            continue
        for actor in actors:
            host = index.get(actor)
            if host is not None and host in home.hosts and (trust or board.room(home, expert, host)):
                board.put(home, expert, host)
    board.weigh(parts)


def placement_of(board: Board, parts: Sequence[Part], current: Placement) -> Placement:
    """The board as the placement that follows `current`, sorted by expert."""
    ids = board.ids()
    single = [(actor,) for actor in ids]
    table: dict[ExpertId, tuple[str, ...]] = {}
    for part in sorted(parts, key=lambda part: part.layer):
        names, held = _names(part.layer, len(part.held)), part.held
        for e in part.experts:
            hosts = held[e]
            table[names[e]] = single[hosts[0]] if len(hosts) == 1 else tuple([ids[h] for h in hosts])
    return Placement(current.epoch + 1, table)


@lru_cache(maxsize=1024)
def _names(layer: int, count: int) -> tuple[ExpertId, ...]:
    """The experts of a layer: made once, since tens of thousands of new objects a plan keep the collector busy."""
    return tuple(ExpertId(layer, expert) for expert in range(count))

"""The working state of one planning run: what each host holds, and how loaded it is.

Hosts are indices, fastest first. A host's speed is its share over the mean share, so that `load / speed` of different
hosts compare and a mean host's is plain load. Only the functions of `eplb` make and change a Board.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Host
from moeray.types import ExpertId

UNKNOWN = 0.01
"""An expert weighs at least this part of its layer's mean, so that idle experts do not all pile up on one host."""


@dataclass
class Part:
    """Experts of one layer and the hosts that may take them (a whole layer, or its routing groups of one node).

    `units[e]`: the load of one replica, `wanted[e]`: how many there are to be, `held[e]`: the hosts that have one (all
    indexed by the layer's expert number and shared by the parts of a layer); `load[h]`: what this part puts on a host;
    `limit`: what no host need exceed, for its speed. `power`, `fastest`: sum and largest of the speeds of `hosts`.
    """

    layer: int
    size: int
    experts: Sequence[int]
    hosts: Sequence[int]
    units: list[float]
    wanted: list[int]
    held: list[tuple[int, ...]]
    power: float
    fastest: float
    load: list[float] = field(default_factory=list)
    limit: float = math.inf

    def missing(self) -> list[int]:
        """Experts with too few replicas, once for each, the heaviest first."""
        short = sorted((-self.units[e], e) for e in self.experts if len(self.held[e]) < self.wanted[e])
        return [e for _, e in short for _ in range(self.wanted[e] - len(self.held[e]))]


@dataclass
class Board:
    """`free[h]`: bytes; `total[h]`: load over all layers. A pool's bytes count each distinct expert once."""

    hosts: Sequence[Host]
    speed: list[float]
    node: list[int]
    free: list[int]
    total: list[float]
    pool: list[int]
    pool_free: list[int]
    pooled: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.speeds: NDArray[np.float64] = np.array(self.speed)
        # Most experts have one replica: they share these, since new objects by the thousand keep the collector busy.
        self._alone = [(host,) for host in range(len(self.hosts))]

    @classmethod
    def of(cls, hosts: Sequence[Host]) -> Board:
        hosts = sorted(hosts, key=lambda host: -host.share)
        mean = sum(host.share for host in hosts) / len(hosts) or 1.0
        nodes = {node: i for i, node in enumerate(dict.fromkeys(host.node_id for host in hosts))}
        pools = {pool: i for i, pool in enumerate(dict.fromkeys(host.pool for host in hosts if host.pool))}
        bytes_of = {host.pool: host.pool_bytes for host in hosts}
        return cls(
            hosts,
            [max(host.share / mean, 1e-9) for host in hosts],
            [nodes[host.node_id] for host in hosts],
            [host.capacity_bytes if host.pool else min(host.capacity_bytes, host.pool_bytes) for host in hosts],
            [0.0] * len(hosts),
            [pools.get(host.pool, -1) for host in hosts],
            [bytes_of[pool] for pool in pools],
        )

    def room(self, part: Part, expert: int, host: int) -> bool:
        """Whether the host can take the expert, by its own bytes and by its pool's."""
        pool = self.pool[host]
        if self.free[host] < part.size:
            return False
        return pool < 0 or self.pool_free[pool] >= part.size or (pool, part.layer, expert) in self.pooled

    def put(self, part: Part, expert: int, host: int) -> None:
        """Count the bytes of one more replica; loads are recounted by `weigh` or kept by the caller."""
        held = part.held[expert]
        part.held[expert] = (*held, host) if held else self._alone[host]
        self._bytes(part, expert, host, 1)

    def take(self, part: Part, expert: int, host: int) -> None:
        part.held[expert] = tuple(other for other in part.held[expert] if other != host)
        self._bytes(part, expert, host, -1)

    def move(self, part: Part, expert: int, host: int, to: int) -> None:
        """Give the replica of `host` to `to`, loads included."""
        unit = part.units[expert]
        held = part.held[expert]
        part.held[expert] = tuple([to if h == host else h for h in held]) if len(held) > 1 else self._alone[to]
        self._bytes(part, expert, host, -1)
        self._bytes(part, expert, to, 1)
        self.shift(part, host, -unit)
        self.shift(part, to, unit)

    def shift(self, part: Part, host: int, load: float) -> None:
        part.load[host] += load
        self.total[host] += load

    def _bytes(self, part: Part, expert: int, host: int, by: int) -> None:
        self.free[host] -= by * part.size
        if (pool := self.pool[host]) >= 0:
            self._pool_bytes(part, (pool, part.layer, expert), by)

    def _pool_bytes(self, part: Part, key: tuple[int, int, int], by: int) -> None:
        count = self.pooled.get(key, 0)
        if count == 0 or count + by == 0:  # the pool's first copy of it, or its last
            self.pool_free[key[0]] -= by * part.size
        self.pooled[key] = count + by
        if count + by == 0:
            del self.pooled[key]

    def weigh(self, parts: Sequence[Part]) -> None:
        """Count all loads afresh, so that equal placements give equal numbers whatever led to them."""
        count = len(self.hosts)
        total = np.zeros(count)
        for part in parts:
            held, units = part.held, part.units
            hosts = list(chain.from_iterable([held[e] for e in part.experts]))
            loads = [units[e] for e in part.experts for _ in held[e]]
            load = np.bincount(hosts, loads, count) if hosts else np.zeros(count)
            total += load
            part.load = load.tolist()
        self.total = total.tolist()

    def end(self, part: Part) -> float:
        """The latest end (load for its speed) of the part's hosts."""
        return float((np.array(part.load) / self.speeds).max())

    def ids(self) -> list[str]:
        return [host.actor_id for host in self.hosts]


def weights(load: Mapping[ExpertId, float], experts: Mapping[int, int]) -> dict[int, list[float]]:
    """layer -> the load of each expert. A layer without load counts each expert as the mean expert of the others."""
    known = {layer: [0.0] * count for layer, count in experts.items()}
    for (layer, expert), rows in load.items():
        if layer in known and 0 <= expert < len(known[layer]):
            known[layer][expert] = rows
    loaded = [rows for rows in known.values() if any(rows)]
    mean = sum(map(sum, loaded)) / sum(map(len, loaded)) if loaded else 1.0
    return {layer: _floored(rows) if any(rows) else [mean] * len(rows) for layer, rows in known.items()}


def _floored(rows: list[float]) -> list[float]:
    floored: list[float] = np.maximum(rows, UNKNOWN * sum(rows) / len(rows)).tolist()
    return floored

"""The plan of a whole layer, in one call where the part in C is there (`native/deal.c`), else by `plan_rows`.

Both give the same plan. C does what nearly all layers are: every expert has a replica, and none so many rows that it
might be split.

Shapes: T tokens, K experts a token, A actors, E experts.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moeray.compiled import compiled
from moeray.dispatch.balance import DECAY, NEAR, READ, SPLIT_FROM, Balancer
from moeray.dispatch.plan import NO_ROWS, Ints, Plan, Share, plan_rows
from moeray.dispatch.view import Usable

native = compiled("moeray.dispatch._native")

_TABLE_HEAD = struct.Struct("=ddqqqq")


class Planner:
    """Owned by one dispatcher: not thread-safe. Remembers who had how much to do, so that replicas share evenly."""

    def __init__(self) -> None:
        self._balancer = Balancer()
        self._now: Usable | None = None
        self._actors: list[str] = []
        self._carry = bytearray()
        self._tables: dict[int, bytes] = {}

    def plan(self, now: Usable, layer: int, ids_TK: Tensor) -> Plan:
        """All rows of a layer; ids_TK: int64, contiguous, on the CPU. Raises PlacementError as `plan_rows`."""
        if now is not self._now:
            self._renew(now)
        assert ids_TK.dtype is torch.int64, "the part in C reads them where they lie"
        assert ids_TK.is_contiguous()
        replicas = now.replicas.get(layer, {})
        shares = None
        if native is not None:
            table = self._tables.get(layer)
            if table is None:
                table = self._tables[layer] = pack_table(self._actors, now.rates, replicas)
            shares = native.deal(table, self._carry, ids_TK.data_ptr(), *ids_TK.shape)
        if shares is None:
            return self.plan_again(now, replicas, ids_TK.numpy(), None)
        return Plan([Share(self._actors[actor], *rest) for actor, *rest in shares], [], NO_ROWS)

    def plan_again(self, now: Usable, replicas: Mapping[int, Sequence[str]], ids_TK: Ints, rows_R: Ints | None) -> Plan:
        """Only `rows_R` (None: all), among these replicas."""
        if now is not self._now:
            self._renew(now)
        carry = memoryview(self._carry).cast("d")
        self._balancer.carry = dict(zip(self._actors, carry, strict=True))
        plan = plan_rows(ids_TK, replicas, self._balancer.of(now.rates), rows_R)
        for i, actor in enumerate(self._actors):
            carry[i] = self._balancer.carry.get(actor, 0.0)
        return plan

    def _renew(self, now: Usable) -> None:
        known = dict(zip(self._actors, memoryview(self._carry).cast("d"), strict=True))
        experts = (actors for layer in now.replicas.values() for actors in layer.values())
        self._actors = sorted({actor for actors in experts for actor in actors})
        self._carry = bytearray(np.array([known.get(actor, 0.0) for actor in self._actors]).tobytes())
        self._now, self._tables = now, {}


def pack_table(actors: Sequence[str], rates: Mapping[str, float], replicas: Mapping[int, Sequence[str]]) -> bytes:
    """What `deal` reads of a layer; an expert that the placement does not know has no replicas here."""
    place = {actor: i for i, actor in enumerate(actors)}
    experts = max(replicas, default=-1) + 1
    first, hosts = array("i", [0]), array("i")
    for expert in range(experts):
        hosts.extend(place[actor] for actor in replicas.get(expert, ()))
        first.append(len(hosts))
    head = _TABLE_HEAD.pack(NEAR, DECAY, READ, SPLIT_FROM, experts, len(actors))
    return head + array("d", [rates.get(actor, 1.0) for actor in actors]).tobytes() + first.tobytes() + hosts.tobytes()

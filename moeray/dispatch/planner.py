"""The plan of a whole layer, in one call where the part in C is there (`native/deal.h`), else by `plan_rows`.

Both give the same plan. C does what nearly all layers are: every expert has a replica, and none so many rows that it
might be split. It then sends them too, and waits for the outputs (`native/layer.c`).

Shapes: T tokens, K experts a token, R = T * K rows, D hidden size, A actors, E experts.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeray.compiled import compiled
from moeray.dispatch.balance import DECAY, NEAR, READ, SPLIT_FROM, Balancer
from moeray.dispatch.plan import NO_ROWS, Ints, Plan, Share, plan_rows
from moeray.dispatch.view import Usable
from moeray.model.kernels.combine import Combining
from moeray.wire.tensors import CODES

native = compiled("moeray.dispatch._native")

_TABLE_HEAD = struct.Struct("=ddqqqq")


Answered = tuple[int, list[int], int, int, float]
"""A share whose outputs have come: (actor, by its place in `Planner.actors`; its experts; how many rows and tokens it
has; seconds from sending them until their outputs came)."""


class Left(NamedTuple):
    """A share that is not answered yet. `actor`: its place in `Planner.actors`; `frame_id`: under which it went out, 0
    where it did not; `in_part`: the rest of that is still to be sent."""

    actor: int
    share: Share
    frame_id: int
    in_part: bool


class Layer(NamedTuple):
    """What came of a layer. `slowest_s`: the longest that an actor computed, as it says; `combined_s`: what combining
    took, where nothing is left."""

    answered: list[Answered]
    left: list[Left]
    slowest_s: float
    combined_s: float


class Planner:
    """Owned by one dispatcher: not thread-safe. Remembers who had how much to do, so that replicas share evenly."""

    def __init__(self) -> None:
        self._balancer = Balancer()
        self._now: Usable | None = None
        self.actors: list[str] = []
        self._carry = bytearray()
        self._tables: dict[int, bytes] = {}

    def renew(self, now: Usable) -> None:
        """Plan by this placement from now on; `actors` are those that host an expert in it."""
        if now is self._now:
            return
        known = dict(zip(self.actors, memoryview(self._carry).cast("d"), strict=True))
        experts = (actors for layer in now.replicas.values() for actors in layer.values())
        self.actors = sorted({actor for actors in experts for actor in actors})
        self._carry = bytearray(np.array([known.get(actor, 0.0) for actor in self.actors]).tobytes())
        self._now, self._tables = now, {}

    def layer(
        self, now: Usable, layer: int, ids_TK: Tensor, x_TD: Tensor, out: int, lanes: list[int], first_id: int,
        within_s: float, combining: Combining | None,
    ) -> Layer | None:  # fmt: skip
        """Plan all rows, send each actor's share on its lane (0: there is none) under the ids from first_id on, and put
        the outputs that come `within_s` to their places, [T, K, D] at the address `out`, or where all of them come,
        combine them (without putting all to `out`). None, with nothing done, where C does not do it.

        ids_TK: int64; both are contiguous, on the CPU, and x's dtype is one of the wire's.
        """
        assert native is not None
        _check_ids(ids_TK)
        found = native.layer(
            self._table(now, layer), self._carry, ids_TK.data_ptr(), *ids_TK.shape, lanes, first_id, layer, now.epoch,
            CODES[x_TD.dtype], x_TD.data_ptr(), x_TD.shape[1], out, within_s, combining,
        )  # fmt: skip
        if found is None:
            return None
        answered, left, slowest_s, combined_s = found
        if left:
            left = [Left(share[0], self._share(share), *rest) for share, *rest in left]
        return Layer(answered, left, slowest_s, combined_s)

    def plan(self, now: Usable, layer: int, ids_TK: Tensor) -> Plan:
        """All rows of a layer; ids_TK: int64, contiguous, on the CPU. Raises PlacementError as `plan_rows`."""
        _check_ids(ids_TK)
        self.renew(now)
        shares = None
        if native is not None:
            shares = native.deal(self._table(now, layer), self._carry, ids_TK.data_ptr(), *ids_TK.shape)
        if shares is None:
            return self.plan_again(now, now.replicas.get(layer, {}), ids_TK.numpy(), None)
        return Plan([self._share(share) for share in shares], [], NO_ROWS)

    def _table(self, now: Usable, layer: int) -> bytes:
        table = self._tables.get(layer)
        if table is None:
            table = self._tables[layer] = pack_table(self.actors, now.rates, now.replicas.get(layer, {}))
        return table

    def _share(self, found: tuple[int, list[int], list[int], bytes, bytes, bytes]) -> Share:
        return Share(self.actors[found[0]], *found[1:])

    def plan_again(self, now: Usable, replicas: Mapping[int, Sequence[str]], ids_TK: Ints, rows_R: Ints | None) -> Plan:
        """Only `rows_R` (None: all), among these replicas."""
        self.renew(now)
        carry = memoryview(self._carry).cast("d")
        self._balancer.carry = dict(zip(self.actors, carry, strict=True))
        plan = plan_rows(ids_TK, replicas, self._balancer.of(now.rates), rows_R)
        for i, actor in enumerate(self.actors):
            carry[i] = self._balancer.carry.get(actor, 0.0)
        return plan


def _check_ids(ids_TK: Tensor) -> None:
    assert ids_TK.dtype is torch.int64, "the part in C reads them where they lie"
    assert ids_TK.is_contiguous()


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

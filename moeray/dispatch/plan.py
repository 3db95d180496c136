"""Which row goes to which actor. Pure: arrays and a placement in, a plan out.

It runs for every layer of every step, so it is numpy: at few tokens torch's operators would cost more than the rest of
a dispatch.

Shapes: T tokens, K experts a token, R = T * K rows; a row's index is t * K + k; U distinct tokens of a share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeray.dispatch.balance import Choose, balance_rows
from moeray.errors import PlacementError

Ints = npt.NDArray[np.int64]

NO_ROWS = np.empty(0, np.int64)


class Share(NamedTuple):
    """The rows of one layer that one actor serves.

    `experts` and `counts`: the distinct experts in order, and how many rows each has; `rows`: row indices in that
    order; `tokens`: the distinct tokens to send; `token_of_row`: each row's place in `tokens`. The last three are int64
    numbers as bytes, which is how they go out; `rows_R` and so on are the same as arrays.
    """

    actor_id: str
    experts: list[int]
    counts: list[int]
    rows: bytes
    tokens: bytes
    token_of_row: bytes

    @property
    def size(self) -> int:
        """How many rows."""
        return len(self.rows) // 8

    @property
    def rows_R(self) -> Ints:
        return np.frombuffer(self.rows, np.int64)

    @property
    def tokens_U(self) -> Ints:
        return np.frombuffer(self.tokens, np.int64)

    @property
    def token_of_row_R(self) -> Ints:
        return np.frombuffer(self.token_of_row, np.int64)


class Plan(NamedTuple):
    """`shares` go out now; `orphans` are experts of which no replica is left, `orphan_rows_R` the rows that wait."""

    shares: list[Share]
    orphans: list[int]
    orphan_rows_R: Ints


class _Part(NamedTuple):
    """What one actor gets: for each of its experts the rows, and how many."""

    experts: list[int]
    counts: list[int]
    rows: list[Ints]


def plan_rows(
    ids_TK: Ints, replicas: Mapping[int, Sequence[str]], choose: Choose = balance_rows, rows_R: Ints | None = None
) -> Plan:
    """Split the rows (or only `rows_R` of them) among actors.

    ids_TK: chosen experts. `replicas`: expert -> actors that can serve it now. Raises PlacementError for an expert that
    the placement does not know.
    """
    groups = _by_expert(ids_TK.ravel(), rows_R)
    counts, orphans = {}, []
    for expert, rows in groups.items():
        actors = replicas.get(expert)
        if actors is None:
            raise PlacementError(f"the gate chose expert {expert}, which the placement does not know")
        if actors:
            counts[expert] = rows.size
        else:
            orphans.append(expert)
    parts = _deal(groups, choose(counts, replicas))
    shares = [_share(actor, parts[actor], *ids_TK.shape) for actor in sorted(parts)]
    return Plan(shares, orphans, np.concatenate([groups[e] for e in orphans]) if orphans else NO_ROWS)


def _by_expert(flat_R: Ints, rows_R: Ints | None) -> dict[int, Ints]:
    """Each expert's rows in the order given, experts in order."""
    experts = flat_R if rows_R is None else flat_R[rows_R]
    # Numpy sorts 16-bit numbers in linear time.
    order = experts.astype(np.uint16).argsort(kind="stable")
    sizes = np.bincount(experts)
    present = sizes.nonzero()[0]
    rows = order if rows_R is None else rows_R[order]
    groups, start = {}, 0
    for expert, size in zip(present.tolist(), sizes[present].tolist(), strict=True):
        groups[expert] = rows[start : start + size]
        start += size
    return groups


def _deal(groups: Mapping[int, Ints], chosen: Mapping[int, Sequence[tuple[str, int]]]) -> dict[str, _Part]:
    """Each actor's part, its experts in order."""
    parts: dict[str, _Part] = {}
    for expert in groups:
        if expert not in chosen:
            continue
        rows, start = groups[expert], 0
        for actor, count in chosen[expert]:
            part = parts.get(actor)
            if part is None:
                part = parts[actor] = _Part([], [], [])
            part.experts.append(expert)
            part.counts.append(count)
            part.rows.append(rows[start : start + count])
            start += count
        assert start == rows.size, f"the choice for expert {expert} covers {start} of {rows.size} rows"
    return parts


def _share(actor: str, part: _Part, tokens: int, top_k: int) -> Share:
    rows = np.concatenate(part.rows)
    token_of_row = rows // top_k
    is_used = np.zeros(tokens, bool)
    is_used[token_of_row] = True
    used = is_used.nonzero()[0]
    if used.size < tokens:
        token_of_row = (is_used.cumsum() - 1)[token_of_row]
    return Share(actor, part.experts, part.counts, rows.tobytes(), used.tobytes(), token_of_row.tobytes())

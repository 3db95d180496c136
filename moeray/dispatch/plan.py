"""Which row goes to which actor. Pure: tensors and a placement in, a plan out.

It runs for every layer of every step, so it is numpy and plain loops over experts: at one token torch's operators
would cost more than the rest of a dispatch.

Shapes: T tokens, K experts a token, R = T * K rows; a row's index is t * K + k; U distinct tokens of a share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeray.dispatch.balance import Choose, balance_rows
from moeray.errors import PlacementError

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """The rows of one layer that one actor serves.

    `rows_R`: row indices, sorted by expert; `experts` and `counts`: the distinct experts in that order and how many
    rows each has; `tokens_U`: the distinct tokens to send; `token_of_row_R`: each row's place in `tokens_U`.
    """

    actor_id: str
    rows_R: Tensor
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens_U: Tensor
    token_of_row_R: Tensor


@dataclass(frozen=True)
class Plan:
    """`shares` go out now; `orphans` are experts of which no replica is left, `orphan_rows_R` the rows that wait."""

    shares: tuple[Share, ...]
    orphans: tuple[int, ...]
    orphan_rows_R: Tensor


def plan_rows(
    ids_TK: Tensor, replicas: Mapping[int, Sequence[str]], choose: Choose = balance_rows, rows_R: Tensor | None = None
) -> Plan:
    """Split the rows (or only `rows_R` of them) among actors.

    ids_TK: chosen experts, int64, on the CPU. `replicas`: expert -> actors that can serve it now. Raises
    PlacementError for an expert that the placement does not know.
    """
    flat = ids_TK.numpy().ravel()
    rows = None if rows_R is None else rows_R.numpy()
    expert_of_row = flat if rows is None else flat[rows]
    order = _grouped(expert_of_row)
    rows = order if rows is None else rows[order]
    expert_of_row = expert_of_row[order]
    starts = np.concatenate(([0], np.flatnonzero(expert_of_row[1:] != expert_of_row[:-1]) + 1, [len(rows)]))
    counts = dict(zip(expert_of_row[starts[:-1]].tolist(), np.diff(starts).tolist(), strict=True)) if len(rows) else {}
    orphans = tuple(expert for expert in counts if not _actors(expert, replicas))
    alive = {e: n for e, n in counts.items() if e not in orphans} if orphans else counts
    shares, left = _deal(rows, counts, choose(alive, replicas))
    top_k = ids_TK.shape[1]
    orphan_rows = np.concatenate(left) if left else rows[:0]
    return Plan(
        tuple(_share(actor, shares[actor], top_k, len(ids_TK)) for actor in sorted(shares)),
        orphans,
        torch.from_numpy(orphan_rows),
    )


def _grouped(expert_of_row: _Ints) -> _Ints:
    """The order that sorts rows by expert, stable. numpy sorts 16-bit numbers in linear time."""
    small = expert_of_row.astype(np.uint16) if len(expert_of_row) > 64 else expert_of_row
    return np.argsort(small, kind="stable")


def _actors(expert: int, replicas: Mapping[int, Sequence[str]]) -> Sequence[str]:
    actors = replicas.get(expert)
    if actors is None:
        raise PlacementError(f"the gate chose expert {expert}, which the placement does not know")
    return actors


def _deal(
    rows: _Ints, counts: Mapping[int, int], chosen: Mapping[int, Sequence[tuple[str, int]]]
) -> tuple[dict[str, list[tuple[int, _Ints]]], list[_Ints]]:
    """Each actor's (expert, rows) in order of experts, and the rows of experts that nobody serves."""
    shares: dict[str, list[tuple[int, _Ints]]] = {}
    left = []
    start = 0
    for expert, count in counts.items():
        stop = start + count
        if expert not in chosen:
            left.append(rows[start:stop])
            start = stop
            continue
        for actor, part in chosen[expert]:
            shares.setdefault(actor, []).append((expert, rows[start : start + part]))
            start += part
        assert start == stop, f"expert {expert} has {count} rows, the choice covers {count - stop + start}"
    return shares, left


def _share(actor_id: str, parts: list[tuple[int, _Ints]], top_k: int, tokens: int) -> Share:
    rows_R = np.concatenate([piece for _, piece in parts])
    token_of_row_R = rows_R // top_k
    used_T = np.zeros(tokens, dtype=bool)
    used_T[token_of_row_R] = True
    tokens_U = np.flatnonzero(used_T)
    if len(tokens_U) < tokens:
        token_of_row_R = (np.cumsum(used_T) - 1)[token_of_row_R]
    return Share(
        actor_id,
        torch.from_numpy(rows_R),
        tuple(expert for expert, _ in parts),
        tuple(len(piece) for _, piece in parts),
        torch.from_numpy(tokens_U),
        torch.from_numpy(token_of_row_R),
    )

"""Which row goes to which actor. Pure: tensors and a placement in, a plan out.

Shapes: T tokens, K experts a token, R = T * K rows; a row's index is t * K + k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.errors import PlacementError


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
    """`shares` go out now; `orphans` are experts of which no replica is left, with the rows that wait for one."""

    shares: tuple[Share, ...]
    orphans: tuple[int, ...]


Choose = Callable[[Mapping[int, int], Mapping[int, Sequence[str]]], Mapping[int, str]]
"""(rows of each expert, its usable replicas) -> the replica to use, for every expert."""


def balance_rows(rows: Mapping[int, int], replicas: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """Give each expert's rows to its replica with the fewest rows so far, experts with many rows first.

    Longest-processing-time list scheduling (Graham 1969). Ties go to the first in order, so the choice is the same
    each time.
    """
    load: dict[str, int] = {}
    chosen: dict[int, str] = {}
    for expert in sorted(rows, key=lambda e: (len(replicas[e]) > 1, -rows[e], e)):
        actor = min(replicas[expert], key=lambda a: load.get(a, 0))
        chosen[expert] = actor
        load[actor] = load.get(actor, 0) + rows[expert]
    return chosen


def plan_rows(
    ids_TK: Tensor, replicas: Mapping[int, Sequence[str]], choose: Choose = balance_rows, rows_R: Tensor | None = None
) -> Plan:
    """Split the rows (or only `rows_R` of them) among actors.

    ids_TK: chosen experts, int, on the CPU. `replicas`: expert -> actors that can serve it now. Raises PlacementError
    for an expert that the placement does not know.
    """
    top_k = ids_TK.shape[1]
    rows = torch.arange(ids_TK.numel()) if rows_R is None else rows_R
    expert_of_row = ids_TK.reshape(-1)[rows]
    order = torch.argsort(expert_of_row, stable=True)
    rows, expert_of_row = rows[order], expert_of_row[order]
    distinct, counts_E = torch.unique_consecutive(expert_of_row, return_counts=True)
    counts = dict(zip(distinct.tolist(), counts_E.tolist(), strict=True))
    for expert in counts:
        if expert not in replicas:
            raise PlacementError(f"the gate chose expert {expert}, which the placement does not know")
    orphans = tuple(e for e in counts if not replicas[e])
    alive = {e: n for e, n in counts.items() if replicas[e]}
    chosen = choose(alive, replicas)
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for expert, piece in zip(counts, torch.split(rows, list(counts.values())), strict=True):
        if expert in alive:
            pieces.setdefault(chosen[expert], []).append((expert, piece))
    return Plan(tuple(_share(actor, parts, top_k) for actor, parts in sorted(pieces.items())), orphans)


def _share(actor_id: str, parts: list[tuple[int, Tensor]], top_k: int) -> Share:
    rows_R = torch.cat([piece for _, piece in parts])
    tokens_U, token_of_row_R = torch.unique(rows_R // top_k, return_inverse=True)
    experts = tuple(expert for expert, _ in parts)
    counts = tuple(len(piece) for _, piece in parts)
    return Share(actor_id, rows_R, experts, counts, tokens_U, token_of_row_R)

"""Which row goes to which actor. Pure: tensors and a placement in, a plan out.

It runs for every layer of every step, so it is lists where there are few rows and numpy where there are many: at one
token, torch's operators would cost more than the rest of a dispatch.

Shapes: T tokens, K experts a token, R = T * K rows; a row's index is t * K + k; U distinct tokens of a share.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeray.dispatch.balance import Choose, balance_rows
from moeray.errors import PlacementError

FEW = 64
"""Up to so many rows, lists are faster than arrays."""

_Ints = npt.NDArray[np.int64]
_Rows = list[int] | _Ints


class Share(NamedTuple):
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


class Plan(NamedTuple):
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
    tokens, top_k = ids_TK.shape
    few = (tokens * top_k if rows_R is None else len(rows_R)) <= FEW
    groups = _group_few(ids_TK, rows_R) if few else _group_many(ids_TK, rows_R)
    counts, orphans = {}, []
    for expert, rows in groups.items():
        actors = replicas.get(expert)
        if actors is None:
            raise PlacementError(f"the gate chose expert {expert}, which the placement does not know")
        if actors:
            counts[expert] = len(rows)
        else:
            orphans.append(expert)
    parts = _deal(groups, choose(counts, replicas))
    index = _index_few if few else _index_many
    blocks = [_joined([groups[expert] for expert in orphans])]
    for part in parts.values():
        blocks += index(_joined(part.rows), top_k, tokens)
    # One buffer for all: making a tensor costs more than filling it.
    buffer = torch.from_numpy(_array(_joined(blocks)))
    tensors = iter(buffer.split_with_sizes([len(block) for block in blocks]))
    orphan_rows_R = next(tensors)
    shares = [
        Share(actor, next(tensors), tuple(part.experts), tuple(part.counts), next(tensors), next(tensors))
        for actor, part in parts.items()
    ]
    return Plan(tuple(shares), tuple(orphans), orphan_rows_R)


def _group_few(ids_TK: Tensor, rows_R: Tensor | None) -> dict[int, _Rows]:
    """Each expert's rows, experts in order."""
    flat = ids_TK.numpy().ravel()
    rows = range(len(flat)) if rows_R is None else rows_R.tolist()
    groups: dict[int, list[int]] = {}
    for row, expert in zip(rows, (flat if rows_R is None else flat[rows]).tolist(), strict=True):
        groups.setdefault(expert, []).append(row)
    return {expert: groups[expert] for expert in sorted(groups)}


def _group_many(ids_TK: Tensor, rows_R: Tensor | None) -> dict[int, _Rows]:
    """As `_group_few`."""
    flat = ids_TK.numpy().ravel()
    chosen = None if rows_R is None else rows_R.numpy()
    experts = flat if chosen is None else flat[chosen]
    # Rows of an expert stay in order; numpy sorts 16-bit numbers in linear time.
    order = np.argsort(experts.astype(np.uint16), kind="stable")
    experts = experts[order]
    stops = [*(np.flatnonzero(experts[1:] != experts[:-1]) + 1).tolist(), len(experts)]
    rows = order if chosen is None else chosen[order]
    starts = [0, *stops[:-1]]
    return {int(experts[start]): rows[start:stop] for start, stop in zip(starts, stops, strict=True)}


class _Part(NamedTuple):
    """What one actor gets: for each of its experts the rows, and how many."""

    experts: list[int]
    counts: list[int]
    rows: list[_Rows]


def _deal(groups: Mapping[int, _Rows], chosen: Mapping[int, Sequence[tuple[str, int]]]) -> dict[str, _Part]:
    """Each actor's part, actors and experts in order."""
    parts: dict[str, _Part] = {}
    for expert, pieces in sorted(chosen.items()):
        rows, start = groups[expert], 0
        for actor, count in pieces:
            part = parts.get(actor)
            if part is None:
                part = parts[actor] = _Part([], [], [])
            part.experts.append(expert)
            part.counts.append(count)
            part.rows.append(rows if count == len(rows) else rows[start : start + count])
            start += count
        assert start == len(rows), f"the choice for expert {expert} covers {start} of {len(rows)} rows"
    return dict(sorted(parts.items()))


def _index_few(rows: _Rows, top_k: int, tokens: int) -> list[_Rows]:
    """The rows, their distinct tokens in order, and each row's place among those."""
    token_of_row = [row // top_k for row in rows]
    used = sorted(set(token_of_row))
    place = {token: i for i, token in enumerate(used)}
    return [rows, used, [place[token] for token in token_of_row]]


def _index_many(rows: _Rows, top_k: int, tokens: int) -> list[_Rows]:
    """As `_index_few`."""
    token_of_row = _array(rows) // top_k
    is_used = np.zeros(tokens, dtype=bool)
    is_used[token_of_row] = True
    used = np.flatnonzero(is_used)
    if len(used) < tokens:
        token_of_row = (np.cumsum(is_used) - 1)[token_of_row]
    return [rows, used, token_of_row]


def _joined(parts: Sequence[_Rows]) -> _Rows:
    if not parts:
        return []
    if isinstance(parts[-1], list):
        return list(itertools.chain.from_iterable(parts))
    return np.concatenate([_array(part) for part in parts])


def _array(rows: _Rows) -> _Ints:
    return rows if isinstance(rows, np.ndarray) else np.array(rows, dtype=np.int64)

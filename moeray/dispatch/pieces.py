"""A layer with many rows goes out in pieces, of which an actor has two at a time: it computes one while the other is
copied, and who is done early takes over what another has not been sent yet (work stealing, Blumofe & Leiserson 1999).
So the layer ends when all actors do, however their speed changes meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moeray.buffers import ALIGN
from moeray.dispatch.plan import Share

PIECE_BYTES = 4 << 20
"""Of a piece's outputs: long enough to compute that a message more costs nothing beside it."""
AHEAD = 2
"""Pieces that an actor has at a time; one where its channel takes nothing before it is read."""
_INDEX_BYTES = 8
"""Beside each row that goes out: its place among the tokens."""


def rows_of_a_piece(row_bytes: int, room: int) -> int:
    """How many rows go out at once to an actor whose channel takes so many bytes before they are read; 0: all of them.

    All that is on its way fits the channel twice, inputs and outputs, so that neither side ever waits for the other to
    read.
    """
    return min(PIECE_BYTES, room // (2 * AHEAD)) // max(row_bytes, 1)


def rows_of_a_frame(row_bytes: int, most_bytes: int) -> int:
    """How many rows a frame with a payload of at most so many bytes carries, and so does that of their outputs. At
    least one: where that is too large, the channel says so."""
    return max(1, (most_bytes - 2 * ALIGN) // (row_bytes + _INDEX_BYTES))


def cut(share: Share, most_rows: int) -> list[Share]:
    """The share in pieces of at most so many rows, in order; an expert is in two of them only where it has more."""
    if share.size <= most_rows:
        return [share]
    pieces: list[list[tuple[int, int]]] = [[]]
    size = 0
    for expert, rows in zip(share.experts, share.counts, strict=True):
        for begin in range(0, rows, most_rows):
            count = min(most_rows, rows - begin)
            if size + count > most_rows:
                pieces.append([])
                size = 0
            pieces[-1].append((expert, count))
            size += count
    parts, begin = [], 0
    for piece in pieces:
        end = begin + sum(count for _, count in piece)
        parts.append(_part(share, piece, begin, end))
        begin = end
    return parts


def _part(share: Share, experts: Sequence[tuple[int, int]], begin: int, end: int) -> Share:
    """Its rows [begin, end), which are those of these experts, so many each."""
    tokens_U, token_of_row_R = share.tokens_U, share.token_of_row_R[begin:end]
    is_used = np.zeros(len(tokens_U), bool)
    is_used[token_of_row_R] = True
    return Share(
        share.actor_id,
        [expert for expert, _ in experts],
        [count for _, count in experts],
        share.rows[8 * begin : 8 * end],
        tokens_U[is_used].tobytes(),
        (is_used.cumsum() - 1)[token_of_row_R].tobytes(),
    )


class Backlog:
    """What of a layer is not sent yet, by the actor that it is planned for."""

    def __init__(self) -> None:
        self._left: dict[str, deque[Share]] = {}

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, actor_id: str, pieces: Iterable[Share]) -> None:
        """At least one, behind what the actor has already."""
        self._left.setdefault(actor_id, deque()).extend(pieces)

    def drop(self, actor_id: str) -> list[Share]:
        """All of the actor's."""
        return list(self._left.pop(actor_id, ()))

    def take(
        self,
        actor_id: str,
        replicas: Mapping[int, Sequence[str]],
        rates: Mapping[str, float],
        in_flight: Mapping[str, int],
    ) -> Share | None:
        """The actor's next piece; with none left, the last one of whoever is farthest from its end, if the actor hosts
        its experts and would be done with it sooner.

        `replicas`: actors that host an expert; `rates`: their relative speed, 1 where absent; `in_flight`: rows that
        they have been sent.
        """
        if actor_id in self._left:
            piece = self._left[actor_id].popleft()
            self._forget_empty(actor_id)
            return piece
        rest = {
            other: (sum(piece.size for piece in left) + in_flight.get(other, 0)) / rates.get(other, 1.0)
            for other, left in self._left.items()
        }
        for other in sorted(rest, key=lambda other: (-rest[other], other)):
            piece = self._left[other][-1]
            done = (in_flight.get(actor_id, 0) + piece.size) / rates.get(actor_id, 1.0)
            if done <= rest[other] and all(actor_id in replicas.get(expert, ()) for expert in piece.experts):
                self._left[other].pop()
                self._forget_empty(other)
                return piece._replace(actor_id=actor_id)
        return None

    def _forget_empty(self, actor_id: str) -> None:
        if not self._left[actor_id]:
            del self._left[actor_id]

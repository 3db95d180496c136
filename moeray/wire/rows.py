"""The two messages of which a step sends thousands: a layer's rows for an actor, and their outputs.

On the wire they are frames like any other, with ops FORWARD and RESULT. Between two layers a step's weights push
everything out of the caches, so that each thing which is touched costs more than the work that it does: these are
written in one call from where their rows lie, and read without making tensors. Without the compiled part
(`native/rows.c`) they go as ordinary frames.

Shapes: T tokens, U those that are sent, K experts a token, R rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeray.buffers import aligned
from moeray.errors import WireError
from moeray.wire.frame import Frame, Op
from moeray.wire.row_message import Place, native
from moeray.wire.tensors import CODES, DTYPES, Tensors

_INT64 = CODES[torch.int64]


class Forward(NamedTuple):
    """Rows for an expert actor: those of `counts[i]` tokens for each `experts[i]`, one expert after the other.

    x_TD is contiguous. `tokens`: which of them are sent, [U]; `token_of_row`: each row's place among these, [R]; both
    the bytes of int64 numbers.
    """

    id: int
    layer: int
    epoch: int
    experts: list[int]
    counts: list[int]
    x_TD: Tensor
    tokens: bytes
    token_of_row: bytes

    @property
    def payload_bytes(self) -> int:
        x_TD = self.x_TD
        return aligned(len(self.tokens) // 8 * x_TD.shape[1] * x_TD.itemsize) + aligned(len(self.token_of_row))

    def frame(self) -> Frame:
        """See `RowMessage`."""
        x_UD = self.x_TD[torch.from_numpy(np.frombuffer(self.tokens, np.int64).copy())]
        token_of_row_R = torch.from_numpy(np.frombuffer(self.token_of_row, np.int64).copy())
        meta = {"experts": self.experts, "counts": self.counts}
        return Frame(Op.FORWARD, self.id, self.layer, self.epoch, meta, (x_UD, token_of_row_R))

    def write(self, out: bytearray, ring: memoryview | None, where: int, most: int) -> int | None:
        """See `RowMessage`."""
        assert native is not None
        x_TD = self.x_TD
        if x_TD.dtype not in CODES:  # the frame's refusal says why
            return None
        size: int | None = native.write_forward(
            out, ring, where, most, self.id, self.layer, self.epoch, self.experts, self.counts,
            CODES[x_TD.dtype], x_TD.data_ptr(), len(x_TD), x_TD.shape[1], self.tokens, self.token_of_row,
        )  # fmt: skip
        return size

    def send_in_place(self, lane: int) -> bool:
        """See `RowMessage`."""
        return False


class Result(NamedTuple):
    """The outputs of a forward: [rows, width] of `dtype` at the beginning of a place."""

    id: int
    layer: int
    epoch: int
    compute_s: float
    queue_s: float
    dtype: torch.dtype
    place: Place
    rows: int
    width: int

    @property
    def payload_bytes(self) -> int:
        return aligned(self.rows * self.width * self.dtype.itemsize)

    def frame(self) -> Frame:
        """See `RowMessage`."""
        out_R = torch.frombuffer(self.place.memory, dtype=self.dtype, count=self.rows * self.width)
        meta = {"compute_s": self.compute_s, "queue_s": self.queue_s}
        return Frame(Op.RESULT, self.id, self.layer, self.epoch, meta, (out_R.view(self.rows, self.width),))

    def send_in_place(self, lane: int) -> bool:
        """See `RowMessage`."""
        assert native is not None
        place = self.place
        went: bool = native.send_outputs(
            lane, place.position, self.id, self.layer, self.epoch, self.compute_s, self.queue_s,
            CODES[self.dtype], place.address, self.rows, self.width,
        )  # fmt: skip
        return went

    def write(self, out: bytearray, ring: memoryview | None, where: int, most: int) -> int | None:
        """See `RowMessage`."""
        assert native is not None
        size: int | None = native.write_result(
            out, ring, where, most, self.id, self.layer, self.epoch, self.compute_s, self.queue_s,
            CODES[self.dtype], self.place.address, self.rows, self.width,
        )  # fmt: skip
        return size


def put_rows(tensors: Sequence[Tensor], rows: bytes, out_TKD: Tensor) -> bool:
    """Copy the rows of a RESULT to their places among the T * K of out_TKD (contiguous); `rows`: where each belongs,
    int64 as bytes.

    False, and nothing is copied, where the tensors are not one of so many rows and of out's width and dtype.
    """
    count, width = len(rows) // 8, out_TKD.shape[2]
    if native is None or not isinstance(tensors, Tensors):
        rows_RD = tensors[0] if len(tensors) == 1 else None
        if rows_RD is None or rows_RD.shape != (count, width) or rows_RD.dtype != out_TKD.dtype:
            return False
        out_TKD.view(-1, width).index_copy_(0, torch.from_numpy(np.frombuffer(rows, np.int64).copy()), rows_RD)
        return True
    spans = tensors.spans
    if len(spans) != 1 or spans[0][:2] != (CODES.get(out_TKD.dtype), [count, width]):
        return False
    out_rows, row_bytes = out_TKD.shape[0] * out_TKD.shape[1], width * out_TKD.itemsize
    native.put_rows(tensors.memory, tensors.start, rows, out_TKD.data_ptr(), out_rows, row_bytes)
    return True


class Given(NamedTuple):
    """Where the tokens of a received FORWARD lie: `tokens` rows of `width` numbers of `dtype` at the address `x`, valid
    as long as its frame's tensors are. `token_of_row`: each row's token, a checked copy of int64 numbers [rows]; the
    frame's may lie in memory that the peer can still write."""

    x: int
    tokens: int
    width: int
    dtype: torch.dtype
    token_of_row: bytes
    rows: int


def check_forward(frame: Frame) -> Given | None:
    """Where a FORWARD's tensors lie, if that is a channel's memory and the compiled part is there.

    Raises WireError unless its experts and counts go with each other and with the row index, and that with the tokens.
    """
    experts, counts, tensors = frame.meta.get("experts"), frame.meta.get("counts"), frame.tensors
    if type(experts) is not list or type(counts) is not list:
        raise WireError("a FORWARD frame names no experts and counts")
    found = None
    if native is None or not isinstance(tensors, Tensors):
        fits = _fits(experts, counts, tensors)
    else:
        found = _find(experts, counts, tensors)
        fits = found is not None
    if not fits:
        raise WireError("a FORWARD frame's experts, counts and row index do not fit its tensors")
    return found


def _find(experts: list[Any], counts: list[Any], tensors: Tensors) -> Given | None:
    assert native is not None
    if len(tensors) != 2:
        return None
    (code, x_shape, _, x_at), (index_code, index_shape, _, index_at) = tensors.spans
    if len(x_shape) != 2 or len(index_shape) != 1 or index_code != _INT64:
        return None
    (tokens, _), (rows,) = x_shape, index_shape
    found = native.forward_memory(experts, counts, tensors.memory, tensors.start + index_at, rows, tokens)
    if found is None:
        return None
    address, token_of_row = found
    return Given(address + tensors.start + x_at, tokens, x_shape[1], DTYPES[code], token_of_row, rows)


def _fits(experts: list[Any], counts: list[Any], tensors: Sequence[Tensor]) -> bool:
    if len(tensors) != 2 or len(experts) != len(counts) or not all(type(n) is int for n in (*experts, *counts)):
        return False
    if len(set(experts)) != len(experts) or not all(n > 0 for n in counts):
        return False
    x_UD, index = tensors
    if x_UD.dim() != 2 or index.dtype != torch.int64 or index.shape != (sum(counts),):
        return False
    return len(index) == 0 or bool(index.min() >= 0 and index.max() < len(x_UD))

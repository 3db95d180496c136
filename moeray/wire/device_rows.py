"""A layer's rows and their outputs on a channel's rings on a device: FORWARD and RESULT whose large tensor is named in
`meta` and lies there. The row index, which both sides plan by, is an ordinary tensor.

Shapes: T tokens, U those that are sent, K experts a token, R rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeray.buffers import aligned
from moeray.errors import WireError
from moeray.wire.base import Channel
from moeray.wire.device_rings import DeviceRings
from moeray.wire.frame import Frame
from moeray.wire.tensors import CODES, DTYPES

KEY = "device"


class Placed(NamedTuple):
    """Rows [rows, width] of a dtype at a position of their sender's ring."""

    position: int
    rows: int
    width: int
    code: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize


def place(rings: DeviceRings, rows: int, like_RD: Tensor, fill: Callable[[Tensor], object]) -> Placed | None:
    """Have `fill` write so many rows, of the width and dtype of `like_RD`, to the ring: they are there once the memory
    is settled. None where the ring has no room, or the wire does not know the dtype. Raises WireError."""
    code, width = CODES.get(like_RD.dtype), like_RD.shape[-1]
    if code is None:
        return None
    nbytes = rows * width * like_RD.itemsize
    position = rings.reserve(aligned(nbytes))
    if position is None:
        return None
    fill(rings.piece(position, nbytes).view(like_RD.dtype).view(rows, width))
    rings.commit(position, aligned(nbytes))
    return Placed(position, rows, width, code)


def place_tokens(rings: DeviceRings, x_TD: Tensor, tokens: bytes) -> Placed | None:
    """These tokens (distinct, in order, int64 as bytes) of x, as `place`; they are there when it returns."""

    def fill(to_UD: Tensor) -> None:
        if len(to_UD) == len(x_TD):  # all of them, and no index is needed on the device
            to_UD.copy_(x_TD)
        else:
            torch.index_select(x_TD, 0, index_on(tokens, x_TD.device), out=to_UD)

    placed = place(rings, len(tokens) // 8, x_TD, fill)
    if placed is not None:
        rings.memory.settle()
    return placed


def named_in(frame: Frame) -> Placed | None:
    """What a frame names on a device, if anything. Raises WireError for what is no such name."""
    if KEY not in frame.meta:
        return None
    name: Any = frame.meta[KEY]
    if type(name) is not list or len(name) != 4 or not all(type(number) is int for number in name):
        raise WireError("the peer's frame names rows on a device in another way than this release")
    placed = Placed(*name)
    if min(placed) < 0 or placed.code >= len(DTYPES) or not placed.dtype.is_floating_point:
        raise WireError(f"the peer names rows on a device that cannot be: {name}")
    return placed


@contextmanager
def brought(frame: Frame, channel: Channel) -> Iterator[tuple[Frame, DeviceRings | None]]:
    """A FORWARD with its tokens in front of its other tensors, also where they lie on a device, and the rings by which
    they came there. Within the block they are valid; what computes with them is to be settled by its end. Raises
    WireError."""
    placed, rings = named_in(frame), channel.device if KEY in frame.meta else None
    if placed is None:
        yield frame, None
        return
    if rings is None:
        raise WireError("the peer names rows on a device that it never shared")
    with rings.use():
        try:
            # The index is a copy: what is found good must stay so, and the peer can write to where the frame's lies.
            others = [tensor.clone() for tensor in frame.tensors]
            yield frame._replace(tensors=(held(rings, placed), *others)), rings
        finally:
            rings.release()


def held(rings: DeviceRings, placed: Placed) -> Tensor:
    """The rows [rows, width] that the peer has placed, on this side's device, until the rings' `release`. Raises
    WireError outside its ring."""
    memory = rings.hold(placed.position, aligned(placed.nbytes))
    rows_RD = memory[: placed.nbytes].view(placed.dtype).view(placed.rows, placed.width)
    return rows_RD.to(rings.memory.device)


def take_outputs(rings: DeviceRings, placed: Placed, rows: bytes, out_TKD: Tensor) -> bool:
    """Copy what the peer has placed to these rows (int64 as bytes) of the T * K of out_TKD, which lies on the device.

    False, and nothing is copied, where it is not so many rows of out's width and dtype. Raises WireError outside the
    ring.
    """
    width = out_TKD.shape[2]
    fits = (placed.rows, placed.width, placed.dtype) == (len(rows) // 8, width, out_TKD.dtype)
    if fits:
        out_TKD.view(-1, width).index_copy_(0, index_on(rows, out_TKD.device), held(rings, placed))
        rings.memory.settle()
        rings.release()
    return fits


def index_on(numbers: bytes, device: torch.device) -> Tensor:
    """int64 numbers as bytes, as a tensor on the device."""
    return torch.from_numpy(np.frombuffer(numbers, np.int64).copy()).to(device)

"""What a channel knows of the messages of which a step sends thousands (`rows.py`): how they are written and read.

Without the compiled part (`native`) they go as ordinary frames. This module imports no torch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from moeray.compiled import compiled
from moeray.wire.frame import INLINE, Frame, Header, Limits, Op

native = compiled("moeray.wire._native")
_OPS = {int(op): op for op in (Op.FORWARD, Op.RESULT)}


class RowMessage(Protocol):
    """A layer's rows, or their outputs."""

    @property
    def payload_bytes(self) -> int: ...

    def frame(self) -> Frame:
        """The message as an ordinary frame."""
        ...

    def write(self, out: bytearray, ring: memoryview | None, where: int, most: int) -> int | None:
        """Write the message to `out`, but for its payload where there is room in the `ring` (at `where`). Its size, or
        None where it does not fit, or its header is longer than `most`."""
        ...

    def send_in_place(self, lane: int) -> bool:
        """Send it on the lane in one call, from where its payload lies, if nothing else goes out at the time and the
        peer keeps up."""
        ...


class Place(NamedTuple):
    """Memory that outputs are written to. `position`: in a channel's ring, where they go out from as they are; INLINE
    elsewhere."""

    memory: memoryview
    address: int
    position: int = INLINE


def read_header(memory: memoryview, start: int, end: int, limits: Limits) -> Header | None:
    """The header of a FORWARD or RESULT that lies whole in bytes [start, end) of the memory, within the limits.

    None for anything else, right or wrong: `frame.unpack_header` tells.
    """
    if native is None:
        return None
    found = native.read_rows(memory, start, end, limits.max_header_bytes, limits.max_payload_bytes)
    return None if found is None else Header(_OPS[found[0]], *found[1:])

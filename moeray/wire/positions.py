"""How far a ring is written and read: the arithmetic of both its ends, wherever its bytes lie.

Positions only grow: position p lies at byte p % capacity. The reader's progress is a number in shared memory, which the
writer mistrusts; the writer's travels in its frames, which the reader mistrusts.
"""

from __future__ import annotations

from ctypes import c_uint64

from moeray.buffers import ALIGN
from moeray.errors import WireError
from moeray.wire.lane import Ring


def reserve(ring: Ring, size: int) -> int | None:
    """The position where `size` bytes fit in one piece, or None when the receiver has not made room.

    Raises WireError when the receiver claims to have read what was never written.
    """
    ring.done = _read_progress(ring)
    position = ring.head
    empty = ring.done == position
    if empty or position % ring.capacity + size > ring.capacity:
        # An empty ring, too, starts over at its first byte, which is still in the caches.
        position = -(-position // ring.capacity) * ring.capacity
    if empty:
        ring.start = position
    room = max(ring.done, ring.start) + ring.capacity - position
    return position if size <= room else None


def _read_progress(ring: Ring) -> int:
    done = c_uint64.from_address(ring.progress).value
    if not ring.done <= done <= ring.head:
        raise WireError("the peer claims to have read shared memory that was never written; the channel is closed")
    return done


def hold(ring: Ring, position: int, size: int) -> int:
    """The byte offset of a payload, which stays until `release`. Raises WireError outside the ring."""
    at = position % ring.capacity
    # The sender skips what is left before the ring's end, so a position may be up to two rings ahead.
    ahead = position - ring.done
    if not 0 <= ahead <= 2 * ring.capacity or position % ALIGN or at + size > ring.capacity:
        raise WireError(f"the peer names shared memory outside its ring ({position}, {size} bytes)")
    ring.head = position + size
    return at


def release(ring: Ring) -> None:
    """Give the last payload's bytes back to the sender."""
    if ring.head != ring.done:
        ring.done = ring.head
        c_uint64.from_address(ring.progress).value = ring.done

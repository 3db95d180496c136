"""Shared memory for large payloads: one ring per direction, written by the sender and read in place by the receiver.

The ring is a sealed memfd: it has no name, so a kill leaves nothing behind, and nobody can shrink it under its reader.
Its first page holds one number, how far the receiver is done; how far the sender has written travels in the frames.
Each side's own numbers are a `Ring`, which the compiled part of the wire reads and writes too.
Positions only grow: position p lies at byte p % capacity. Each side mistrusts what the other writes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from ctypes import c_uint64

import numpy as np

from moeray.buffers import ALIGN, Bytes, aligned
from moeray.errors import WireError
from moeray.wire.lane import Ring

_PAGE = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingWriter:
    """The sender's end. `fd` goes to the peer and is closed by `handed_over`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // _PAGE * _PAGE
        self.fd = os.memfd_create("moeray-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, _PAGE + self.capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory, self.ring = _map(self.fd, _PAGE + self.capacity)
        except OSError:
            os.close(self.fd)
            raise

    def handed_over(self) -> None:
        """Close the descriptor; the mapping stays."""
        os.close(self.fd)

    def reserve(self, size: int) -> int | None:
        """The position where `size` bytes fit in one piece, or None when the receiver has not made room.

        Raises WireError when the receiver claims to have read what was never written.
        """
        self.ring.done = self._read_progress()
        position = self.ring.head
        empty = self.ring.done == position
        if empty or position % self.capacity + size > self.capacity:
            # An empty ring, too, starts over at its first byte, which is still in the caches.
            position = -(-position // self.capacity) * self.capacity
        if empty:
            self.ring.start = position
        room = max(self.ring.done, self.ring.start) + self.capacity - position
        return position if size <= room else None

    def write(self, position: int, chunks: list[memoryview]) -> None:
        """Copy the chunks to a reserved position, each padded to 64 bytes."""
        at = position % self.capacity
        for chunk in chunks:
            size = chunk.nbytes
            # Through numpy, which lets other threads run while it copies.
            self._memory[at : at + size] = np.frombuffer(chunk, np.uint8) if size else 0
            at += aligned(size)

    def piece(self, position: int, size: int) -> memoryview:
        """The bytes of a reserved position, to be written by the caller."""
        at = position % self.capacity
        return self._memory.data[at : at + size]

    def commit(self, position: int, size: int) -> None:
        """The frame that names the reserved position is on its way: the bytes are the receiver's now."""
        self.ring.head = position + size

    def take_back(self, position: int, size: int) -> None:
        """What was committed there last is not to be sent: its room is free again."""
        if self.ring.head == position + size:
            self.ring.head = position

    def _read_progress(self) -> int:
        done = c_uint64.from_address(self.ring.progress).value
        if not self.ring.done <= done <= self.ring.head:
            raise WireError("the peer claims to have read shared memory that was never written; the channel is closed")
        return done


class RingReader:
    """The receiver's end of the peer's ring, made from its descriptor (which the caller closes)."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or size <= _PAGE or size % _PAGE:
            raise WireError("the peer's shared memory is not a sealed ring; run one release of moeray everywhere")
        self.capacity = size - _PAGE
        self.memory, self.ring = _map(fd, size)

    def hold(self, position: int, size: int) -> int:
        """The byte offset in `memory` of a payload, which stays until `release`. Raises WireError outside the ring."""
        at = position % self.capacity
        # The sender skips what is left before the ring's end, so a position may be up to two rings ahead.
        ahead = position - self.ring.done
        if not 0 <= ahead <= 2 * self.capacity or position % ALIGN or at + size > self.capacity:
            raise WireError(f"the peer names shared memory outside its ring ({position}, {size} bytes)")
        self.ring.head = position + size
        return at

    def release(self) -> None:
        """Give the last payload's bytes back to the sender."""
        ring = self.ring
        if ring.head != ring.done:
            ring.done = ring.head
            c_uint64.from_address(ring.progress).value = ring.done


def _map(fd: int, size: int) -> tuple[Bytes, Ring]:
    """The data bytes, and the ring over them. The array keeps the mapping alive, so a late view never faults."""
    mapping = mmap.mmap(fd, size)
    memory = np.frombuffer(mapping, np.uint8, size - _PAGE, _PAGE)
    address = memory.ctypes.data
    return memory, Ring(address, size - _PAGE, address - _PAGE, 0, 0)

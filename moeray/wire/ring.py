"""Shared memory for large payloads: one ring per direction, written by the sender and read in place by the receiver.

The ring is a sealed memfd: it has no name, so a kill leaves nothing behind, and nobody can shrink it under its reader.
Its first page holds one number, how far the receiver is done; how far the sender has written travels in the frames.
Behind it is room for the same of a second ring, whose bytes lie on a device (`device_rings.py`).
Each side's own numbers are a `Ring`, which the compiled part of the wire reads and writes too.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

from moeray.buffers import Bytes, aligned
from moeray.errors import WireError
from moeray.wire.lane import Ring
from moeray.wire.positions import hold, release, reserve

_PAGE = mmap.PAGESIZE
_SECOND = 128
"""Bytes from the first ring's number to the second's: lines of a CPU's cache are fetched in pairs."""
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
        return reserve(self.ring, size)

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

    @property
    def second_progress(self) -> int:
        """Address of the number for a second ring, in the same page: how far the receiver is done with that."""
        return self.ring.progress + _SECOND


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
        return hold(self.ring, position, size)

    def release(self) -> None:
        """Give the last payload's bytes back to the sender."""
        release(self.ring)

    @property
    def second_progress(self) -> int:
        """See `RingWriter`."""
        return self.ring.progress + _SECOND


def _map(fd: int, size: int) -> tuple[Bytes, Ring]:
    """The data bytes, and the ring over them. The array keeps the mapping alive, so a late view never faults."""
    mapping = mmap.mmap(fd, size)
    memory = np.frombuffer(mapping, np.uint8, size - _PAGE, _PAGE)
    address = memory.ctypes.data
    return memory, Ring(address, size - _PAGE, address - _PAGE, 0, 0)

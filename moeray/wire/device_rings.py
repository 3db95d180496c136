"""A channel's two rings on a device, one for each direction: as `ring.py`, but the bytes are never the host's.

Each is allocated by its writer and opened by its reader. How far the reader is done is a number in the page of the
channel's ring of host memory; how far the writer has come travels in the frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moeray.errors import ChannelClosedError
from moeray.wire.device_memory import DeviceMemory, Region
from moeray.wire.lane import Ring
from moeray.wire.lifeline import Lifeline
from moeray.wire.positions import hold, release, reserve
from moeray.wire.retired import Retired
from moeray.wire.ring import RingReader, RingWriter


class OwnRing:
    """This side's ring: `region` for the bytes, `lifeline` for whether the peer still reads them."""

    def __init__(self, region: Region, lifeline: Lifeline, host: RingWriter) -> None:
        """`host`: the channel's ring in host memory, in whose page the peer says how far it is."""
        self.region = region
        self.lifeline = lifeline
        self._host = host  # keeps the page
        self.ring = Ring(0, len(region.memory), host.second_progress, 0, 0, 0)


class PeersRing:
    """The peer's ring, open here; `held`: the descriptor that tells the peer so."""

    def __init__(self, region: Region, held: int, host: RingReader) -> None:
        """`host`: as for `OwnRing`, the peer's."""
        self.region = region
        self._held = held
        self._host = host
        self.ring = Ring(0, len(region.memory), host.second_progress, 0, 0, 0)

    def close(self) -> None:
        """Let the peer have its memory back. Once."""
        self.region.close()
        os.close(self._held)


class DeviceRings:
    """Both rings of a channel. One thread at a time sends by them, one receives. What they lend is valid within `use`.

    `close` is any thread's: the memory stays until nobody uses it, here and at the peer's.
    """

    def __init__(self, memory: DeviceMemory, own: OwnRing, peers: PeersRing, retired: Retired) -> None:
        self.memory = memory
        self._own = own
        self._peers = peers
        self._retired = retired
        self._lock = threading.Lock()  # guards the two below
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Raises ChannelClosedError after `close`."""
        with self._lock:
            if self._closed:
                raise ChannelClosedError("the channel's device memory is closed; connect again")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._give_up()

    def reserve(self, nbytes: int) -> int | None:
        """The position of so many bytes for the next message; None where the peer has not made room. Raises WireError
        where the peer's progress cannot be."""
        return reserve(self._own.ring, nbytes) if nbytes else None

    def piece(self, position: int, nbytes: int) -> Tensor:
        """The bytes at a reserved position, uint8 [nbytes], to be written."""
        at = position % self._own.ring.capacity
        return self._own.region.memory[at : at + nbytes]

    def commit(self, position: int, nbytes: int) -> None:
        """A message is to name them: they are the peer's from now on."""
        self._own.ring.head = position + nbytes

    def hold(self, position: int, nbytes: int) -> Tensor:
        """What the peer has written there, uint8 [nbytes], until `release`. Raises WireError outside its ring, and
        ChannelClosedError where the peer is gone: a device may fail that reads the memory of a dead process."""
        if self._own.lifeline.cut:
            raise ChannelClosedError("the peer is gone, and its device memory with it; connect again")
        at = hold(self._peers.ring, position, nbytes)
        return self._peers.region.memory[at : at + nbytes]

    def release(self) -> None:
        """What was held last is read, and the device has done so: the peer may write there again."""
        release(self._peers.ring)

    def close(self) -> None:
        """No more is sent or received by them. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = not self._users
        if last:
            self._give_up()

    def _give_up(self) -> None:
        self._peers.close()
        self._retired.add(self._own.region, self._own.lifeline)

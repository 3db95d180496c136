"""The channel: a stream socket, within a node with large payloads in shared memory rings; across nodes gRPC carries its
bytes (`grpc_tunnel.py`).

A frame costs one system call on each side. A payload that finds no room in the ring goes through the socket, which is
always correct. Waiting is the kernel's (SO_RCVTIMEO, poll); nothing spins.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from moeray.errors import WireError
from moeray.wire.base import T
from moeray.wire.connection import Carrier, Connection
from moeray.wire.frame import Limits
from moeray.wire.receiver import Receiver
from moeray.wire.ring import RingReader, RingWriter
from moeray.wire.sender import RING_THRESHOLD, Sender

if TYPE_CHECKING:  # it is of torch, which an endpoint has none of
    from moeray.wire.device_rings import DeviceRings

__all__ = ["RING_THRESHOLD", "SocketChannel"]


class SocketChannel:
    """One end of a connected socket; see `Channel`. Made by `connect` and by the listener.

    It begins with the limits of an unproven peer; `admit` lifts them once the handshake is over.
    """

    def __init__(self, sock: socket.socket, send_timeout_s: float, carrier: Carrier) -> None:
        self.kind = carrier.kind
        self._connection = Connection(sock, carrier)
        self._sender = Sender(self._connection, send_timeout_s)
        self._receiver = Receiver(self._connection)
        self._close_lock = threading.Lock()
        self._released = False
        self.device: DeviceRings | None = None
        # Bound here, they cost a frame no further call.
        self.send = self._sender.send
        self.send_rows = self._sender.send_rows
        self.place_outputs = self._sender.place_outputs
        self.flush = self._sender.flush
        self.recv = self._receiver.recv
        self.release = self._receiver.release

    def admit(self, peer: str, limits: Limits, ring_bytes: int, deadline: float) -> None:
        """The peer is proven: exchange the shared memory rings and lift the limits. Raises WireError."""
        self.peer = peer
        self._sender.admit(limits, ring_bytes)
        self._receiver.admit(limits, deadline)
        self._connection.admit(limits)

    @property
    def peer(self) -> str:
        """See `Channel.peer`."""
        return self._connection.peer

    @peer.setter
    def peer(self, actor_id: str) -> None:
        self._connection.peer = actor_id

    @property
    def send_timeout_s(self) -> float:
        """See `Channel.send`."""
        return self._sender.timeout_s

    @send_timeout_s.setter
    def send_timeout_s(self, seconds: float) -> None:
        self._sender.timeout_s = seconds

    @property
    def shares_memory(self) -> bool:
        """Whether descriptors reach the peer."""
        return self.kind == "unix"

    @property
    def host_rings(self) -> tuple[RingWriter, RingReader]:
        """This side's shared memory and the peer's, on a channel that was admitted with both."""
        writer, reader = self._sender.ring, self._receiver.ring
        if writer is None or reader is None:
            raise WireError(f"{self.peer} shares no memory; set wire.shared_memory_bytes alike on both sides")
        return writer, reader

    def use_device(self, rings: DeviceRings) -> None:
        """Rows may go by these rings, which are closed with the channel: at once, where that is closed."""
        with self._close_lock:
            if not self._released:
                self.device = rings
                return
        rings.close()

    @property
    def lane(self) -> int:
        """See `Channel.lane`."""
        return self._connection.open_lane

    @property
    def room(self) -> int:
        """See `Channel.room`: both sides go by the same settings, so their rings are alike."""
        return self._sender.room

    @property
    def most_payload_bytes(self) -> int:
        """See `Channel.most_payload_bytes`."""
        return self._sender.most_payload_bytes

    @property
    def closed(self) -> bool:
        """True once either side is known to be gone."""
        return self._connection.shut

    def on_lane(self, use: Callable[[int], T]) -> T | None:
        """See `Channel.on_lane`."""
        # Not bound: the lane points to memory of both halves, which this call keeps alive.
        return self._receiver.on_lane(use)

    def close(self) -> None:
        """See `Channel.close`."""
        with self._close_lock:
            if self._released:
                return
            self._connection.shut_down()
            # Whoever is in send or recv is awake by now; only then is the descriptor's number free for others.
            with self._sender.lock, self._receiver.lock:
                self._connection.close()
                self._sender.drop()
                self._receiver.drop()
                self._released = True
            rings, self.device = self.device, None
        if rings is not None:
            rings.close()
        self._connection.carrier.hang_up()

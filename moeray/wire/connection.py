"""The socket of a channel, as the channel and both of its halves have it: who is at its other side, and whether it is
still open.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from moeray.errors import ChannelClosedError
from moeray.types import Address
from moeray.wire.frame import Limits
from moeray.wire.lane import Lane


class Carrier(Protocol):
    """What takes a socket's bytes to the peer."""

    @property
    def kind(self) -> str:
        """See `Channel.kind`."""

    @property
    def why(self) -> str:
        """Why it has ended, where it knows more than the socket says; else empty."""

    def hang_up(self) -> None:
        """The socket is closed; ends what still runs. What was written to it before goes out first, for a second."""


@dataclass(frozen=True)
class Kernel:
    """The `Carrier` of a socket whose other end is the peer's."""

    kind: str
    why: str = ""

    def hang_up(self) -> None:
        """The kernel has done so."""


class Connection:
    """A connected socket.

    `peer`: the actor id of the other side, empty until it is known. `lane`: what the compiled part knows of this end.
    `shut`: either side is known to be gone.
    """

    def __init__(self, sock: socket.socket, carrier: Carrier) -> None:
        sock.settimeout(None)
        self.sock = sock
        self.carrier = carrier
        self.peer = ""
        self.shut = False
        # Whatever the compiled part is to leave alone until the peer is proven has no descriptor.
        self.lane = Lane(fd=-1)
        self._address = self.lane.address

    @property
    def who(self) -> str:
        """The peer, for an error's text."""
        return self.peer or "the peer"

    @property
    def open_lane(self) -> int:
        """Address of the lane; 0 where either side is gone."""
        return 0 if self.shut else self._address

    def admit(self, limits: Limits) -> None:
        """The peer is proven, and the lane complete: the compiled part may use it."""
        self.lane.most_header, self.lane.most_payload = limits.max_header_bytes, limits.max_payload_bytes
        self.lane.fd = self.sock.fileno()

    def check_open(self) -> None:
        """Raise ChannelClosedError where either side is gone."""
        if self.shut:
            raise ChannelClosedError(f"the channel to {self.who} is closed; connect again")

    def lost(self, error: OSError | None) -> ChannelClosedError:
        """The peer is gone, as this error of the socket says, or its end: shuts down; what to raise."""
        self.shut_down()
        why = self.carrier.why or (error.strerror if error is not None else "")
        return ChannelClosedError(f"{self.who} is gone{f' ({why})' if why else ''}; connect again")

    def shut_down(self) -> None:
        """End it, and wake whoever waits on it, on either side."""
        self.shut = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def close(self) -> None:
        """Free the descriptor's number. Nobody is in a call on the socket any more."""
        self.lane.fd = -1
        self.sock.close()


def without_descriptor(address: Address, error: OSError) -> ChannelClosedError:
    """This process has no file descriptor left for a socket."""
    return ChannelClosedError(f"no socket for {address.actor_id} ({error.strerror}); raise `ulimit -n`")

"""Both ends of a unix channel's beginning: dial or accept, prove, exchange the rings."""

from __future__ import annotations

import socket
import struct
from time import monotonic

from moeray.errors import AuthenticationError, ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import limits_of
from moeray.wire.frame import VersionMismatchError
from moeray.wire.guests import Guests
from moeray.wire.handshake import Acceptor, Connector, reason_of, refusal
from moeray.wire.identity import Identity
from moeray.wire.unix import UnixChannel

MAX_PATH_BYTES = 107


def check_path(path: str) -> None:
    """Raise WireError for a path that the kernel's socket address has no room for."""
    size = len(path.encode())
    if size > MAX_PATH_BYTES:
        raise WireError(
            f"socket path {path} has {size} bytes, the system's limit is {MAX_PATH_BYTES}; choose a shorter folder"
        )


def connect_unix(address: Address, identity: Identity, wire: WireConfig, timeout: float) -> UnixChannel:
    """A proven channel to the actor that listens at `address.unix`.

    Raises AuthenticationError, ChannelClosedError where nobody listens, ChannelTimeoutError.
    """
    assert address.unix is not None
    check_path(address.unix)
    deadline = monotonic() + timeout
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise ChannelClosedError(f"no socket for {address.actor_id} ({error.strerror}); raise `ulimit -n`") from error
    try:
        # Where the listener's queue is full, connect waits at most this long.
        wait = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6) or 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        sock.connect(address.unix)
    except BlockingIOError as error:
        sock.close()
        raise ChannelTimeoutError(f"{address.actor_id} did not accept within {timeout:g} s; is it stopped?") from error
    except OSError as error:
        sock.close()
        raise ChannelClosedError(
            f"{address.actor_id} does not listen at {address.unix} ({error.strerror}); it is gone or not started"
        ) from error
    channel = UnixChannel(sock, wire.send_timeout_s)
    try:
        _prove(channel, Connector(identity, address.actor_id), wire, deadline)
    except BaseException:
        channel.close()
        raise
    return channel


def _prove(channel: UnixChannel, connector: Connector, wire: WireConfig, deadline: float) -> None:
    channel.peer = connector.expected
    channel.send(connector.hello())
    try:
        reply = channel.recv(deadline - monotonic())
    except VersionMismatchError as error:
        raise AuthenticationError(str(error)) from error
    channel.send(connector.prove(reply))
    channel.admit(connector.expected, limits_of(wire), wire.shared_memory_bytes, deadline)


def accept_unix(channel: UnixChannel, identity: Identity, wire: WireConfig, guests: Guests) -> None:
    """Let the connector prove itself, within the handshake's deadline. Raises WireError where it does not."""
    deadline = monotonic() + wire.handshake_timeout_s
    acceptor = Acceptor(identity)
    try:
        hello = channel.recv(deadline - monotonic())
        if guests.full():
            channel.send(refusal("full"))
            raise ChannelClosedError("a peer was refused: wire.max_channels are open; raise it or close some")
        channel.send(acceptor.welcome(hello))
    except (AuthenticationError, VersionMismatchError) as error:
        _answer(channel, reason_of(error))
        raise
    peer = acceptor.check(channel.recv(deadline - monotonic()))
    channel.admit(peer, limits_of(wire), wire.shared_memory_bytes, deadline)


def _answer(channel: UnixChannel, reason: str) -> None:
    if not channel.closed:
        channel.send(refusal(reason))

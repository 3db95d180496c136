"""The beginning of a channel, whatever carries it: both sides prove themselves, then exchange their rings."""

from __future__ import annotations

from time import monotonic

from moeray.errors import AuthenticationError, ChannelClosedError
from moeray.settings.wire import WireConfig
from moeray.wire.base import limits_of
from moeray.wire.frame import VersionMismatchError
from moeray.wire.guests import Guests
from moeray.wire.handshake import Acceptor, Connector, reason_of, refusal
from moeray.wire.identity import Identity
from moeray.wire.socket_channel import SocketChannel


def introduce(channel: SocketChannel, connector: Connector, wire: WireConfig, deadline: float) -> None:
    """The dialling side. Raises AuthenticationError, ChannelClosedError, ChannelTimeoutError at the deadline (of
    time.monotonic)."""
    channel.peer = connector.expected
    channel.send(connector.hello())
    try:
        reply = channel.recv(deadline - monotonic())
    except VersionMismatchError as error:
        raise AuthenticationError(str(error)) from error
    channel.send(connector.prove(reply))
    _admit(channel, connector.expected, wire, deadline)


def receive(channel: SocketChannel, identity: Identity, wire: WireConfig, guests: Guests) -> bool:
    """The listening side: let the connector prove itself, within the handshake's deadline. False where it goes without
    a word: it only wanted to know whether somebody listens. Raises WireError where it does not prove itself."""
    deadline = monotonic() + wire.handshake_timeout_s
    acceptor = Acceptor(identity)
    try:
        try:
            hello = channel.recv(deadline - monotonic())
        except ChannelClosedError:
            return False
        if guests.full():
            channel.send(refusal("full"))
            raise ChannelClosedError("a peer was refused: wire.max_channels are open; raise it or close some")
        channel.send(acceptor.welcome(hello))
    except (AuthenticationError, VersionMismatchError) as error:
        _answer(channel, reason_of(error))
        raise
    _admit(channel, acceptor.check(channel.recv(deadline - monotonic())), wire, deadline)
    return True


def _admit(channel: SocketChannel, peer: str, wire: WireConfig, deadline: float) -> None:
    ring_bytes = wire.shared_memory_bytes if channel.shares_memory else 0
    channel.admit(peer, limits_of(wire), ring_bytes, deadline)


def _answer(channel: SocketChannel, reason: str) -> None:
    if not channel.closed:
        channel.send(refusal(reason))

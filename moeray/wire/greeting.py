"""The beginning of a channel, whatever carries it: both sides prove themselves, then exchange their rings, on a device
too where both have one."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from moeray.errors import AuthenticationError, ChannelClosedError
from moeray.settings.wire import WireConfig
from moeray.wire.base import limits_of
from moeray.wire.frame import VersionMismatchError
from moeray.wire.guests import Guests
from moeray.wire.handshake import Acceptor, Connector, reason_of, refusal
from moeray.wire.identity import Identity
from moeray.wire.socket_channel import SocketChannel

if TYPE_CHECKING:
    from moeray.wire.device_rings import DeviceRings
    from moeray.wire.device_side import DeviceSide


def introduce(
    channel: SocketChannel, connector: Connector, wire: WireConfig, deadline: float, side: DeviceSide | None = None
) -> None:
    """The dialling side. Raises AuthenticationError, ChannelClosedError, ChannelTimeoutError at the deadline (of
    time.monotonic), and WireError where rows must stay on a device and cannot."""
    channel.peer = connector.expected
    connector.devices = side is not None and channel.shares_memory
    channel.send(connector.hello())
    try:
        reply = channel.recv(deadline - monotonic())
    except VersionMismatchError as error:
        raise AuthenticationError(str(error)) from error
    channel.send(connector.prove(reply))
    _admit(channel, connector.expected, wire, deadline)
    if side is not None and connector.devices and connector.peer_has_devices:
        from moeray.wire.device_greeting import offer  # only where it is used: it imports torch

        _use(channel, offer(channel, side, deadline))


def receive(
    channel: SocketChannel, identity: Identity, wire: WireConfig, guests: Guests, side: DeviceSide | None = None
) -> bool:
    """The listening side: let the connector prove itself, within the handshake's deadline. False where it goes without
    a word: it only wanted to know whether somebody listens. Raises WireError where it does not prove itself."""
    deadline = monotonic() + wire.handshake_timeout_s
    acceptor = Acceptor(identity, devices=side is not None and channel.shares_memory)
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
    if side is not None and acceptor.devices and acceptor.peer_has_devices:
        from moeray.wire.device_greeting import take_offer

        _use(channel, take_offer(channel, side, deadline))
    return True


def _use(channel: SocketChannel, rings: DeviceRings | None) -> None:
    if rings is not None:
        channel.use_device(rings)


def _admit(channel: SocketChannel, peer: str, wire: WireConfig, deadline: float) -> None:
    ring_bytes = wire.shared_memory_bytes if channel.shares_memory else 0
    channel.admit(peer, limits_of(wire), ring_bytes, deadline)


def _answer(channel: SocketChannel, reason: str) -> None:
    if not channel.closed:
        channel.send(refusal(reason))

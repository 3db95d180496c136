"""The wire's door: dial an actor with `connect`, be reached through a `Listener`; both give a `Channel`."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from moeray.errors import WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import Channel
from moeray.wire.greeting import introduce
from moeray.wire.handshake import Connector
from moeray.wire.identity import Identity
from moeray.wire.listener import Listener
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.tcp import dial_tcp
from moeray.wire.unix_dial import dial_unix

if TYPE_CHECKING:
    from moeray.wire.device_side import DeviceSide

__all__ = ["Channel", "Listener", "connect"]


def connect(
    address: Address, identity: Identity, wire: WireConfig, *, timeout: float, side: DeviceSide | None = None
) -> Channel:
    """A proven channel to the actor at `address`: unix socket within the node, TCP or gRPC across nodes. With a `side`,
    rows stay on the device where the actor has one of the same node, too.

    Raises AuthenticationError for another token, model or version; ChannelClosedError where nobody listens;
    ChannelTimeoutError after `timeout` seconds; WireError where the address has no way of the kind that is needed.
    """
    deadline = monotonic() + timeout
    channel = _dial(address, identity.node_id, wire, timeout)
    try:
        introduce(channel, Connector(identity, address.actor_id), wire, deadline, side)
    except BaseException:
        channel.close()
        raise
    return channel


def _dial(address: Address, node_id: str, wire: WireConfig, timeout: float) -> SocketChannel:
    if address.node_id == node_id:
        if address.unix is None:
            raise WireError(
                f"{address.actor_id} is on this node but its address has no unix socket; start its listener"
            )
        return dial_unix(address, wire, timeout)
    for kind in wire.remotes:
        if kind == "tcp" and address.tcp is not None:
            return dial_tcp(address, wire, timeout)
        if kind == "grpc" and address.grpc is not None:
            from moeray.wire.grpc_dial import dial_grpc  # only where it is used: grpc takes a while to import

            return dial_grpc(address, wire)
    wanted = " or ".join(wire.remotes) or "none, as wire.remote is off"
    raise WireError(
        f"{address.actor_id} is on node {address.node_id} but has no port of the kind that is dialled here ({wanted}); "
        "set wire.remote alike on both sides"
    )

"""The wire's door: dial an actor with `connect`, be reached through a `Listener`; both give a `Channel`."""

from __future__ import annotations

from moeray.errors import WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import Channel
from moeray.wire.identity import Identity
from moeray.wire.listener import Listener
from moeray.wire.unix_door import connect_unix

__all__ = ["Channel", "Listener", "connect"]


def connect(address: Address, identity: Identity, wire: WireConfig, *, timeout: float) -> Channel:
    """A proven channel to the actor at `address`: unix socket within the node, gRPC across nodes.

    Raises AuthenticationError for another token, model or version; ChannelClosedError where nobody listens;
    ChannelTimeoutError after `timeout` seconds; WireError where the address has no way of the kind that is needed.
    """
    if address.node_id == identity.node_id:
        if address.unix is None:
            raise WireError(
                f"{address.actor_id} is on this node but its address has no unix socket; start its listener"
            )
        return connect_unix(address, identity, wire, timeout)
    if address.grpc is None:
        raise WireError(f"{address.actor_id} is on node {address.node_id} but has no gRPC port; set wire.grpc: true")
    from moeray.wire.grpc_door import connect_grpc  # only where it is used: grpc takes a while to import

    return connect_grpc(address, identity, wire, timeout)

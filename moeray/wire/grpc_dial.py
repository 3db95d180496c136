"""The way to an actor on another node: a gRPC stream to its port."""

from __future__ import annotations

import threading
from typing import Any

import grpc

from moeray.errors import ChannelClosedError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.grpc_tunnel import CLOSE_S, SERVICE, STREAM, Tunnel, options, stop_quietly
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.tls import read_credentials


def dial_grpc(address: Address, wire: WireConfig) -> SocketChannel:
    """A channel to whoever listens at `address.grpc`; one to nobody is found closed. Raises ConfigError, and
    ChannelClosedError where there are no descriptors for it."""
    assert address.grpc is not None
    try:
        tunnel = Tunnel(lambda: finish())
    except OSError as error:
        raise ChannelClosedError(f"no sockets for {address.actor_id} ({error.strerror}); raise `ulimit -n`") from error
    try:
        connection = _connection(address.grpc, wire)
    except BaseException:
        tunnel.drop()
        raise
    call = connection.stream_stream(f"/{SERVICE}/{STREAM}")(tunnel.outgoing())
    reader = threading.Thread(
        target=tunnel.pump, args=(call,), name=f"wire-grpc-read-{address.actor_id}", daemon=True
    )  # fmt: skip
    reader.start()

    def finish() -> None:
        reader.join(CLOSE_S)
        stop_quietly(call.cancel)
        reader.join()
        connection.close()

    return SocketChannel(tunnel.near, wire.send_timeout_s, tunnel)


def _connection(target: str, wire: WireConfig) -> Any:
    if (tls := read_credentials(wire)) is None:
        return grpc.insecure_channel(target, options(wire, server=False))
    credentials = grpc.ssl_channel_credentials(tls.authority or tls.cert, tls.key, tls.cert)
    return grpc.secure_channel(target, credentials, options(wire, server=False))

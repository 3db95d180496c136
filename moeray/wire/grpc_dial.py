"""The way to an actor on another node: a gRPC stream to its port."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import grpc
import grpc.aio

from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.connection import without_descriptor
from moeray.wire.grpc_loop import STREAMS
from moeray.wire.grpc_tunnel import CLOSE_S, SERVICE, STREAM, STREAM_ENDS, Tunnel, options
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.tls import Credentials, credential_files


def dial_grpc(address: Address, wire: WireConfig) -> SocketChannel:
    """A channel to whoever listens at `address.grpc`; one to nobody is found closed. Raises ConfigError, and
    ChannelClosedError where there are no descriptors for it."""
    assert address.grpc is not None
    files = credential_files(wire)
    tls = files.current() if files is not None else None
    stream = _Stream()
    with ExitStack() as undo:
        try:
            STREAMS.enter()
            undo.callback(STREAMS.leave)
            tunnel = Tunnel(stream.end)
            undo.callback(tunnel.drop)
        except OSError as error:
            raise without_descriptor(address, error) from error
        STREAMS.run(stream.begin(address.grpc, wire, tls, tunnel))
        undo.pop_all()
    return SocketChannel(tunnel.near, wire.send_timeout_s, tunnel)


class _Stream:
    """A call on a connection of its own, and the tasks that carry its bytes."""

    async def begin(self, target: str, wire: WireConfig, tls: Credentials | None, tunnel: Tunnel) -> None:
        self._connection = _connection(target, wire, tls)
        self._call = self._connection.stream_stream(f"/{SERVICE}/{STREAM}")()
        self._reading = asyncio.ensure_future(tunnel.receive(self._call.read))
        self._writing = asyncio.ensure_future(self._write(tunnel))

    async def _write(self, tunnel: Tunnel) -> None:
        await tunnel.send(self._call.write)
        with suppress(*STREAM_ENDS):
            await self._call.done_writing()

    def end(self) -> None:
        """The channel is closed: let what it has written go out, and the peer end the stream, or end it."""
        STREAMS.run(self._end())
        STREAMS.leave()

    async def _end(self) -> None:
        await asyncio.wait([self._reading], timeout=CLOSE_S)
        self._call.cancel()
        self._writing.cancel()  # a call that was never connected does not end its writes
        await asyncio.wait([self._reading, self._writing])
        await self._connection.close()


def _connection(target: str, wire: WireConfig, tls: Credentials | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(target, options(wire, server=False))
    credentials = grpc.ssl_channel_credentials(tls.authority or tls.cert, tls.key, tls.cert)
    return grpc.aio.secure_channel(target, credentials, options(wire, server=False))

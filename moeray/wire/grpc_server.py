"""The gRPC port of a listener: each stream is a socket more that it accepts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

import grpc
import grpc.aio

from moeray.errors import WireError
from moeray.settings.wire import WireConfig
from moeray.wire.connection import Carrier
from moeray.wire.grpc_loop import STREAMS
from moeray.wire.grpc_tunnel import CLOSE_S, SERVICE, STREAM, Tunnel, options
from moeray.wire.guests import MAX_UNAUTHENTICATED
from moeray.wire.own_address import bracketed, reachable
from moeray.wire.tls import CredentialFiles, Credentials, credential_files

Accept = Callable[[socket.socket, Carrier], None]
"""Greet whoever is behind the socket, and serve it, in another thread; or close the socket."""


class GrpcServer:
    """Accepts streams at `wire.host`, each of which becomes a socket for `accept`."""

    def __init__(self, wire: WireConfig, accept: Accept) -> None:
        self._wire = wire
        self._accept = accept
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> str:
        """Listen; returns `host:port` as others reach it. Raises WireError where the host is not this machine's."""
        host = bracketed(reachable(self._wire.host))
        STREAMS.enter()
        try:
            port = STREAMS.run(self._start())
        except BaseException:
            STREAMS.leave()
            raise
        return f"{host}:{port}"

    async def _start(self) -> int:
        handlers = {STREAM: grpc.stream_stream_rpc_method_handler(self._stream)}
        server = grpc.aio.server(
            handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)],
            options=options(self._wire, server=True),
            maximum_concurrent_rpcs=self._wire.max_channels + MAX_UNAUTHENTICATED,
        )
        try:
            port = self._bind(server, f"{bracketed(self._wire.host)}:0")
        except RuntimeError as error:
            raise WireError(f"cannot listen at wire.host {self._wire.host}; name an address of this machine") from error
        await server.start()
        self._server = server
        return port

    def _bind(self, server: grpc.aio.Server, target: str) -> int:
        if (files := credential_files(self._wire)) is None:
            return int(server.add_insecure_port(target))
        return int(server.add_secure_port(target, _credentials(files)))

    async def _stream(self, _: Any, context: Any) -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        writing = asyncio.current_task()
        assert writing is not None

        async def end() -> None:
            """The channel is closed: let what it has written go out, or end the stream."""
            try:
                await asyncio.wait_for(over.wait(), CLOSE_S)
            except TimeoutError:
                writing.cancel()

        tunnel = Tunnel(lambda: asyncio.run_coroutine_threadsafe(end(), loop).result())
        reading = asyncio.ensure_future(tunnel.receive(context.read))
        self._tasks.add(reading)
        reading.add_done_callback(self._tasks.discard)
        self._accept(tunnel.near, tunnel)
        try:
            await tunnel.send(context.write)
        finally:
            over.set()

    def close(self, deadline: float) -> list[str]:
        """End all streams; the name of what still runs at the deadline."""
        ended = STREAMS.run(self._close(deadline))
        STREAMS.leave()
        return [] if ended else ["the gRPC server"]

    async def _close(self, deadline: float) -> bool:
        assert self._server is not None
        stopping = asyncio.ensure_future(self._server.stop(None))
        _, left = await asyncio.wait([stopping, *self._tasks], timeout=max(0.0, deadline - monotonic()))
        return not left


def _credentials(files: CredentialFiles) -> grpc.ServerCredentials:
    """gRPC asks at each new connection for what has changed, from a thread of its own."""
    served = files.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        before, served = served, files.current()
        return None if served is before else _configuration(served)

    return grpc.dynamic_ssl_server_credentials(_configuration(served), renewed, served.authority is not None)


def _configuration(tls: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.cert)], tls.authority)

"""The gRPC port of a listener: each stream is a socket more that it accepts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import grpc

from moeray.errors import WireError
from moeray.settings.wire import WireConfig
from moeray.wire.connection import Carrier
from moeray.wire.grpc_tunnel import CLOSE_S, SERVICE, STREAM, Tunnel, options, stop_quietly
from moeray.wire.guests import MAX_UNAUTHENTICATED, Guests
from moeray.wire.own_address import bracketed, reachable
from moeray.wire.tls import read_credentials

Accept = Callable[[socket.socket, Carrier], None]
"""Greet whoever is behind the socket, and serve it, in another thread; or close the socket."""


class GrpcServer:
    """Accepts streams at `wire.host`, each of which becomes a socket for `accept`. Its readers are among `guests`."""

    def __init__(self, actor_id: str, wire: WireConfig, guests: Guests, accept: Accept) -> None:
        self._wire = wire
        self._guests = guests
        self._accept = accept
        self._most = wire.max_channels + MAX_UNAUTHENTICATED
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix=f"wire-grpc-{actor_id}")
        self._server: Any = None

    def start(self) -> str:
        """Listen; returns `host:port` as others reach it. Raises WireError where the host is not this machine's."""
        self._server = grpc.server(
            self._pool,
            options=options(self._wire, server=True),
            maximum_concurrent_rpcs=self._most,
        )
        host = bracketed(reachable(self._wire.host))
        handlers = {STREAM: grpc.stream_stream_rpc_method_handler(self._stream)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            port = self._bind(f"{bracketed(self._wire.host)}:0")
        except RuntimeError as error:
            self._pool.shutdown()
            raise WireError(f"cannot listen at wire.host {self._wire.host}; name an address of this machine") from error
        self._server.start()
        return f"{host}:{port}"

    def _bind(self, target: str) -> int:
        if (tls := read_credentials(self._wire)) is None:
            return int(self._server.add_insecure_port(target))
        credentials = grpc.ssl_server_credentials([(tls.key, tls.cert)], tls.authority, tls.authority is not None)
        return int(self._server.add_secure_port(target, credentials))

    def _stream(self, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        over = threading.Event()

        def finish() -> None:
            if not over.wait(CLOSE_S):
                stop_quietly(context.cancel)

        tunnel = Tunnel(finish)
        try:
            if not self._guests.spawn("wire-grpc-read", lambda: tunnel.pump(chunks)):
                tunnel.drop()
                context.abort(grpc.StatusCode.UNAVAILABLE, "the listener closes")
            self._accept(tunnel.near, tunnel)
            yield from tunnel.outgoing()
        finally:
            over.set()

    def close(self, deadline: float) -> list[str]:
        """End all calls and join gRPC's threads; the name of what still runs at the deadline."""
        stopped = self._server.stop(None)
        if not stopped.wait(max(0.0, deadline - monotonic())):
            return ["the gRPC server"]
        self._pool.shutdown()
        return []

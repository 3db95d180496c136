"""gRPC as the carrier of a channel's bytes: what is written to a socket on one node is read from one on the other.

Measured: a layer's messages in Python at both ends, one gRPC message each, cost 1.3 to 2.7 ms a layer; most of that was
Python waiting for its lock and for a core. Behind a socket the compiled part sends and takes them as it does within a
node, and Python only moves bytes, in two tasks an end. A peer that stops reading fills HTTP/2's window, then the
socket, and then `send` times out.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc

from moeray.settings.wire import WireConfig

SERVICE = "moeray.Wire"
STREAM = "Stream"

CHUNK_BYTES = 1 << 20
"""Of a gRPC message, at most: also what an unproven peer can make this side hold."""

STREAM_ENDS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What a stream raises that is over."""

CLOSE_S = 1.0
"""What was written before a channel's end has so long to go out."""


class Tunnel:
    """One end; see `Carrier`. `near` is the channel's socket, which the channel closes; both tasks run on one loop.
    `finish` is called after that, from another thread, and returns when the stream has ended."""

    kind = "grpc"

    def __init__(self, finish: Callable[[], None]) -> None:
        self.why = ""
        self._finish = finish
        self.near, self._far = socket.socketpair()
        self._far.setblocking(False)
        for sock in (self.near, self._far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)  # or what the system allows
        self._users = 2

    async def send(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Have gRPC `write` what the channel has written, until the channel's end or the stream's."""
        loop = asyncio.get_running_loop()
        try:
            while chunk := await loop.sock_recv(self._far, CHUNK_BYTES):
                await write(chunk)
        except (ConnectionResetError, *STREAM_ENDS):  # the channel was closed with something unread, or there is none
            return
        finally:
            self._leave()

    async def receive(self, read: Callable[[], Awaitable[Any]]) -> None:
        """Let the channel read what gRPC has `read`, until the stream's end or the channel's."""
        loop = asyncio.get_running_loop()
        try:
            while (chunk := await read()) is not grpc.aio.EOF:
                await loop.sock_sendall(self._far, chunk)
        except grpc.RpcError as error:
            self.why = describe(error)
        except (OSError, asyncio.CancelledError, *STREAM_ENDS):  # either is closed; nobody cancels this task itself
            return
        finally:
            with suppress(OSError):
                self._far.shutdown(socket.SHUT_RDWR)  # what was written to it can still be read
            self._leave()

    def hang_up(self) -> None:
        """See `Carrier`."""
        self._finish()

    def drop(self) -> None:
        """It was not used, and will not be."""
        self.near.close()
        self._far.close()

    def _leave(self) -> None:
        """The last one frees the descriptor: nobody waits on it any more."""
        self._users -= 1
        if not self._users:
            self._far.close()


def describe(error: grpc.RpcError) -> str:
    """A gRPC failure in one line."""
    code = getattr(error, "code", None)
    if code is None:
        return "the connection broke"
    details = " ".join(str(error.details()).split())
    if "Tls handshake failed" in details:  # why stands at the end, behind the addresses and OpenSSL's own words
        cause = details.rpartition("OPENSSL_internal:")[2][:120]
        return f"the TLS handshake failed: {cause}; see wire.tls_cert, tls_ca and their dates on both nodes"
    return f"{code().name.lower()}: {details[:200]}"


def options(wire: WireConfig, *, server: bool) -> list[tuple[str, Any]]:
    """gRPC's settings: our chunks, keepalive that sees a dead peer in 15 s, no proxy, no shared connection."""
    chosen: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", CHUNK_BYTES),
        ("grpc.max_receive_message_length", CHUNK_BYTES),
        ("grpc.max_metadata_size", 4 << 10),
        ("grpc.absolute_max_metadata_size", 16 << 10),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_frame_size", (1 << 24) - 1),
        ("grpc.optimization_target", "latency"),
    ]
    if server:
        return [
            *chosen,
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ]
    return [*chosen, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]

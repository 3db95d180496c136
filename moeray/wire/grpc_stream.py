"""The channel across nodes: one gRPC bidirectional stream of bytes, a message a frame, no protobuf.

Measured: the synchronous API with one reader thread a stream is as fast as asyncio at both ends, without its hop
from the caller's thread. gRPC pulls a message to send only when the last one has left, so the bounded queue in front of
it is the flow control: when the peer stops reading, HTTP/2's window fills, then the queue, and then `send` times out.

The service has two methods. In Greet, HELLO and WELCOME travel as metadata, and so does PROOF in Stream: an unproven
peer gets no message of its own read, whatever the limits of the stream are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from moeray.buffers import ALIGN, KEPT_BYTES, Bytes, new_buffer
from moeray.errors import ChannelClosedError, ChannelTimeoutError, ConfigError, WireError
from moeray.settings.wire import WireConfig
from moeray.wire.base import UNAUTHENTICATED, T, limits_of
from moeray.wire.frame import PREFIX, Frame, Limits, decode, encode
from moeray.wire.row_message import RowMessage

SERVICE = "moeray.Wire"
GREET = "Greet"
STREAM = "Stream"
FRAME_KEY = "moeray-frame-bin"  # the suffix lets gRPC carry raw bytes

_QUEUED = 8
_CLOSE_S = 1.0


class GrpcChannel:
    """One end of a gRPC stream; see `Channel`. Made by `connect_grpc` and by the server.

    `cancel` ends the call at once; the reader thread runs `pump` over the peer's messages; gRPC draws from `outgoing`.
    """

    kind = "grpc"

    def __init__(self, peer: str, wire: WireConfig) -> None:
        self.peer = peer
        self.send_timeout_s = wire.send_timeout_s
        self._limits: Limits = limits_of(wire)
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        self._out_room = threading.Semaphore(_QUEUED)
        self._in: SimpleQueue[bytes | None] = SimpleQueue()
        self._in_room = threading.Semaphore(_QUEUED)
        self._recv_lock = threading.Lock()
        self._memory: Bytes = new_buffer(64 << 10)
        self._why = "closed on this side"
        self._shut = False
        self._over = threading.Event()
        self._finish: Callable[[], None] = _nothing

    def on_close(self, finish: Callable[[], None]) -> None:
        """What `close` calls, once, after it has asked the stream to end."""
        self._finish = finish

    @property
    def lane(self) -> int:
        """See `Channel.lane`."""
        return 0

    @property
    def room(self) -> int:
        """See `Channel.room`."""
        return 0

    @property
    def closed(self) -> bool:
        """True once either side is known to be gone."""
        return self._shut or self._over.is_set()

    def send(self, frame: Frame) -> None:
        """See `Channel.send`."""
        message = b"".join(encode(frame, self._limits))
        if self.closed:
            raise self._gone()
        if not self._out_room.acquire(timeout=self.send_timeout_s):
            raise ChannelTimeoutError(f"{self.peer} did not read for {self.send_timeout_s:g} s; is it stopped?")
        if self.closed:
            self._out_room.release()  # wakes the next sender that waits in vain
            raise self._gone()
        self._out.put(message)

    def place_outputs(self, nbytes: int) -> None:
        """See `Channel.place_outputs`."""

    def send_rows(self, rows: RowMessage) -> None:
        """See `Channel.send_rows`."""
        self.send(rows.frame())

    def release(self) -> None:
        """See `Channel.release`."""

    def on_lane(self, use: Callable[[int], T]) -> None:
        """See `Channel.on_lane`."""

    def flush(self) -> None:
        """See `Channel.flush`."""

    def recv(self, timeout: float | None = None) -> Frame:
        """See `Channel.recv`."""
        with self._recv_lock:
            if self._shut:
                raise self._gone()
            message = self.next_message(timeout)
            if len(message) > len(self._memory):
                self._memory = new_buffer(len(message))
            elif len(self._memory) > KEPT_BYTES:
                self._memory = new_buffer(64 << 10)
            try:
                return decode(message, self._limits, self._memory)
            except WireError:
                self._end("sent bytes that are no frame")
                raise

    def next_message(self, timeout: float | None) -> bytes:
        """The next message's raw bytes. Raises ChannelTimeoutError, ChannelClosedError."""
        try:
            message = self._in.get(timeout=timeout if timeout is None else max(timeout, 0.0))
        except Empty:
            raise ChannelTimeoutError(f"nothing came from {self.peer} within the deadline") from None
        if message is None:
            self._in.put(None)  # for the next recv
            raise self._gone()
        self._in_room.release()
        return message

    def outgoing(self) -> Iterator[bytes]:
        """What gRPC sends; it asks for the next message when the last one has left."""
        while (message := self._out.get()) is not None:
            yield message
            self._out_room.release()

    def pump(self, messages: Iterable[bytes]) -> None:
        """Read the peer's messages until the stream ends, at most a few ahead of `recv`."""
        try:
            for message in messages:
                self._in_room.acquire()
                if self._shut:
                    break
                self._in.put(message)
            self._why = "closed by the peer" if not self._shut else self._why
        except grpc.RpcError as error:
            self._why = describe(error) if not self._shut else self._why
        finally:
            self._over.set()
            self._wake()

    def _wake(self) -> None:
        self._out.put(None)
        self._in.put(None)
        self._in_room.release()
        self._out_room.release()

    def _gone(self) -> ChannelClosedError:
        return ChannelClosedError(f"the channel to {self.peer} is closed ({self._why}); connect again")

    def _end(self, why: str) -> None:
        self._shut = True
        self._why = why
        self._wake()

    def close(self) -> None:
        """See `Channel.close`. What was sent before goes out first, for up to a second."""
        finish, self._finish = self._finish, _nothing
        if not self._shut:
            self._end("closed on this side")
        finish()

    def ended(self) -> bool:
        """Wait a moment for the stream to end by itself."""
        return self._over.wait(_CLOSE_S)


def _nothing() -> None:
    """What the second `close` does."""


def describe(error: grpc.RpcError) -> str:
    """A gRPC failure in one line."""
    code = getattr(error, "code", None)
    if code is None:
        return "the connection broke"
    return f"{code().name.lower()}: {' '.join(str(error.details()).split())[:200]}"


def options(wire: WireConfig, *, server: bool) -> list[tuple[str, Any]]:
    """gRPC's settings: our size limits, keepalive that sees a dead peer in 15 s, no proxy, no shared connection."""
    largest = PREFIX.size + ALIGN + wire.max_header_bytes + wire.max_payload_bytes
    chosen: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", min(largest, (1 << 31) - 1)),
        ("grpc.max_receive_message_length", min(largest, (1 << 31) - 1)),
        ("grpc.max_metadata_size", 4 * UNAUTHENTICATED.max_header_bytes),
        ("grpc.absolute_max_metadata_size", 4 * UNAUTHENTICATED.max_header_bytes),
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


def read_pem(path: str | None, key: str) -> bytes | None:
    """The bytes of a TLS file. Raises ConfigError with the config key."""
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"config key wire.{key}: cannot read {path} ({error.strerror}); check the path") from error


def stop_quietly(cancel: Callable[[], Any]) -> None:
    """Cancel a call that may be over already."""
    with suppress(grpc.RpcError):
        cancel()

"""The half of a unix channel that sends: one message at a time, large payloads by way of the ring.

A payload that finds no room there goes through the socket. What a sender that gave up has left of its message goes out
before the next.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from ctypes import addressof, c_char
from time import monotonic
from typing import TypeVar

from moeray.buffers import aligned
from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import RING_FROM
from moeray.wire.base import UNAUTHENTICATED
from moeray.wire.connection import Connection
from moeray.wire.frame import INLINE, Frame, Limits, chunks_of, inline_buffers, pack_head
from moeray.wire.ring import RingWriter
from moeray.wire.row_message import Place, RowMessage, native

_M = TypeVar("_M")

RING_THRESHOLD = RING_FROM

_MESSAGE_BYTES = 48 << 10
_WHOLE_BYTES = 1 << 20
"""Of a message's memory where there is no ring: what the compiled part copies goes out in one call."""
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Sender:
    """Any thread may send. `lock`: whoever sends holds it. `timeout_s` bounds a send to a peer that does not read."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.lock = threading.Lock()
        self.timeout_s = timeout_s
        self._connection = connection
        self._sock = connection.sock
        self._lane = connection.lane
        self._limits = UNAUTHENTICATED
        self._unsent = b""
        self._writer: RingWriter | None = None
        self._placed: tuple[int, int] | None = None  # position and bytes of outputs that are not sent yet
        self._use(bytearray(_MESSAGE_BYTES))

    def _use(self, message: bytearray) -> None:
        """Write small messages to this memory from now on."""
        self._message, self._message_view = message, memoryview(message)
        self._lane.message, self._lane.message_room = addressof(c_char.from_buffer(message)), len(message)

    def admit(self, limits: Limits, ring_bytes: int) -> None:
        """The peer is proven: give it a shared memory ring and lift the limits. Raises WireError."""
        self._limits = limits
        self._offer_ring(ring_bytes)
        if self._writer is None:
            self._use(bytearray(_WHOLE_BYTES))
        self._lane.ring_from = RING_THRESHOLD
        self._lane.join(self._writer.ring if self._writer else None, None)

    def _offer_ring(self, ring_bytes: int) -> None:
        if ring_bytes >= RING_THRESHOLD:
            self._writer = self._new_ring(ring_bytes)
        try:
            if self._writer is None:
                self._sock.sendmsg([b"-"], (), _FLAGS)
                return
            try:
                socket.send_fds(self._sock, [b"R"], [self._writer.fd], _FLAGS)
            finally:
                self._writer.handed_over()
        except OSError as error:
            raise self._connection.lost(error) from error

    def _new_ring(self, ring_bytes: int) -> RingWriter:
        try:
            return RingWriter(ring_bytes)
        except OSError as error:
            raise ChannelClosedError(
                f"no shared memory of {ring_bytes} bytes for {self._connection.who} ({error.strerror}); "
                "raise `ulimit -n` or lower wire.shared_memory_bytes"
            ) from error

    @property
    def ring(self) -> RingWriter | None:
        """This side's shared memory."""
        return self._writer

    @property
    def room(self) -> int:
        """The ring's bytes."""
        writer = self._writer
        return writer.capacity if writer is not None else 0

    @property
    def most_payload_bytes(self) -> int:
        """What the peer takes in one frame."""
        return self._limits.max_payload_bytes

    def send(self, frame: Frame) -> None:
        """See `Channel.send`."""
        self._in_turn(self._send, frame)

    def send_rows(self, rows: RowMessage) -> None:
        """See `Channel.send_rows`."""
        if native is None:
            self.send(rows.frame())
        elif not self._send_in_place(rows):
            self._in_turn(self._send_rows, rows)

    def flush(self) -> None:
        """See `Channel.flush`."""
        self._in_turn(lambda message, deadline: None, None)

    def place_outputs(self, nbytes: int) -> Place | None:
        """See `Channel.place_outputs`."""
        writer, lane = self._writer, self._connection.open_lane
        placed = native.place_outputs(lane, nbytes) if native is not None and lane else None
        if placed is None or writer is None:
            return None
        position, address = placed
        self._placed = position, aligned(nbytes)
        return Place(writer.piece(position, nbytes), address, position)

    def _send_in_place(self, rows: RowMessage) -> bool:
        lane = self._connection.open_lane
        went = bool(lane) and rows.send_in_place(lane)
        if went:
            self._placed = None
        if went and self._lane.unsent_from != self._lane.unsent_to:
            self.flush()
        return went

    def _in_turn(self, send: Callable[[_M, float], None], message: _M) -> None:
        """One message at a time; first what is left of one whose sender has given up."""
        deadline = monotonic() + self.timeout_s
        if not self.lock.acquire(timeout=self.timeout_s):
            raise self._stuck()
        lane = self._lane
        try:
            self._connection.check_open()
            lane.busy = 1
            if lane.unsent_from != lane.unsent_to:
                self._unsent = bytes(self._message_view[lane.unsent_from : lane.unsent_to])
                lane.unsent_from = lane.unsent_to
            if self._unsent:
                self._finish([self._unsent], deadline)
            send(message, deadline)
        finally:
            lane.busy = bool(self._unsent)
            self.lock.release()

    def _send_rows(self, rows: RowMessage, deadline: float) -> None:
        size = self._write(rows)
        self._placed = None  # what was written lies behind it
        if size is None:  # too much for both, or for the limits
            self._send(rows.frame(), deadline)
        else:
            self._finish([self._message_view[:size]], deadline)

    def _write(self, rows: RowMessage) -> int | None:
        """The rows' message, in the ring where it is large; how many bytes of it go through the socket."""
        size, most, writer = rows.payload_bytes, self._limits.max_header_bytes, self._writer
        if size > self._limits.max_payload_bytes:
            return None
        if writer is not None and RING_THRESHOLD <= size <= writer.capacity:
            position = self._reserve(writer, size)
            if position is not None:
                written = rows.write(self._message, writer.piece(position, size), position, most)
                if written is not None:
                    writer.commit(position, size)
                return written
        return rows.write(self._message, None, INLINE, most)

    def _send(self, frame: Frame, deadline: float) -> None:
        chunks, size = chunks_of(frame)
        writer, position = self._writer, None
        if writer is not None and self._placed is not None:  # outputs that never came to be, as their compute failed
            writer.take_back(*self._placed)
            self._placed = None
        if writer is not None and RING_THRESHOLD <= size <= writer.capacity:
            position = self._reserve(writer, size)
        if writer is None or position is None:
            self._finish(inline_buffers(pack_head(frame, size, INLINE, self._limits), chunks), deadline)
            return
        head = pack_head(frame, size, position, self._limits)
        writer.write(position, chunks)
        # Also where the socket is full and the head never leaves: the reader's next position frees the gap.
        writer.commit(position, size)
        self._finish([head], deadline)

    def _reserve(self, writer: RingWriter, size: int) -> int | None:
        try:
            return writer.reserve(size)
        except WireError:
            self._connection.shut_down()
            raise

    def _finish(self, buffers: list[bytes | memoryview], deadline: float) -> None:
        """Send the buffers whole, or keep what is left of a begun frame for the next send."""
        try:
            self._push(buffers, deadline)
        except WireError:
            raise
        except BaseException:  # a signal's: how much has gone out is not known, and nothing may follow half a frame
            self._connection.shut_down()
            raise

    def _push(self, buffers: list[bytes | memoryview], deadline: float) -> None:
        sent, total = 0, sum(len(buffer) for buffer in buffers)
        while True:
            try:
                sent += self._sock.sendmsg(_behind(buffers, sent), (), _FLAGS)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._connection.lost(error) from error
            if sent == total:
                self._unsent = b""
                return
            if not self._writable(deadline):
                if sent or self._unsent:
                    self._unsent = b"".join(_behind(buffers, sent))
                raise self._stuck()

    def _writable(self, deadline: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        return bool(poller.poll(max(0.0, deadline - monotonic()) * 1000))

    def _stuck(self) -> ChannelTimeoutError:
        return ChannelTimeoutError(f"{self._connection.who} did not read for {self.timeout_s:g} s; is it stopped?")

    def drop(self) -> None:
        """Give the ring up. The caller holds `lock`, and the connection is closed."""
        self._writer = None


def _behind(buffers: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of the buffers after `sent` bytes."""
    if not sent:
        return buffers
    left: list[bytes | memoryview] = []
    for buffer in buffers:
        if sent < len(buffer):
            left.append(buffer[sent:])
        sent = max(0, sent - len(buffer))
    return left

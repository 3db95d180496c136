"""The half of a unix channel that receives: frames in one buffer, large payloads in the ring or in memory of their own.

What has come of a frame when its deadline passes is kept for the next call.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from time import monotonic

from moeray.buffers import KEPT_BYTES, Bytes, aligned, new_buffer
from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.wire.base import UNAUTHENTICATED, T
from moeray.wire.connection import Connection
from moeray.wire.frame import (
    INLINE,
    PREFIX,
    Frame,
    Header,
    Limits,
    VersionMismatchError,
    build_frame,
    check_lengths,
    unpack_header,
)
from moeray.wire.ring import RingReader
from moeray.wire.row_message import native, read_header

_BUFFER_BYTES = 256 << 10
_WHOLE_BYTES = (1 << 20) + (64 << 10)
"""Where there is no ring: payloads that the compiled part copies lie whole in it."""
_TIMEVAL = struct.Struct("@ll")


class Receiver:
    """One thread at a time receives. `lock`: whoever receives holds it."""

    def __init__(self, connection: Connection) -> None:
        self.lock = threading.Lock()
        self._connection = connection
        self._sock = connection.sock
        self._lane = connection.lane
        self._limits = UNAUTHENTICATED
        self._reader: RingReader | None = None
        self._use(new_buffer(UNAUTHENTICATED.max_header_bytes + 64))
        self._header: Header | None = None
        self._large: Bytes | None = None
        self._large_end = 0
        self._spare: Bytes | None = None
        self._wait: float | None = None

    def admit(self, limits: Limits, deadline: float) -> None:
        """The peer is proven: take its shared memory ring and lift the limits. Raises WireError."""
        self._limits = limits
        self._take_ring(deadline)
        assert self._lane.start == self._lane.end, "bytes of an unproven peer are read one frame at a time"
        self._lane.start = self._lane.end = 0
        self._use(new_buffer(_BUFFER_BYTES if self._reader else _WHOLE_BYTES))
        self._lane.join(None, self._reader.ring if self._reader else None)

    @property
    def ring(self) -> RingReader | None:
        """The peer's shared memory."""
        return self._reader

    def _take_ring(self, deadline: float) -> None:
        self._set_wait(max(deadline - monotonic(), 1e-3))
        who = self._connection.who
        try:
            mark, fds, flags, _ = socket.recv_fds(self._sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError as error:
            raise ChannelTimeoutError(f"{who} did not finish the handshake in time; is it stopped?") from error
        except OSError as error:
            raise self._connection.lost(error) from error
        try:
            if fds and mark == b"R":
                self._reader = RingReader(fds[0])
            elif flags & socket.MSG_CTRUNC:
                raise ChannelClosedError(f"no descriptor is left for the shared memory of {who}; raise `ulimit -n`")
            elif mark != b"-":
                raise self._connection.lost(None) if not mark else WireError(f"{who} sent no shared memory ring")
        except OSError as error:  # it is none, or this process has too many files or mappings
            raise WireError(f"the shared memory of {who} cannot be mapped ({error.strerror})") from error
        finally:
            for fd in fds:
                socket.close(fd)

    def _use(self, memory: Bytes) -> None:
        """Receive into this memory from now on."""
        self._memory, self._view = memory, memory.data
        self._lane.buffer, self._lane.room = memory.ctypes.data, len(memory)

    def recv(self, timeout: float | None = None) -> Frame:
        """See `Channel.recv`."""
        deadline = None if timeout is None else monotonic() + timeout
        with self.lock:
            self._connection.check_open()
            if self._reader is not None:
                self._reader.release()
            try:
                return self._read_frame(deadline)
            except ChannelTimeoutError:
                raise
            except WireError as error:
                # A peer of another version is still told so before its channel ends.
                if not (isinstance(error, VersionMismatchError) and self._limits is UNAUTHENTICATED):
                    self._connection.shut_down()
                raise

    def release(self) -> None:
        """See `Channel.release`."""
        with self.lock:
            if self._reader is not None:
                self._reader.release()

    def on_lane(self, use: Callable[[int], T]) -> T | None:
        """See `Channel.on_lane`."""
        with self.lock:
            self._connection.check_open()
            if native is None:
                return None
            self._wait_at_most(None)
            return use(self._lane.address)

    def _read_frame(self, deadline: float | None) -> Frame:
        self._lane.reading = 1
        header = self._header or self._read_header(deadline)
        self._header = header
        body, payload_bytes = header.body, header.payload_bytes
        if header.where != INLINE:
            memory, at = self._in_ring(header.where, payload_bytes)
            self._lane.start += body
        elif body + payload_bytes <= len(self._memory):
            self._need(body + payload_bytes, deadline)
            memory, at = self._view, self._lane.start + body
            self._lane.start += body + payload_bytes
        else:
            memory, at = self._read_large(body, payload_bytes, deadline), 0
        self._header = None
        self._lane.reading = 0
        return build_frame(header, memory, at)

    def _read_header(self, deadline: float | None) -> Header:
        if self._lane.start == self._lane.end:
            self._lane.start = self._lane.end = 0
        self._need(PREFIX.size, deadline)
        if header := read_header(self._view, self._lane.start, self._lane.end, self._limits):
            return header
        header_bytes, payload_bytes = PREFIX.unpack_from(self._view, self._lane.start)
        check_lengths(header_bytes, payload_bytes, self._limits)
        self._need(aligned(PREFIX.size + header_bytes), deadline)
        begin = self._lane.start + PREFIX.size
        return unpack_header(self._view[begin : begin + header_bytes], payload_bytes)

    def _in_ring(self, position: int, size: int) -> tuple[memoryview, int]:
        if self._reader is None:
            raise WireError(f"{self._connection.who} names shared memory that it never gave; the channel is closed")
        return self._reader.memory.data, self._reader.hold(position, size)

    def _read_large(self, body: int, size: int, deadline: float | None) -> memoryview:
        """The payload in memory of its own, straight from the socket but for what the buffer already holds."""
        if self._large is None:
            self._large = self._spare if self._spare is not None and len(self._spare) >= size else new_buffer(size)
            early = min(size, self._lane.end - self._lane.start - body)
            begin = self._lane.start + body
            self._large[:early] = self._memory[begin : begin + early]
            self._large_end = early
        view = self._large.data
        while self._large_end < size:
            self._large_end += self._receive(view[self._large_end : size], deadline)
        memory, self._large = self._large, None
        self._spare = memory if len(memory) <= KEPT_BYTES else None
        self._lane.start = min(self._lane.end, self._lane.start + body + size)
        return memory.data

    def _need(self, size: int, deadline: float | None) -> None:
        """Have at least `size` bytes at the lane's `start`, in one piece."""
        if self._lane.start + size > len(self._memory):
            self._make_room(size)
        # An unproven peer's bytes are read one frame at a time: behind its last one comes a descriptor.
        exact = self._limits is UNAUTHENTICATED
        while self._lane.end - self._lane.start < size:
            stop = self._lane.start + size if exact else len(self._memory)
            self._lane.end += self._receive(self._view[self._lane.end : stop], deadline)

    def _make_room(self, size: int) -> None:
        held = self._memory[self._lane.start : self._lane.end]
        if size > len(self._memory):
            self._use(new_buffer(size))
        self._memory[: len(held)] = held
        self._lane.start, self._lane.end = 0, len(held)

    def _receive(self, view: memoryview, deadline: float | None) -> int:
        left = None if deadline is None else deadline - monotonic()
        try:
            if left is not None and left <= 0:
                count = self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
            else:
                self._wait_at_most(left)
                count = self._sock.recv_into(view)
        except BlockingIOError as error:
            raise ChannelTimeoutError(f"nothing came from {self._connection.who} within the deadline") from error
        except OSError as error:
            raise self._connection.lost(error) from error
        if not count:
            raise self._connection.lost(None)
        return count

    def _wait_at_most(self, seconds: float | None) -> None:
        """Bound the kernel's wait for bytes. A bound that is at most a tenth too long stays: that spares a call."""
        now = self._wait
        if seconds is None or now is None:
            if seconds is not now:
                self._set_wait(seconds)
        elif not now / 1.1 <= seconds <= now:
            self._set_wait(seconds * 1.05)

    def _set_wait(self, seconds: float | None) -> None:
        bounded = 0.0 if seconds is None else max(seconds, 1e-3)  # 0 is for ever
        timeval = _TIMEVAL.pack(int(bounded), int(bounded % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._wait = seconds

    def drop(self) -> None:
        """Give the ring and large payloads' memory up. The caller holds `lock`, and the connection is closed."""
        self._reader = None
        self._large = self._spare = None

"""The channel within a node: a unix stream socket, with large payloads in shared memory rings.

A frame costs one system call on each side. A payload that finds no room in the ring goes through the socket, which is
always correct. Waiting is the kernel's (SO_RCVTIMEO, poll); nothing spins.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable
from ctypes import addressof, c_char
from time import monotonic
from typing import TypeVar

from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.wire.base import UNAUTHENTICATED, T
from moeray.wire.frame import (
    CODES,
    INLINE,
    PREFIX,
    Bytes,
    Frame,
    Header,
    Limits,
    VersionMismatchError,
    aligned,
    build_frame,
    check_lengths,
    flatten,
    inline_buffers,
    new_buffer,
    pack_head,
    unpack_header,
)
from moeray.wire.lane import Lane
from moeray.wire.ring import RingReader, RingWriter
from moeray.wire.rows import Forward, Place, Result, native, read_header

_M = TypeVar("_M")

RING_THRESHOLD = 4 << 10

_MESSAGE_BYTES = 48 << 10
_BUFFER_BYTES = 256 << 10
_KEPT_BYTES = 16 << 20
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TIMEVAL = struct.Struct("@ll")


class UnixChannel:
    """One end of a connected unix socket; see `Channel`. Made by `connect_unix` and by the listener.

    It begins with the limits of an unproven peer; `admit` lifts them once the handshake is over.
    """

    kind = "unix"

    def __init__(self, sock: socket.socket, send_timeout_s: float) -> None:
        sock.settimeout(None)
        self.peer = ""
        self.send_timeout_s = send_timeout_s
        self._sock = sock
        self._limits = UNAUTHENTICATED
        self._shut = False
        self._released = False
        self._send_lock = threading.Lock()
        self._recv_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._unsent = b""
        self._message = bytearray(_MESSAGE_BYTES)
        self._message_view = memoryview(self._message)
        self._writer: RingWriter | None = None
        self._reader: RingReader | None = None
        # Whatever the compiled part is to leave alone until the peer is proven has no descriptor.
        self._lane = Lane(fd=-1, message=addressof(c_char.from_buffer(self._message)), message_room=_MESSAGE_BYTES)
        self._use(new_buffer(UNAUTHENTICATED.max_header_bytes + 64))
        self._header: Header | None = None
        self._large: Bytes | None = None
        self._large_end = 0
        self._spare: Bytes | None = None
        self._wait: float | None = None

    def admit(self, peer: str, limits: Limits, ring_bytes: int, deadline: float) -> None:
        """The peer is proven: exchange the shared memory rings and lift the limits. Raises WireError."""
        self.peer = peer
        self._limits = limits
        self._offer_ring(ring_bytes)
        self._take_ring(deadline)
        assert self._lane.start == self._lane.end, "bytes of an unproven peer are read one frame at a time"
        self._lane.start = self._lane.end = 0
        self._use(new_buffer(_BUFFER_BYTES))
        lane = self._lane
        lane.most_header, lane.most_payload = limits.max_header_bytes, limits.max_payload_bytes
        lane.ring_from = RING_THRESHOLD
        lane.join(self._writer.ring if self._writer else None, self._reader.ring if self._reader else None)
        lane.fd = self._sock.fileno()

    def _use(self, memory: Bytes) -> None:
        """Receive into this memory from now on."""
        self._memory, self._view = memory, memory.data
        self._lane.buffer, self._lane.room = memory.ctypes.data, len(memory)

    def _offer_ring(self, ring_bytes: int) -> None:
        try:
            if ring_bytes < RING_THRESHOLD:
                self._sock.sendmsg([b"-"], (), _SEND_FLAGS)
                return
            self._writer = RingWriter(ring_bytes)
            try:
                socket.send_fds(self._sock, [b"R"], [self._writer.fd], _SEND_FLAGS)
            finally:
                self._writer.handed_over()
        except OSError as error:
            raise self._lost(error) from error

    def _take_ring(self, deadline: float) -> None:
        self._set_wait(max(deadline - monotonic(), 1e-3))
        try:
            mark, fds, _, _ = socket.recv_fds(self._sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError as error:
            raise ChannelTimeoutError(f"{self.peer} did not finish the handshake in time; is it stopped?") from error
        except OSError as error:
            raise self._lost(error) from error
        try:
            if fds and mark == b"R":
                self._reader = RingReader(fds[0])
            elif mark != b"-":
                raise self._lost(None) if not mark else WireError(f"{self.peer} sent no shared memory ring")
        finally:
            for fd in fds:
                socket.close(fd)

    @property
    def lane(self) -> int:
        """See `Channel.lane`."""
        return 0 if self._shut else self._lane.address

    @property
    def closed(self) -> bool:
        """True once either side is known to be gone."""
        return self._shut

    def send(self, frame: Frame) -> None:
        """See `Channel.send`."""
        self._in_turn(self._send, frame)

    def send_rows(self, rows: Forward | Result) -> None:
        """See `Channel.send_rows`."""
        if native is None:
            self.send(rows.frame())
        elif not (isinstance(rows, Result) and self._send_outputs(rows)):
            self._in_turn(self._send_rows, rows)

    def place_outputs(self, nbytes: int) -> Place | None:
        """See `Channel.place_outputs`."""
        writer, lane = self._writer, self.lane
        placed = native.place_outputs(lane, nbytes) if native is not None and lane else None
        if placed is None or writer is None:
            return None
        position, address = placed
        return Place(writer.piece(position, nbytes), address, position)

    def _send_outputs(self, result: Result) -> bool:
        """In one call, where nothing else goes out at the time and the peer keeps up."""
        assert native is not None
        lane, place = self.lane, result.place
        went: bool = bool(lane) and native.send_outputs(
            lane, place.position, result.id, result.layer, result.epoch, result.compute_s, result.queue_s,
            CODES[result.dtype], place.address, result.rows, result.width,
        )  # fmt: skip
        if went and self._lane.unsent_from != self._lane.unsent_to:
            self.flush()
        return went

    def _in_turn(self, send: Callable[[_M, float], None], message: _M) -> None:
        """One message at a time; first what is left of one whose sender has given up."""
        deadline = monotonic() + self.send_timeout_s
        if not self._send_lock.acquire(timeout=self.send_timeout_s):
            raise self._stuck()
        lane = self._lane
        try:
            self._check_open()
            lane.busy = 1
            if lane.unsent_from != lane.unsent_to:
                self._unsent = bytes(self._message_view[lane.unsent_from : lane.unsent_to])
                lane.unsent_from = lane.unsent_to
            if self._unsent:
                self._finish([self._unsent], 0, deadline)
            send(message, deadline)
        finally:
            lane.busy = bool(self._unsent)
            self._send_lock.release()

    def _send_rows(self, rows: Forward | Result, deadline: float) -> None:
        size = self._write(rows)
        if size is None:  # too much for both, or for the limits
            self._send(rows.frame(), deadline)
        else:
            self._finish([self._message_view[:size]], 0, deadline)

    def _write(self, rows: Forward | Result) -> int | None:
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
        chunks, size = flatten(frame.tensors)
        writer = self._writer
        if writer is None or not RING_THRESHOLD <= size <= writer.capacity:
            self._finish(inline_buffers(pack_head(frame, size, INLINE, self._limits), chunks), 0, deadline)
            return
        position = self._reserve(writer, size)
        if position is None:
            self._finish(inline_buffers(pack_head(frame, size, INLINE, self._limits), chunks), 0, deadline)
            return
        head = pack_head(frame, size, position, self._limits)
        writer.write(position, chunks)
        # Also where the socket is full and the head never leaves: the reader's next position frees the gap.
        writer.commit(position, size)
        self._finish([head], 0, deadline)

    def _reserve(self, writer: RingWriter, size: int) -> int | None:
        try:
            return writer.reserve(size)
        except WireError:
            self._shut_down()
            raise

    def _finish(self, buffers: list[bytes | memoryview], sent: int, deadline: float) -> None:
        """Send the buffers whole, or keep what is left of a begun frame for the next send."""
        total = sum(len(buffer) for buffer in buffers)
        while True:
            try:
                sent += self._sock.sendmsg(_behind(buffers, sent), (), _SEND_FLAGS)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(error) from error
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

    def recv(self, timeout: float | None = None) -> Frame:
        """See `Channel.recv`."""
        deadline = None if timeout is None else monotonic() + timeout
        with self._recv_lock:
            self._check_open()
            if self._reader is not None:
                self._reader.release()
            try:
                return self._read_frame(deadline)
            except ChannelTimeoutError:
                raise
            except WireError as error:
                # A peer of another version is still told so before its channel ends.
                if not (isinstance(error, VersionMismatchError) and self._limits is UNAUTHENTICATED):
                    self._shut_down()
                raise

    def release(self) -> None:
        """See `Channel.release`."""
        with self._recv_lock:
            if self._reader is not None:
                self._reader.release()

    def on_lane(self, use: Callable[[int], T]) -> T | None:
        """See `Channel.on_lane`."""
        with self._recv_lock:
            self._check_open()
            if native is None:
                return None
            self._wait_at_most(None)
            return use(self._lane.address)

    def flush(self) -> None:
        """See `Channel.flush`."""
        self._in_turn(lambda message, deadline: None, None)

    def _read_frame(self, deadline: float | None) -> Frame:
        self._lane.reading = 1
        header = self._header or self._read_header(deadline)
        self._header = header
        body, payload_bytes = header.body, header.payload_bytes
        if header.where != INLINE:
            memory, at = self._in_ring(header.where, payload_bytes)
            self._lane.start += body
        elif body + payload_bytes <= _BUFFER_BYTES:
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
            raise WireError(f"{self.peer} names shared memory that it never gave; the channel is closed")
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
        self._spare = memory if len(memory) <= _KEPT_BYTES else None
        self._lane.start = min(self._lane.end, self._lane.start + body + size)
        return memory.data

    def _need(self, size: int, deadline: float | None) -> None:
        """Have at least `size` bytes at `_start`, in one piece."""
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
            raise ChannelTimeoutError(f"nothing came from {self.peer or 'the peer'} within the deadline") from error
        except OSError as error:
            raise self._lost(error) from error
        if not count:
            raise self._lost(None)
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

    def _check_open(self) -> None:
        if self._shut:
            raise ChannelClosedError(f"the channel to {self.peer or 'the peer'} is closed; connect again")

    def _stuck(self) -> ChannelTimeoutError:
        return ChannelTimeoutError(
            f"{self.peer or 'the peer'} did not read for {self.send_timeout_s:g} s; is it stopped?"
        )

    def _lost(self, error: OSError | None) -> ChannelClosedError:
        self._shut_down()
        cause = f" ({error.strerror})" if error is not None else ""
        return ChannelClosedError(f"{self.peer or 'the peer'} is gone{cause}; connect again")

    def _shut_down(self) -> None:
        self._shut = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def close(self) -> None:
        """See `Channel.close`."""
        with self._close_lock:
            if self._released:
                return
            self._shut_down()
            # Whoever is in send or recv is awake by now; only then is the descriptor's number free for others.
            with self._send_lock, self._recv_lock:
                self._lane.fd = -1
                self._sock.close()
                self._writer = self._reader = None
                self._large = self._spare = None
                self._released = True


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

"""Shared memory: wrap-around, a full ring, and ends that do not trust each other."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from time import monotonic

import pytest
import torch

from moeray.buffers import ALIGN
from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.wire.frame import PREFIX, Frame, Limits, Op, pack_head
from moeray.wire.ring import RingReader, RingWriter
from moeray.wire.socket_channel import RING_THRESHOLD, SocketChannel
from moeray.wire.unix_dial import UNIX

LIMITS = Limits(1 << 16, 1 << 24)
RING = 256 << 10


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, RingReader]]:
    writer = RingWriter(RING)
    reader = RingReader(writer.fd)
    yield writer, reader
    writer.handed_over()


@pytest.fixture
def ends() -> Iterator[tuple[SocketChannel, SocketChannel, socket.socket]]:
    """Two admitted channel ends, and a second handle of the first end's socket to write raw bytes with."""
    left, right = socket.socketpair()
    raw = left.dup()
    a, b = SocketChannel(left, 0.3, UNIX), SocketChannel(right, 0.3, UNIX)
    admit = threading.Thread(target=a.admit, args=("b", LIMITS, RING, monotonic() + 5))
    admit.start()
    b.admit("a", LIMITS, RING, monotonic() + 5)
    admit.join()
    yield a, b, raw
    a.close()
    b.close()
    raw.close()


def put(writer: RingWriter, value: int, size: int) -> int | None:
    position = writer.reserve(size)
    if position is not None:
        writer.write(position, [memoryview(bytes([value]) * size)])
        writer.commit(position, size)
    return position


def test_the_ring_wraps_and_never_overwrites_what_is_held(ring):
    writer, reader = ring
    size = 96 << 10
    first, second = put(writer, 1, size), put(writer, 2, size)
    assert put(writer, 3, size) is None  # two thirds are in use, and one piece is too large for the rest
    at = reader.hold(first, size)
    assert put(writer, 3, size) is None
    assert (reader.memory[at : at + size] == 1).all()
    reader.release()
    third = put(writer, 3, size)
    assert third == RING  # wrapped to byte 0
    at = reader.hold(second, size)
    assert (reader.memory[at : at + size] == 2).all()
    reader.release()
    at = reader.hold(third, size)
    assert at == 0
    assert (reader.memory[:size] == 3).all()


def test_a_ring_that_starts_over_has_all_of_its_room(ring):
    """What is skipped when an empty ring starts over at its first byte is free, though no reader says so."""
    writer, reader = ring
    size = 96 << 10
    for value in range(5):
        first, second = put(writer, value, size), put(writer, value + 1, size)
        assert (first % RING, second % RING) == (0, size)
        assert put(writer, 9, size) is None
        for position, expected in ((first, value), (second, value + 1)):
            at = reader.hold(position, size)
            assert (reader.memory[at : at + size] == expected).all()
            reader.release()


def test_an_empty_ring_takes_a_payload_of_its_whole_size(ring):
    writer, reader = ring
    for value in range(5):
        for size in (64, RING, 128):
            position = put(writer, value, size)
            at = reader.hold(position, size)
            assert (reader.memory[at : at + size] == value).all()
            reader.release()


@pytest.mark.parametrize(
    ("position", "size"),
    [(-64, 64), (1, 64), (RING - 64, 128), (3 * RING, 64), (0, RING + 64), (1 << 64, 64), ((1 << 64) - 64, 64)],
)
def test_positions_outside_the_ring_are_refused(ring, position, size):
    with pytest.raises(WireError, match="outside its ring"):
        ring[1].hold(position, size)


def test_a_reader_that_claims_too_much_is_refused(ring):
    writer, reader = ring
    reader.ring.head = 1 << 40
    reader.release()
    with pytest.raises(WireError, match="never written"):
        writer.reserve(64)


def test_memory_that_its_owner_could_shrink_is_refused():
    fd = os.memfd_create("x")
    try:
        os.ftruncate(fd, RING)
        with pytest.raises(WireError, match="not a sealed ring"):
            RingReader(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("offered", "named"), [(False, "no shared memory of"), (True, "no descriptor is left")])
def test_a_process_without_a_descriptor_for_a_ring_is_told_so(offered, named):
    left, right = socket.socketpair()
    ends = [SocketChannel(sock, 1.0, UNIX) for sock in (left, right)]
    if offered:
        ends[1]._sender.admit(LIMITS, RING)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.dup(0)
    os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, limits[1]))
    try:
        with pytest.raises(ChannelClosedError, match=named + r".* raise `ulimit -n`"):
            ends[0].admit("expert", LIMITS, 0 if offered else RING, monotonic() + 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for end in ends:
            end.close()


def test_large_payloads_wrap_around_the_ring(ends):
    a, b, _ = ends
    for turn in range(40):
        size = RING_THRESHOLD + 7919 * turn % (64 << 10)
        sent = torch.full((size,), turn, dtype=torch.uint8)
        a.send(Frame(Op.FORWARD, turn, tensors=(sent, torch.tensor([turn]))))
        got = b.recv(5.0)
        assert got.id == turn
        assert torch.equal(got.tensors[0], sent)
        assert got.tensors[1].item() == turn


def test_frames_that_find_the_ring_full_go_through_the_socket(ends):
    a, b, _ = ends
    count = 40  # five times the ring
    got: list[tuple[int, bool]] = []

    def read() -> None:
        while len(got) < count:
            frame = b.recv(5.0)
            got.append((frame.id, bool((frame.tensors[0] == frame.id).all())))

    a.send_timeout_s = 5.0
    for turn in range(4):  # fills the ring: nobody reads yet
        a.send(Frame(Op.FORWARD, turn, tensors=(torch.full((60 << 10,), turn, dtype=torch.uint8),)))
    assert a._sender._writer.reserve(60 << 10) is None
    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(4, count):
        a.send(Frame(Op.FORWARD, turn, tensors=(torch.full((60 << 10,), turn, dtype=torch.uint8),)))
    reader.join()
    assert got == [(turn, True) for turn in range(count)]


def test_a_frame_larger_than_ring_and_buffer_arrives_whole(ends):
    a, b, _ = ends
    a.send_timeout_s = 10.0
    sent = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8)
    sender = threading.Thread(target=a.send, args=(Frame(Op.FORWARD, 7, tensors=(sent,)),))
    sender.start()
    assert torch.equal(b.recv(10.0).tensors[0], sent)
    sender.join()
    a.send(Frame(Op.PING, 8))
    assert b.recv(5.0).id == 8


def test_a_timeout_in_the_middle_of_a_frame_loses_nothing(ends):
    _, b, raw = ends
    payload = bytes(range(256)) * 4
    frame = Frame(Op.FORWARD, 5, tensors=(torch.frombuffer(bytearray(payload), dtype=torch.uint8),))
    data = pack_head(frame, len(payload), -1, LIMITS) + payload
    for cut in (3, 20, 70, 500):
        raw.sendall(data[:cut])
        with pytest.raises(ChannelTimeoutError):
            b.recv(0.02)
        with pytest.raises(ChannelTimeoutError):
            b.recv(0)
        raw.sendall(data[cut:])
        got = b.recv(5.0)
        assert got.id == 5
        assert bytes(got.tensors[0].numpy()) == payload


def test_a_timeout_in_the_middle_of_a_large_frame_loses_nothing(ends):
    a, b, _ = ends
    a.send_timeout_s = 0.05
    sent = torch.randint(0, 255, (2 << 20,), dtype=torch.uint8)
    with pytest.raises(ChannelTimeoutError):
        a.send(Frame(Op.FORWARD, 1, tensors=(sent,)))  # half of it fills the socket
    with pytest.raises(ChannelTimeoutError):
        b.recv(0.05)
    a.send_timeout_s = 5.0
    sender = threading.Thread(target=a.send, args=(Frame(Op.PING, 2),))  # the rest goes first
    sender.start()
    assert torch.equal(b.recv(5.0).tensors[0], sent)
    assert b.recv(5.0).id == 2
    sender.join()


@pytest.mark.parametrize(
    "data",
    [
        PREFIX.pack(LIMITS.max_header_bytes + 1, 0),
        PREFIX.pack(100, LIMITS.max_payload_bytes + 1),
        PREFIX.pack(56, 0) + b"\xc1" * 56,
        pack_head(Frame(Op.FORWARD), 0, 0, LIMITS)[: PREFIX.size] + bytes(120),
        pack_head(Frame(Op.FORWARD, tensors=(torch.ones(16),)), 64, 1 << 50, LIMITS),
        pack_head(Frame(Op.FORWARD, tensors=(torch.ones(16),)), 64, 63, LIMITS),
    ],
)
def test_hostile_bytes_close_the_channel(ends, data):
    _, b, raw = ends
    raw.sendall(data)
    with pytest.raises(WireError):
        b.recv(5.0)
    assert b.closed
    with pytest.raises(ChannelClosedError):
        b.recv(5.0)


def test_pipelined_frames_keep_their_alignment(ends):
    a, b, _ = ends
    for turn in range(100):
        a.send(Frame(Op.FORWARD, turn, meta={"pad": "x" * turn}, tensors=(torch.full((turn,), turn),)))
    for turn in range(100):
        got = b.recv(5.0)
        assert got.id == turn
        assert got.tensors[0].data_ptr() % ALIGN == 0
        assert (got.tensors[0] == turn).all()


def test_nothing_of_the_rings_has_a_name(ends):
    assert not [name for name in os.listdir("/dev/shm") if "moeray" in name]

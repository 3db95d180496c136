"""How a channel comes to rings on a device, and what becomes of it where that fails."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

import pytest
import torch

from moeray.errors import ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.wire.base import limits_of
from moeray.wire.channel import Channel, Listener, connect
from moeray.wire.device_memory import DeviceMemoryError
from moeray.wire.device_side import DeviceSide, device_side
from moeray.wire.frame import Frame, Op
from moeray.wire.handshake import Acceptor, Connector
from moeray.wire.host_memory import HostMemory
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.unix_dial import UNIX
from tests.wire.support import SMALL, dial, eventually, identity

RING = 64 << 10
CPU = torch.device("cpu")


class Room:
    """A listener with this memory, whose channels are handed to the test."""

    def __init__(self, folder: Path, memory: HostMemory | None) -> None:
        self.channels: SimpleQueue[Channel] = SimpleQueue()
        self.side = None if memory is None else DeviceSide(memory, RING, required=False)
        self.listener = Listener(identity(), SMALL, self._handle, folder, self.side)
        self.address = self.listener.start()

    def _handle(self, channel: Channel) -> None:
        self.channels.put(channel)
        while True:  # until the channel ends
            channel.send(Frame(Op.PONG, channel.recv().id))

    def connect(self, side: DeviceSide | None, kind: str = "unix") -> Channel:
        if kind == "unix":
            return connect(self.address, identity("router-0"), SMALL, timeout=20.0, side=side)
        return dial(self.address, identity("router-0"), SMALL, kind)

    def close(self) -> None:
        self.listener.close(20.0)


@pytest.fixture
def room(folder):
    room = Room(folder, HostMemory())
    yield room
    room.close()


def side_of(memory: HostMemory | None = None, required: bool = False) -> DeviceSide:
    return DeviceSide(memory or HostMemory(), RING, required=required)


def proven(room: Room) -> SocketChannel:
    """A dialling side that has proven itself, said that it has a device, and nothing since."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(room.address.unix)
    channel = SocketChannel(sock, 5.0, UNIX)
    connector = Connector(identity("router-0"), "expert-0", devices=True)
    channel.send(connector.hello())
    channel.send(connector.prove(channel.recv(10.0)))
    assert connector.peer_has_devices
    return channel


def works(channel: Channel) -> bool:
    channel.send(Frame(Op.PING, 5))
    return channel.recv(10.0).id == 5


def test_both_ends_have_rings_and_give_them_back(room):
    side = side_of(required=True)
    near = room.connect(side)
    far = room.channels.get(timeout=10.0)
    assert near.device is not None
    assert far.device is not None
    assert (side.held_bytes, room.side.held_bytes) == (RING, RING)
    assert works(near)
    near.close()
    assert near.device is None
    assert eventually(lambda: (side.held_bytes, room.side.held_bytes) == (0, 0))


def test_a_side_without_a_device_is_asked_nothing(folder, room):
    """CPU actors, endpoints and the controller: not a frame more than without GPUs."""
    side, plain = side_of(required=True), Room(folder / "plain", None)
    near = plain.connect(side)
    assert near.device is None
    assert side.held_bytes == 0
    assert works(near)
    near.close()
    plain.close()
    other = room.connect(None)
    assert other.device is None
    assert works(other)
    assert room.channels.get(timeout=10.0).device is None
    other.close()


class Blind(HostMemory):
    def open(self, handle, device_name, nbytes):
        raise DeviceMemoryError("the peer's GPU is not visible here")


class Broken(HostMemory):
    """As torch says it."""

    def open(self, handle, device_name, nbytes):
        raise RuntimeError("CUDA error: invalid argument\nCompile with `TORCH_USE_CUDA_DSA`")


class Full(HostMemory):
    def allocate(self, nbytes):
        raise DeviceMemoryError(f"cudaMalloc of {nbytes} bytes failed: out of memory (2)")


class Elsewhere(HostMemory):
    """Its handles open, and lead to other memory than is written: what a self-check is for."""

    def open(self, handle, device_name, nbytes):
        found = super().open(handle, device_name, nbytes)
        found.memory = torch.zeros(nbytes, dtype=torch.uint8)
        return found


class OtherKind(HostMemory):
    kind = "cuda"


class OtherHost(HostMemory):
    def allocate(self, nbytes):
        region = super().allocate(nbytes)
        region.device_name = "GPU-of-another"
        return region


FAILURES = [
    (Blind, "not visible here"),
    (Broken, "CUDA error: invalid argument"),
    (Full, "out of memory"),
    (Elsewhere, "something else in the device's memory"),
    (OtherKind, "of the kind"),
    (OtherHost, "GPU-of-another"),
]


@pytest.mark.parametrize(("memory", "words"), FAILURES)
@pytest.mark.parametrize("where", ["dials", "listens"])
def test_where_either_side_cannot_the_channel_goes_on_and_one_line_says_why(folder, memory, words, where, caplog):
    room = Room(folder, memory() if where == "listens" else HostMemory())
    side = side_of(memory() if where == "dials" else None)
    with caplog.at_level(logging.WARNING):
        near = room.connect(side)
        assert works(near)
    assert near.device is None
    assert room.channels.get(timeout=10.0).device is None
    assert (side.held_bytes, room.side.held_bytes) == (0, 0)
    (line,) = caplog.messages
    assert line.startswith("rows to expert-0 and back go through the host's memory: ")
    assert words in line
    assert "\n" not in line
    near.close()
    room.close()


@pytest.mark.parametrize(("memory", "words"), FAILURES)
def test_where_rows_must_stay_on_the_device_there_is_no_channel_without(folder, memory, words):
    room, side = Room(folder, memory()), side_of(required=True)
    before = descriptors()
    with pytest.raises(WireError, match=words) as raised:
        room.connect(side)
    assert str(raised.value).endswith("; or set wire.device_rows: auto")
    assert eventually(lambda: (side.held_bytes, room.side.held_bytes) == (0, 0))
    del raised  # its frames hold the channel
    assert eventually(lambda: descriptors() <= before)
    room.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["tcp", "grpc"])
def test_across_nodes_nothing_is_offered(room, kind):
    near = room.connect(None, kind)
    assert near.device is None
    assert works(near)
    near.close()


def test_a_dialling_side_that_goes_away_in_the_middle_leaves_nothing(room):
    """It has said that it has a device, and never says more."""
    proven(room).close()
    assert eventually(lambda: room.side.held_bytes == 0)
    near = room.connect(side_of(required=True))
    assert near.device is not None
    near.close()


def test_a_listening_side_that_says_nothing_is_a_timeout(folder):
    """And what was allocated for it is given back."""
    silent = HostMemory()
    blocked = threading.Event()

    def open_late(handle, device_name, nbytes):
        assert blocked.wait(20)
        raise DeviceMemoryError("too late")

    silent.open = open_late
    room, side = Room(folder, silent), side_of()
    with pytest.raises(ChannelTimeoutError):
        connect(room.address, identity("router-0"), SMALL, timeout=0.3, side=side)
    blocked.set()
    assert eventually(lambda: (side.held_bytes, room.side.held_bytes) == (0, 0))
    room.close()


def test_a_device_frame_that_names_no_memory_is_refused_in_words(room):
    channel = proven(room)
    channel.admit("expert-0", limits_of(SMALL), SMALL.shared_memory_bytes, monotonic() + 5)
    channel.send(Frame(Op.DEVICE, meta={"kind": "host", "bytes": "many"}))
    answer = channel.recv(10.0)
    assert answer.op is Op.DEVICE
    assert "names no memory" in answer.meta["refused"]
    channel.close()


@pytest.mark.parametrize(
    ("wire", "memory", "there"),
    [
        ({}, True, True),
        ({"device_rows": "on"}, True, True),
        ({"device_rows": "off"}, True, False),
        ({}, False, False),  # a CPU
        ({"device_rows": "on"}, False, False),
        ({"shared_memory_bytes": 0}, True, False),
    ],
)
def test_who_has_a_side(wire, memory, there):
    side = device_side(CPU, WireConfig(**wire), HostMemory() if memory else None)
    assert (side is not None) == there


def test_on_where_a_gpu_has_no_runtime_is_an_error_and_auto_a_warning(caplog):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(DeviceMemoryError, match="not built for CUDA"):
        device_side(torch.device("cuda", 0), WireConfig(device_rows="on"))
    with caplog.at_level(logging.WARNING):
        assert device_side(torch.device("cuda", 0), WireConfig()) is None
    (line,) = caplog.messages
    assert "not built for CUDA" in line


@pytest.mark.parametrize(
    ("said", "heard"), [({"devices": True}, True), ({}, False), ({"devices": 1}, False), ({"devices": "yes"}, False)]
)
def test_only_a_plain_yes_is_one(said, heard):
    """Another release may say anything, or nothing."""
    connector, acceptor = Connector(identity("router-0"), "expert-0"), Acceptor(identity())
    hello = connector.hello()
    assert "devices" not in hello.meta
    welcome = acceptor.welcome(hello._replace(meta={**hello.meta, **said}))
    assert "devices" not in welcome.meta
    connector.prove(welcome._replace(meta={**welcome.meta, **said}))
    assert acceptor.peer_has_devices is heard
    assert connector.peer_has_devices is heard

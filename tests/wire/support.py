"""Two ends of a channel in one process, and a peer in another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

from moeray.errors import ChannelClosedError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.channel import Channel, Listener, connect
from moeray.wire.frame import Frame, Limits, Op
from moeray.wire.identity import Identity
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.unix_dial import UNIX

SERVER = "expert-0"
KINDS = ("unix", "tcp", "grpc")
SMALL = WireConfig(remote="both", send_timeout_s=10.0, handshake_timeout_s=5.0, shared_memory_bytes=1 << 20)


def identity(actor: str = SERVER, node: str = "here", fingerprint: str = "model", token: bytes = b"secret") -> Identity:
    return Identity(actor, node, fingerprint, token)


def dial(address: Address, me: Identity, wire: WireConfig, kind: str, timeout: float = 20.0) -> Channel:
    """A channel of this kind."""
    if kind == "unix":
        return connect(address, me, wire, timeout=timeout)
    remote = "grpc" if kind == "grpc" else wire.remote
    return connect(address, replace(me, node_id="there"), replace(wire, remote=remote), timeout=timeout)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time (for what the kernel or gRPC ends behind our back)."""
    deadline, never = monotonic() + seconds, threading.Event()
    while not holds():
        if monotonic() > deadline:
            return False
        never.wait(0.01)
    return True


class Host:
    """A listener whose channels are handed to the test; it keeps each until the channel is closed."""

    def __init__(self, folder: Path, wire: WireConfig = SMALL) -> None:
        if wire.remote == "auto" and wire.tls_cert is None:
            wire = replace(wire, remote="both")
        self.wire = wire
        self.channels: SimpleQueue[Channel] = SimpleQueue()
        self._done = threading.Event()
        self.listener = Listener(identity(), wire, self._handle, folder)
        self.address = self.listener.start()

    def _handle(self, channel: Channel) -> None:
        self.channels.put(channel)
        self._done.wait()

    def dial(self, kind: str, actor: str = "router-0", **other: object) -> Channel:
        """Only the connecting end."""
        return dial(self.address, identity(actor, **other), self.wire, kind)

    def pair(self, kind: str) -> tuple[Channel, Channel]:
        """The connecting and the listening end of a new channel."""
        near = self.dial(kind)
        return near, self.channels.get(timeout=10.0)

    def close(self) -> None:
        self._done.set()
        self.listener.close(20.0)


def echo(channel: Channel) -> None:
    """Answer each frame with its own tensors until the peer leaves."""
    with suppress(ChannelClosedError):
        while True:
            frame = channel.recv()
            channel.send(Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, frame.meta, frame.tensors))


class OtherProcess:
    """An echoing listener in a process of its own, to be killed or stopped."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.wire.support", str(folder)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = Address(SERVER, "here", *self.process.stdout.readline().split())

    def dial(self, kind: str, wire: WireConfig = SMALL) -> Channel:
        return dial(self.address, identity("router-0"), wire, kind)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main(folder: str) -> None:
    listener = Listener(identity(), SMALL, echo, Path(folder))
    address = listener.start()
    print(address.unix, address.tcp, address.grpc, flush=True)
    sys.stdin.read()
    listener.close(5.0)


if __name__ == "__main__":
    main(sys.argv[1])


def admitted_pair(limits: Limits, ring_bytes: int, *, soon_full: bool = False) -> tuple[SocketChannel, SocketChannel]:
    """Both ends of a channel whose handshake is over. `soon_full`: its sockets take as little as they can."""
    left, right = socket.socketpair()
    for sock in (left, right) if soon_full else ():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    a, b = SocketChannel(left, SMALL.send_timeout_s, UNIX), SocketChannel(right, SMALL.send_timeout_s, UNIX)
    until = monotonic() + SMALL.handshake_timeout_s
    admit = threading.Thread(target=a.admit, args=("expert", limits, ring_bytes, until))
    admit.start()
    b.admit("router", limits, ring_bytes, until)
    admit.join()
    return a, b

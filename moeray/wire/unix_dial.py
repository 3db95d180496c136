"""The way to an actor on the same node: its unix socket."""

from __future__ import annotations

import socket
import struct

from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.connection import Kernel, without_descriptor
from moeray.wire.socket_channel import SocketChannel

MAX_PATH_BYTES = 107


UNIX = Kernel("unix")


def check_path(path: str) -> None:
    """Raise WireError for a path that the kernel's socket address has no room for."""
    size = len(path.encode())
    if size > MAX_PATH_BYTES:
        raise WireError(
            f"socket path {path} has {size} bytes, the system's limit is {MAX_PATH_BYTES}; choose a shorter folder"
        )


def dial_unix(address: Address, wire: WireConfig, timeout: float) -> SocketChannel:
    """A channel to whoever listens at `address.unix`. Raises ChannelClosedError (nobody does), ChannelTimeoutError."""
    assert address.unix is not None
    check_path(address.unix)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise without_descriptor(address, error) from error
    try:
        # Where the listener's queue is full, connect waits at most this long.
        wait = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6) or 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        sock.connect(address.unix)
    except BlockingIOError as error:
        sock.close()
        raise ChannelTimeoutError(f"{address.actor_id} did not accept within {timeout:g} s; is it stopped?") from error
    except OSError as error:
        sock.close()
        raise ChannelClosedError(
            f"{address.actor_id} does not listen at {address.unix} ({error.strerror}); it is gone or not started"
        ) from error
    return SocketChannel(sock, wire.send_timeout_s, UNIX)


def is_listened_at(path: str) -> bool:
    """Somebody listens at this socket: whoever does, however busy, does not refuse. Raises FileNotFoundError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its queue is full
            return True
    return True

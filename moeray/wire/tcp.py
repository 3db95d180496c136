"""The way between nodes where nothing needs to be encrypted: a TCP connection, dialled and listened for.

It is as the unix socket but for the shared memory. Measured: a layer's rows take a third of the time that they take by
gRPC in Python.
"""

from __future__ import annotations

import errno
import socket

from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.connection import Kernel, without_descriptor
from moeray.wire.guests import MAX_UNAUTHENTICATED
from moeray.wire.own_address import bracketed, reachable
from moeray.wire.socket_channel import SocketChannel

TCP = Kernel("tcp")

_IDLE_S, _PROBE_S, _GONE_S = 10, 5, 15


def dial_tcp(address: Address, wire: WireConfig, timeout: float) -> SocketChannel:
    """A channel to whoever listens at `address.tcp`. Raises ChannelClosedError (nobody does), ChannelTimeoutError."""
    assert address.tcp is not None
    host, _, port = address.tcp.rpartition(":")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), max(timeout, 1e-3))
    except TimeoutError as error:
        raise ChannelTimeoutError(f"{address.actor_id} did not accept within {timeout:g} s; is it stopped?") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise without_descriptor(address, error) from error
        raise ChannelClosedError(
            f"{address.actor_id} does not listen at {address.tcp} ({error.strerror or error}); "
            "it is gone or not started"
        ) from error
    settle(sock)
    return SocketChannel(sock, wire.send_timeout_s, TCP)


def listen_tcp(host: str) -> tuple[socket.socket, str]:
    """A socket that listens at a free port of `host`, and `host:port` as others reach it. Raises WireError where the
    host is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host.strip("[]"), 0), family=family, backlog=MAX_UNAUTHENTICATED)
    except OSError as error:
        raise WireError(f"cannot listen at wire.host {host}; name an address of this machine") from error
    settle(sock)  # those that it accepts are as it is
    try:
        return sock, f"{bracketed(reachable(host))}:{sock.getsockname()[1]}"
    except BaseException:
        sock.close()
        raise


def settle(sock: socket.socket) -> None:
    """Small messages go out at once, and a machine that is gone without a word is found out in 15 s at most."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_S * 1000)

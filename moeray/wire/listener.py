"""Where an actor can be reached: a unix socket in a private folder and, for other nodes, a TCP or a gRPC port."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from moeray.errors import WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import Channel
from moeray.wire.connection import Carrier, Kernel
from moeray.wire.door import Door
from moeray.wire.greeting import receive
from moeray.wire.guests import MAX_UNAUTHENTICATED, Guests
from moeray.wire.identity import Identity
from moeray.wire.socket_channel import SocketChannel
from moeray.wire.tcp import TCP, listen_tcp
from moeray.wire.unix_dial import UNIX, check_path, is_listened_at

if TYPE_CHECKING:
    from moeray.wire.device_side import DeviceSide
    from moeray.wire.grpc_server import GrpcServer

_log = logging.getLogger(__name__)

RENEW_S = 1.0


class Listener:
    """Runs `handler(channel)` in a thread of its own for each peer that has proven itself; the channel ends with it."""

    def __init__(
        self, identity: Identity, wire: WireConfig, handler: Callable[[Channel], None], socket_dir: Path,
        side: DeviceSide | None = None,
    ) -> None:  # fmt: skip
        """`side`: for rows that stay on a device, see `connect`."""
        self._identity = identity
        self._wire = wire
        self._side = side
        self._path = Path(socket_dir) / (re.sub(r"[^A-Za-z0-9._-]", "_", identity.actor_id) + ".sock")
        self._guests = Guests(handler, wire.max_channels)
        self._inode = 0
        self._doors: list[Door] = []  # the unix socket's first
        self._renewing = threading.Lock()  # guards the doors and the socket's file
        self._grpc: GrpcServer | None = None

    def start(self) -> Address:
        """Listen. Raises WireError for an unsafe folder, too long a path, or a socket that another actor holds."""
        check_path(str(self._path))
        _check_folder(self._path.parent)
        _clear_stale(self._path)
        me, remotes, tcp, grpc = self._identity, self._wire.remotes, None, None
        listening = [(self._bind(), UNIX)]
        try:
            if "tcp" in remotes:
                sock, tcp = listen_tcp(self._wire.host)
                listening.append((sock, TCP))
            if "grpc" in remotes:
                grpc = self._start_grpc()
        except BaseException:
            self._unlink()
            for sock, _ in listening:
                sock.close()
            raise
        self._doors = [self._door(sock, carrier) for sock, carrier in listening]
        return Address(me.actor_id, me.node_id, str(self._path), tcp, grpc)

    def renew(self) -> None:
        """Listen again where the socket's file is gone: somebody has removed it, or the whole folder. Open channels do
        not notice, and there would never be another one. Raises WireError where that cannot be.
        """
        with self._renewing:
            if not self._doors or os.path.lexists(self._path):
                return
            _check_folder(self._path.parent)
            gone, self._doors[0] = self._doors[0], self._door(self._bind(), UNIX)
            gone.close(monotonic() + RENEW_S)
        _log.warning("somebody had removed %s; listening there again", self._path)

    def _bind(self) -> socket.socket:
        sock = _bind(self._path)
        self._inode = self._path.stat().st_ino
        return sock

    def _door(self, listening: socket.socket, carrier: Kernel) -> Door:
        name = f"wire-accept-{carrier.kind}-{self._identity.actor_id}"
        return Door(listening, name, lambda sock: self._receive(sock, carrier))

    def _start_grpc(self) -> str:
        from moeray.wire.grpc_server import GrpcServer  # only where it is used: grpc takes a while to import

        self._grpc = GrpcServer(self._wire, self._receive)
        return self._grpc.start()

    def _receive(self, sock: socket.socket, carrier: Carrier) -> None:
        if not self._guests.enter():
            sock.close()
            return
        channel = SocketChannel(sock, self._wire.send_timeout_s, carrier)
        if not self._guests.spawn(f"wire-{carrier.kind}-greeting", lambda: self._host(channel), channel):
            self._guests.leave(channel)
            sock.close()

    def _host(self, channel: SocketChannel) -> None:
        try:
            if not receive(channel, self._identity, self._wire, self._guests, self._side):
                channel.close()
                return
        except WireError as error:
            _log.warning("refused a peer (%s): %s", channel.kind, error)
            channel.close()
            return
        except Exception:  # one peer's failure must not leave its channel open, but it is never silent
            _log.exception("a peer could not be greeted (%s)", channel.kind)
            channel.close()
            return
        finally:
            self._guests.leave(channel)
        self._guests.serve(channel)

    def close(self, timeout: float) -> None:
        """Stop listening, end all channels, join all threads. Raises WireError that names what still runs after it."""
        deadline = monotonic() + timeout
        with self._renewing:
            doors, self._doors = self._doors, []
            if not doors:
                return
            self._unlink()
        for door in doors:
            door.close(deadline)
        left = self._guests.close(deadline)
        if self._grpc is not None:
            left += self._grpc.close(deadline)
        if left:
            raise WireError(f"{self._identity.actor_id}: {', '.join(left)} did not end within {timeout:g} s")

    def _unlink(self) -> None:
        """Remove our socket file, unless another actor has taken the name since."""
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except OSError:  # somebody has removed it, or closed the folder
            return


def _check_folder(folder: Path) -> None:
    try:
        for missing in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise WireError(f"no socket folder {folder} can be made ({error.strerror}); choose another") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise WireError(f"socket folder {folder} is not a folder; choose another")
    if found.st_uid != os.getuid():
        raise WireError(f"socket folder {folder} belongs to user {found.st_uid}; choose one of user {os.getuid()}")
    if found.st_mode & 0o077:
        raise WireError(f"socket folder {folder} is open to others (mode {found.st_mode & 0o777:o}); chmod 700 it")


def _clear_stale(path: Path) -> None:
    """Remove the socket of a dead process. Raises WireError for a live one and for anything else of that name."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise WireError(f"{path} is in the way and is not a socket; remove it")
    if is_listened_at(str(path)):
        raise WireError(f"another live actor listens at {path}; give each actor a name of its own")
    path.unlink(missing_ok=True)


def _bind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(0o600)  # nobody else reaches it meanwhile: the folder is private
        sock.listen(MAX_UNAUTHENTICATED)
    except OSError as error:
        sock.close()
        raise WireError(f"cannot listen at {path}: {error.strerror}; choose another folder") from error
    return sock

"""The processes of a Ray that this process has started, for when that Ray can no longer be asked to end."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil
import ray

LOOK_S = 0.25
END_S = 5.0


class OwnRay:
    """Its head's processes and all below them."""

    def __init__(self, head: Sequence[psutil.Process], address: tuple[str, int]) -> None:
        self._head = head
        self._address = address
        self._below: set[psutil.Process] = set()

    def is_gone(self) -> bool:
        """A process of the head has ended, or the head does not listen any more since it is about to."""
        return any(map(_has_ended, self._head)) or not _listens(self._address)

    def look(self) -> None:
        """Note who is there: later nobody tells whose processes were a raylet's that is gone."""
        self._below.update(psutil.Process().children(recursive=True))

    def end(self) -> None:
        """Wait until all have ended, which they do by themselves without a head; kill those that do not."""
        _kill(self._head)
        until = time.monotonic() + END_S
        while time.monotonic() < until and not all(map(_has_ended, self._below)):
            time.sleep(LOOK_S)
        _kill(self._below)


def own_ray() -> OwnRay | None:
    """The Ray that this process is connected to, None where another has started it."""
    head = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]
    if not head:
        return None
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return OwnRay(head, (host, int(port)))


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=LOOK_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True

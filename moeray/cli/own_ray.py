"""The processes of a Ray that this process has started, for when that Ray can no longer be asked to end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

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


@contextmanager
def wholly_or_not_at_all() -> Iterator[None]:
    """Where the start of a Ray within the block is interrupted, every process that it has started is killed: Ray's own
    way to end them can be interrupted by a further Ctrl-C, and its agents then stay for a minute.

    Further Ctrl-Cs change nothing until that is done; then one ends this process at once.
    """
    before = set(psutil.Process().children(recursive=True))
    with _interrupted_once():
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # the latter is Ray's own for SIGTERM
            _kill_all_but(before)
            raise


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """The block's first SIGINT raises KeyboardInterrupt, later ones do nothing. In other threads than the main one, and
    where SIGINT is ignored or no business of Python's, nothing is changed."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    came = False

    def take(number: int, frame: object) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if came else before)


def _kill_all_but(before: set[psutil.Process]) -> None:
    """The processes below this one that were not there before. All are stopped first: none starts another meanwhile."""
    stopped: set[psutil.Process] = set()
    while fresh := set(psutil.Process().children(recursive=True)) - before - stopped:
        for process in fresh:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        stopped |= fresh
    _kill(stopped)


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

"""A socket that listens, and the thread that takes what comes there."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from time import monotonic

_log = logging.getLogger(__name__)


class Door:
    """Hands each accepted socket to `take`, which must neither block nor raise. Owns the listening socket."""

    def __init__(self, listening: socket.socket, name: str, take: Callable[[socket.socket], None]) -> None:
        self._listening = listening
        self._take = take
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listening.accept()
            except OSError as error:
                if not self._closing.is_set():
                    _log.error("%s: cannot accept a channel: %s", self._thread.name, error.strerror)
                    self._closing.wait(0.1)  # out of descriptors or memory: others may give some back
                continue
            self._take(sock)

    def close(self, deadline: float) -> None:
        """Stop listening; joins the thread until the deadline (of time.monotonic)."""
        self._closing.set()
        self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(max(0.0, deadline - monotonic()))
        self._listening.close()

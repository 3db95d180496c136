"""An actor's watch for its controller: one that hears of no controller for long stops, and leaves nothing behind."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


def new_incarnation() -> str:
    """A name for one start of an actor: counters of another incarnation begin again at 0."""
    return secrets.token_hex(8)


class Vigil:
    """Calls `on_orphan`, once and from its own thread, when `heard` was not called for `orphan_s` seconds."""

    def __init__(
        self, orphan_s: float, on_orphan: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._orphan_s = orphan_s
        self._on_orphan = on_orphan
        self._clock = clock
        self._last = clock()
        self._closed = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)
        self._thread.start()

    def heard(self) -> None:
        """A controller has spoken."""
        self._last = self._clock()

    def allow(self, orphan_s: float) -> None:
        """From now on, silence of `orphan_s` seconds."""
        self._orphan_s = orphan_s
        self._woken.set()

    def _watch(self) -> None:
        while not self._closed and (left := self._last + self._orphan_s - self._clock()) > 0:
            if self._woken.wait(min(left, threading.TIMEOUT_MAX)):
                self._woken.clear()
        if not self._closed:
            log.error("no controller was heard of for %g s (control.orphan_s); the actor stops", self._orphan_s)
            self._on_orphan()

    def close(self) -> None:
        """End the watch and join its thread; `on_orphan` itself may call it."""
        self._closed = True
        self._woken.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

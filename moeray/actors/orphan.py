"""An actor that hears of no controller for long ends itself: nobody else would."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class OrphanWatch:
    """Calls `on_orphan` once, in its own thread, when `heard` was not called for `limit_s` seconds."""

    def __init__(
        self, actor_id: str, limit_s: float, on_orphan: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._on_orphan = on_orphan
        self._clock = clock
        self._heard = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"orphan-watch-{actor_id}", daemon=True)

    def start(self) -> None:
        self.heard()
        self._thread.start()

    def heard(self) -> None:
        """The controller is there."""
        self._heard = self._clock()

    def _run(self) -> None:
        while (left := self._heard + self._limit_s - self._clock()) > 0:
            if self._over.wait(left):
                return
        log.error("no controller was heard of for %g s (control.orphan_s); the actor stops", self._limit_s)
        self._on_orphan()

    def stop(self) -> None:
        """End the thread; from within `on_orphan` it ends by itself."""
        self._over.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

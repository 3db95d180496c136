"""Whether the system serves yet: what its start is doing, what has ended it, and who serves since."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from moeray.actors.spec import SystemInfo
from moeray.errors import MoerayError


class Readiness:
    """Any thread may look. `phase`: what the start is doing, in a line; `error`: what has ended it; `info`: what an
    ingress needs, once there is a router that serves."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.error: str | None = None
        self.info: SystemInfo | None = None
        self._start: Future[None] = Future()

    @property
    def decided(self) -> bool:
        """The start has succeeded, or failed."""
        return self._start.done()

    def fail(self, error: MoerayError) -> None:
        """End the start, unless it has ended."""
        if not self.decided:
            self._start.set_exception(error)

    def succeed(self) -> None:
        """The system serves: the start has ended, unless it had before."""
        if not self.decided:
            self.phase = "ready"
            self._start.set_result(None)

    def take_over(self) -> None:
        """A system that runs has a controller again: what fails from now on is mended, and ends nothing."""
        self.phase = "taking over the actors that run"
        if not self.decided:
            self._start.set_result(None)

    def wait(self, limit_s: float, look: Callable[[], str | None]) -> None:
        """Until the start has ended; `look` says meanwhile what it is doing, where that is known.

        Raises the MoerayError that ended it, or one after `limit_s` seconds.
        """
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            try:
                self._start.result(timeout=0.5)
                return
            except FutureTimeoutError:
                self.phase = look() or self.phase
        raise MoerayError(
            f"the system is still {self.phase} after {limit_s:g} s (control.start_s); "
            "`ray status` shows whether the cluster has room"
        )

    def state(self, stopping: bool) -> dict[str, Any]:
        """`status` ("loading", "ready", "stopping" or "failed"), `detail` in a line, `info` (SystemInfo) if ready."""
        if self.error is not None:
            return {"status": "failed", "detail": self.error, "info": None}
        if stopping:
            return {"status": "stopping", "detail": "stopping", "info": None}
        if self.info is None or not self.decided:
            return {"status": "loading", "detail": self.phase, "info": None}
        return {"status": "ready", "detail": "ready", "info": self.info}

"""`GET /console/state`: how the endpoint and the system behind it stand, for as many pages as are open."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from moeray import __version__
from moeray.errors import MoerayError
from moeray.serve.backend import ObservedBackend

log = logging.getLogger("moeray.serve")

KEEP_S = 0.5
"""An answer is given again for so long: a page asks each second."""
ANSWER_S = 3.0
"""A controller that takes longer is shown as one that does not answer."""


class ConsoleState:
    """The state as JSON. One question to the controller is under way at a time, and only while a page asks."""

    def __init__(self, backend: ObservedBackend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._answer = b""
        self._until = float("-inf")

    async def read(self) -> bytes:
        """`endpoint` (status, detail), `model` (None until it is known), `system` (what the controller shows, None
        where it does not answer, for the reason `error`)."""
        async with self._one_at_a_time:
            if self._clock() >= self._until:
                self._answer = json.dumps(await self._look(), separators=(",", ":")).encode()
                self._until = self._clock() + KEEP_S
            return self._answer

    async def _look(self) -> dict[str, Any]:
        system, error = await self._system()
        state, model = self._backend.state, self._backend.model
        return {
            "version": __version__,
            "endpoint": {"status": state.status, "detail": state.detail},
            "model": None if model is None else {"name": model.name, "max_context": model.max_context},
            "system": system,
            "error": error,
        }

    async def _system(self) -> tuple[dict[str, Any] | None, str | None]:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._backend.console(), None
        except TimeoutError:
            return None, f"the controller has not answered for {ANSWER_S:g} s"
        except MoerayError as error:  # the page says so, and works on
            log.info("the live page has no data: %s", error)
            return None, str(error)

"""A system in this process, without Ray: the controller over local actors, behind the same port."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from moeray.actors.controller import Controller
from moeray.cluster.local import NODE, LocalCluster
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.recorder import Reading

__all__ = ["NODE", "LocalPort"]


class LocalPort:
    """Implements `ControllerPort`. The system starts at once, in a thread; `close` ends it."""

    def __init__(self, config: Config) -> None:
        self._controller = Controller(config, LocalCluster())
        self._starter = threading.Thread(target=self._start, name="controller-start", daemon=True)
        self._starter.start()

    def _start(self) -> None:
        try:
            self._controller.start()
        except MoerayError:
            return  # `state` holds the text, and `renew` hands it on

    async def renew(self, reading: Reading) -> dict[str, Any]:
        self._controller.hear(reading)
        return self._controller.state()

    async def call(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(self._controller.call, method, *args)

    async def close(self) -> None:
        """Stop every actor. A start that is under way is waited for."""
        await asyncio.to_thread(self._starter.join)
        await asyncio.to_thread(self._controller.stop)

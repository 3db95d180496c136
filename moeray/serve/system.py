"""The endpoint's backend over a running system: follows the controller, and spreads requests over the routers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Protocol

from moeray.actors.client import RouterClient
from moeray.actors.controller import SystemInfo
from moeray.actors.spec import model_fingerprint
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.model.loading import generation_defaults
from moeray.model.source import resolve
from moeray.serve.backend import BackendState, ModelInfo
from moeray.types import GenerationRequest, TokenOutput
from moeray.wire.channel import Identity

log = logging.getLogger(__name__)

POLL_LOADING_S = 0.2
RENEW_S = 5.0


class ControllerPort(Protocol):
    """A way to the controller: a Ray actor, or an object of this process."""

    async def renew(self) -> dict[str, Any]:
        """Keep the system alive, and read its state."""
        ...

    async def call(self, method: str, *args: Any) -> Any: ...


class SystemBackend:
    """Implements `Backend`. `start` and `close` on the event loop that uses it."""

    def __init__(self, config: Config, controller: ControllerPort, node_id: str) -> None:
        self._config = config
        self._controller = controller
        self._node_id = node_id
        self._state = BackendState("loading", "connecting to the controller")
        self._model: ModelInfo | None = None
        self._clients: list[RouterClient] = []
        self._follower: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()

    @property
    def state(self) -> BackendState:
        return self._state

    @property
    def model(self) -> ModelInfo | None:
        return self._model

    def start(self) -> None:
        """Begin to follow the controller; returns at once."""
        self._follower = asyncio.create_task(self._follow(), name="controller-follower")

    async def ready(self, timeout: float) -> ModelInfo:
        """Wait until the system serves. Raises the MoerayError that stopped its start, or one after `timeout` s."""
        try:
            await asyncio.wait_for(self._settled.wait(), timeout)
        except TimeoutError:
            raise MoerayError(f"the system is still {self._state.detail} after {timeout:g} s") from None
        if self._model is None:
            raise MoerayError(self._state.detail)
        return self._model

    async def _follow(self) -> None:
        while self._state.status != "failed":
            await self._look()
            await asyncio.sleep(POLL_LOADING_S if self._state.status == "loading" else RENEW_S)

    async def _look(self) -> None:
        try:
            state = await self._controller.renew()
            if state["status"] == "ready" and self._model is None:
                await self._connect(state["info"])
            self._state = BackendState(state["status"], state["detail"])
        except MoerayError as error:
            # A controller that is gone does not stop the routers: go on serving, and say so in /health.
            log.warning("the controller does not answer: %s", error)
            if self._model is None:
                self._state = BackendState("failed", str(error))
        if self._state.status != "loading":
            self._settled.set()

    async def _connect(self, info: SystemInfo) -> None:
        identity = Identity(
            f"ingress-{secrets.token_hex(4)}", self._node_id, model_fingerprint(self._config), info.token
        )
        self._clients = [RouterClient(address, identity, self._config.wire) for address in info.routers]
        folder = await asyncio.to_thread(lambda: resolve(info.model, info.revision, node=self._node_id).metadata_dir())
        self._model = ModelInfo(
            name=self._config.serve.model_name or Path(info.model).name,
            created=int(time.time()),
            max_context=info.max_context,
            vocab_size=info.vocab_size,
            metadata_dir=folder,
            eos_token_ids=info.eos_token_ids,
            generation_defaults=generation_defaults(folder),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Run on the router with the fewest requests of ours in flight."""
        client = min(self._clients, key=lambda c: c.in_flight)
        stream = client.generate(request)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def status(self) -> dict[str, Any]:
        return dict(await self._controller.call("status"))

    async def metrics(self) -> bytes:
        return bytes(await self._controller.call("metrics"))

    async def close(self) -> None:
        """Stop following and close the channels; what is in flight is aborted."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        for client in self._clients:
            await client.close()

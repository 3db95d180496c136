"""The endpoint's backend over a running system: follows the controller, and knows whether anything can be served."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Protocol

from moeray.actors.client import RouterClient
from moeray.actors.spec import SystemInfo, model_fingerprint
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.model.generation import sampling_defaults
from moeray.model.source import resolve
from moeray.recorder import Reading, Recorder
from moeray.serve.backend import BackendState, ModelInfo
from moeray.serve.errors import ControllerLostError
from moeray.serve.pool import RouterPool
from moeray.types import Address, GenerationRequest, TokenOutput
from moeray.wire.identity import Identity

log = logging.getLogger(__name__)

POLL_S = 0.2
"""While the system loads, a request waits for a router or a router is lost."""
RENEW_S = 5.0
FIRST_CONTACT_S = 120.0
"""A controller that has never answered for so long will not."""


class ControllerPort(Protocol):
    """A way to the controller: a Ray actor, or an object of this process."""

    async def renew(self, reading: Reading) -> dict[str, Any]:
        """Keep the system alive, tell what was counted here, and read the system's state.

        Raises ControllerLostError while the controller does not answer, another MoerayError where it refuses.
        """
        ...

    async def call(self, method: str, *args: Any) -> Any: ...


class SystemBackend:
    """Implements `Backend`. `start` and `close` on the event loop that uses it.

    A controller that does not answer disturbs no request: the routers known at last go on serving, and the follower
    goes on asking. What `recorder` holds is told to the controller.
    """

    def __init__(
        self, config: Config, controller: ControllerPort, node_id: str, recorder: Recorder | None = None
    ) -> None:
        self._config = config
        self._recorder = recorder or Recorder()
        self._controller = controller
        self._node_id = node_id
        self._said = BackendState("loading", "connecting to the controller")
        self.name = f"ingress-{secrets.token_hex(4)}"
        self._identity: Identity | None = None
        self._model: ModelInfo | None = None
        self._pool = RouterPool(self._dial, config.serve.request_timeout_s, self._recorder)
        self._follower: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._unanswered = 0
        self._began = time.monotonic()

    @property
    def state(self) -> BackendState:
        if self._model is None:
            return self._said
        if self._pool.usable:
            return BackendState("ready")
        return BackendState("waiting", f"no router can be reached; the controller: {self._said.detail}")

    @property
    def model(self) -> ModelInfo | None:
        return self._model

    def configure(self, config: Config) -> None:
        """Hold a newer config: the model's name, the requests' deadline and choices from now on."""
        self._config = config
        self._pool.timeout_s = config.serve.request_timeout_s
        self._pool.disturbed.set()  # the controller may have something new to tell
        if self._model is not None:
            told = replace(self._model, name=config.served_model_name, max_sequences=config.most_sequences)
            self._model = self._model if told == self._model else told  # whoever reads its files knows it by identity

    def start(self) -> None:
        """Begin to follow the controller; returns at once."""
        self._follower = asyncio.create_task(self._follow(), name="controller-follower")
        self._follower.add_done_callback(_log_death)

    async def ready(self, timeout: float) -> ModelInfo:
        """Wait until the system serves. Raises the MoerayError that stopped its start, or one after `timeout` s."""
        try:
            async with asyncio.timeout(timeout):
                await self._settled.wait()
        except TimeoutError:
            raise MoerayError(f"the system is still {self._said.detail} after {timeout:g} s") from None
        if self._model is None:
            raise MoerayError(self._said.detail)
        return self._model

    # -- following the controller ---------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Ask on for as long as the backend lives; also where no system could start, which another config may mend."""
        while True:
            try:
                await self._look()
                await self._accuse()
            except Exception as error:  # an endpoint that looks no more would never hear of another router
                log.exception("the controller could not be asked")
                self._wait_on(MoerayError(f"the controller could not be asked: {error!r}"))
            if self._model is not None or self._said.status == "failed":
                self._settled.set()
            await self._pause()

    async def _pause(self) -> None:
        self._pool.disturbed.clear()
        hurried = self._pool.troubled or (self._model is None and self._said.status != "failed")
        if hurried or self._unanswered:
            await asyncio.sleep(min(RENEW_S, POLL_S * 2.0 ** min(self._unanswered, 10)))
            return
        with suppress(TimeoutError):
            # Not wait_for, which before Python 3.12 loses a cancellation that comes as the event is set.
            async with asyncio.timeout(RENEW_S):
                await self._pool.disturbed.wait()

    async def _look(self) -> None:
        try:
            state = await self._controller.renew(self.reading())
        except ControllerLostError as error:
            starts = self._wait_on(error)
            log.log(logging.INFO if starts else logging.WARNING, "%s", error)
            return
        except MoerayError as error:
            if str(error) != self._said.detail:
                log.error("%s", error)
            self._unanswered += 1
            self._said = BackendState("failed", str(error))
            return
        if state["info"] is not None:
            try:
                await self._take(state["info"])
            except MoerayError as error:  # of this endpoint's node, such as a hub that does not answer
                log.warning("%s", error)
                self._wait_on(error)
                return
        self._unanswered = 0
        self._said = BackendState(state["status"], state["detail"])

    async def _accuse(self) -> None:
        """Have the controller ask the routers that do not answer here."""
        if (lost := self._pool.lost) and not self._unanswered:
            try:
                await self._controller.call("suspect", lost)
            except MoerayError as error:  # it looks for itself, too
                log.info("%s", error)

    def _wait_on(self, error: MoerayError) -> bool:
        """Try again later: for ever once the endpoint has served, else for a time, of which True says that it lasts."""
        self._unanswered += 1
        starts = self._model is None and time.monotonic() - self._began <= FIRST_CONTACT_S
        self._said = BackendState("loading" if starts or self._model is not None else "failed", str(error))
        return starts

    async def _take(self, info: SystemInfo) -> None:
        self._identity = Identity(self.name, self._node_id, model_fingerprint(self._config), info.token)
        self._pool.follow(info.routers)
        if self._model is None:
            self._model = await self._describe(info)

    def _dial(self, address: Address, on_loss: Callable[[], None]) -> RouterClient:
        assert self._identity is not None, "routers are named together with the token"
        return RouterClient(address, self._identity, self._config.wire, on_loss=on_loss)

    async def _describe(self, info: SystemInfo) -> ModelInfo:
        folder = await asyncio.to_thread(lambda: resolve(info.model, info.revision, node=self._node_id).metadata_dir())
        return ModelInfo(
            name=self._config.served_model_name,
            created=int(time.time()),
            max_context=info.max_context,
            vocab_size=info.vocab_size,
            metadata_dir=folder,
            eos_token_ids=info.eos_token_ids,
            sampling_defaults=sampling_defaults(folder),
            max_sequences=self._config.most_sequences,
        )

    # -- serving --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Run on the router with the fewest requests of ours, and go on elsewhere when that one is lost."""
        async with aclosing(self._pool.generate(request)) as stream:
            async for output in stream:
                yield output

    def stopped(self, request_id: str) -> None:
        self._pool.stopped(request_id)

    async def status(self) -> dict[str, Any]:
        return dict(await self._controller.call("status"))

    async def console(self) -> dict[str, Any]:
        return dict(await self._controller.call("console"))

    async def call(self, method: str, *args: Any) -> Any:
        """Ask the controller anything that it answers."""
        return await self._controller.call(method, *args)

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        text, content_type = await self._controller.call("metrics", accept, self.reading())
        return bytes(text), str(content_type)

    def reading(self) -> Reading:
        """What this endpoint has counted, under its own name: it comes and goes as it likes."""
        return Reading(self.name, self.name, *self._recorder.read(), guest=True)

    async def close(self) -> None:
        """Stop following and close the channels; what is in flight is aborted."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._pool.close()


def _log_death(follower: asyncio.Task[None]) -> None:
    if not follower.cancelled() and (error := follower.exception()):
        log.error("nobody follows the controller any more", exc_info=error)

"""The endpoint as a Ray Serve application: `serve run moeray.serve.app:build model=...`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve.schema import LoggingConfig

from moeray.cluster.ray import find_controller, start_controller
from moeray.config import Config, load_config, overlay
from moeray.errors import ConfigError, MoerayError, one_line
from moeray.logs import change_logging, setup_logging
from moeray.recorder import Reading, Recorder
from moeray.serve.errors import ControllerLostError, ControllerSilentError
from moeray.serve.openai import create_app
from moeray.serve.prompt import import_tokenizers, read_template
from moeray.serve.system import SystemBackend

log = logging.getLogger(__name__)

START_TIMEOUT_S = 3600.0
RENEW_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 60.0
HUNG_RENEWALS = 2
"""A controller that has answered once, and then so many renewals in a row not at all, hangs."""


@dataclass(frozen=True)
class _Offer:
    """A config to run by, laid down at `since`; `before`: the one that is in force while the system has not taken
    this one."""

    config: Config
    since: float
    before: _Offer | None = None

    def same(self, other: _Offer) -> bool:
        """Whichever was in force before."""
        return self.config is other.config and self.since == other.since


class RayPort:
    """Implements `ControllerPort` over the controller's Ray actor, starting it where it does not run.

    `since`: when the config was laid down; a running system follows the newest, and never one of 0.

    The handle is kept for as long as the actor lives (restarts included): a call over it goes from process to process,
    while a lookup asks Ray's GCS, which may be away. A controller that hangs, which Ray never notices, is ended.
    """

    def __init__(self, config: Config, since: float = 0.0) -> None:
        self._offer = _Offer(config, since)
        self._lookup: asyncio.Future[Any] | None = None
        self._silences: int | None = None  # renewals in a row; None while it may not have started yet

    async def configure(self, config: Config, since: float, reading: Reading) -> None:
        """Ask for the system by a newer config from now on. Raises MoerayError, and keeps the one before, where the
        system refuses it; one that does not answer at present will hear of it when it does."""
        self._offer = _Offer(config, since, self._offer.before or self._offer)
        try:
            await self.renew(reading)
        except ControllerLostError as error:
            log.warning("the new config is not taken yet: %s", error)

    async def renew(self, reading: Reading) -> dict[str, Any]:
        offer = self._offer  # while it is asked about, there may come a newer one
        try:
            state = dict(await self._ask("renew", offer.config, offer.since, reading, timeout=RENEW_TIMEOUT_S))
        except ControllerSilentError:
            await self._note_silence()
            raise
        except ControllerLostError:
            self._silences = None
            raise
        except MoerayError:
            self._silences = 0
            if self._offer.same(offer) and self._offer.before is not None:
                self._offer = self._offer.before
            raise
        self._silences = 0
        taken = replace(offer, before=None)
        self._offer = taken if self._offer.same(offer) else replace(self._offer, before=taken)
        return await self._replace(state["detail"]) if state["status"] == "gone" else state

    async def call(self, method: str, *args: Any) -> Any:
        return await self._ask("call", method, *args, timeout=CALL_TIMEOUT_S)

    async def _ask(self, method: str, *args: Any, timeout: float) -> Any:
        """Raises the controller's own MoerayError, or ControllerLostError where it gave no answer."""
        try:
            async with asyncio.timeout(timeout):
                actor = await self._actor()
                return await asyncio.wrap_future(getattr(actor, method).remote(*args).future())
        except RayTaskError as error:
            if isinstance(error.cause, MoerayError):
                raise error.cause from None  # it says all; `serve status` would show Ray's lines around it
            raise MoerayError(f"the controller failed: {one_line(error)[-300:]}") from error
        except ActorDiedError as error:
            self._lookup = None
            said = one_line(error)
            # Of a constructor that failed the cause comes last, of a process that died first.
            why = said[-300:] if "creation task" in said else said[:300]
            raise ControllerLostError(f"the controller is gone: {why}") from error
        except TimeoutError as error:
            raise ControllerSilentError(f"the controller has not answered for {timeout:g} s") from error
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise ControllerLostError(f"the controller does not answer: {one_line(error)[:300]}") from error

    async def _note_silence(self) -> None:
        if self._silences is None:
            return
        self._silences += 1
        if self._silences == HUNG_RENEWALS:
            self._silences = None
            await self._restart()

    async def _restart(self) -> None:
        """End a controller that hangs: Ray starts another, which takes everything over."""
        log.error("the controller hangs; another one takes its place")
        await asyncio.to_thread(ray.kill, await self._actor(), no_restart=False)

    async def _replace(self, failure: str) -> dict[str, Any]:
        """End a system that failed with another config, so that the next look-up starts one with ours."""
        actor, self._lookup = await self._actor(), None
        await asyncio.to_thread(ray.kill, actor)
        return {"status": "loading", "detail": "starting again with a new config", "info": None}

    def _find(self) -> Any:
        return start_controller(self._offer.config, self._offer.since)

    async def _actor(self) -> Any:
        """One lookup at a time, whoever waits for it: without a GCS it holds its thread for as long as Ray retries."""
        if self._lookup is None or (self._lookup.done() and (self._lookup.cancelled() or self._lookup.exception())):
            self._lookup = asyncio.ensure_future(asyncio.to_thread(self._find))
        return await asyncio.shield(self._lookup)


class AttachedPort(RayPort):
    """The same for a system of others, whose config this is: it is never started here, nor replaced."""

    async def _restart(self) -> None:
        log.error("the controller hangs; whoever owns the system ends it")

    async def _replace(self, failure: str) -> dict[str, Any]:
        return {"status": "failed", "detail": failure, "info": None}

    def _find(self) -> Any:
        return find_controller(self._offer.config.serve.name)


@serve.ingress()
class Ingress:
    """A stateless replica: HTTP in front, the routers behind.

    Serve calls `reconfigure` at the start and whenever the deployment's `user_config` has changed: config keys that lie
    over those of the application, taken without a restart.
    """

    def __init__(self, config: Config) -> None:
        self._base = config
        self._port = RayPort(config)
        recorder = Recorder()
        node_id = ray.get_runtime_context().get_node_id()
        self._backend = SystemBackend(config, self._port, node_id, recorder)
        setup_logging(config, actor=self._backend.name, kind="ingress", node=node_id)
        self._app = create_app(self._backend, config, recorder, answer_request_id=False)  # Serve's proxy does
        self._warming: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            if self._warming is not None:
                self._warming.cancel()
                await asyncio.gather(self._warming, return_exceptions=True)
            await self._backend.close()

        self._app.router.lifespan_context = lifespan
        return self._app

    async def reconfigure(self, changes: Mapping[str, Any]) -> None:
        """Go by `changes` from now on. Raises MoerayError where a replica cannot start with them; one that serves
        already serves on as before, and the refusal stands in the audit log, which `moeray status` shows."""
        if self._warming is None:
            await self._start(await asyncio.to_thread(changed, self._base, changes))
            return
        try:
            config = await asyncio.to_thread(changed, self._base, changes)
            await self._port.configure(config, time.time(), self._backend.reading())
        except MoerayError as error:
            log.error("the config stays as it was: %s", error)
            with suppress(MoerayError):  # a controller that is away at the moment writes nothing down
                await self._backend.call("refuse", str(error))
            return
        self._use(config)

    async def _start(self, config: Config) -> None:
        await self._port.configure(config, time.time(), self._backend.reading())
        self._use(config)
        self._backend.start()
        self._warming = asyncio.create_task(self._warm_up())
        if config.serve.wait_for_system:
            await self._backend.ready(START_TIMEOUT_S)
            await self._warming

    def _use(self, config: Config) -> None:
        change_logging(config)
        self._backend.configure(config)
        self._app.state.endpoint.configure(config)

    async def _warm_up(self) -> None:
        """Load the tokenizer once the system is ready, so that the first request does not wait for it."""
        try:
            await asyncio.to_thread(import_tokenizers)  # while the system loads
            await self._backend.ready(START_TIMEOUT_S)
            await self._app.state.endpoint.warm_up()
        except (MoerayError, ImportError) as error:
            log.error("%s", error)


def changed(base: Config, changes: Mapping[str, Any]) -> Config:
    """The config of a replica. Raises ConfigError, also for what is read when the application is built, and for a chat
    template that is none."""
    config = overlay(base, changes)
    for key in ("replicas", "host", "port"):
        if getattr(config.serve, key) != getattr(base.serve, key):
            raise ConfigError(f"serve.{key} is read when the application is built; move it from user_config to args")
    if config.chat_template is not None:
        read_template(config.chat_template)
    return config


def serve_logging(config: Config) -> LoggingConfig:
    """How Serve is to write its own lines, so that they go with ours."""
    encoding, level = config.log_format.upper(), config.log_level.upper()
    return LoggingConfig(encoding=encoding, log_level=level, enable_access_log=config.log_requests)


def application(config: Config) -> serve.Application:
    """The Serve application of a config."""
    deployment = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.serve.replicas,
        max_ongoing_requests=100_000,  # the routers' queues are the limit, and answer 429
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=10.0,
        logging_config=serve_logging(config),
        user_config={},
    )
    return deployment.bind(config)


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's builder: `model=...`, dotted config keys (`experts.actors=4`) or nested ones, and `config=FILE`.

    Raises ConfigError.
    """
    overrides = dict(args)
    config = load_config(overrides.pop("config", None), overrides)
    if not config.model:
        raise ConfigError("config key model: name a local folder or a hub id, such as model=/models/olmoe")
    return application(config)

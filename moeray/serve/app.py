"""The endpoint as a Ray Serve application: `serve run moeray.serve.app:build model=...`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.schema import LoggingConfig

from moeray.config import Config, load_config, overlay
from moeray.errors import ConfigError, MoerayError
from moeray.logs import change_logging, setup_logging
from moeray.recorder import Recorder
from moeray.serve.openai import create_app
from moeray.serve.prompt import import_tokenizers, read_template
from moeray.serve.ray_port import RayPort
from moeray.serve.system import SystemBackend

log = logging.getLogger(__name__)

START_TIMEOUT_S = 3600.0


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

"""A system for the time of one command: in this process, or over Ray; stopped at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from moeray.config import Config
from moeray.logs import setup_logging
from moeray.serve.system import SystemBackend

START_TIMEOUT_S = 1800.0


@asynccontextmanager
async def local_system(config: Config) -> AsyncIterator[SystemBackend]:
    """Every actor in this process."""
    from moeray.serve.local import NODE, LocalPort

    port = LocalPort(config)
    backend = SystemBackend(config, port, NODE)
    backend.start()
    try:
        await backend.ready(START_TIMEOUT_S)
        yield backend
    finally:
        await backend.close()
        await port.close()


@asynccontextmanager
async def ray_system(config: Config) -> AsyncIterator[SystemBackend]:
    """Ray actors, in the cluster that RAY_ADDRESS names, else in one on this machine."""
    import ray

    from moeray.cluster.ray import start_controller
    from moeray.serve.app import RayPort

    connect_ray(config)
    backend = SystemBackend(config, RayPort(config), ray.get_runtime_context().get_node_id())
    controller = start_controller(config)
    backend.start()
    try:
        await backend.ready(START_TIMEOUT_S)
        yield backend
    finally:
        await backend.close()
        await asyncio.to_thread(stop_controller, controller)


def connect_ray(config: Config | None = None, **options: Any) -> None:
    """Connect to the cluster that runs, else start one on this machine. Actors' logs stay in Ray's log folder."""
    import ray

    if config and config.log_format == "json":  # what other libraries say in our processes, too
        options["logging_config"] = ray.LoggingConfig(encoding="JSON", log_level="WARNING")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True, **options)
    setup_logging(config)


def stop_controller(controller: Any) -> None:
    """Stop every actor of the system, then the controller itself."""
    import ray

    ray.get(controller.stop.remote(), timeout=120.0)
    ray.kill(controller)


def attach(name: str, address: str | None) -> Any:
    """The controller of a running system. Raises MoerayError where there is no cluster or no such system."""
    from moeray.cluster.ray import find_controller

    connect(address)
    return find_controller(name)


def connect(address: str | None) -> None:
    """Connect to a cluster that runs. Raises MoerayError where there is none."""
    import ray

    from moeray.errors import MoerayError

    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise MoerayError(
            "no Ray cluster runs here; start one with `ray start --head` or `moeray serve MODEL`, or give --address"
        ) from error

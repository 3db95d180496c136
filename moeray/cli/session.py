"""A system for the time of one command: in this process, or over Ray; stopped at the end."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import click

from moeray.cli.ray_address import astray, unnamed, unreachable
from moeray.config import Config
from moeray.logs import setup_logging
from moeray.serve.system import SystemBackend

START_TIMEOUT_S = 1800.0
LOOK_S = 0.25

_NICENESS = ("RAY_worker_niceness", "0")
"""Of actors in a cluster that is started here. Ray's own choice (15) has its daemons take their cores dozens of times a
second; on two cores that costs a tenth of the tokens."""

Show = Callable[[str], None]
"""Takes a line of progress."""


@asynccontextmanager
async def local_system(config: Config, show: Show | None = None) -> AsyncIterator[SystemBackend]:
    """Every actor in this process."""
    from moeray.serve.local import NODE, LocalPort

    port = LocalPort(config)
    backend = SystemBackend(config, port, NODE)
    backend.start()
    try:
        await _ready(backend, show)
        yield backend
    finally:
        await backend.close()
        await port.close()


def apart(config: Config, purpose: str) -> Config:
    """The same under a name of its own, so that it neither finds nor stops a system that serves in this cluster."""
    name = f"{config.serve.name}-{purpose}-{secrets.token_hex(4)}"
    return replace(config, serve=replace(config.serve, name=name))


def running_or_own(config: Config, purpose: str) -> AbstractAsyncContextManager[SystemBackend]:
    """The system that runs under the config's name where it serves the same model alike; else one of its own."""
    from moeray.actors.spec import model_fingerprint
    from moeray.cluster.ray import running

    connect_where_it_runs(config.serve.name, config)
    served = running(config.serve.name)
    if served is not None and model_fingerprint(served) == model_fingerprint(config):
        click.echo(f"{purpose}: using the system {served.serve.name!r} that serves, as it is", err=True)
        return attached_system(served, served.serve.request_timeout_s)
    return ray_system(apart(config, purpose))


@asynccontextmanager
async def ray_system(config: Config, show: Show | None = None) -> AsyncIterator[SystemBackend]:
    """Ray actors, in the cluster that RAY_ADDRESS names, else in one on this machine."""
    import ray

    from moeray.cluster.ray import start_controller, stop_controller
    from moeray.serve.ray_port import RayPort

    connect_ray(config)
    backend = SystemBackend(config, RayPort(config), ray.get_runtime_context().get_node_id())
    controller = start_controller(config)
    backend.start()
    try:
        await _ready(backend, show)
        yield backend
    finally:
        await backend.close()
        await asyncio.to_thread(stop_controller, controller)


@asynccontextmanager
async def attached_system(config: Config, patience_s: float) -> AsyncIterator[SystemBackend]:
    """The system that runs as `config.serve.name`, whose config this must be; it is neither started nor stopped.

    `patience_s`: for so long a request waits for a router.
    """
    import ray

    from moeray.serve.ray_port import AttachedPort

    patient = replace(config, serve=replace(config.serve, request_timeout_s=patience_s))
    backend = SystemBackend(patient, AttachedPort(config), ray.get_runtime_context().get_node_id())
    backend.start()
    try:
        await _ready(backend)
        yield backend
    finally:
        await backend.close()


async def _ready(backend: SystemBackend, show: Show | None = None) -> None:
    """Wait until the system serves; `show` gets each new line of what it is doing meanwhile. Raises MoerayError."""
    ready = asyncio.ensure_future(backend.ready(START_TIMEOUT_S))
    last = ""
    try:
        while not (await asyncio.wait({ready}, timeout=LOOK_S))[0]:
            if show and (detail := backend.state.detail) != last:
                show(detail)
                last = detail
        await ready
    finally:
        ready.cancel()


def connect_ray(config: Config | None = None) -> None:
    """Connect to the cluster that runs, else start one on this machine, without Ray's dashboard, whose processes would
    compete with the start. Actors' logs stay in Ray's log folder. Raises MoerayError where a cluster is named and
    cannot be reached.
    """
    import ray

    if not ray.is_initialized():
        _refuse(unreachable(None))
        os.environ.setdefault(*_NICENESS)
        _init(configure_logging=True, include_dashboard=False, **_quiet(config))
    setup_logging(config)


def connect_where_it_runs(name: str, config: Config | None = None) -> None:
    """Connect to the cluster in which the system `name` runs; where none has it, as `connect_ray`."""
    import ray

    if not ray.is_initialized():
        _join(name, None, config)
    connect_ray(config)


def _join(name: str, address: str | None, config: Config | None = None) -> bool:
    """Connect to the cluster of this user's on this machine in which the system runs, though nothing names that
    cluster, as where a bare `moeray serve` has started it. False, and no connection, where there is none, and where
    `address`, RAY_ADDRESS or `ray start` name one."""
    import ray
    from ray.exceptions import RayError

    from moeray.cluster.ray import find_controller, take_token
    from moeray.errors import MoerayError

    for head in unnamed(address):
        take_token()
        try:
            ray.init(address=head, configure_logging=True, **_quiet(config))
            find_controller(name)
            return True
        except (MoerayError, RayError, ConnectionError, RuntimeError):  # another's, or of another release of Ray
            ray.shutdown()
    return False


def _quiet(config: Config | None) -> dict[str, Any]:
    """Options of `ray.init`: what actors log stays where they run."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config and config.log_format == "json":  # what other libraries say in our processes, too
        options["logging_config"] = ray.LoggingConfig(encoding="JSON", log_level="WARNING")
    return options


def attach(name: str, address: str | None) -> Any:
    """The controller of a running system. Raises MoerayError where there is no cluster or no such system."""
    from moeray.cluster.ray import find_controller

    connect(address, name)
    return find_controller(name)


def connect(address: str | None, name: str | None = None) -> None:
    """Connect to a cluster that runs: where nothing says which one, to that in which the system `name` runs.
    Raises MoerayError where there is none."""
    if name is not None and _join(name, address):
        return
    _refuse(unreachable(address) or astray(address))
    _init(address=address or "auto", **_quiet(None))


def _init(**options: Any) -> None:
    """`ray.init`. Raises MoerayError where there is no cluster, or one that does not let this process in."""
    import ray
    from ray.exceptions import RayError

    from moeray.cli.own_ray import wholly_or_not_at_all
    from moeray.errors import MoerayError

    try:
        with wholly_or_not_at_all():
            ray.init(**options)
    except (ConnectionError, RuntimeError, RayError) as error:
        ray.shutdown()
        raise MoerayError(not_joined(error)) from error


def not_joined(error: Exception) -> str:
    """What Ray's refusal means, and its mend. Ray does not say why a cluster that answers lets nobody in."""
    from moeray.errors import one_line

    said = one_line(error)[:200]
    if "Could not find any running Ray instance" in said:
        return "no Ray cluster runs here; start one with `ray start --head` or `moeray serve MODEL`, or give --address"
    mend = "where it asks for a token, `export RAY_AUTH_MODE=token` and have it in ~/.ray/auth_token or RAY_AUTH_TOKEN"
    return f"no Ray cluster could be joined or started: {said}; {mend}"


def _refuse(reason: str | None) -> None:
    from moeray.errors import MoerayError

    if reason is not None:
        raise MoerayError(f"no Ray cluster: {reason}; name another by --address or RAY_ADDRESS (local: one of its own)")

"""A running endpoint for the time of a command: Ray, Serve, the application, and their end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import ray
from ray import serve

from moeray.cli.session import connect_ray, stop_controller
from moeray.cluster.ray import find_controller
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.logs import setup_logging
from moeray.serve.app import application

Report = Callable[[str], None]


@contextmanager
def running_endpoint(config: Config, report: Report = lambda detail: None, timeout: float = 1800.0) -> Iterator[str]:
    """Start the endpoint and wait until it is ready; its URL. Leaving the block stops what was started here.

    `report` gets each new line of progress. Raises MoerayError when the system does not start.
    """
    started_ray = not ray.is_initialized() and not _cluster_runs()
    connect_ray()
    setup_logging(config.log_format)
    url = f"http://{config.serve.host}:{config.serve.port}"
    try:
        serve.start(http_options={"host": config.serve.host, "port": config.serve.port})
        serve.run(application(config), name=config.serve.name, route_prefix="/")
        _wait_ready(url, report, timeout)
        yield url
    finally:
        _stop(config, started_ray)


def _cluster_runs() -> bool:
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        return False
    return True


def _wait_ready(url: str, report: Report, timeout: float) -> None:
    until, last = time.monotonic() + timeout, ""
    with httpx.Client(timeout=5.0) as client:
        while time.monotonic() < until:
            state = _health(client, url)
            if state.get("status") == "ok":
                return
            detail = str(state.get("detail", "starting"))
            if state.get("status") == "failed":
                raise MoerayError(detail)
            if detail != last:
                report(detail)
                last = detail
            time.sleep(0.25)
    raise MoerayError(f"the endpoint at {url} was not ready after {timeout:g} s; it says: {last}")


def _health(client: httpx.Client, url: str) -> dict[str, Any]:
    try:
        return dict(client.get(f"{url}/health").json())
    except (httpx.HTTPError, ValueError):
        return {"status": "loading", "detail": "starting the endpoint"}


def _stop(config: Config, started_ray: bool) -> None:
    with suppress(Exception):  # an endpoint that never came up cannot be deleted; the rest must still be stopped
        serve.delete(config.serve.name)
    with suppress(MoerayError):
        stop_controller(find_controller(config.serve.name))
    if started_ray:
        serve.shutdown()
    ray.shutdown()


def wait_for_interrupt() -> None:
    """Return at SIGINT or SIGTERM."""
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    stop.wait()

"""A running endpoint for the time of a command: Ray, Serve, the application, and their end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import ray
from ray import serve

from moeray.cli.progress import phases, progress
from moeray.cli.session import connect_ray
from moeray.cluster.ray import find_controller, start_controller, stop_controller
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.serve.app import application, serve_logging


@contextmanager
def running_endpoint(config: Config, timeout: float = 1800.0) -> Iterator[str]:
    """Start the endpoint and wait until it is ready; its URL. Leaving the block stops what was started here.

    Progress is shown on stderr. Raises MoerayError when the system does not start.
    """
    connect_ray(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    url = f"http://{config.serve.host}:{config.serve.port}"
    try:
        start_controller(config)  # its actors come up while Serve does
        http = {"host": config.serve.host, "port": config.serve.port}
        serve.start(http_options=http, logging_config=serve_logging(config))
        serve.run(application(config), name=config.serve.name, route_prefix="/")
        with progress() as report:
            _wait_ready(url, phases(report), timeout)
        yield url
    finally:
        _stop(config)


def _wait_ready(url: str, show: Callable[[str], None], timeout: float) -> None:
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
                show(detail)
                last = detail
            time.sleep(0.25)
    raise MoerayError(f"the endpoint at {url} was not ready after {timeout:g} s; it says: {last}")


def _health(client: httpx.Client, url: str) -> dict[str, Any]:
    try:
        return dict(client.get(f"{url}/health").json())
    except (httpx.HTTPError, ValueError):
        return {"status": "loading", "detail": "starting the endpoint"}


def _stop(config: Config) -> None:
    """The endpoint first, since it would start a controller that it misses; then the actors.

    A Ray that was started here ends with everything in it; one that was there before goes on.
    """
    if config.serve.name in serve.status().applications:
        serve.delete(config.serve.name)
    with suppress(MoerayError):
        stop_controller(find_controller(config.serve.name))
    ray.shutdown()


def wait_for_interrupt() -> None:
    """Return at SIGINT or SIGTERM."""
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    stop.wait()

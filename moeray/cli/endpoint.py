"""A running endpoint for the time of a command: Ray, Serve, the application, and their end."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import click
import httpx
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from moeray.cli.checks.gather import bind_error, holder_of
from moeray.cli.own_ray import LOOK_S, OwnRay, own_ray
from moeray.cli.progress import phases, progress
from moeray.cli.session import connect_ray
from moeray.cluster.ray import ask, find_controller, start_controller, stop_controller, take_over
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.serve.app import application, serve_logging


@contextmanager
def running_endpoint(config: Config, timeout: float = 1800.0) -> Iterator[str]:
    """Start the endpoint and wait until it is ready; its URL. Leaving the block stops what was started here.

    Progress is shown on stderr. Where a Ray that was started here is ended from outside meanwhile, so is this process.
    Raises MoerayError when the system does not start, and where what runs in this Ray cluster already leaves no room
    for it: that goes on as it was.
    """
    connect_ray(config)
    own = own_ray()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    url = f"http://{config.serve.host}:{config.serve.port}"
    serving = _check_address(config)
    take_over(config)
    try:
        controller = start_controller(config)  # its actors come up while Serve does
        http = {"host": config.serve.host, "port": config.serve.port}
        serve.start(http_options=http, logging_config=serve_logging(config))
        _deploy(config)
        with progress() as report:
            _wait_ready(url, config.serve.name, controller, phases(report), timeout)
        if own is not None:
            own.look()
        yield url
    finally:
        _stop_with(own, config, serving)


def _check_address(config: Config) -> bool:
    """True where Serve runs in this Ray cluster. Raises MoerayError where it answers at another address than ours, and
    where it does not run and could not listen there: it would share the port with whoever does."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        host, port = config.serve.host, config.serve.port
        if (error := bind_error(host, port) if port else None) is not None:
            holder = f" by {who}" if (who := holder_of(port)) else ""
            raise MoerayError(f"cannot listen at {host}:{port}: {error}{holder}; choose another --port or --host")
        return False
    at = client.http_config
    if (at.host, at.port) != (config.serve.host, config.serve.port):
        raise MoerayError(
            f"Ray Serve answers in this cluster at --host {at.host} --port {at.port} and nowhere else: give these, end "
            "it by `serve shutdown`, or set RAY_ADDRESS=local for a cluster of your own"
        )
    return True


def _deploy(config: Config) -> None:
    try:
        target = serve.RunTarget(application(config), config.serve.name)
        serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:  # another application has our paths
        raise MoerayError(f"{_error_of(str(error))} Set RAY_ADDRESS=local for a cluster of your own") from error


def _wait_ready(url: str, name: str, controller: Any, show: Callable[[str], None], timeout: float) -> None:
    """Until the endpoint answers. The controller says how far it is: Serve holds back what is asked before."""
    until, last = time.monotonic() + timeout, ""
    with httpx.Client(timeout=5.0) as client:
        while time.monotonic() < until:
            state = ask(controller, "state")
            if state["status"] == "failed":
                raise MoerayError(state["detail"])
            if state["status"] == "ready" and _healthy(client, url):
                return
            _check_deployment(name)
            detail = "starting the endpoint" if state["status"] == "ready" else str(state["detail"])
            if detail != last:
                show(detail)
                last = detail
            time.sleep(0.25)
    raise MoerayError(f"the endpoint at {url} was not ready after {timeout:g} s; at last it was {last}")


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def _check_deployment(name: str) -> None:
    """Raises MoerayError with the last line of what Serve says of an application that it has given up."""
    overview = serve.status().applications[name]
    if overview.status == ApplicationStatus.DEPLOY_FAILED:
        said = [overview.message, *(deployment.message for deployment in overview.deployments.values())]
        raise MoerayError(f"Ray Serve could not start the endpoint: {_error_of(' '.join(said))}")


def _error_of(traceback: str) -> str:
    """Its last line without the name of the error's class."""
    return re.sub(r"^[\w.]+: ", "", traceback.strip().rpartition("\n")[2])


def _stop_with(own: OwnRay | None, config: Config, serving: bool) -> None:
    """As `_stop`, as long as there is somebody to ask: a signal to the whole process group, as systemd sends it, ends
    Ray with all its actors, and asking a head that is gone takes a minute.

    A further signal ends a Ray that was started here at once. In one of others it changes nothing, since half of a
    system would stay there.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _stop(config, serving)
        except BaseException as error:  # the thread that waits is to hear of it
            failures.append(error)

    stopping = threading.Thread(target=run, name="stop-endpoint", daemon=True)
    stopping.start()
    if own is not None:
        own.look()
    with _signals_taken() as taken:
        while stopping.is_alive() and not (own is not None and (taken or own.is_gone())):
            stopping.join(LOOK_S)
            if taken and own is None:
                click.echo("the system is being stopped, which takes some seconds", err=True)
                taken.clear()
        if not stopping.is_alive() and not failures:
            ray.shutdown()
            return
        if own is None:
            raise failures[0]
        reason = repr(failures[0]) if failures else f"{taken[0].name} again" if taken else "it was ended from outside"
        click.echo(f"Ray is ended with every actor: {reason}", err=True)
        own.end()
        if taken or sys.exc_info()[0] is None:
            sys.stdout.flush()
            # A thread still waits within Ray, which would make the interpreter's end one of a minute, or a crash; and
            # what it asks next would start another Ray.
            os._exit(130 if taken else 0)


@contextmanager
def _signals_taken() -> Iterator[list[signal.Signals]]:
    """SIGINT and SIGTERM of the time of the block; they interrupt nothing. In other threads than the main one, none."""
    taken: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield taken
        return

    def take(number: int, _: object) -> None:
        taken.append(signal.Signals(number))

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(config: Config, serving: bool) -> None:
    """The endpoint first, since it would start a controller that it misses; then the actors.

    A Ray that was started here ends with everything in it; one that was there before goes on, and so does a Serve that
    was (`serving`) or that others use.
    """
    if config.serve.name in serve.status().applications:
        serve.delete(config.serve.name)
    with suppress(MoerayError):
        stop_controller(find_controller(config.serve.name))
    if not serving and not serve.status().applications:
        with redirect_stdout(io.StringIO()):  # Ray prints there that Serve's controller has ended itself
            serve.shutdown()


def wait_for_interrupt() -> None:
    """Return at SIGINT or SIGTERM."""
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    stop.wait()

"""A system's controller over Ray: starting it, finding it, asking it, ending it.

With the modules beside it the only place, but for the entry points, where Ray is known.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from moeray.cluster.ray_cluster import NAMESPACE, controller_name, runtime_env, unwrapped
from moeray.cluster.ray_controller import ControllerProcess
from moeray.config import Config
from moeray.errors import MoerayError, SystemAbsentError

LOOKUP_S = 30.0


def start_controller(config: Config, since: float = 0.0) -> Any:
    """The system's controller: the one that runs under `config.serve.name`, or a new one with this config."""
    return (
        ray.remote(ControllerProcess)
        .options(
            name=controller_name(config.serve.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            resources=dict(config.control.resources),
            max_concurrency=16,
            runtime_env=runtime_env(config),
        )
        .remote(config, since)
    )


def find_controller(system: str, timeout: float = LOOKUP_S) -> Any:
    """The handle of a running controller.

    Raises SystemAbsentError when there is none, another MoerayError when Ray does not answer in time.
    """
    try:
        return _look_up(controller_name(system)).result(timeout)
    except ValueError:
        raise SystemAbsentError(
            f"no moeray system named {system!r} runs in this Ray cluster; start one with `moeray serve MODEL`"
        ) from None
    except FutureTimeoutError as error:
        raise MoerayError(
            f"Ray has not said within {timeout:g} s where the system {system!r} is; see whether Ray's head (GCS) runs"
        ) from error
    except Exception as error:
        raise MoerayError(
            f"Ray could not say where the system {system!r} is ({error!r}); see whether Ray's head (GCS) runs"
        ) from error


def _look_up(name: str) -> Future[Any]:
    """In a thread of its own: without a GCS it hangs for as long as Ray tries again, which Ray bounds itself."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ray.get_actor(name, namespace=NAMESPACE))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="look-up-controller", daemon=True).start()
    return answer


def take_over(config: Config, timeout: float = 60.0) -> None:
    """A system that runs under `config.serve.name` goes by this config from now on; one that had failed makes room.

    Raises MoerayError, and leaves the system as it is, where it cannot.
    """
    try:
        controller = find_controller(config.serve.name)
    except SystemAbsentError:
        return
    state = _answer(controller.renew.remote(config, time.time()), timeout)
    if state["status"] in ("failed", "gone"):
        stop_controller(controller)


def stop_controller(controller: Any, timeout: float = 120.0) -> None:
    """Stop every actor of the system, then the controller itself; one that is gone has been stopped by others."""
    for _ in range(2):  # one that died with its node is put elsewhere, and is asked again there
        with suppress(ActorDiedError):
            ray.get(controller.stop.remote(), timeout=timeout)
            break
    ray.kill(controller)


def take_token() -> None:
    """Send Ray's token along, where this user has one, as Ray does by itself where it finds a cluster by itself."""
    with suppress(ImportError):  # of a Ray that has no tokens yet
        from ray._private.authentication import authentication_token_setup as setup

        logging.getLogger("ray").setLevel(logging.ERROR)  # its warning is for those who start a cluster
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def gcs_address() -> str:
    """`HOST:PORT` of the GCS of the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def ask(controller: Any, method: str, *args: Any, timeout: float = 60.0) -> Any:
    """One call to a controller, with its own error. Raises MoerayError."""
    return _answer(controller.call.remote(method, *args), timeout)


def running_config(controller: Any, timeout: float = 60.0) -> Config:
    """The config that a running system was started with. Raises MoerayError."""
    config: Config = _answer(controller.config.remote(), timeout)
    return config


def running(name: str) -> Config | None:
    """The config of the system that runs under `name`; None where there is none. Raises MoerayError."""
    try:
        controller = find_controller(name)
    except SystemAbsentError:
        return None
    return None if ask(controller, "state")["status"] == "stopping" else running_config(controller)


def _answer(call: Any, timeout: float) -> Any:
    try:
        return unwrapped(call.future(), "the controller").result(timeout)
    except FutureTimeoutError:
        raise MoerayError(f"the controller has not answered for {timeout:g} s; ask again") from None

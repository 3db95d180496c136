"""Actors as Ray actors. The only place, beside the entry points, where Ray is known."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as global_state
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from moeray.actors.controller import Controller
from moeray.actors.hosting import ActorHandle
from moeray.actors.spec import ActorSpec, model_fingerprint
from moeray.cluster.ray_metrics import RayMetrics
from moeray.cluster.ray_process import Process
from moeray.cluster.resources import Request, check_fits, for_experts, for_router
from moeray.config import Config
from moeray.errors import MoerayError, SystemAbsentError
from moeray.logs import change_logging, setup_logging
from moeray.recorder import Reading
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig
from moeray.threads import PASSIVE

log = logging.getLogger(__name__)

NAMESPACE = "moeray"
LEASE_S = 60.0
FAREWELL_S = 10.0
LOOKUP_S = 30.0
# Threads that wait must not spin on a core that another actor needs.
_ENV = PASSIVE | {"TOKENIZERS_PARALLELISM": "false"}


# A process's interpreter: forks of the node's zygote start in a fraction of a second. MOERAY_PYTHON is for a node
# whose Python has another path than the one that starts the system.
_WARM = f"${{MOERAY_PYTHON:-{shlex.quote(sys.executable)}}} -m moeray.cluster.warm"


def _runtime_env(config: Config, num_gpus: float = 0) -> dict[str, Any]:
    """What an actor's process is started with. Those with a GPU import by themselves: CUDA dislikes forks."""
    warm = config.control.warm_start and not num_gpus
    return {"env_vars": _ENV, "py_executable": _WARM} if warm else {"env_vars": _ENV}


class RayHandle:
    """Implements `ActorHandle`. A dead actor's calls fail with a MoerayError that names it."""

    def __init__(self, actor_id: str, actor: Any) -> None:
        self.actor_id = actor_id
        self._actor = actor

    def call(self, method: str, *args: Any) -> Future[Any]:
        return unwrapped(self._actor.call.remote(method, *args).future(), f"actor {self.actor_id}")

    def kill(self) -> None:
        ray.kill(self._actor)


def unwrapped(future: Future[Any], who: str) -> Future[Any]:
    """A future that fails with the actor's own error instead of Ray's wrapping of it."""
    outer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        elif isinstance(error, RayTaskError) and isinstance(error.cause, MoerayError):
            outer.set_exception(error.cause)
        elif isinstance(error, RayActorError):
            outer.set_exception(MoerayError(f"{who} is gone: {' '.join(str(error).split())[:300]}"))
        else:
            outer.set_exception(MoerayError(f"{who} failed: {' '.join(str(error).split())[-300:]}"))

    future.add_done_callback(settle)
    return outer


class RayCluster:
    """Implements `Cluster`. Must be made inside a process that is connected to Ray.

    Actors are detached and named `SYSTEM:START:ACTOR`, so that they outlive a controller that dies and the next one
    finds them; `name` is the system's.
    """

    def __init__(self, name: str, namespace: str = NAMESPACE) -> None:
        self._name = name
        self._namespace = namespace
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self._gpus: float | None = None
        self._actors = 1

    def check(self, groups: Sequence[ExpertGroupConfig], router: RouterConfig) -> None:
        total = self._measure(groups, router)
        requests = [
            for_experts(group, self._gpus or 0.0, self._actors) for group in groups for _ in range(group.actors)
        ]
        requests += [for_router(router, self._gpus or 0.0, self._actors)] * router.actors
        check_fits(requests, total)

    def _measure(self, groups: Sequence[ExpertGroupConfig], router: RouterConfig) -> dict[str, float]:
        total: dict[str, float] = ray.cluster_resources()
        self._gpus = total.get("GPU", 0.0)
        self._actors = router.actors + sum(group.actors for group in groups)
        return total

    def start_expert(self, spec: ActorSpec, group: ExpertGroupConfig) -> ActorHandle:
        if self._gpus is None:
            self._measure(spec.config.experts.resolved(), spec.config.router)
        return self._start("expert", spec, for_experts(group, self._gpus or 0.0, self._actors))

    def start_router(self, spec: ActorSpec, router: RouterConfig) -> ActorHandle:
        if self._gpus is None:
            self._measure(spec.config.experts.resolved(), router)
        return self._start("router", spec, for_router(router, self._gpus or 0.0, self._actors))

    def _start(self, kind: str, spec: ActorSpec, request: Request) -> ActorHandle:
        actor = (
            ray.remote(Process)
            .options(
                name=f"{self._name}:{spec.system}:{spec.actor_id}",
                namespace=self._namespace,
                lifetime="detached",
                num_cpus=request.num_cpus,
                num_gpus=request.num_gpus,
                resources=dict(request.resources),
                scheduling_strategy="SPREAD",
                max_concurrency=8,
                runtime_env=_runtime_env(spec.config, request.num_gpus),
            )
            .remote(kind, spec)
        )
        return RayHandle(spec.actor_id, actor)

    def find(self) -> list[ActorHandle]:
        names = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if self._ours(row)]
        found: list[ActorHandle] = []
        for name in names:
            with suppress(ValueError):  # it died since the list was made
                found.append(RayHandle(name.rpartition(":")[2], ray.get_actor(name, namespace=self._namespace)))
        return found

    def _ours(self, row: Mapping[str, str]) -> bool:
        """An actor of any start of this system, but not its controller."""
        return (
            row["namespace"] == self._namespace
            and row["name"].startswith(f"{self._name}:")
            and row["name"] != controller_name(self._name)
        )

    def draining(self) -> Mapping[str, float]:
        deadlines: dict[str, int] = global_state.get_draining_nodes()
        now = time.time()
        return {node: at / 1000 - now if at else math.inf for node, at in deadlines.items()}

    def close(self) -> None:
        """Nothing is held."""


class ControllerProcess:
    """The Ray actor around the controller. It lives while somebody renews its lease, and takes every actor with it.

    The lease lets a crashed ingress or job leave nothing behind, and a restarted one find everything still running.
    """

    def __init__(self, config: Config, since: float = 0.0) -> None:
        self._config = config
        cluster = RayCluster(config.serve.name)
        self._controller = controller = Controller(config, cluster, since)
        setup_logging(
            config, actor="controller", kind="controller", node=cluster.node_id, epoch=lambda: controller.epoch
        )
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._stopping = threading.Lock()
        self._ray_metrics: RayMetrics | None = None
        if config.metrics.ray:
            resumed = bool(ray.get_runtime_context().was_current_actor_reconstructed)
            self._ray_metrics = RayMetrics(self._controller.series, resumed)
        self._starter = threading.Thread(target=self._start, name="controller-start", daemon=True)
        self._starter.start()
        threading.Thread(target=self._watch, name="controller-lease", daemon=True).start()

    def _start(self) -> None:
        try:
            self._controller.start()
        except MoerayError:
            log.exception("the system did not start")

    def _watch(self) -> None:
        while not self._ended.wait(LEASE_S / 4):
            if time.monotonic() - self._renewed > LEASE_S:
                log.warning("nobody has renewed the lease for %g s; stopping", LEASE_S)
                self.stop()
        time.sleep(FAREWELL_S)  # whoever asked for the stop ends this actor, unless they died meanwhile
        ray.kill(ray.get_runtime_context().current_actor)  # and not started again

    def config(self) -> Config:
        """The config that the system runs with."""
        return self._config

    def renew(self, config: Config, since: float = 0.0, reading: Reading | None = None) -> dict[str, Any]:
        """Keep the system alive for another lease; its state. `reading`: what the caller has counted.

        `config` is the caller's, laid down at `since`: a system that runs takes one that is newer than its own, or
        refuses it with a ConfigError; 0 is never newer. One that failed to start gives way to another config (status
        "gone"), one that lives with another model does not: MoerayError.
        """
        state = self._controller.state()
        if config != self._config and state["status"] == "failed":
            return {"status": "gone", "detail": state["detail"], "info": None}
        if self._controller.configure(config, since):
            change_logging(config)
            self._config = config
        if model_fingerprint(config) != model_fingerprint(self._config):
            raise MoerayError(
                f"a system named {config.serve.name!r} already serves {self._config.model} in this Ray cluster; "
                "stop it, or choose another serve.name"
            )
        self._renewed = time.monotonic()
        if reading is not None:
            self._controller.hear(reading)
        return state

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._controller, method)(*args)

    def stop(self) -> None:
        """End every actor; whoever asks while that is under way waits for it too."""
        with self._stopping:
            if self._ray_metrics is not None:
                self._ray_metrics.close()
            self._controller.stop()
            self._ended.set()


def controller_name(system: str) -> str:
    return f"{system}:controller"


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
            runtime_env=_runtime_env(config),
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
    except (FutureTimeoutError, RayError) as error:
        raise MoerayError(
            f"Ray has not said within {timeout:g} s where the system {system!r} is; see whether Ray's head (GCS) runs"
        ) from error


def _look_up(name: str) -> Future[Any]:
    """In a thread of its own: without a GCS it hangs for as long as Ray tries again, which Ray bounds itself."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ray.get_actor(name, namespace=NAMESPACE))
        except (ValueError, RayError) as error:
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

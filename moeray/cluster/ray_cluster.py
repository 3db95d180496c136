"""A Ray cluster as the controller sees it: where actors are started, and found again."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as global_state
from ray.exceptions import ActorDiedError, RayTaskError

from moeray.actors.hosting import ActorHandle
from moeray.actors.spec import ActorSpec
from moeray.cluster.ray_note import RayNote
from moeray.cluster.ray_process import Process
from moeray.cluster.resources import Request, check_fits, for_experts, for_router
from moeray.config import Config
from moeray.errors import ActorLostError, MoerayError, one_line
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig

NAMESPACE = "moeray"
_ENV = {"TOKENIZERS_PARALLELISM": "false"}


def controller_name(system: str) -> str:
    return f"{system}:controller"


# A process's interpreter: forks of the node's zygote start in a fraction of a second. MOERAY_PYTHON is for a node
# whose Python has another path than the one that starts the system.
_WARM = f"${{MOERAY_PYTHON:-{shlex.quote(sys.executable)}}} -m moeray.cluster.warm"


def runtime_env(config: Config, num_gpus: float = 0) -> dict[str, Any]:
    """What an actor's process is started with. Those with a GPU import by themselves: CUDA dislikes forks."""
    warm = config.control.warm_start and not num_gpus
    return {"env_vars": _ENV, "py_executable": _WARM} if warm else {"env_vars": _ENV}


class RayHandle:
    """Implements `ActorHandle`. A dead actor's calls fail with an ActorLostError that names it."""

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
        elif isinstance(error, ActorDiedError) and "creation task" not in str(error):  # else its constructor failed
            outer.set_exception(ActorLostError(f"{who} is gone: {one_line(error)[:300]}"))
        else:
            outer.set_exception(MoerayError(f"{who} failed: {one_line(error)[-300:]}"))

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
        self._note = RayNote(f"{namespace}:{name}:{ray.get_runtime_context().get_actor_id()}")

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
                runtime_env=runtime_env(spec.config, request.num_gpus),
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

    def keep(self, orders: bytes) -> None:
        self._note.write(orders)

    def recall(self) -> bytes | None:
        return self._note.read()

    def close(self) -> None:
        self._note.close()

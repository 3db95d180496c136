"""Every actor in this process, without Ray. The channels between them are the real ones (unix sockets)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moeray.actors.expert import ExpertActor
from moeray.actors.hosting import ActorHandle
from moeray.actors.router import RouterActor
from moeray.actors.spec import ActorSpec
from moeray.errors import ActorLostError
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig

NODE = "local"


class LocalHandle:
    """An actor object in this process, with threads for its control calls: one may load while another asks."""

    def __init__(self, actor_id: str, actor: ExpertActor | RouterActor, ended: Callable[[LocalHandle], None]) -> None:
        self.actor_id = actor_id
        self._actor = actor
        self._ended = ended
        self._thread = ThreadPoolExecutor(2, thread_name_prefix=f"control-{actor_id}")

    def call(self, method: str, *args: Any) -> Future[Any]:
        try:
            return self._thread.submit(getattr(self._actor, method), *args)
        except RuntimeError as error:
            gone: Future[Any] = Future()
            gone.set_exception(ActorLostError(f"actor {self.actor_id} is gone: {error}"))
            return gone

    def kill(self) -> None:
        self._ended(self)
        self._actor.stop()
        self._thread.shutdown(wait=True)


class LocalCluster:
    """Implements `Cluster` in one process. It outlives a controller: another one over it finds the actors."""

    node_id = NODE

    def __init__(self) -> None:
        self._handles: list[LocalHandle] = []
        self._orders: bytes | None = None

    def start_expert(self, spec: ActorSpec, group: ExpertGroupConfig) -> ActorHandle:
        return self._keep(LocalHandle(spec.actor_id, ExpertActor(spec, NODE), self._forget))

    def start_router(self, spec: ActorSpec, router: RouterConfig) -> ActorHandle:
        return self._keep(LocalHandle(spec.actor_id, RouterActor(spec, NODE), self._forget))

    def _keep(self, handle: LocalHandle) -> ActorHandle:
        self._handles.append(handle)
        return handle

    def _forget(self, handle: LocalHandle) -> None:
        if handle in self._handles:
            self._handles.remove(handle)

    def find(self) -> list[ActorHandle]:
        return list(self._handles)

    def draining(self) -> Mapping[str, float]:
        return {}

    def keep(self, orders: bytes) -> None:
        self._orders = orders

    def recall(self) -> bytes | None:
        return self._orders

    def check(self, groups: Sequence[ExpertGroupConfig], router: RouterConfig) -> None:
        """One process takes whatever is asked of it; its memory is checked when experts are placed."""

    def close(self) -> None:
        self._orders = None

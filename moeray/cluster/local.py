"""Every actor in this process, without Ray. The channels between them are the real ones (unix sockets)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moeray.actors.expert import ExpertActor
from moeray.actors.router import RouterActor
from moeray.actors.spec import ActorSpec
from moeray.config import ExpertGroupConfig, RouterConfig

NODE = "local"


class LocalHandle:
    """An actor object in this process, with threads for its control calls: one may load while another asks."""

    def __init__(self, actor_id: str, actor: ExpertActor | RouterActor) -> None:
        self.actor_id = actor_id
        self._actor = actor
        self._thread = ThreadPoolExecutor(2, thread_name_prefix=f"control-{actor_id}")

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._thread.submit(getattr(self._actor, method), *args)

    def kill(self) -> None:
        self._actor.stop()
        self._thread.shutdown(wait=True)


class LocalCluster:
    """Implements `Cluster` in one process."""

    def start_expert(self, spec: ActorSpec, group: ExpertGroupConfig) -> LocalHandle:
        return LocalHandle(spec.actor_id, ExpertActor(spec, NODE))

    def start_router(self, spec: ActorSpec, router: RouterConfig) -> LocalHandle:
        return LocalHandle(spec.actor_id, RouterActor(spec, NODE))

    def check(self, groups: Sequence[ExpertGroupConfig], router: RouterConfig) -> None:
        """One process takes whatever is asked of it; its memory is checked when experts are placed."""

    def close(self) -> None:
        """Nothing is held."""

"""What the controller needs of the place where actors run. `cluster/` implements it: in this process, or over Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Protocol

from moeray.actors.spec import ActorSpec
from moeray.errors import MoerayError
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig

log = logging.getLogger(__name__)


class ActorHandle(Protocol):
    """A started actor. `call` runs one of its control methods; the future carries the method's own error."""

    @property
    def actor_id(self) -> str: ...

    def call(self, method: str, *args: Any) -> Future[Any]: ...

    def kill(self) -> None:
        """End the actor at once, without a drain. May take a while; killing what is gone does nothing."""
        ...


class Cluster(Protocol):
    """Starts actors. The group's device and resources decide where. Calls may block while the cluster is disturbed."""

    @property
    def node_id(self) -> str:
        """The node of this process."""
        ...

    def start_expert(self, spec: ActorSpec, group: ExpertGroupConfig) -> ActorHandle: ...

    def start_router(self, spec: ActorSpec, router: RouterConfig) -> ActorHandle: ...

    def find(self) -> list[ActorHandle]:
        """The actors of this system that live already: what a controller before this one has started."""
        ...

    def draining(self) -> Mapping[str, float]:
        """Nodes that are about to go, with the seconds that are left to them (inf: until they are empty)."""
        ...

    def keep(self, orders: bytes) -> None:
        """Have them for `recall`, in place of those before. Returns at once; what fails is logged."""
        ...

    def recall(self) -> bytes | None:
        """What this system's controller has kept at last, perhaps in an earlier life. Raises MoerayError where the
        cluster does not say."""
        ...

    def check(self, groups: Sequence[ExpertGroupConfig], router: RouterConfig) -> None:
        """Raise PlacementError when the cluster as it is could not run these actors, naming what is short."""
        ...

    def close(self) -> None:
        """The system has ended: release what the cluster object itself holds, and forget what it keeps. Its actors were
        stopped before, by their owner."""
        ...


def stop_all(handles: Sequence[ActorHandle], timeout: float) -> None:
    """Stop all of them side by side, within `timeout` seconds; those that do not in good order are killed."""
    futures = [(handle, call(handle, "stop")) for handle in handles]
    until = time.monotonic() + timeout
    for handle, future in futures:
        try:
            future.result(timeout=max(0.0, until - time.monotonic()))
        except (MoerayError, FutureTimeoutError) as error:
            log.warning("actor %s did not stop in good order: %s", handle.actor_id, error)
        kill(handle)


def call(handle: ActorHandle, method: str, *args: Any) -> Future[Any]:
    """As the handle's own, but that whatever keeps the call from being made is the future's error."""
    try:
        return handle.call(method, *args)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(MoerayError(f"{method} could not be asked of {handle.actor_id}: {error!r}"))
        return failed


def kill(handle: ActorHandle) -> None:
    """As the handle's own; one that fails is logged, and keeps nobody from killing the others."""
    try:
        handle.kill()
    except Exception as error:
        log.warning("actor %s could not be killed: %r", handle.actor_id, error)

"""The Ray actor around an expert or a router. It owns the process: its threads, its signals and its end.

This module imports nothing heavy: where nobody waits for an actor (the warm pool), what it needs is imported by a
thread of low priority, so that its start does not slow down those that serve.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from moeray.actors.spec import ActorSpec

_NICE = 5


class Process:
    """`kind` is `expert` or `router`. SIGTERM makes the actor say that it is leaving: the controller moves its work."""

    def __init__(self, kind: str, spec: ActorSpec) -> None:
        if spec.background:
            _import_gently("torch", "transformers", f"moeray.actors.{kind}")
        import torch

        from moeray.logs import setup_logging
        from moeray.threads import all_cores

        node_id = ray.get_runtime_context().get_node_id()
        self._actor: Any = None
        setup_logging(spec.config, actor=spec.actor_id, group=spec.group, kind=kind, node=node_id, epoch=self._epoch)
        torch.set_num_threads(spec.threads or all_cores())  # Ray's own choice is one for each of num_cpus
        self._actor = _make(kind, spec, node_id)
        signal.signal(signal.SIGTERM, lambda *_: self._actor.leave())

    def _epoch(self) -> int | None:
        """The placement that a router goes by; experts know of none."""
        return getattr(self._actor, "epoch", None)

    def call(self, method: str, *args: Any) -> Any:
        if method == "configure":
            from moeray.logs import change_logging

            change_logging(args[0])
        return getattr(self._actor, method)(*args)


def _make(kind: str, spec: ActorSpec, node_id: str) -> Any:
    from moeray.actors.expert import ExpertActor
    from moeray.actors.router import RouterActor

    kinds: dict[str, Any] = {"expert": ExpertActor, "router": RouterActor}
    return kinds[kind](spec, node_id, on_stop=_exit)


def _exit() -> None:
    """No controller has asked for this actor for long: nobody would ever stop it."""
    os._exit(0)


def _import_gently(*modules: str) -> None:
    """Import in a thread whose priority is low; Linux keeps a priority for each thread, and this one ends."""

    def run() -> None:
        with suppress(OSError):  # then at the ordinary priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        for module in modules:
            importlib.import_module(module)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    thread.join()

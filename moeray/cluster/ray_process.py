"""The Ray actor around an expert or a router. It owns the process: its threads, its signals and its end.

This module imports nothing heavy: where nobody waits for an actor (the warm pool), what it needs is imported by a
thread of low priority, so that its start does not slow down those that serve.
"""

from __future__ import annotations

import importlib
import os
import signal
from typing import TYPE_CHECKING, Any

import ray

from moeray.threads import BACKGROUND, all_cores, apart, wait_passively

if TYPE_CHECKING:
    from moeray.actors.spec import ActorSpec


class Process:
    """`kind` is `expert` or `router`. SIGTERM makes the actor say that it is leaving: the controller moves its work."""

    def __init__(self, kind: str, spec: ActorSpec) -> None:
        wait_passively()
        if spec.background:
            apart(lambda: _import("torch", "transformers", f"moeray.actors.{kind}"), BACKGROUND)
        import torch

        from moeray.logs import setup_logging

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


def _import(*modules: str) -> None:
    for module in modules:
        importlib.import_module(module)

"""An expert actor and as many routers as a test wants, without a controller: the real actors, channels and engine."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from moeray.actors.expert import ExpertActor
from moeray.actors.router import RouterActor
from moeray.actors.spec import ActorSpec, SystemInfo, model_fingerprint
from moeray.cluster.local import NODE
from moeray.config import Config
from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.model.loading import eos_token_ids, open_model
from moeray.recorder import Reading
from moeray.serve.errors import ControllerLostError
from moeray.types import Address
from moeray.wire.channel import Channel, connect
from moeray.wire.identity import Identity
from tests.systems import tiny_config

_names = itertools.count()


class Fleet:
    """A context manager; `routers` are those that live, in order of their start."""

    def __init__(self, model: Any, **overrides: Any) -> None:
        self.config: Config = tiny_config(model, **overrides)
        self.system = secrets.token_hex(4)
        self.token = secrets.token_bytes(16)
        self.files = open_model(self.config.model, None, node=NODE)
        self.routers: list[RouterActor] = []
        self.addresses: dict[RouterActor, Address] = {}
        self.processes: list[Address] = []

    def __enter__(self) -> Fleet:
        hosts = [Host("experts-0", 1 << 40)]
        sizes = self.files.expert_bytes(self.config.experts.quantization)
        self.placement = place({}, hosts, experts=self.files.expert_counts(), expert_bytes=sizes)
        self.start_expert()
        return self

    def __exit__(self, *exc: object) -> None:
        for router in self.addresses:
            router.stop()
        self.expert.stop()

    def spec(self, actor_id: str, group: str) -> ActorSpec:
        return ActorSpec(actor_id, group, "cpu", 0, self.config, self.token, self.system)

    def start_expert(self) -> None:
        self.expert = ExpertActor(self.spec("experts-0", "experts"), NODE)
        _, self.expert_address = self.expert.start()
        self.expert.host([tuple(expert) for expert in self.placement.replicas])

    def renew_expert(self, router: RouterActor) -> None:
        """Another expert actor takes the place of the first, and the router is told so."""
        lost, self.expert = self.expert, ExpertActor(self.spec("experts-1", "experts"), NODE)
        lost.stop()
        _, address = self.expert.start()
        self.expert.host([tuple(expert) for expert in self.placement.replicas])
        placement = Placement(router.epoch + 1, dict.fromkeys(self.placement.replicas, ("experts-1",)))
        router.publish(placement.to_tree(), {"experts-1": address}, None, ["experts-0"])

    def add_router(self, **options: Any) -> RouterActor:
        router = RouterActor(self.spec(f"router-{next(_names)}", "router"), NODE, **options)
        _, self.addresses[router] = router.start()
        self.facts = router.load_trunk()
        router.publish(self.placement.to_tree(), {"experts-0": self.expert_address})
        self.routers.append(router)
        return router

    @contextmanager
    def router_process(self) -> Iterator[RouterProcess]:
        """A router in a process of its own, for signals."""
        spec = self.spec(f"router-{next(_names)}", "router")
        process = RouterProcess(spec, self.placement.to_tree(), {"experts-0": self.expert_address})
        try:
            self.facts, process.address = process.pipe.recv()
            self.processes.append(process.address)
            yield process
        finally:
            process.kill()

    def kill(self, router: RouterActor) -> None:
        """Its sockets close in the middle of whatever they carry."""
        self.routers.remove(router)
        router.stop()

    def identity(self, name: str = "") -> Identity:
        return Identity(name or f"test-{next(_names)}", NODE, model_fingerprint(self.config), self.token)

    def connect(self, router: RouterActor) -> Channel:
        return connect(self.addresses[router], self.identity(), self.config.wire, timeout=10.0)

    def info(self) -> SystemInfo:
        return SystemInfo(
            self.config.model,
            None,
            self.token,
            self.system,
            (*(self.addresses[router] for router in self.routers), *self.processes),
            self.facts["max_context"],
            self.facts["vocab_size"],
            eos_token_ids(self.files),
        )


class RouterProcess:
    """A spawned process with one router; `kill` is SIGKILL."""

    address: Address

    def __init__(self, spec: ActorSpec, placement: dict[str, Any], addresses: dict[str, Address]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_router, args=(spec, placement, addresses, theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.join(30)
        self.pipe.close()


def _run_router(spec: ActorSpec, placement: dict[str, Any], addresses: dict[str, Address], pipe: Connection) -> None:
    router = RouterActor(spec, NODE)
    _, address = router.start()
    facts = router.load_trunk()
    router.publish(placement, addresses)
    pipe.send((facts, address))
    try:
        pipe.recv()
    except EOFError:
        router.stop()


class FleetPort:
    """Implements `ControllerPort` over a fleet. While `silent` is set it does not answer. `suspects`: the routers that
    it was told of."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.silent = threading.Event()
        self.asked_in_vain = asyncio.Event()
        self.suspects: set[str] = set()

    async def renew(self, reading: Reading) -> dict[str, Any]:
        if self.silent.is_set():
            self.asked_in_vain.set()
            raise ControllerLostError("the controller does not answer: the test says so")
        return {"status": "ready", "detail": "ready", "info": self._fleet.info()}

    async def call(self, method: str, *args: Any) -> Any:
        assert method == "suspect", f"no test here calls {method}"
        self.suspects.update(*args)


def generated(router: RouterActor) -> float:
    """Tokens that a router has generated."""
    return float(sum(router.metrics().values["moeray_generation_tokens_total"].values()))

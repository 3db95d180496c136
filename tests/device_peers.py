"""Expert actors and routers as processes of their own that share a device's memory, to be killed.

`kind` names the memory: `host`, which is there on any machine, or `cuda`.
"""

from __future__ import annotations

import math
import multiprocessing
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from moeray.actors.expert import ExpertActor
from moeray.actors.spec import ActorSpec
from moeray.config import Config
from moeray.control.placement import Placement
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.recorder import Recorder
from moeray.types import Address, ExpertId
from moeray.wire.channel import Channel, connect
from moeray.wire.device_memory import DeviceMemory
from moeray.wire.device_side import DeviceSide, device_side
from moeray.wire.host_memory import HostMemory

NODE = "device-test"
MEMORIES = [
    "host",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]
LAYERS, EXPERTS, TOP_K, WIDTH = 2, 8, 2, 64
"""Of the tiny Mixtral."""

_SPAWN = multiprocessing.get_context("spawn")


def device_of(kind: str) -> torch.device:
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def memory_of(kind: str) -> DeviceMemory | None:
    """None: an actor on a GPU has its own."""
    return None if kind == "cuda" else HostMemory()


def spec_of(config: Config, actor_id: str, kind: str) -> ActorSpec:
    """Of a system of its own, so that the same name may run elsewhere."""
    return ActorSpec(actor_id, "experts", device_of(kind).type, 1, config, b"token", secrets.token_hex(4))


@dataclass
class Expert:
    """One that runs, and where it listens."""

    process: BaseProcess
    pipe: Connection
    address: Address

    def held_bytes(self) -> float:
        """Of its device's memory, for rings."""
        self.pipe.send("held")
        return self.pipe.recv()


def all_experts() -> list[ExpertId]:
    return [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def ring_bytes(actor: ExpertActor) -> float:
    """Of its device's memory, as it says itself."""
    return float(sum(actor.metrics().values["moeray_device_ring_bytes"].values()))


def _run_expert(spec: ActorSpec, kind: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    actor = ExpertActor(spec, NODE, memory=memory_of(kind) if kind != "none" else None)
    _, address = actor.start()
    actor.host(all_experts())
    pipe.send(address)
    while pipe.poll(None):
        try:
            pipe.recv()
        except EOFError:
            break
        pipe.send(ring_bytes(actor))
    actor.stop()


@contextmanager
def experts(config: Config, kinds: Iterable[str]) -> Iterator[list[Expert]]:
    """One of each kind (`none`: without memory to share), hosting all experts."""
    config = replace(config, control=replace(config.control, orphan_s=math.inf))
    running = []
    try:
        for number, kind in enumerate(kinds):
            ours, theirs = _SPAWN.Pipe()
            spec = spec_of(config, f"experts-{number}", kind if kind != "none" else "host")
            process = _SPAWN.Process(target=_run_expert, args=(spec, kind, theirs))
            process.start()
            theirs.close()
            running.append((process, ours))
        yield [Expert(process, ours, ours.recv()) for process, ours in running]
    finally:
        for process, ours in running:
            ours.close()
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


class Routing:
    """A router's dispatcher, and its side of the rings, in this process."""

    def __init__(
        self, config: Config, addresses: Iterable[Address], kind: str, memory: DeviceMemory | None = None
    ) -> None:
        """`memory`: instead of that of the kind."""
        self.addresses = {address.actor_id: address for address in addresses}
        self.side: DeviceSide | None = device_side(device_of(kind), config.wire, memory or memory_of(kind))
        identity = replace(spec_of(config, "router-0", kind).identity(NODE), actor_id="router-0")
        self.channels: dict[str, Channel] = {}
        self.losses: list[tuple[str, str]] = []
        self.recorder = Recorder()

        def dial(address: Address, seconds: float) -> Channel:
            channel = connect(address, identity, config.wire, timeout=max(seconds, 20.0), side=self.side)
            self.channels[address.actor_id] = channel
            return channel

        view = PlacementView()
        self.dispatcher = Dispatcher(
            view, dial, self.recorder, deadline_s=60.0, on_loss=lambda *loss: self.losses.append(loss),
            device=self.side.memory.device if self.side is not None else None,
        )  # fmt: skip
        self.dispatcher.expect(self.addresses)
        for thread in self.dispatcher._links._threads:  # every channel is there, or none is to be had
            thread.join(20.0)
        view.publish(Placement(1, dict.fromkeys(all_experts(), tuple(sorted(self.addresses)))), self.addresses)

    def rows(self, hop: str) -> float:
        """That have come back by it."""
        self.dispatcher.count()
        return float(self.recorder.read()[1]["moeray_dispatch_rows_total"][hop,])

    def close(self) -> None:
        self.dispatcher.close()


def problem(tokens: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D] in bf16, and ids [T, K], on the device."""
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, WIDTH, generator=generator).to(torch.bfloat16)
    ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x_TD.to(device_of(kind)), ids_TK.to(device_of(kind))


def _run_router(config: Config, address: Address, kind: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    routing = Routing(config, [address], kind)
    x_TD, ids_TK = problem(16, kind)
    routing.dispatcher(0, x_TD, ids_TK)
    pipe.send(routing.rows("device"))
    while True:
        routing.dispatcher(0, x_TD, ids_TK)


def start_router(config: Config, address: Address, kind: str) -> tuple[BaseProcess, float]:
    """One that dispatches until it is killed, once it has begun; how many rows have stayed on the device by then."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_run_router, args=(config, address, kind, theirs))
    process.start()
    theirs.close()
    return process, ours.recv()

"""Expert actors as processes of their own, without Ray, for benchmarks of what lies between them and a router."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moeray.actors.expert import ExpertActor
from moeray.actors.spec import ActorSpec
from moeray.config import Config
from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.errors import MoerayError
from moeray.logs import setup_logging
from moeray.model.loading import open_model
from moeray.recorder import Recorder
from moeray.settings.wire import Remote
from moeray.types import Address, ExpertId
from moeray.wire.channel import connect

NEAR, FAR = "near", "far"
"""The actors' node, and another one as far as channels can tell: from there, they are reached by TCP or gRPC."""
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ExpertProcesses:
    """Those that run: where they listen, and what a dispatcher needs to reach them."""

    config: Config
    system: str
    token: bytes
    placement: Placement
    addresses: dict[str, Address]

    @contextmanager
    def dispatcher(self, node: str, remote: Remote = "auto") -> Iterator[Dispatcher]:
        """A router's dispatcher on `node`, closed at the end. `remote`: by what it reaches actors of another one."""
        spec = ActorSpec("bench", "router", "cpu", 1, self.config, self.token, self.system)
        identity = replace(spec.identity(node), actor_id=f"bench-{node}")
        view = PlacementView()
        view.publish(self.placement, self.addresses)
        wire = replace(self.config.wire, remote=remote)
        dispatcher = Dispatcher(
            view,
            lambda address, seconds: connect(address, identity, wire, timeout=seconds),
            Recorder(),
            deadline_s=wire.deadline_s,
        )
        try:
            yield dispatcher
        finally:
            dispatcher.close()


@contextmanager
def expert_processes(config: Config, count: int, threads: int = 1) -> Iterator[ExpertProcesses]:
    """`count` actors of `threads` compute threads on the node NEAR, which host all experts with `experts.replicas`.

    They can be reached by TCP and by gRPC. All are stopped at the end. Raises CheckpointError, and MoerayError where
    one does not start.
    """
    files = open_model(config.model, None, node=NEAR)
    hosts = [Host(f"experts-{i}", 1 << 60) for i in range(count)]
    replicas = min(config.experts.replicas, count)
    sizes = files.expert_bytes(config.experts.quantization)
    placement = place({}, hosts, experts=files.expert_counts(), expert_bytes=sizes, replicas=replicas)
    context, system, token = multiprocessing.get_context("spawn"), secrets.token_hex(4), secrets.token_bytes(32)
    # No controller speaks to them, so silence says nothing: the pipe ends them.
    control = replace(config.control, orphan_s=math.inf)
    reachable = replace(config, wire=replace(config.wire, remote="both"), control=control)
    started = []
    for host in hosts:
        spec = ActorSpec(host.actor_id, "experts", "cpu", threads, reachable, token, system)
        ours, theirs = context.Pipe()
        process = context.Process(target=_run_actor, args=(spec, placement.hosted_by(host.actor_id), theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        addresses = [_hear(ours) for _, ours in started]
        yield ExpertProcesses(config, system, token, placement, {address.actor_id: address for address in addresses})
    finally:
        for process, ours in started:
            ours.close()
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _hear(pipe: multiprocessing.connection.Connection) -> Address:
    try:
        address: Address | None = pipe.recv() if pipe.poll(START_TIMEOUT_S) else None
    except EOFError:
        address = None
    if address is None:
        raise MoerayError(f"an expert process did not start within {START_TIMEOUT_S:g} s; see its output above")
    return address


def _run_actor(spec: ActorSpec, experts: list[ExpertId], pipe: multiprocessing.connection.Connection) -> None:
    """The expert process: serve until the other end of the pipe closes."""
    setup_logging(replace(spec.config, log_level="warning"))
    torch.set_num_threads(spec.threads)
    actor = ExpertActor(spec, NEAR)
    _, address = actor.start()
    actor.host(experts)
    pipe.send(address)
    pipe.poll(None)
    actor.stop()

"""How long a layer's dispatch takes, hop by hop, beside the same experts called in this process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moeray.actors.expert import ExpertActor
from moeray.actors.spec import ActorSpec
from moeray.bench.environment import environment
from moeray.config import Config, load_config
from moeray.control.eplb import place
from moeray.control.placement import Host
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.errors import MoerayError
from moeray.logs import setup_logging
from moeray.metrics import Recorder
from moeray.model.experts import ExpertBank
from moeray.model.loading import open_model
from moeray.types import Address, ExpertId
from moeray.wire.channel import connect

NEAR, FAR = "near", "far"


@dataclass(frozen=True)
class Shape:
    hidden: int = 1024
    intermediate: int = 512
    experts: int = 32
    top_k: int = 8
    layers: int = 2
    actors: int = 2


def measure(shape: Shape, tokens: list[int], repeat: int) -> dict[str, Any]:
    """Medians in microseconds of one layer for each number of tokens; `*_compute_us` is the slowest actor's part."""
    with tempfile.TemporaryDirectory() as folder:
        model = _write_model(shape, Path(folder))
        config = load_config(None, {"model": str(model), "dtype": "bfloat16"})
        with _actors(config, shape) as addresses:
            rows = [_row(config, shape, addresses, n, repeat) for n in tokens]
    return {"shape": asdict(shape), "repeat": repeat, "rows": rows, "environment": environment()}


def _write_model(shape: Shape, folder: Path) -> Path:
    """Random experts of the shape behind the smallest trunk."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=8, num_key_value_heads=1, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@contextmanager
def _actors(config: Config, shape: Shape) -> Iterator[list[Address]]:
    """Expert actors as processes, one thread each, on a node named NEAR; all stopped at the end."""
    files = open_model(config.model, None, node=NEAR)
    counts = files.expert_counts()
    hosts = [Host(f"experts-{i}", 1 << 60) for i in range(shape.actors)]
    placement = place({}, hosts, experts=counts, expert_bytes=files.expert_bytes())
    context, system, token = multiprocessing.get_context("spawn"), secrets.token_hex(4), secrets.token_bytes(32)
    started = []
    for host in hosts:
        spec = ActorSpec(host.actor_id, "experts", "cpu", 1, config, token, system)
        ours, theirs = context.Pipe()
        process = context.Process(target=_run_actor, args=(spec, placement.hosted_by(host.actor_id), theirs))
        process.start()
        started.append((process, ours))
    try:
        yield [_hear(ours) for _, ours in started]
    finally:
        for process, ours in started:
            ours.close()
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _hear(pipe: multiprocessing.connection.Connection) -> Any:
    if not pipe.poll(120):
        raise MoerayError("an expert process did not start within 120 s; see its output above")
    return pipe.recv()


def _run_actor(spec: ActorSpec, experts: list[ExpertId], pipe: multiprocessing.connection.Connection) -> None:
    """The expert process: serve until the other end of the pipe closes."""
    setup_logging(level="WARNING")
    torch.set_num_threads(spec.threads)
    actor = ExpertActor(spec, NEAR)
    _, address = actor.start()
    actor.host(experts)
    pipe.send((address, spec.token, spec.system))
    pipe.poll(None)
    actor.stop()


def _row(config: Config, shape: Shape, started: list[Any], tokens: int, repeat: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    ids_TK = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.top_k] for _ in range(tokens)])
    row: dict[str, Any] = {"tokens": tokens, "in_process_us": _in_process(config, shape, x_TD, ids_TK, repeat)}
    for hop, node in (("unix", NEAR), ("grpc", FAR)):
        row |= _over(hop, node, config, shape, started, x_TD, ids_TK, repeat)
    return row


def _in_process(config: Config, shape: Shape, x_TD: Tensor, ids_TK: Tensor, repeat: int) -> float:
    """The same experts by direct calls, on as many threads as the actors have together."""
    files = open_model(config.model, None, node=NEAR)
    bank = ExpertBank(files.family, files.weights, torch.bfloat16, torch.device("cpu"))
    bank.load(ExpertId(layer, expert) for layer in range(shape.layers) for expert in range(shape.experts))
    flat = ids_TK.flatten()
    order = flat.argsort(stable=True)
    distinct, counts = torch.unique_consecutive(flat[order], return_counts=True)
    experts, sizes = distinct.tolist(), counts.tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(shape.actors)
    try:
        return _median_us(lambda i: bank.forward(i % shape.layers, x_TD[order // shape.top_k], experts, sizes), repeat)
    finally:
        torch.set_num_threads(before)


def _over(
    hop: str, node: str, config: Config, shape: Shape, started: list[Any], x_TD: Tensor, ids_TK: Tensor, repeat: int
) -> dict[str, float]:
    """One layer through a real dispatcher, from a router on `node`."""
    addresses = {address.actor_id: address for address, _, _ in started}
    _, token, system = started[0]
    spec = ActorSpec("bench", "router", "cpu", 1, config, token, system)
    identity = replace(spec.identity(node), actor_id=f"bench-{hop}")
    files = open_model(config.model, None, node=node)
    hosts = [Host(actor, 1 << 60) for actor in sorted(addresses)]
    placement = place({}, hosts, experts=files.expert_counts(), expert_bytes=files.expert_bytes())
    view, recorder = PlacementView(), Recorder()
    view.publish(placement, addresses)
    dispatcher = Dispatcher(
        view, lambda address: connect(address, identity, config.wire, timeout=10.0), recorder, deadline_s=60.0
    )
    computes: list[float] = []

    def layer(i: int) -> None:
        dispatcher(i % shape.layers, x_TD, ids_TK)
        computes.append(1e6 * dispatcher.slowest_compute_s)

    try:
        total = _median_us(layer, repeat)
    finally:
        dispatcher.close()
    return {f"{hop}_us": total, f"{hop}_compute_us": statistics.median(computes[-repeat:])}


def _median_us(call: Callable[[int], object], repeat: int) -> float:
    for i in range(5):
        call(i)
    times = []
    for i in range(repeat):
        began = time.perf_counter()
        call(i)
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)

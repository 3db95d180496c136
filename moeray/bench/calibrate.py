"""The costs that `moeray simulate` reckons with, measured on this machine with the real parts.

Expert actors are processes of their own on one thread each, reached through a real dispatcher over unix channels; the
trunk is a real one whose experts cost nothing. Each figure is a least-squares fit over medians.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeray.actors.expert import ExpertActor
from moeray.actors.spec import ActorSpec
from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.bench.environment import environment
from moeray.config import Config, load_config
from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.engine.sampler import Sampler
from moeray.engine.scheduler import Batch, Entry
from moeray.engine.sequence import Sequence as Request
from moeray.engine.trunk_runner import TrunkRunner
from moeray.errors import MoerayError
from moeray.logs import setup_logging
from moeray.metrics import Recorder
from moeray.model.experts import ExpertBank
from moeray.model.loading import ModelFiles, open_model, pick_device
from moeray.model.trunk import Trunk
from moeray.types import Address, ExpertId, GenerationRequest
from moeray.wire.channel import connect

NODE = "calibrate"
SHAPE = Shape(vocab=1024)
STEP_TOKENS = (1, 8, 64, 256, 1024)
HOP_TOKENS = (1, 16, 128)
EXPERT_GRID = tuple((distinct, rows) for distinct in (1, 2, 4, 8) for rows in (1, 4, 16, 64))
DECODES, CONTEXT = 8, 256
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class _Started:
    """An expert actor's process: where it listens, seconds until it was ready, and to map its experts then."""

    address: Address
    start_s: float
    map_s: float


def calibrate(
    model: str | None, *, actors: int = 2, repeat: int = 7, report: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measure. `model` None: a small random Mixtral.

    Returns plain data for the cost file: `costs` (see `control.cost.Costs`), the points that they were fitted to, the
    model's shape and the environment. Raises CheckpointError, and MoerayError where an actor does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            report("writing a small random model")
            model = str(write_random_moe(SHAPE, Path(folder)))
        config = load_config(None, {"model": model, "engine.kv_blocks": 1024})
        files = open_model(model, None, node=NODE)
        report("experts")
        expert_points, expert_costs = _experts(files, repeat)
        report("trunk")
        trunk_costs = _trunk(files, config, repeat)
        report("starting expert actors, and hops")
        hop_points, hop_costs = _hops(files, config, actors, repeat)
    return {
        "costs": trunk_costs | expert_costs | hop_costs,
        "points": {"experts": expert_points, "hops": hop_points},
        "model": {
            "name": None if config.model.startswith(folder) else config.model,
            "experts": {str(layer): count for layer, count in files.expert_counts().items()},
            "top_k": _top_k(files),
            "expert_bytes": next(iter(files.expert_bytes().values())),
        },
        "environment": environment(),
    }


# -- experts ----------------------------------------------------------------------------------------------------------


def _experts(files: ModelFiles, repeat: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Forwards of different experts each time, as in a model of many layers, on one thread."""
    dtype = files.dtype("auto")
    bank = ExpertBank(files.family, files.weights, dtype, pick_device("cpu"))
    counts = files.expert_counts()
    bank.load(ExpertId(layer, expert) for layer, count in counts.items() for expert in range(count))
    layers = sorted(counts)
    points = []
    with _one_thread():
        for distinct, each in EXPERT_GRID:
            if distinct > min(counts.values()):
                continue
            x_RD = torch.randn(distinct * each, _hidden(files)).to(dtype)

            def forward(i: int, distinct: int = distinct, each: int = each, x_RD: Tensor = x_RD) -> None:
                layer = layers[i % len(layers)]
                first = i * distinct % (counts[layer] - distinct + 1)
                bank.forward(layer, x_RD, list(range(first, first + distinct)), [each] * distinct)

            points.append({"distinct": distinct, "rows": distinct * each, "seconds": _median_s(forward, repeat)})
    a, b, c = _fit([[1.0, p["rows"], p["distinct"]] for p in points], [float(p["seconds"]) for p in points])
    return points, {"forward_s": a, "row_s": b, "expert_s": c}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- trunk ------------------------------------------------------------------------------------------------------------


def _trunk(files: ModelFiles, config: Config, repeat: int) -> dict[str, Any]:
    """Steps, sampling included, of prompts of several lengths, and what sequences that decode add to that."""
    dtype, device = files.dtype("auto"), pick_device("auto")
    trunk = Trunk.load(files.checkpoint, files.family, files.weights, dtype, device, config.engine)

    def no_experts(layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        return x_TD.unsqueeze(1).expand(-1, ids_TK.shape[1], -1)

    runner = TrunkRunner(trunk, config.engine, no_experts, ())
    size = config.engine.block_size
    longest = min(runner.max_context, runner.num_blocks * size // DECODES)
    tokens = [n for n in STEP_TOKENS if n <= longest]
    context = min(CONTEXT, longest)

    sampler = Sampler()

    def steps(batch: Batch) -> float:
        return _median_s(lambda i: sampler.sample(runner.run(batch), batch.sampled), max(3, repeat // 2))

    seconds = [steps(Batch((_entry(0, 0, n, size),))) for n in tokens]
    decode = steps(Batch(tuple(_entry(i, context - 1, 1, size) for i in range(DECODES))))
    prefill = float(np.interp(DECODES, tokens, seconds))
    return {
        "trunk_tokens": tokens,
        "trunk_s": list(np.maximum.accumulate(seconds)),
        "trunk_layers": len(files.family.layers),
        "decode_s": max(0.0, (decode - prefill) / DECODES),
    }


def _entry(number: int, start: int, count: int, block_size: int) -> Entry:
    """`count` tokens of a sequence that has `start` behind it, in blocks of its own."""
    request = Request(GenerationRequest(f"calibrate-{number}", (1,) * (start + count)))
    blocks = -(-(start + count) // block_size)
    request.block_table = list(range(number * blocks, (number + 1) * blocks))
    return Entry(request, start, count, True)


# -- hops and starts --------------------------------------------------------------------------------------------------


def _hops(
    files: ModelFiles, config: Config, actors: int, repeat: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """A layer's way there and back, less what the slowest actor computed."""
    counts = files.expert_counts()
    hosts = [Host(f"experts-{i}", 1 << 60) for i in range(actors)]
    placement = place({}, hosts, experts=counts, expert_bytes=files.expert_bytes())
    spec = ActorSpec("calibrate", "router", "cpu", 1, config, secrets.token_bytes(32), secrets.token_hex(4))
    with _processes(spec, placement) as started, _dispatcher(spec, placement, started) as dispatcher:
        points = [_hop(files, dispatcher, tokens, repeat) for tokens in HOP_TOKENS]
        start_s = statistics.median(one.start_s for one in started)
        map_s = statistics.median(one.map_s for one in started)
    a, b = _fit([[1.0, p["rows"]] for p in points], [p["seconds"] for p in points])
    return points, {"hop_s": a, "hop_row_s": b, "start_s": start_s, "map_s": map_s}


def _hop(files: ModelFiles, dispatcher: Dispatcher, tokens: int, repeat: int) -> dict[str, float]:
    counts, top_k = files.expert_counts(), _top_k(files)
    layers = sorted(counts)
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, _hidden(files), generator=generator).to(files.dtype("auto"))
    fewest = min(counts.values())
    ids_TK = torch.stack([torch.randperm(fewest, generator=generator)[:top_k] for _ in range(tokens)])
    waits: list[float] = []

    def layer(i: int) -> None:
        began = time.perf_counter()
        dispatcher(layers[i % len(layers)], x_TD, ids_TK)
        waits.append(time.perf_counter() - began - dispatcher.slowest_compute_s)

    _median_s(layer, repeat)
    return {"rows": tokens * top_k, "seconds": statistics.median(waits[-repeat:])}


@contextmanager
def _dispatcher(spec: ActorSpec, placement: Placement, started: Sequence[_Started]) -> Iterator[Dispatcher]:
    view, identity = PlacementView(), spec.identity(NODE)
    view.publish(placement, {one.address.actor_id: one.address for one in started})
    wire = spec.config.wire
    dispatcher = Dispatcher(
        view, lambda address: connect(address, identity, wire, timeout=10.0), Recorder(), deadline_s=60.0
    )
    try:
        yield dispatcher
    finally:
        dispatcher.close()


@contextmanager
def _processes(spec: ActorSpec, placement: Placement) -> Iterator[list[_Started]]:
    """An expert actor in a process of its own for each actor of the placement, started one by one."""
    context = multiprocessing.get_context("forkserver")  # which forks as a node's zygote does
    context.set_forkserver_preload([__name__])
    first = context.Process(target=_nothing)
    first.start()
    first.join()
    running: list[tuple[Any, multiprocessing.connection.Connection]] = []
    try:
        started = []
        for actor_id in placement.actors():
            own = ActorSpec(actor_id, "experts", "cpu", 1, spec.config, spec.token, spec.system)
            ours, theirs = context.Pipe()
            process = context.Process(target=_run_actor, args=(own, placement.hosted_by(actor_id), theirs))
            began = time.perf_counter()
            process.start()
            running.append((process, ours))
            _hear(ours)
            start_s = time.perf_counter() - began
            address, map_s = _hear(ours)
            started.append(_Started(address, start_s, map_s))
        yield started
    finally:
        for process, ours in running:
            ours.close()
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _nothing() -> None:
    """The first fork waits for the server's imports."""


def _hear(pipe: multiprocessing.connection.Connection) -> Any:
    if not pipe.poll(START_TIMEOUT_S):
        raise MoerayError(f"an expert process did not start within {START_TIMEOUT_S:g} s; see its output above")
    return pipe.recv()


def _run_actor(spec: ActorSpec, experts: Sequence[ExpertId], pipe: multiprocessing.connection.Connection) -> None:
    """The expert process: ready, then with experts, then serving until the other end of the pipe closes."""
    setup_logging(level="WARNING")
    torch.set_num_threads(spec.threads)
    actor = ExpertActor(spec, NODE)
    _, address = actor.start()
    try:
        actor.prepare()
        pipe.send("ready")
        began = time.perf_counter()
        actor.host(experts)
        pipe.send((address, time.perf_counter() - began))
        pipe.poll(None)
    finally:
        actor.stop()


# -- helpers ----------------------------------------------------------------------------------------------------------


def _top_k(files: ModelFiles) -> int:
    """Experts of a token, as the family's config calls them."""
    config = files.family.config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 1)


def _hidden(files: ModelFiles) -> int:
    return int(files.family.config.hidden_size)


def _median_s(call: Callable[[int], object], repeat: int) -> float:
    call(0)
    times = []
    for i in range(1, repeat + 1):
        began = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 with the least relative squared error: small batches matter as much as large ones.

    Those that come out negative are left out, worst first (what remains is fitted again).
    """
    matrix = np.array(features) / np.array(seconds)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    result = [0.0] * matrix.shape[1]
    for index, value in zip(used, found.tolist(), strict=True):
        result[index] = max(value, 0.0)
    return result

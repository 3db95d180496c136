"""The costs that `moeray simulate` reckons with, measured on a running system and its parts.

Experts are measured alone, on one thread. What a step takes beside them is what a client of the running system sees
(`bench.rhythm`): the dispatcher's own clock tells the hops, and all else between two tokens is the trunk's. Each figure
is a least-squares fit.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeray.bench.environment import environment
from moeray.bench.grow import settled
from moeray.bench.rhythm import PROMPTS, Rhythm, Rhythms
from moeray.bench.traffic import System
from moeray.config import Config
from moeray.control.cost import Costs, StepCosts
from moeray.control.eplb import place
from moeray.control.placement import Host
from moeray.control.popularity import MoeShape, PopularityModel
from moeray.errors import MoerayError
from moeray.model.loading import ModelFiles, open_bank, open_model, pick_device
from moeray.types import ExpertId

NODE = "calibrate"
EXPERT_GRID = tuple((distinct, rows) for distinct in (1, 2, 4, 8) for rows in (1, 4, 16, 64))
SETTLE_S = 120.0
POLL_S = 0.05


async def calibrate(
    system: System, config: Config, vocab: int, context: int, *, repeat: int = 15,
    report: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a running system of this config, whose autoscaling is off, that nobody else uses. `context`: tokens that
    its sequences may have.

    Returns plain data for the cost file: `costs` (see `control.cost.Costs`), the points that they were fitted to, the
    model's shape and the environment. How long an actor takes to start is measured where the config lets the first
    group grow by one. Raises CheckpointError, and MoerayError where a request fails or an actor does not start.
    """
    files = open_model(config.model, None, node=NODE)
    report("experts")
    points, expert_costs = await asyncio.to_thread(_experts, files, config, repeat)
    most = config.engine.max_batch_tokens
    longest, chunk = min(most, context - 1), min(config.engine.prefill_chunk, most - 1)
    rhythms = Rhythms(system, vocab, longest=longest, chunk=chunk, context=context, repeat=repeat)
    rhythm = await rhythms.measure(report)
    shape = MoeShape(len(files.expert_counts()), max(files.expert_counts().values()), _top_k(files))
    measured = Costs(**expert_costs, trunk_layers=shape.layers, hop_s=0.0, hop_row_s=0.0)
    costs = expert_costs | fit_rhythm(rhythm, measured, shape, config.experts.resolved()[0].actors)
    report("starting an actor")
    costs |= await _start(system, config)
    return {
        "costs": costs,
        "points": {"experts": points, "rhythm": asdict(rhythm)},
        "model": {
            "name": config.model,
            "experts": {str(layer): count for layer, count in files.expert_counts().items()},
            "top_k": _top_k(files),
            "expert_bytes": next(iter(files.expert_bytes(config.experts.quantization).values())),
        },
        "environment": environment(),
    }


# -- experts ----------------------------------------------------------------------------------------------------------


def _experts(files: ModelFiles, config: Config, repeat: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Forwards of different experts each time, as in a model of many layers, on one thread."""
    dtype = files.dtype(config.dtype)
    bank = open_bank(files, config, pick_device("cpu"))
    counts = files.expert_counts()
    bank.load(ExpertId(layer, expert) for layer, count in counts.items() for expert in range(count))
    layers = sorted(counts)
    points = []
    with _one_thread():
        for layer, count in counts.items():  # weights that are mapped from a file come with their first use
            bank.forward(layer, torch.zeros(count, _hidden(files), dtype=dtype), list(range(count)), [1] * count)
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


# -- steps ------------------------------------------------------------------------------------------------------------


def fit_rhythm(rhythm: Rhythm, experts: Costs, shape: MoeShape, actors: int) -> dict[str, Any]:
    """The costs of hops, trunk, attention, waking and requests: with them a simulated step lasts as long as a seen one.

    Small steps are taken from streams, larger ones from prompts; what a decode costs beside a prompt is the difference
    where the two meet. `experts`: costs of experts alone; `actors`: how many there were when the rhythm was taken.
    """
    hops = _hop_costs(rhythm, shape.top_k)
    rest_s = _beside_experts(replace(experts, **hops), shape, actors)
    seen = {phase.count: phase.step_s for phase in rhythm.streams}
    request_s = max(0.0, rhythm.beside_s - seen[1] / 2 - seen[2])
    wake_s = max(0.0, rhythm.prompts[0].step_s - seen[1] - request_s)
    decode_context_s, prefill_context_s = _context_costs(rhythm)
    streams = {p.count: p.step_s - p.count * p.context * decode_context_s for p in rhythm.streams}
    prefills = {
        p.count: p.step_s - request_s - wake_s - prefill_context_s * p.count**2 / 2
        for p in rhythm.prompts if p.count > 1
    }  # fmt: skip
    most = max(streams)
    as_prefill_s = float(np.interp(most, sorted(prefills), [prefills[n] for n in sorted(prefills)]))
    decode_s = max(0.0, (streams[most] - as_prefill_s) / most)
    steps = {n: seconds for n, seconds in prefills.items() if n > most}
    steps |= {n: seconds - n * decode_s for n, seconds in streams.items()}
    tokens = sorted(steps)
    trunk_s = rising([max(0.0, steps[n] - rest_s(n)) for n in tokens])
    return hops | {
        "trunk_tokens": tokens, "trunk_s": trunk_s, "trunk_layers": shape.layers, "decode_s": decode_s,
        "decode_context_s": decode_context_s, "prefill_context_s": prefill_context_s, "request_s": request_s,
        "wake_s": wake_s,
    }  # fmt: skip


def _context_costs(rhythm: Rhythm) -> tuple[float, float]:
    """Seconds for each token that a decoding sequence attends to, and that a prompt's token does.

    A prompt that is cut into chunks takes as many times as long as there are chunks, and what they attend to of those
    before them; beside that, once, what a prompt of one token does but for its own step.
    """
    streams = {phase.count: phase for phase in rhythm.streams}
    decode_s = prefill_s = 0.0
    if (far := rhythm.far_streams) is not None:
        near = streams[far.count]
        decode_s = (far.step_s - near.step_s) / (far.count * (far.context - near.context))
    if rhythm.far_prompts is not None:
        chunk, whole = rhythm.far_prompts
        once_s, chunks = rhythm.beside_s - streams[2].step_s, whole.count / chunk.count
        pairs = (chunks**2 - chunks) / 2 * chunk.count**2
        prefill_s = (whole.step_s - once_s - chunks * (chunk.step_s - once_s)) / pairs
    return max(0.0, decode_s), max(0.0, prefill_s)


def _hop_costs(rhythm: Rhythm, top_k: int) -> dict[str, Any]:
    phases = [phase for phase in (*rhythm.streams, *rhythm.prompts) if phase.hop_s > 0]
    if not phases:
        return {"hop_s": 0.0, "hop_row_s": 0.0}
    hop_s, hop_row_s = _fit([[1.0, phase.count * top_k] for phase in phases], [phase.hop_s for phase in phases])
    return {"hop_s": hop_s, "hop_row_s": hop_row_s}


def _beside_experts(costs: Costs, shape: MoeShape, actors: int) -> Callable[[int], float]:
    """What the simulation says that experts and hops take of a step of so many tokens."""
    steps = StepCosts(replace(costs, trunk_s=(0.0,) * len(costs.trunk_tokens)), shape, max(PROMPTS))
    hosts = [Host(f"experts-{i}", 1 << 60) for i in range(actors)]
    counts = dict.fromkeys(range(shape.layers), shape.experts)
    placement = place({}, hosts, experts=counts, expert_bytes=dict.fromkeys(counts, 1))
    popularity = PopularityModel("uniform", shape, 0).of_epoch(0)
    table = steps.table(placement, popularity, dict.fromkeys(placement.actors(), 1.0))
    return lambda tokens: steps.trunk_s[tokens] + table.slowest_s[tokens]


async def _start(system: System, config: Config) -> dict[str, float]:
    """One actor more, and gone again: until it has started, and until it hosts experts. Nothing where none may come."""
    group = config.experts.resolved()[0]
    if group.actors_span[1] <= group.actors:
        return {}
    before = {row["actor"] for row in (await system.status())["actors"]}

    def started(status: Mapping[str, Any]) -> bool:
        there = {row["actor"] for row in status["actors"] if row["state"] not in ("pending", "starting")}
        return bool(there - before)

    began = time.monotonic()
    await system.call("scale", {group.name: group.actors + 1})
    start_s = await _until(system, started) - began
    map_s = await _until(system, settled) - began - start_s
    await system.call("scale", {group.name: group.actors})
    await _until(system, settled)
    return {"start_s": start_s, "map_s": map_s}


async def _until(system: System, what: Callable[[dict[str, Any]], bool]) -> float:
    """The moment at which `what` holds of the status."""
    end = time.monotonic() + SETTLE_S
    while not what(status := await system.status()):
        if time.monotonic() > end:
            raise MoerayError(f"no actor more within {SETTLE_S:g} s: {status['ready']} of {status['wanted']} are ready")
        await asyncio.sleep(POLL_S)
    return time.monotonic()


# -- helpers ----------------------------------------------------------------------------------------------------------


def _top_k(files: ModelFiles) -> int:
    """Experts of a token, as the family's config calls them."""
    config = files.family.config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 1)


def _hidden(files: ModelFiles) -> int:
    return int(files.family.config.hidden_size)


def rising(values: Sequence[float]) -> list[float]:
    """The sequence that never falls with the least squared difference to these (Ayer et al. 1955, pool adjacent
    violators): one value that came out too high lifts only those beside it, and by a part of that."""
    pools: list[tuple[float, int]] = []  # mean, and of how many
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (other * more + mean * count) / (more + count), more + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


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

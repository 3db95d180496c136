"""How long a layer's dispatch takes, hop by hop, beside the same experts called in this process."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.bench.environment import environment
from moeray.bench.expert_processes import FAR, NEAR, ExpertProcesses, expert_processes
from moeray.config import Config, load_config
from moeray.dispatch.hops import KINDS, Kind
from moeray.model.loading import open_bank, open_model
from moeray.types import ExpertId


def measure(shape: Shape, actors: int, tokens: Sequence[int], repeat: int) -> dict[str, Any]:
    """Medians in microseconds of one layer for each number of tokens; `*_compute_us` is the slowest actor's part."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_moe(shape, Path(folder))
        config = load_config(None, {"model": str(model), "dtype": "bfloat16"})
        with expert_processes(config, actors) as processes:
            rows = [_row(processes, shape, n, repeat) for n in tokens]
    return {"shape": asdict(shape) | {"actors": actors}, "repeat": repeat, "rows": rows, "environment": environment()}


def _row(processes: ExpertProcesses, shape: Shape, tokens: int, repeat: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    ids_TK = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.top_k] for _ in range(tokens)])
    row: dict[str, Any] = {
        "tokens": tokens,
        "in_process_us": _in_process(processes.config, shape, len(processes.addresses), x_TD, ids_TK, repeat),
    }
    for hop in KINDS:
        row |= _over(hop, processes, shape, x_TD, ids_TK, repeat)
    return row


def _in_process(config: Config, shape: Shape, actors: int, x_TD: Tensor, ids_TK: Tensor, repeat: int) -> float:
    """The same experts by direct calls, on as many threads as the actors have together."""
    files = open_model(config.model, None, node=NEAR)
    bank = open_bank(files, config, torch.device("cpu"))
    bank.load(ExpertId(layer, expert) for layer in range(shape.layers) for expert in range(shape.experts))
    flat = ids_TK.flatten()
    order = flat.argsort(stable=True)
    distinct, counts = torch.unique_consecutive(flat[order], return_counts=True)
    experts, sizes = distinct.tolist(), counts.tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(actors)
    try:
        return _median_us(lambda i: bank.forward(i % shape.layers, x_TD[order // shape.top_k], experts, sizes), repeat)
    finally:
        torch.set_num_threads(before)


def _over(
    hop: Kind, processes: ExpertProcesses, shape: Shape, x_TD: Tensor, ids_TK: Tensor, repeat: int
) -> dict[str, float]:
    """One layer through a real dispatcher, from a router on the actors' node or on another one."""
    computes: list[float] = []
    reach = processes.dispatcher(NEAR) if hop == "unix" else processes.dispatcher(FAR, hop)
    with reach as dispatcher:

        def layer(i: int) -> None:
            dispatcher(i % shape.layers, x_TD, ids_TK)
            computes.append(1e6 * dispatcher.slowest_compute_s)

        total = _median_us(layer, repeat)
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

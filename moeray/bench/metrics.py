"""What counting costs: everything that one decode step records, against the least time that such a step can take.

A step cannot be faster than reading the weights that it uses once from memory, so it is held against that, measured in
the same run. The recorders, and those who call them, are the real ones; what they count is made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import torch

from moeray.actors.life import Life
from moeray.actors.request_figures import RequestFigures
from moeray.bench.environment import environment
from moeray.control.objectives import Objectives
from moeray.dispatch.hops import MANY, Hops
from moeray.model import kernels
from moeray.model.kernels.native import read_all
from moeray.recorder import Recorder, snapshot_tree
from moeray.types import GenerationRequest, SamplingParams

_READ_BYTES, _TURNS = 256 << 20, 5


@dataclass(frozen=True)
class Load:
    """A decode step of `streams` sequences: `layers` MoE layers, each of which asks `actors` expert actors; together
    the step reads `active_bytes` of weights. The default is granite-3.0-1b-a400m in bf16, at batch 1."""

    layers: int = 24
    actors: int = 2
    streams: int = 1
    active_bytes: int = 800_000_000


class Router:
    """What a router records."""

    def __init__(self, load: Load) -> None:
        self.recorder = Recorder(model_name="m", kind="router", group="router", actor="router-0")
        self._load = load
        self._hops = Hops(self.recorder)
        self._combine = self.recorder.histogram("moeray_combine_seconds")
        self._step = self.recorder.histogram("moeray_step_seconds")
        self._requests = RequestFigures(self.recorder, Objectives())
        self._lives = [
            Life(GenerationRequest(f"r{i}", (1,) * 64, SamplingParams()), time.monotonic()) for i in range(load.streams)
        ]

    def step(self) -> None:
        """All of one step."""
        for _ in range(self._load.layers):
            self._hops.note(
                ["unix"] * self._load.actors, 2048, [(a, [0, 1, 2, 3], 4, 4, 0.001) for a in range(self._load.actors)]
            )
            self._hops.record(MANY)
            self._combine.observe(0.0001)
        self._step.observe(0.05)
        now = time.monotonic()
        for life in self._lives:
            self._requests.token(life, 1, now)


class Expert:
    """What an expert actor records."""

    def __init__(self) -> None:
        recorder = Recorder(kind="expert", group="experts", actor="experts-0")
        self._wait = recorder.histogram("moeray_expert_queue_wait_seconds")
        self._service = recorder.histogram("moeray_expert_service_seconds")
        self._batch = recorder.histogram("moeray_expert_batch_rows")

    def forward(self) -> None:
        """All of one forward."""
        self._wait.observe(0.00001)
        self._service.observe(0.0005)
        self._batch.observe(4)


def measure(load: Load, repeat: int = 200) -> dict[str, Any]:
    """Seconds of a step's parts, the least time of a step, and what counting is of it (`part`).

    `part` adds up what happens one beside the other: the router, all forwards of all actors, and a second's report.
    """
    router, expert = Router(load), Expert()
    step_s = _best(router.step, repeat)
    forward_s = _best(expert.forward, repeat * load.layers)
    report_s = _best(lambda: msgpack.packb(snapshot_tree(router.recorder.read()[1])), repeat)
    least_s = load.active_bytes / _read_bytes_per_s()
    part = (step_s + load.layers * load.actors * forward_s) / least_s + report_s
    return {
        "load": asdict(load),
        "router_step_s": step_s,
        "expert_forward_s": forward_s,
        "report_s": report_s,
        "least_step_s": least_s,
        "part": part,
        "environment": environment(),
    }


def _best(call: Callable[[], object], repeat: int) -> float:
    """The mean of the best of several turns: whatever else runs on the machine can only add to it."""
    return min(_mean(call, max(1, repeat // _TURNS)) for _ in range(_TURNS))


def _mean(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def _read_bytes_per_s() -> float:
    memory = torch.ones(_READ_BYTES // 4)
    read = (lambda: read_all(memory)) if kernels.available() else memory.sum
    return _READ_BYTES / _best(read, _TURNS)

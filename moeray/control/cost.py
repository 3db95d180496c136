"""What a step costs: seconds of trunk, hops and experts, for any batch and any placement.

A = actors, G = entries of a grid of token counts; the others as in `popularity`. Measure your own figures with
`moeray bench calibrate`. The defaults stand for a 24-layer model of 32 experts of 1024x512 in bf16. Those of experts
and hops are estimates from measurements of such experts on single cores of a virtual machine, that of starting is what
an actor took over Ray on two busy cores; those of the trunk are assumptions (a router whose node is several times as
fast as a 2-core one), measured nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement
from moeray.control.popularity import MoeShape, Popularity
from moeray.control.spread import spread
from moeray.errors import SimulationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """Seconds.

    `trunk_tokens`, `trunk_s`: a step of the trunk of `trunk_layers` layers by its tokens, between them a straight line;
    `decode_s`: what a decoding sequence adds to that; `decode_context_s`: and each token of its context, which it
    attends to; `prefill_context_s`: the same of a prompt's token. `forward_s` + `row_s` x rows + `expert_s` x distinct
    experts: one layer's forward at one actor of speed 1. `hop_s` + `hop_row_s` x rows: the way
    there and back of a layer's rows, planning and combining included.
    `request_s`: a request's way to its router and its tokens' way back, beside the steps; `wake_s`: what the first step
    of a router that had nothing to do takes longer (processes wake, caches are cold).
    `start_s`: from asking for an actor to its being ready, `map_s`: until an actor that is ready hosts further experts.
    `cores`: how many actors can compute at once, on all nodes together (0: all).
    """

    trunk_tokens: tuple[int, ...] = (1, 32, 256, 2048)
    trunk_s: tuple[float, ...] = (0.010, 0.011, 0.020, 0.100)
    trunk_layers: int = 24
    decode_s: float = 0.0001
    decode_context_s: float = 0.0
    prefill_context_s: float = 0.0
    forward_s: float = 0.00015
    row_s: float = 0.0000107
    expert_s: float = 0.00030
    hop_s: float = 0.00040
    hop_row_s: float = 0.0000010
    request_s: float = 0.0
    wake_s: float = 0.0
    start_s: float = 1.5
    map_s: float = 0.1
    cores: int = 0


def mean_costs(before: Costs, after: Costs) -> Costs:
    """Halfway between two measurements of one system, on a machine that is not always as fast."""
    seconds = [f.name for f in fields(Costs) if f.name.endswith("_s")]
    return replace(before, **{name: _halfway(getattr(before, name), getattr(after, name)) for name in seconds})


def _halfway(before: Any, after: Any) -> Any:
    if isinstance(before, tuple):
        return tuple(_halfway(*pair) for pair in zip(before, after, strict=True))
    return (before + after) / 2


def load_costs(path: str | Path) -> Costs:
    """Read the file that `moeray bench calibrate` wrote. Raises SimulationError, naming the key at fault."""
    return _costs_from(_part(path, "costs"), path)


def load_model(path: str | Path) -> tuple[MoeShape, int]:
    """The model that the file's costs are of: its shape, and an expert's bytes. Raises SimulationError likewise."""
    model = _part(path, "model")
    layers = model.get("experts")
    counts = list(layers.values()) if isinstance(layers, dict) else []
    found = {"experts": counts, "top_k": [model.get("top_k")], "expert_bytes": [model.get("expert_bytes")]}
    for key, numbers in found.items():
        if not numbers or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise SimulationError(
                f"cost file {path}: model.{key} must be 1 or more, got {model.get(key)!r}; see `moeray bench calibrate`"
            )
    return MoeShape(len(counts), max(counts), model["top_k"]), model["expert_bytes"]


def _part(path: str | Path, key: str) -> Mapping[str, Any]:
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as error:
        raise SimulationError(f"cost file {path}: {error.strerror}; write one with `moeray bench calibrate`") from error
    except ValueError as error:
        raise SimulationError(f"cost file {path}: is not JSON ({error}); see `moeray bench calibrate`") from error
    part = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(part, dict):
        raise SimulationError(f"cost file {path}: has no `{key}`; write one with `moeray bench calibrate`")
    return part


def _costs_from(tree: Mapping[str, Any], path: str | Path) -> Costs:
    known = {f.name: f.default for f in fields(Costs)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            raise SimulationError(f"cost file {path}: unknown key costs.{key}; known are {', '.join(known)}")
        many = isinstance(known[key], tuple)
        numbers = value if many and isinstance(value, list) else [value]
        if not numbers or not all(isinstance(n, int | float) and 0 <= n < math.inf for n in numbers):
            raise SimulationError(f"cost file {path}: costs.{key} must be 0 or more, got {value!r}")
        values[key] = tuple(numbers) if many else value
    costs = Costs(**values)
    if len(costs.trunk_tokens) != len(costs.trunk_s) or sorted(set(costs.trunk_tokens)) != list(costs.trunk_tokens):
        raise SimulationError(f"cost file {path}: costs.trunk_tokens must rise and be as many as costs.trunk_s")
    if costs.trunk_layers < 1:
        raise SimulationError(f"cost file {path}: costs.trunk_layers must be 1 or more, got {costs.trunk_layers}")
    if not _of_one_token(costs):
        raise SimulationError(f"cost file {path}: a step of one token must take time; raise costs.trunk_s")
    return costs


def _of_one_token(costs: Costs) -> float:
    """What the smallest step takes at the least, as if of one layer."""
    trunk = float(np.interp(1, costs.trunk_tokens, costs.trunk_s))
    return trunk + costs.hop_s + costs.hop_row_s + costs.forward_s + costs.row_s + costs.expert_s


def token_grid(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `largest`: the batches whose cost is computed; others lie between."""
    return (*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest)


@dataclass(frozen=True, eq=False)
class StepTable:
    """A placement's cost by tokens of the step.

    `slowest_s[T]`: sum over the layers of the slowest actor's forward; `bottleneck_s[T]`: how long a step keeps the
    busiest actor (or all cores) busy, which bounds the steps per second of all routers together; both are lists for
    T = 0 to the largest. `busy_GA`: seconds that a step keeps each actor busy; `forwards_GA`: how many it asks of it.
    """

    actors: tuple[str, ...]
    slowest_s: list[float]
    bottleneck_s: list[float]
    busy_GA: Floats
    forwards_GA: Floats


class StepCosts:
    """Makes the tables, for one shape, one set of costs and steps of at most `largest` tokens. What a step takes beside
    the tables' part is in seconds of all the shape's layers."""

    def __init__(self, costs: Costs, shape: MoeShape, largest: int) -> None:
        self.costs, self.shape = costs, shape
        self.grid = token_grid(largest)
        self._tokens = np.arange(largest + 1)
        self._batches: dict[int, tuple[Popularity, Ints]] = {}

    @cached_property
    def trunk_s(self) -> list[float]:
        """Trunk and hops of a step by its tokens, without attention and what decoding adds."""
        costs, layers = self.costs, self.shape.layers
        trunk = np.interp(self._tokens, costs.trunk_tokens, costs.trunk_s) * layers / costs.trunk_layers
        hops = layers * (costs.hop_s + costs.hop_row_s * self.shape.top_k * self._tokens)
        return [float(s) for s in trunk + hops]

    @cached_property
    def decode_s(self) -> float:
        return self._of_all_layers(self.costs.decode_s)

    @cached_property
    def decode_context_s(self) -> float:
        return self._of_all_layers(self.costs.decode_context_s)

    @cached_property
    def prefill_context_s(self) -> float:
        return self._of_all_layers(self.costs.prefill_context_s)

    def _of_all_layers(self, seconds: float) -> float:
        return seconds * self.shape.layers / self.costs.trunk_layers

    @cached_property
    def weights_TG(self) -> Floats:
        """How much of each grid entry a step of T tokens is, so that sums over steps become sums over the grid."""
        return np.stack([np.interp(self._tokens, self.grid, unit) for unit in np.eye(len(self.grid))], axis=1)

    def table(self, placement: Placement, popularity: Popularity, speeds: Mapping[str, float]) -> StepTable:
        """The table of a placement whose actors (the keys of `speeds`) compute that many times as fast as measured."""
        actors, costs = tuple(speeds), self.costs
        speed_A = np.array([speeds[actor] for actor in actors])
        index = {actor: i for i, actor in enumerate(actors)}
        rows_GLA, distinct_GLA, whole_GLA = spread(placement, self._drawn(popularity), index, speed_A)
        asked_GLA = np.minimum(distinct_GLA, 1.0)
        seconds_GLA = (costs.forward_s * asked_GLA + costs.row_s * rows_GLA + costs.expert_s * distinct_GLA) / speed_A
        whole_s_GLA = (
            costs.forward_s * (distinct_GLA > 0)
            + costs.row_s * whole_GLA
            + costs.expert_s * np.ceil(distinct_GLA - 1e-9)
        )
        slowest_GL, busy_GA = (whole_s_GLA / speed_A).max(axis=2), seconds_GLA.sum(axis=1)
        bottleneck_G = busy_GA.max(axis=1)
        if costs.cores:
            slowest_GL = np.maximum(slowest_GL, seconds_GLA.sum(axis=2) / costs.cores)
            bottleneck_G = np.maximum(bottleneck_G, busy_GA.sum(axis=1) / costs.cores)
        return StepTable(
            actors, self._by_tokens(slowest_GL.sum(axis=1)), self._by_tokens(bottleneck_G), busy_GA,
            asked_GLA.sum(axis=1).astype(np.float64),
        )  # fmt: skip

    def _by_tokens(self, values_G: Floats) -> list[float]:
        values: list[float] = np.interp(self._tokens, (0, *self.grid), (0.0, *values_G)).tolist()
        return values

    def _drawn(self, popularity: Popularity) -> Ints:
        key = id(popularity)
        if key not in self._batches:  # the popularity is kept with them, so that its id stays its own
            self._batches[key] = (popularity, popularity.batches(self.grid))
        return self._batches[key][1]

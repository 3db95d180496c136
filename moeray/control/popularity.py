"""How popular each expert is, and what a step's batch looks like when it is.

L layers, E experts a layer, T tokens of a step, G entries of a grid of T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moeray.types import ExpertId

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Skew = Literal["uniform", "zipf", "shifting"]
SKEWS: tuple[Skew, ...] = get_args(Skew)

SHIFT_S = 600.0
"""How long a ranking of the shifting skew takes to give way to the next."""

_PHASES = 10  # the steps in which it does


@dataclass(frozen=True)
class MoeShape:
    """MoE layers, experts of a layer, experts that the gate chooses for a token."""

    layers: int = 24
    experts: int = 32
    top_k: int = 8


@dataclass(frozen=True, eq=False)
class Popularity:
    """`chosen_LE`: the probability that a token is sent to the expert; a layer's sum is top_k. `seed`: of the draws."""

    chosen_LE: Floats
    seed: int

    def batches(self, grid: tuple[int, ...]) -> Ints:
        """One drawn batch for each T of the grid: rows of each expert, [G, L, E].

        A step's slowest actor is slow because its rows are above their mean, so means alone would be too kind.
        """
        rng = np.random.default_rng(self.seed)
        return np.stack([rng.binomial(tokens, self.chosen_LE) for tokens in grid])

    @cached_property
    def load(self) -> Mapping[ExpertId, float]:
        """Rows of each expert per token."""
        return {ExpertId(layer, e): float(p) for layer, row in enumerate(self.chosen_LE) for e, p in enumerate(row)}


class PopularityModel:
    """The popularity at each moment. `period_s`: how long it stays as it is (inf: for ever)."""

    def __init__(self, skew: Skew, shape: MoeShape, seed: int) -> None:
        self.skew, self.shape, self._seed = skew, shape, seed
        self.period_s = SHIFT_S / _PHASES if skew == "shifting" else float("inf")
        self._known: dict[int, Popularity] = {}

    def epoch_at(self, now: float) -> int:
        return int(now // self.period_s)

    def of_epoch(self, epoch: int) -> Popularity:
        if epoch not in self._known:
            chosen = np.stack([inclusion(weights, self.shape.top_k) for weights in self._weights(epoch)])
            self._known[epoch] = Popularity(chosen, self._seed)
        return self._known[epoch]

    def mean(self, duration_s: float) -> Popularity:
        """Over the whole time: what hindsight knows."""
        last = self.epoch_at(duration_s)
        chosen = np.mean([self.of_epoch(epoch).chosen_LE for epoch in range(last + 1)], axis=0)
        return Popularity(chosen, self._seed)

    def _weights(self, epoch: int) -> Floats:
        shape = self.shape
        if self.skew == "uniform":
            return np.ones((shape.layers, shape.experts))
        turn, phase = divmod(epoch, _PHASES)
        if self.skew == "zipf":
            return self._ranking(0)
        return self._ranking(turn) * (1 - phase / _PHASES) + self._ranking(turn + 1) * phase / _PHASES

    def _ranking(self, turn: int) -> Floats:
        """Zipf with exponent 1, each layer in an order of its own."""
        rng = np.random.default_rng((self._seed, turn))
        zipf = 1.0 / np.arange(1, self.shape.experts + 1)
        return np.stack([rng.permutation(zipf) for _ in range(self.shape.layers)])


def inclusion(weights_E: Floats, top_k: int) -> Floats:
    """The probabilities, in proportion to the weights but at most 1 each, whose sum is top_k: [E].

    A token chooses an expert once, so what a very popular expert cannot take goes to the others (water-filling).
    """
    chosen = np.zeros(len(weights_E))
    open_E = np.ones(len(weights_E), dtype=bool)
    left = float(min(top_k, len(weights_E)))
    while left > 0:
        share = left * weights_E[open_E] / weights_E[open_E].sum()
        if (share <= 1).all():
            chosen[open_E] = share
            break
        full = np.flatnonzero(open_E)[share > 1]
        chosen[full] = 1.0
        open_E[full] = False
        left -= len(full)
    return chosen

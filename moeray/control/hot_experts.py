"""The policy of experts that are asked for more than others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moeray.control.eplb import replicate, skew_left
from moeray.control.policy import PolicyInput, Wish
from moeray.types import ExpertId

_KEPT = 1.25
"""A layer without replicas has to be so many times as skewed as one with replicas to come before it, and so many times
the replicas needed are too many. What differs less is noise, and to follow it would move experts at every decision."""

_LEAST_ROWS = 32.0
"""So many rows in the window for each of a layer's experts, in the mean: fewer, a start's or a lone request's, look
skewed by chance, and replicas are of no use to them."""


def hot_experts(seen: PolicyInput) -> Wish:
    """More replicas for the experts with most load per replica, in layers whose max/mean per actor is above `max_skew`.

    Moving experts evens a layer out only down to its heaviest replica, so that is what is split: the fewest replicas
    with which no replica has more than `max_skew` times the mean actor's load. A layer is helped only if that can be
    reached, with the actors that there are and within `replica_budget` (a part of all experts, the most skewed layers
    first); else replicas would cost memory and change little. Replicas that there are and that do stay as they are.
    Layers with less than `_LEAST_ROWS` have none.
    """
    budget = int(seen.settings.replica_budget * len(seen.placement.replicas))
    actors = len(seen.experts)
    layers: dict[int, dict[ExpertId, float]] = {}
    for expert in seen.placement.replicas:
        layers.setdefault(expert.layer, {})[expert] = seen.load.get(expert, 0.0)
    least = _LEAST_ROWS / seen.load_s if seen.load_s else math.inf
    layers = {layer: load for layer, load in layers.items() if sum(load.values()) >= least * len(load)}
    wanted: dict[ExpertId, int] = {}
    reasons = []
    # Judged with the base replicas: were it the present ones, a replica that helps would be given up for helping.
    skews = {layer: skew_left(load, dict.fromkeys(load, seen.base_replicas), actors) for layer, load in layers.items()}
    held = {layer: _held(layers[layer], seen) for layer, skew in skews.items() if skew > seen.settings.max_skew}
    rank = {layer: skews[layer] * (_KEPT if sum(counts.values()) > len(counts) * seen.base_replicas else 1.0)
            for layer, counts in held.items()}  # fmt: skip
    for layer in sorted(held, key=lambda layer: (-rank[layer], layer)):
        counts = _kept_or_split(layers[layer], held[layer], seen, budget)
        if counts is None:
            continue
        more = {expert: count for expert, count in counts.items() if count > seen.base_replicas}
        budget -= sum(more.values()) - seen.base_replicas * len(more)
        wanted |= more
        reasons.append(f"layer {layer}: replicas for {len(more)} hot experts, heaviest/mean is {skews[layer]:.2f}")
    return Wish(replicas=wanted, reasons=tuple(reasons))


def _held(load: Mapping[ExpertId, float], seen: PolicyInput) -> dict[ExpertId, int]:
    """The replicas that there are of a layer's experts."""
    return {expert: max(len(seen.placement.replicas[expert]), seen.base_replicas) for expert in load}


def _kept_or_split(
    load: Mapping[ExpertId, float], held: Mapping[ExpertId, int], seen: PolicyInput, budget: int
) -> Mapping[ExpertId, int] | None:
    """The replicas there are, if they do and not many fewer would, so that noise in the load moves nothing."""
    base = seen.base_replicas * len(load)
    split = _split(load, seen, budget)
    extra = sum(held.values()) - base
    fits = extra <= budget and skew_left(load, held, len(seen.experts)) <= seen.settings.max_skew * (1 + 1e-9)
    if fits and (split is None or extra <= _KEPT * (sum(split.values()) - base)):
        return held
    return split


def _split(load: Mapping[ExpertId, float], seen: PolicyInput, budget: int) -> dict[ExpertId, int] | None:
    """The fewest replicas that bring the layer down to `max_skew`; None where the budget or the actors do not do."""
    base, actors, aim = seen.base_replicas, len(seen.experts), seen.settings.max_skew
    counts = replicate(load, base * len(load) + budget, base=base, most=actors, max_skew=aim)
    return counts if skew_left(load, counts, actors) <= aim * (1 + 1e-9) else None

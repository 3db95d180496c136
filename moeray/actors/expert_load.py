"""Rows by expert as series: the one metric whose number of series grows with the model, so it has a bound."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from moeray.recorder import Labels
from moeray.types import ExpertId

EXPERT_LOAD = "moeray_expert_load_rows_total"
ALL = "all"
"""The label `expert` where a layer is counted as a whole."""


def by_expert(rows: Mapping[ExpertId, int]) -> dict[Labels, float]:
    """A series an expert."""
    return {_labels(expert): count for expert, count in rows.items()}


def by_layer(series: Mapping[Labels, float]) -> dict[Labels, float]:
    """A series a layer."""
    layers: dict[Labels, float] = {}
    for (layer, _), count in series.items():
        layers[layer, ALL] = layers.get((layer, ALL), 0) + count
    return layers


@cache
def _labels(expert: ExpertId) -> Labels:
    return str(expert.layer), str(expert.expert)

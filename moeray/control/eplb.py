"""Where each replica of each expert goes, after DeepSeek's EPLB (github.com/deepseek-ai/EPLB)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeray.control.placement import Host, Placement
from moeray.types import ExpertId


def replicate(load: Mapping[ExpertId, float], slots: int, *, base: int = 1, most: int = 1 << 30) -> dict[ExpertId, int]:
    """How many replicas of each expert of one layer: `base` each, the rest of `slots` to argmax(load / count)."""
    raise NotImplementedError


def place(
    load: Mapping[ExpertId, float],
    hosts: Sequence[Host],
    *,
    experts: Mapping[int, int],
    expert_bytes: Mapping[int, int],
    replicas: int | Mapping[ExpertId, int] = 1,
    current: Placement = Placement(),  # noqa: B008
    migration_cost: float = 0.0,
    max_skew: float = 1.0,
    routing_groups: int = 1,
) -> Placement:
    """The next placement: balanced by load, within memory, near `current`. Raises PlacementError."""
    raise NotImplementedError


def repair(
    current: Placement,
    hosts: Sequence[Host],
    load: Mapping[ExpertId, float],
    *,
    expert_bytes: Mapping[int, int],
    replicas: int = 1,
) -> Placement:
    """The next placement after a loss: only experts with too few replicas gain some. Raises PlacementError."""
    raise NotImplementedError

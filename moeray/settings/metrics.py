"""What is counted, and where it is told."""

from __future__ import annotations

from dataclasses import dataclass

from moeray.tree import require


@dataclass(frozen=True)
class MetricsConfig:
    """`expert_load`: rows by (layer, expert); a model with more experts than `max_expert_series` has them by layer,
    under the expert `all`. `ray`: also repeat every series to Ray's metrics agents, as `ray_moeray_*`."""

    expert_load: bool = True
    max_expert_series: int = 20_000
    ray: bool = False

    def __post_init__(self) -> None:
        require(self.max_expert_series >= 0, "metrics.max_expert_series", "must be 0 or more")

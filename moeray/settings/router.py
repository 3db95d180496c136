"""The actors that hold the trunk."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeray.settings.actors import Device, check_amounts, check_span, span
from moeray.tree import require

ROUTER = "router"
"""The routers' name beside those of the expert groups."""


@dataclass(frozen=True)
class RouterConfig:
    """The actors that hold the trunk and the KV cache.

    `pin_threads`: where a router's threads are two, and all the cores that there are, each keeps to one; switch it off
    where other programs compute on the same cores.
    """

    actors: int = 1
    device: Device = "auto"
    num_cpus: float = 0.5
    num_gpus: float | None = None
    threads: int = 0
    pin_threads: bool = True
    resources: dict[str, float] = field(default_factory=dict)
    min_actors: int | None = None
    max_actors: int | None = None
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        require(self.actors >= 1, "router.actors", f"must be at least 1, got {self.actors}")
        require(self.threads >= 0, "router.threads", "must be 0 (all cores of the node) or more")
        check_span(self, "router")
        check_amounts(self, "router", "num_cpus", "num_gpus", "price_per_hour")

    @property
    def actors_span(self) -> tuple[int, int]:
        """(fewest, most) routers."""
        return span(self.actors, self.min_actors, self.max_actors)

"""Which device and how much of it each actor asks Ray for. Pure functions of the config and of what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeray.errors import PlacementError
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig

_LESS = {
    "CPU": "experts.actors or experts.threads (each thread asks for half a CPU), or set experts.num_cpus",
    "GPU": "the actors or their num_gpus",
}
"""Resource -> what to lower where it is too little."""


@dataclass(frozen=True)
class Request:
    """One actor's request: `device` is concrete, never auto."""

    device: str
    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)


def for_experts(group: ExpertGroupConfig, gpus: float, actors: int) -> Request:
    """`gpus`: GPUs of the cluster; `actors`: how many actors share them (experts and routers)."""
    device = _device(group.device, gpus)
    num_gpus = _share(group.num_gpus, device, gpus, actors)
    num_cpus = group.threads / 2 if group.num_cpus is None else group.num_cpus
    return Request(device, num_cpus, num_gpus, dict(group.resources))


def for_router(router: RouterConfig, gpus: float, actors: int) -> Request:
    device = _device(router.device, gpus)
    return Request(device, router.num_cpus, _share(router.num_gpus, device, gpus, actors), dict(router.resources))


def _device(asked: str, gpus: float) -> str:
    if asked == "auto":
        return "cuda" if gpus > 0 else "cpu"
    return asked


def _share(asked: float | None, device: str, gpus: float, actors: int) -> float:
    if device == "cpu":
        return 0.0
    if asked is not None:
        return asked
    if gpus >= actors:
        return 1.0
    return max(0.01, math.floor(100 * gpus / actors) / 100)


def check_fits(requests: Sequence[Request], total: Mapping[str, float]) -> None:
    """Raise PlacementError when all requests together ask for more than the cluster has in all (nodes' sum)."""
    need: dict[str, float] = {}
    for request in requests:
        for name, amount in {"CPU": request.num_cpus, "GPU": request.num_gpus, **request.resources}.items():
            need[name] = need.get(name, 0.0) + amount
    for name, amount in need.items():
        if amount > total.get(name, 0.0) + 1e-6:
            raise PlacementError(
                f"the actors ask for {amount:g} {name} but the Ray cluster has {total.get(name, 0.0):g}; "
                f"add nodes, or lower {_LESS.get(name, f'the actors or their resources: {name}')} "
                "(where Ray's autoscaler adds nodes, set control.check_room to false)"
            )

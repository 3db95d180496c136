"""The actors that hold the experts, and what they compute with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from moeray.settings.actors import Device, check_amounts, check_span, span
from moeray.settings.router import ROUTER
from moeray.tree import require

ExpertKernel = Literal["auto", "native", "triton", "torch"]
Quantization = Literal["none", "int8"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,39}", re.ASCII)


@dataclass(frozen=True)
class ExpertGroupConfig:
    """One kind of expert actor.

    `actors`: how many of this kind; `share`: the part of the experts that the group hosts, relative to the other
    groups' shares (each expert lives in `experts.replicas` actors in all); `memory_gib` bounds the weights of one
    actor (None: what its device has free). `num_gpus` None means one GPU,
    or an equal part where there are more actors than GPUs; `num_cpus` None means half of `threads`, since routers and
    experts take turns on the cores.

    `actors` is the number at the start; the controller keeps it between `min_actors` and `max_actors` (None: `actors`
    itself, so that a group scales only where it is told how far), and of all groups together at `experts.replicas` at
    the least. `price_per_hour` is what one actor costs, in any currency: the cheaper group grows first.
    """

    name: str = "experts"
    actors: int = 2
    device: Device = "auto"
    num_cpus: float | None = None
    num_gpus: float | None = None
    threads: int = 1
    share: float = 1.0
    memory_gib: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    min_actors: int | None = None
    max_actors: int | None = None
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        require(self.actors >= 1, "experts.groups.actors", f"must be at least 1, got {self.actors}")
        check_span(self, "experts.groups")
        require(self.threads >= 1, "experts.groups.threads", f"must be at least 1, got {self.threads}")
        require(self.share > 0, "experts.groups.share", f"must be above 0, got {self.share}")
        check_amounts(self, "experts.groups", "num_cpus", "num_gpus", "memory_gib", "price_per_hour")

    @property
    def actors_span(self) -> tuple[int, int]:
        """(fewest, most) actors of the group."""
        return span(self.actors, self.min_actors, self.max_actors)


@dataclass(frozen=True)
class ExpertsConfig:
    """`groups` lists the kinds of expert actors; `replicas` is how many actors host each expert, at the least: fewer
    only where memory holds no more of them, or a person has scaled to fewer actors while autoscaling is paused.

    `actors`, `device`, `num_cpus`, `num_gpus`, `threads` and `memory_gib` describe the one group where `groups` is
    empty.

    `kernel`: what multiplies. `native` are moeray's own kernels for CPUs, `triton` those for GPUs; `auto` is the one
    for the actor's device, except in float32 and where it cannot compute a layer, which runs on `torch` then.
    `quantization: int8` keeps dense weights as int8 with a scale for each output, made in the cache folder: half the
    memory and its traffic, somewhat less exact.
    `pin_threads`: an actor on a CPU keeps its compute threads on cores that no other actor of the machine has, as long
    as there are as many; switch it off where other programs compute on the same cores.
    """

    actors: int = 2
    device: Device = "auto"
    num_cpus: float | None = None
    num_gpus: float | None = None
    threads: int = 1
    memory_gib: float | None = None
    min_actors: int | None = None
    max_actors: int | None = None
    replicas: int = 1
    kernel: ExpertKernel = "auto"
    quantization: Quantization = "none"
    pin_threads: bool = True
    groups: tuple[ExpertGroupConfig, ...] = ()

    def __post_init__(self) -> None:
        require(self.replicas >= 1, "experts.replicas", f"must be at least 1, got {self.replicas}")
        actors = sum(g.actors for g in self.resolved())
        require(
            self.replicas <= actors,
            "experts.replicas",
            f"asks for {self.replicas} replicas of each expert but there are {actors} actors; lower it or add actors",
        )
        names = [g.name for g in self.groups]
        require(len(set(names)) == len(names), "experts.groups.name", f"names must differ, got {names}")
        for name in names:
            require(name != ROUTER, "experts.groups.name", f"{name!r} is what the routers are called; choose another")
            # Actors, their sockets and metrics are named by it, and `moeray scale` takes it.
            require(
                _NAME.fullmatch(name) is not None,
                "experts.groups.name",
                f"must be at most 40 letters, digits, '-', '_' and '.', and begin with a letter or digit, got {name!r}",
            )

    def resolved(self) -> tuple[ExpertGroupConfig, ...]:
        """The groups, or the one that the short form describes."""
        return self.groups or (
            ExpertGroupConfig(
                "experts",
                self.actors,
                self.device,
                self.num_cpus,
                self.num_gpus,
                self.threads,
                memory_gib=self.memory_gib,
                min_actors=self.min_actors,
                max_actors=self.max_actors,
            ),
        )

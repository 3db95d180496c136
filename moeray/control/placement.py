"""Placement: the table expert -> replicas, versioned by an epoch. Pure data and pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeray.types import ExpertId


@dataclass(frozen=True)
class Host:
    """An actor that can host experts: `capacity_bytes` of weights at most, taking `share` of the load.

    `share` is relative: the actor's measured service rate, or the config's wish before there is one. Actors of one
    `pool` share memory (CPU actors of a node map the same file, so an expert that one of them hosts costs the others
    nothing); "" is a pool of its own. `pool_bytes` bounds the distinct experts of a pool. `tier` is `cuda` or `cpu`.
    """

    actor_id: str
    capacity_bytes: int
    share: float = 1.0
    node_id: str = ""
    tier: str = "cpu"
    pool: str = ""
    pool_bytes: int = 1 << 62


@dataclass(frozen=True)
class Placement:
    """`replicas[expert]`: the actors that host it, at least one, in order of preference."""

    epoch: int = 0
    replicas: Mapping[ExpertId, tuple[str, ...]] = field(default_factory=dict)

    def hosted_by(self, actor_id: str) -> tuple[ExpertId, ...]:
        """The experts of one actor, sorted."""
        return tuple(sorted(expert for expert, actors in self.replicas.items() if actor_id in actors))

    def actors(self) -> tuple[str, ...]:
        """Every actor that hosts an expert, sorted."""
        return tuple(sorted({actor for actors in self.replicas.values() for actor in actors}))

    def without(self, actor_id: str) -> Placement:
        """The next epoch, with the actor's replicas gone. An expert may be left with none."""
        left = {expert: tuple(a for a in actors if a != actor_id) for expert, actors in self.replicas.items()}
        return replace(self, epoch=self.epoch + 1, replicas=left)

    def to_tree(self) -> dict[str, Any]:
        """Plain data for a frame or a JSON file; `from_tree` is the inverse."""
        actors = list(self.actors())
        index = {actor: i for i, actor in enumerate(actors)}
        rows = [[e.layer, e.expert, [index[a] for a in held]] for e, held in sorted(self.replicas.items())]
        return {"epoch": self.epoch, "actors": actors, "replicas": rows}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Placement:
        actors = tree["actors"]
        replicas = {ExpertId(la, e): tuple(actors[i] for i in held) for la, e, held in tree["replicas"]}
        return cls(tree["epoch"], replicas)

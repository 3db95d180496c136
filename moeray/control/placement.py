"""Placement: the table expert -> replicas, versioned by an epoch. Pure data and pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeray.errors import PlacementError
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


def initial_placement(
    experts: Mapping[int, int], hosts: Sequence[Host], *, expert_bytes: Mapping[int, int], replicas: int = 1
) -> Placement:
    """Spread each layer's experts over the hosts, in proportion to their shares and within their memory.

    `experts`: layer -> number of experts; `expert_bytes`: layer -> stored bytes of one. Each replica goes to the host
    that is emptiest for its share in this layer, then over all layers, so that both the layers and the totals balance.
    Raises PlacementError when they cannot all fit, naming the bytes that are missing.
    """
    if len({host.actor_id for host in hosts}) < replicas:
        raise PlacementError(f"{replicas} replicas of each expert need as many actors, there are {len(hosts)}")
    used = dict.fromkeys((host.actor_id for host in hosts), 0)
    table: dict[ExpertId, tuple[str, ...]] = {}
    for layer in sorted(experts):
        in_layer = dict.fromkeys(used, 0)
        for expert in range(experts[layer]):
            chosen: list[str] = []
            for _ in range(replicas):
                host = _emptiest(hosts, used, in_layer, expert_bytes[layer], chosen)
                if host is None:
                    raise PlacementError(_no_room(experts, hosts, expert_bytes, replicas))
                chosen.append(host.actor_id)
                used[host.actor_id] += expert_bytes[layer]
                in_layer[host.actor_id] += 1
            table[ExpertId(layer, expert)] = tuple(chosen)
    return Placement(1, table)


def _emptiest(
    hosts: Sequence[Host], used: Mapping[str, int], in_layer: Mapping[str, int], size: int, taken: Sequence[str]
) -> Host | None:
    fitting = [h for h in hosts if h.actor_id not in taken and used[h.actor_id] + size <= h.capacity_bytes]
    key = lambda h: ((in_layer[h.actor_id] + 1) / h.share, used[h.actor_id] / h.share)  # noqa: E731
    return min(fitting, key=key, default=None)


def _no_room(experts: Mapping[int, int], hosts: Sequence[Host], expert_bytes: Mapping[int, int], replicas: int) -> str:
    need = replicas * sum(count * expert_bytes[layer] for layer, count in experts.items())
    have = sum(host.capacity_bytes for host in hosts)
    return (
        f"the experts need {need / 2**30:.2f} GiB ({replicas} replica(s) of each) but the {len(hosts)} expert actors "
        f"can hold {have / 2**30:.2f} GiB; add nodes or actors, lower experts.replicas, or use a smaller dtype"
    )

"""What a simulation is about: a trace, a model's shape and popularity, costs, and the actors that may serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from moeray.config import Config
from moeray.control.cost import Costs, StepCosts, StepTable
from moeray.control.deciding import decide, load_policies
from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput
from moeray.control.popularity import MoeShape, Popularity, PopularityModel
from moeray.control.trace import Trace
from moeray.errors import PlacementError
from moeray.settings.experts import ExpertGroupConfig
from moeray.types import ExpertId

_REPLICATE = "hot_experts"


@dataclass(frozen=True, eq=False)
class World:
    """`config`: its `experts`, `router`, `engine` and `control` count. A group's `share` is the speed of its actors,
    relative to the costs. `expert_bytes`: of one expert (0: memory does not matter). `actors_per_node`: how many
    expert actors a node takes."""

    trace: Trace
    config: Config
    costs: Costs
    shape: MoeShape
    popularity: PopularityModel
    expert_bytes: int = 0
    actors_per_node: int = 8

    @cached_property
    def step_costs(self) -> StepCosts:
        return StepCosts(self.costs, self.shape, self.config.engine.max_batch_tokens)

    @cached_property
    def groups(self) -> Mapping[str, ExpertGroupConfig]:
        return {group.name: group for group in self.config.experts.resolved()}

    @cached_property
    def by_value(self) -> tuple[ExpertGroupConfig, ...]:
        """The groups, the one whose work is cheapest first."""
        return tuple(sorted(self.groups.values(), key=lambda group: group.price_per_hour / group.share))

    @cached_property
    def every(self) -> Sequence[ExpertId]:
        """All experts."""
        return [ExpertId(layer, e) for layer, count in self.experts.items() for e in range(count)]

    @cached_property
    def experts(self) -> Mapping[int, int]:
        return dict.fromkeys(range(self.shape.layers), self.shape.experts)

    @property
    def most_actors(self) -> int:
        return sum(group.actors_span[1] for group in self.groups.values())

    @cached_property
    def fewest_actors(self) -> int:
        """As many as the groups must have, or as hold the experts. Raises PlacementError where none may be enough."""
        for actors in range(sum(group.actors_span[0] for group in self.groups.values()), self.most_actors):
            with suppress(PlacementError):
                self._placed({}, self.hosts(actors), self.config.experts.replicas)
                return actors
        self._placed({}, self.hosts(self.most_actors), self.config.experts.replicas)
        return self.most_actors

    @cached_property
    def hindsight(self) -> Popularity:
        return self.popularity.mean(self.trace.duration_s)

    def host(self, actor_id: str, group: str, node_id: str = "") -> Host:
        memory = self.groups[group].memory_gib
        capacity = 1 << 62 if memory is None else int(memory * 2**30)
        return Host(actor_id, capacity, self.groups[group].share, node_id)

    def mix(self, actors: int) -> dict[str, int]:
        """How many actors of each group, of so many in all: the minima, then the cheapest group first."""
        counts = {group.name: group.actors_span[0] for group in self.by_value}
        for group in self.by_value:
            room = group.actors_span[1] - counts[group.name]
            counts[group.name] += min(room, max(actors - sum(counts.values()), 0))
        return counts

    def hosts(self, actors: int) -> list[Host]:
        """The actors of a system of that size."""
        counts = self.mix(actors)
        return [self.host(f"{name}-{i}", name) for name, count in counts.items() for i in range(count)]

    @property
    def expert_sizes(self) -> Mapping[int, int]:
        return dict.fromkeys(range(self.shape.layers), self.expert_bytes)

    def settled_placement(self, hosts: Sequence[Host], load: Mapping[ExpertId, float]) -> Placement:
        """Where the experts belong if the load is known and stays: the hot ones with the replicas that the policy
        gives them. Raises PlacementError where memory does not suffice."""
        base = self.config.experts.replicas
        # The policy counts replicas and does not look where they are, so these need not be placed well.
        somewhere = tuple(host.actor_id for host in hosts[:base])
        placement = Placement(0, dict.fromkeys(self.every, somewhere))
        wish = decide(load_policies([_REPLICATE]), self._seen(hosts, load, placement))
        with suppress(PlacementError):
            return self._placed(load, hosts, dict.fromkeys(self.every, base) | dict(wish.replicas))
        return self._placed(load, hosts, base)  # no memory for more

    def _placed(
        self, load: Mapping[ExpertId, float], hosts: Sequence[Host], replicas: int | Mapping[ExpertId, int]
    ) -> Placement:
        return place(load, hosts, experts=self.experts, expert_bytes=self.expert_sizes, replicas=replicas)

    def _seen(self, hosts: Sequence[Host], load: Mapping[ExpertId, float], placement: Placement) -> PolicyInput:
        views = tuple(ExpertActorView(host.actor_id, group_of(host.actor_id), host.node_id) for host in hosts)
        counts = Counter(view.group for view in views)
        limits = {name: GroupLimits(counts[name], *group.actors_span) for name, group in self.groups.items()}
        routers = GroupLimits(self.config.router.actors, *self.config.router.actors_span)
        return PolicyInput(
            0.0, 0.0, load, load, views, (), placement, limits, routers, self.config.experts.replicas,
            self.config.control,
        )  # fmt: skip

    def table_of(self, placement: Placement, hosts: Sequence[Host], epoch: int) -> StepTable:
        speeds = {host.actor_id: host.share for host in hosts}
        return self.step_costs.table(placement, self.popularity.of_epoch(epoch), speeds)

    def price_of(self, actors: int) -> float:
        """Per hour, of the expert actors of a system of that size."""
        return sum(count * self.groups[name].price_per_hour for name, count in self.mix(actors).items())


def group_of(actor_id: str) -> str:
    return actor_id.rpartition("-")[0]

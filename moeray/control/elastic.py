"""A run whose actors follow the load: the live controller's load windows, policies, votes and placement, simulated.

An actor costs money from the moment it is asked for until it is gone. It gets experts as soon as it is ready, whatever
the interval of the decisions. A placement is in force `map_s` after it was made; those who leave do so one interval
later, when every router has passed to it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeray.control.cost import StepTable
from moeray.control.deciding import decide, load_policies
from moeray.control.fitting import fit
from moeray.control.fleet import reserve_of
from moeray.control.load import LoadBook, skew
from moeray.control.members import Member, Members
from moeray.control.objectives import Objectives
from moeray.control.outcome import Outcome, Sample, Slo, outcome
from moeray.control.placement import Host, Placement
from moeray.control.plan import plan_diff
from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput, RouterView, Wish
from moeray.control.reserve import Busiest
from moeray.control.router_load import RouterLoad
from moeray.control.simulate import Engine
from moeray.control.tally import Tallies
from moeray.control.votes import settle
from moeray.control.world import World, group_of
from moeray.errors import PlacementError
from moeray.types import ExpertId


@dataclass(frozen=True, eq=False)
class _Next:
    """A placement that is on its way: in force from `at_s` on; `leaving` are then free to go."""

    at_s: float
    placement: Placement
    hosts: tuple[Host, ...]
    leaving: tuple[Member, ...]


class ElasticRun:
    """One simulation. `start`: the actors of each group at second 0."""

    def __init__(self, world: World, start: Mapping[str, int], seed: int = 0) -> None:
        self.world, self.settings = world, world.config.control
        self._policies = load_policies(self.settings.policies)
        self._book = LoadBook(self.settings.window_s)
        self._busiest = Busiest()
        self._wishes: deque[Wish] = deque(maxlen=self.settings.shrink_votes)
        self._rng = np.random.default_rng(seed)
        self._members = Members(world.actors_per_node, world.costs.start_s, reserve_of(world.config))
        for group, count in start.items():
            self._members.start_ready(group, count)
        self._members.step(0.0)
        self._wanted = Wish(dict(start))
        self._replicas: Mapping[ExpertId, int] = {}  # those of the placement
        self._routers = world.config.router.actors
        self._router_starts: list[float] = []
        self._tallies = Tallies(world.shape.layers, world.shape.experts)
        self._next: _Next | None = None
        self._looked = 0.0
        hosts = self._hosts(self._members.serving(0.0))
        self._placement = Placement()
        self._placement = self._fit({}, hosts, {})
        self._epoch = 0
        self._table = self._table_of(hosts)
        objectives = Objectives.of(self.settings)
        self._engine = Engine(
            world.trace, world.config.engine, world.step_costs, self._table, self._routers, objectives
        )
        self._publish(self._table)

    def run(self, slo: Slo, report: Callable[[float], None]) -> Outcome:
        """Simulate until every request has finished. `report` hears of the second that was reached."""
        engine, trace = self._engine, self.world.trace
        curve, served = [], []
        while not engine.done:
            curve.append(self._sample(engine.now))
            report(engine.now)
            self._advance(len(curve) * self.settings.interval_s)
            served.append(engine.prompt_tokens + engine.generation_tokens)
            self._tick(engine.now)
        end = max(float(np.max(engine.latencies().last_s + trace.arrival_s)), trace.duration_s)
        return outcome("elastic", trace, engine.latencies(), curve, served, end, slo)

    # -- an interval --------------------------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        """Up to the next decision. What was decided is done as soon as it can be."""
        while (at := self._moment()) < until:
            self._engine.advance(at)
            self._change(at)
        self._engine.advance(until)

    def _moment(self) -> float:
        """When the placement on its way comes into force, or else the first of those that start is ready."""
        if self._next is not None:
            return self._next.at_s
        return min((m.ready_at for m in self._members.members if m.ready_at > self._engine.now), default=math.inf)

    def _change(self, now: float) -> None:
        if self._next is not None and self._next.at_s <= now:
            self._commit(self._next, now)
        if self._next is None:
            self._move(now, look=False)

    def _tick(self, now: float) -> None:
        self._report(now)
        self._members.step(now)
        self._advance_routers(now)
        if self.settings.autoscale:
            self._decide(now)
        self._change(now)
        look = now - self._looked >= self.settings.window_s  # as often as the live keeper of the placement
        if look and self._next is None:
            self._looked = now
            self._move(now, look=True)
        self._refresh(now)

    def _report(self, now: float) -> None:
        """Tell the load book what the actors and routers would."""
        self._count()
        others = len(self._engine.routers) - 1
        for report in self._tallies.reports(self.settings.interval_s, others):
            self._book.fold(report, now)
        for router in self._engine.routers:
            self._book.fold(self._engine.report_of(router), now)

    def _count(self) -> None:
        """Enter into the actors' tallies what was done since the last time, all of it with the present table."""
        engine, costs = self._engine, self.world.step_costs
        steps_T = np.array(engine.steps_by_tokens)
        engine.steps_by_tokens = [0.0] * len(steps_T)
        weights_G = steps_T @ costs.weights_TG
        # A step that was timed anew may be counted back by a rounding error.
        tokens = max(float(np.dot(steps_T, np.arange(len(steps_T)))), 0.0)
        rows_LE = self._rng.poisson(tokens * self.world.popularity.of_epoch(self._epoch).chosen_LE)
        self._tallies.count(rows_LE.ravel(), weights_G @ self._table.busy_GA, weights_G @ self._table.forwards_GA)

    def _advance_routers(self, now: float) -> None:
        ready = sum(at <= now for at in self._router_starts)
        self._router_starts = [at for at in self._router_starts if at > now]
        if ready:
            self._engine.resize_routers(self._engine.open_routers + ready)

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        counts = {group: self._members.count(group) for group in self.world.groups}
        seen = self._seen(now, counts)
        self._busiest.note(seen.experts, now)
        self._wishes.append(decide(self._policies, seen))
        current = Wish(counts, self._routers, self._wanted.replicas)
        self._wanted = settle(current, list(self._wishes), self.settings.shrink_votes)
        self._scale_routers(self._wanted.routers, now)
        for group, count in self._wanted.actors.items():
            self._members.grow(group, max(0, count - counts[group]), now)

    def _seen(self, now: float, counts: Mapping[str, int]) -> PolicyInput:
        book, world = self._book, self.world
        busy, rates, waits = book.busy(now), book.service_rates(), book.queue_waits(now)
        placed = set(self._table.actors)
        experts = tuple(
            ExpertActorView(
                m.actor_id, m.group, str(m.node), busy.get(m.actor_id, 0.0), rates.get(m.actor_id, 0.0),
                waits.get(m.actor_id, 0.0),
            )
            for m in self._members.serving(now)
            if m.actor_id in placed  # those of the placement in force take rows, as live
        )  # fmt: skip
        known = book.routers(now)
        routers = tuple(RouterView(r.name, "", known.get(r.name, RouterLoad())) for r in self._engine.routers)
        limits = {
            name: GroupLimits(counts[name], *group.actors_span, group.price_per_hour, _tier(group.device))
            for name, group in world.groups.items()
        }
        router = world.config.router
        return PolicyInput(
            world.trace.began_at + now, book.idle_s(now), book.expert_rates(now), book.peak(now), experts, routers,
            self._placement, limits, GroupLimits(self._routers, *router.actors_span, router.price_per_hour),
            world.config.experts.replicas, self.settings, self._busiest.within(self.settings.reserve_s, now),
            book.load_s(now),
        )  # fmt: skip

    def _scale_routers(self, wanted: int | None, now: float) -> None:
        if wanted is None or wanted == self._routers:
            return
        if wanted > self._routers:
            self._router_starts += [now + self.world.costs.start_s] * (wanted - self._routers)
        else:
            not_started = min(len(self._router_starts), self._routers - wanted)
            del self._router_starts[len(self._router_starts) - not_started :]
            self._engine.resize_routers(wanted - len(self._router_starts))
        self._routers = wanted

    def _move(self, now: float, look: bool) -> None:
        """Begin another placement, where actors came or are to go, replicas are wanted or (`look`) load is uneven."""
        load, replicas = self._book.expert_rates(now), self._wanted.replicas
        leaving = [m for group in self.world.groups for m in self._surplus(group, now)]
        self._members.leave([m for m in leaving if m.ready_at > now], now)
        leaving = [m for m in leaving if m.ready_at <= now]
        staying = [m for m in self._members.serving(now) if m not in leaving]
        changed = {m.actor_id for m in staying} != set(self._table.actors) or dict(replicas) != dict(self._replicas)
        hosts = self._hosts(staying)
        if not changed and not (look and self._worst_skew(load, hosts) > self.settings.max_skew):
            return
        try:
            placement = self._fit(load, hosts, replicas)
        except PlacementError:
            return  # too little memory without those who were to leave: they stay, as the live plan would roll back
        diff = plan_diff(self._placement, placement)
        if not changed and not diff.host and not diff.drop:
            return
        self._replicas = dict(replicas)
        self._members.leave(leaving, math.inf)
        map_s = self.world.costs.map_s if diff.moves else 0.0
        self._next = _Next(now + map_s, placement, tuple(hosts), tuple(leaving))

    def _surplus(self, group: str, now: float) -> list[Member]:
        """Those of a group that are to go."""
        count = self._members.count(group)
        return self._members.victims(group, max(0, count - self._wanted.actors.get(group, count)), now)

    def _commit(self, coming: _Next, now: float) -> None:
        self._count()
        self._placement, self._next = coming.placement, None
        self._publish(self._table_of(coming.hosts))
        self._members.leave(coming.leaving, now + self.settings.interval_s)
        for member in coming.leaving:
            self._book.forget(member.actor_id)

    def _refresh(self, now: float) -> None:
        """The same placement costs something else when the popularity has changed."""
        epoch = self.world.popularity.epoch_at(now + 1e-9)
        if epoch != self._epoch:
            self._count()
            self._epoch = epoch
            hosts = [self.world.host(actor, group_of(actor)) for actor in self._table.actors]
            self._publish(self._table_of(hosts))

    def _publish(self, table: StepTable) -> None:
        self._table = table
        self._tallies.host(table.actors, self._placement)
        self._engine.publish(table)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _hosts(self, members: list[Member]) -> list[Host]:
        return [self.world.host(m.actor_id, m.group, str(m.node)) for m in members]

    def _worst_skew(self, load: Mapping[ExpertId, float], hosts: list[Host]) -> float:
        return max(skew(load, self._placement, {host.actor_id: host.share for host in hosts}).values())

    def _fit(self, load: Mapping[ExpertId, float], hosts: list[Host], replicas: Mapping[ExpertId, int]) -> Placement:
        world = self.world
        return fit(
            load, hosts, experts=world.experts, expert_bytes=world.expert_sizes, base=world.config.experts.replicas,
            hot=replicas, current=self._placement, migration_cost=self.settings.migration_cost,
            max_skew=self.settings.max_skew,
        ).placement  # fmt: skip

    def _table_of(self, hosts: Sequence[Host]) -> StepTable:
        return self.world.table_of(self._placement, hosts, self._epoch)

    def _sample(self, now: float) -> Sample:
        members = self._members.members
        routers = len(self._engine.routers) + len(self._router_starts)
        count = Counter(m.group for m in members)
        cost = sum(count[name] * group.price_per_hour for name, group in self.world.groups.items())
        cost += routers * self.world.config.router.price_per_hour
        replicas = sum(map(len, self._placement.replicas.values()))
        serving = len(self._members.serving(now))
        return Sample(now, len(members), serving, self._members.nodes(), routers, replicas, cost)


def _tier(device: str) -> str:
    """What a group's actors would run on; `auto` is the CPU, since no GPU is simulated that it could find."""
    return "cuda" if device == "cuda" else "cpu"

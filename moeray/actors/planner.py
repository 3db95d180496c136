"""Where experts belong next, by what is known of the actors and of the load. Owned by the controller's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from moeray.actors.hosts import hosts_of
from moeray.actors.roster import ROUTER, Roster
from moeray.config import Config
from moeray.control.backoff import Backoff
from moeray.control.eplb import repair
from moeray.control.fitting import Fit, fit
from moeray.control.fleet import serving
from moeray.control.load import skew
from moeray.control.placement import Host, Placement
from moeray.control.plan import plan_diff
from moeray.control.staging import next_stage
from moeray.errors import PlacementError
from moeray.types import ExpertId

_NO_STAGE = (
    "experts are to change places, but no actor has room for one more meanwhile; allow another actor (max_actors) or "
    "more memory (memory_gib)"
)


@dataclass(frozen=True)
class ModelShape:
    """What placing needs of the model: layer -> number of experts, layer -> bytes of one, bytes of the trunk."""

    experts: Mapping[int, int]
    expert_bytes: Mapping[int, int]
    trunk_bytes: int


class LoadSource(Protocol):
    """What is known of the load at present."""

    def load(self) -> Mapping[ExpertId, float]: ...

    def rates(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Proposal:
    """A new placement and why. `kind`: first, repair, scale, rebalance. `stage`: as much of it as memory holds beside
    what is to go."""

    target: Placement
    stage: Placement
    kind: str
    why: str


class Plan(NamedTuple):
    """`proposal`: None where nothing is to be done. `short`: why experts have fewer replicas than are wished for, or do
    not change places; `weighed`: it was looked whether they do."""

    proposal: Proposal | None = None
    short: PlacementError | None = None
    weighed: bool = False


class Planner:
    """Proposes, and remembers for which actors and wishes it did, so that nothing is moved without a reason; and which
    actors have failed to map experts of late. `wanted` says how many actors of each group serve."""

    def __init__(
        self, config: Config, roster: Roster, model: ModelShape, source: LoadSource,
        wanted: Callable[[], Mapping[str, int]], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._config = config
        self._roster = roster
        self._model = model
        self._source = source
        self._wanted = wanted
        self._clock = clock
        self._settled: object = None
        self._unfit: object = None
        self._short: object = None
        self._stuck = False
        self._failing: dict[str, Backoff] = {}

    def configure(self, config: Config) -> None:
        self._config = config
        self.unsettle()

    # -- what is remembered ---------------------------------------------------------------------------------------

    def settle(self, placement: Placement, replicas: Mapping[ExpertId, int]) -> None:
        """The placement is being made for the actors and the wishes of now."""
        self._settled = self._signature(placement, replicas)

    def unsettle(self) -> None:
        """It is to be thought over, whoever it was made for."""
        self._settled = None

    def answered(self, actor_id: str, error: Exception | None) -> None:
        """The actor has mapped what it was told to, or could not."""
        if error is None:
            self.forget(actor_id)
        else:
            self._failing.setdefault(actor_id, Backoff()).fail(self._clock())

    def forget(self, actor_id: str) -> None:
        self._failing.pop(actor_id, None)

    def _fails(self, actor_id: str) -> bool:
        return actor_id in self._failing and self._clock() < self._failing[actor_id].until

    def _signature(self, placement: Placement, replicas: Mapping[ExpertId, int]) -> object:
        """What a placement is made for; the load, which always changes, is looked at by its skew."""
        return frozenset(self._serving(placement)), tuple(sorted(replicas.items()))

    # -- what is proposed -----------------------------------------------------------------------------------------

    def propose(
        self, placement: Placement, replicas: Mapping[ExpertId, int], *, look: bool = True, force: bool = False
    ) -> Plan:
        """What would be changed now, and why. `replicas`: the policies' wish for hot experts; `look`: also at the skew;
        `force`: balance whatever the skew is. Raises PlacementError."""
        ids, settings = self._serving(placement), self._config.control
        if not ids:
            return Plan()
        hosts = self._hosts(placement, ids)
        if not placement.replicas:
            first = self._fit(placement, replicas, hosts, 1.0)
            if first.short is not None:
                raise first.short
            return self._towards(placement, first, hosts, "first", f"{len(ids)} actors are ready")
        if (mended := self._repair(placement, replicas, hosts, look)) is not None:
            return Plan(mended)
        if self._settled != self._signature(placement, replicas) or (look and self._stuck):
            found = self._fit(placement, replicas, hosts, settings.max_skew)
            self._short = self._signature(placement, replicas) if found.short is not None else None
            why = f"{len(ids)} actors serve, {len(replicas)} experts are hot"
            return self._towards(placement, found, hosts, "scale", why)
        worst = self._worst_skew(placement, hosts) if look else 1.0
        if not force and worst <= settings.max_skew:
            return Plan()
        found = self._fit(placement, replicas, hosts, 1.0 if force else settings.max_skew)
        why = f"the worst layer's max/mean load is {worst:.2f}"
        return self._towards(placement, found, hosts, "rebalance", why)

    def onwards(self, placement: Placement, replicas: Mapping[ExpertId, int], proposal: Proposal) -> Plan:
        """What is left of a proposal of which the placement is a stage by now, if it is still what is wished for."""
        if self._settled != self._signature(placement, replicas):
            return Plan()
        hosts = self._hosts(placement, self._serving(placement))
        return self._towards(placement, Fit(proposal.target, None), hosts, proposal.kind, proposal.why)

    def _towards(self, placement: Placement, found: Fit, hosts: Sequence[Host], kind: str, why: str) -> Plan:
        diff = plan_diff(placement, found.placement)
        if not diff.host and not diff.drop:
            self._stuck = False
            return Plan(None, found.short, weighed=True)
        stage = next_stage(placement, found.placement, hosts, self._model.expert_bytes)
        self._stuck = stage is None
        if stage is None:
            return Plan(None, found.short or PlacementError(_NO_STAGE), weighed=True)
        return Plan(Proposal(found.placement, stage, kind, why), found.short, weighed=True)

    def _serving(self, placement: Placement) -> tuple[str, ...]:
        """Those that are to host experts; an actor without any that has just failed to map some gets none for now."""
        experts = {group: count for group, count in self._wanted().items() if group != ROUTER}
        members = self._roster.members(placement)
        return serving([m for m in members if m.hosted or not self._fails(m.actor_id)], experts)

    def _worst_skew(self, placement: Placement, hosts: Sequence[Host]) -> float:
        shares = {host.actor_id: host.share for host in hosts}
        return max(skew(self._source.load(), placement, shares).values(), default=1.0)

    def _repair(
        self, placement: Placement, replicas: Mapping[ExpertId, int], hosts: Sequence[Host], look: bool
    ) -> Proposal | None:
        """What gives experts the replicas that they lack, as far as there is room: those that have none come first,
        and get that of spares where there is no other."""
        base = min(self._config.experts.replicas, len(hosts))
        least = min(map(len, placement.replicas.values()))
        tried = self._signature(placement, replicas), placement.epoch
        if least >= base or (least and not look and self._unfit == tried):
            return None
        if least and self._short == tried[0]:  # all that memory holds was placed: what is mended would be taken back
            return None
        short = sum(len(held) < base for held in placement.replicas.values())
        sizes, load = self._model.expert_bytes, self._source.load()
        try:
            found = Fit(repair(placement, hosts, load, expert_bytes=sizes, replicas=base), None)
        except PlacementError:
            found = self._fit(placement, {}, hosts, self._config.control.max_skew, base=1)
        why = f"{short} experts have fewer than {base} replicas"
        mended = self._towards(placement, found, hosts, "repair", why).proposal
        self._unfit = tried if mended is None else None
        return mended

    def _fit(
        self, placement: Placement, replicas: Mapping[ExpertId, int], hosts: Sequence[Host], max_skew: float,
        base: int | None = None,
    ) -> Fit:  # fmt: skip
        """As many replicas as are wished for, or as memory holds. Raises PlacementError."""
        return fit(
            self._source.load(), hosts, experts=self._model.experts, expert_bytes=self._model.expert_bytes,
            base=base or self._config.experts.replicas, hot=replicas, current=placement,
            migration_cost=self._config.control.migration_cost, max_skew=max_skew,
        )  # fmt: skip

    def _hosts(self, placement: Placement, ids: Sequence[str]) -> list[Host]:
        trunks: dict[str, int] = {}
        for router in self._roster.routers():
            trunks[router.node_id] = trunks.get(router.node_id, 0) + self._model.trunk_bytes
        hosts = hosts_of([self._roster[actor_id] for actor_id in ids], trunks, self._source.rates())
        return [self._as_it_is(placement, host) if self._fails(host.actor_id) else host for host in hosts]

    def _as_it_is(self, placement: Placement, host: Host) -> Host:
        """With room for no more than it hosts."""
        held = placement.hosted_by(host.actor_id)
        return replace(host, capacity_bytes=sum(self._model.expert_bytes[expert.layer] for expert in held))

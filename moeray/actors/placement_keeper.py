"""Keeps every expert placed: plans, carries out one change at a time, repairs first. Owned by the controller's loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moeray.actors.audit import Audit
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.hosts import hosts_of, shares_of
from moeray.actors.roster import ROUTER, Actor, Roster
from moeray.config import Config
from moeray.control import reconcile
from moeray.control.backoff import Backoff
from moeray.control.eplb import repair
from moeray.control.fitting import Fit, fit
from moeray.control.fleet import Phase, serving
from moeray.control.load import skew
from moeray.control.placement import Host, Placement
from moeray.control.plan import plan_diff
from moeray.control.reconcile import Change, Event, Instruction, Publish, Step, Unhost
from moeray.errors import MoerayError, PlacementError
from moeray.types import ExpertId

log = logging.getLogger(__name__)


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
    """A new placement and why. `kind`: first, repair, scale, rebalance."""

    target: Placement
    kind: str
    why: str


class PlacementKeeper:
    """`replicas` is the policies' wish for hot experts; `wanted` says how many actors of each group serve."""

    def __init__(
        self, config: Config, roster: Roster, audit: Audit, model: ModelShape, source: LoadSource,
        wanted: Callable[[], Mapping[str, int]], on_failure: Callable[[MoerayError], None],
        metrics: ControllerMetrics, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._config = config
        self._roster = roster
        self._audit = audit
        self._model = model
        self._source = source
        self._wanted = wanted
        self._on_failure = on_failure
        self._metrics = metrics
        self._clock = clock
        self.placement = Placement()
        self.replicas: Mapping[ExpertId, int] = {}
        self.change: Change | None = None
        self._proposal: Proposal | None = None
        self._planned: object = None
        self._looked_at_skew = 0.0
        self._no_room = ""
        self._unfit: object = None
        self._failing: dict[str, Backoff] = {}

    def configure(self, config: Config) -> None:
        """Hold a newer config; the placement is thought over under it."""
        self._config = config
        self._planned = None

    # -- planning -------------------------------------------------------------------------------------------------

    def replan(self, force: bool = False) -> None:
        """Begin a change, if one is needed and none is under way. `force`: balance, whatever the skew is."""
        if self.change is not None:
            return
        now = self._clock()
        look = force or now - self._looked_at_skew >= self._config.control.window_s
        try:
            proposal = self.propose(look, force)
        except PlacementError as error:
            self._complain(error)
            self._on_failure(error)
            return
        if proposal is None and self._signature() != self._unfit:
            self._no_room = ""
        if look:
            self._looked_at_skew = now
        self._planned = None if proposal is not None and proposal.kind == "repair" else self._signature()
        if proposal is not None:
            self._begin(proposal)

    def _complain(self, error: PlacementError) -> None:
        """Once for each new reason: it is tried again at every tick."""
        if str(error) != self._no_room:
            self._no_room = str(error)
            log.error("%s", error)
            self._audit.write("no_room", error=str(error))

    def _serving(self) -> tuple[str, ...]:
        """Those that are to host experts; an actor without any that has just failed to map some gets none for now."""
        experts = {group: count for group, count in self._wanted().items() if group != ROUTER}
        members = self._roster.members(self.placement)
        return serving([m for m in members if m.hosted or not self._fails(m.actor_id)], experts)

    def _fails(self, actor_id: str) -> bool:
        return actor_id in self._failing and self._clock() < self._failing[actor_id].until

    def _signature(self) -> object:
        """What a placement is made for; the load, which always changes, is looked at by its skew."""
        return frozenset(self._serving()), tuple(sorted(self.replicas.items()))

    def propose(self, look: bool = True, force: bool = False) -> Proposal | None:
        """What would be changed now, and why; None where all is as it should be. Changes nothing itself.

        `look`: also at the skew; `force`: balance whatever the skew is. Raises PlacementError.
        """
        ids, settings = self._serving(), self._config.control
        if not ids:
            return None
        hosts = self.hosts(ids)
        if not self.placement.replicas:
            placement, short = self._fit(hosts, 1.0)
            if short is not None:
                raise short
            return Proposal(placement, "first", f"{len(ids)} actors are ready")
        if (mended := self._repair(hosts, look)) is not None:
            return mended
        if self._planned != self._signature():
            why = f"{len(ids)} actors serve, {len(self.replicas)} experts are hot"
            return self._if_moved(self._fit_well(hosts, settings.max_skew), "scale", why)
        worst = self._worst_skew(hosts) if look else 1.0
        if not force and worst <= settings.max_skew:
            return None
        why = f"the worst layer's max/mean load is {worst:.2f}"
        return self._if_moved(self._fit_well(hosts, 1.0 if force else settings.max_skew), "rebalance", why)

    def _worst_skew(self, hosts: Sequence[Host]) -> float:
        shares = {host.actor_id: host.share for host in hosts}
        return max(skew(self._source.load(), self.placement, shares).values(), default=1.0)

    def _repair(self, hosts: Sequence[Host], look: bool) -> Proposal | None:
        """What gives experts the replicas that they lack, as far as there is room: those that have none come first,
        and get that of spares where there is no other."""
        base = min(self._config.experts.replicas, len(hosts))
        least = min(map(len, self.placement.replicas.values()))
        tried = self._signature(), self.placement.epoch
        if least >= base or (least and not look and self._unfit == tried):
            return None
        short = sum(len(held) < base for held in self.placement.replicas.values())
        sizes, load = self._model.expert_bytes, self._source.load()
        try:
            target = repair(self.placement, hosts, load, expert_bytes=sizes, replicas=base)
        except PlacementError:
            target = self._fit(hosts, self._config.control.max_skew, spares=False).placement
        self._unfit = tried
        return self._if_moved(target, "repair", f"{short} experts have fewer than {base} replicas")

    def _if_moved(self, target: Placement, kind: str, why: str) -> Proposal | None:
        diff = plan_diff(self.placement, target)
        return Proposal(target, kind, why) if diff.host or diff.drop else None

    def _fit(self, hosts: Sequence[Host], max_skew: float, *, spares: bool = True) -> Fit:
        """As many replicas as are wished for, or as memory holds. Raises PlacementError."""
        return fit(
            self._source.load(), hosts, experts=self._model.experts, expert_bytes=self._model.expert_bytes,
            base=self._config.experts.replicas if spares else 1, hot=self.replicas if spares else {},
            current=self.placement, migration_cost=self._config.control.migration_cost, max_skew=max_skew,
        )  # fmt: skip

    def _fit_well(self, hosts: Sequence[Host], max_skew: float) -> Placement:
        """The same, and whatever does not fit is said once."""
        placement, short = self._fit(hosts, max_skew)
        if short is not None:
            self._complain(short)
        return placement

    def hosts(self, ids: Iterable[str]) -> list[Host]:
        chosen = [actor for actor in (self._roster.get(actor_id) for actor_id in ids) if actor is not None]
        trunks: dict[str, int] = {}
        for router in self._roster.routers():
            trunks[router.node_id] = trunks.get(router.node_id, 0) + self._model.trunk_bytes
        hosts = hosts_of(chosen, trunks, self._source.rates())
        return [self._as_it_is(host) if self._fails(host.actor_id) else host for host in hosts]

    def _as_it_is(self, host: Host) -> Host:
        """With room for no more than it hosts."""
        held = self.placement.hosted_by(host.actor_id)
        return replace(host, capacity_bytes=sum(self._model.expert_bytes[expert.layer] for expert in held))

    # -- carrying out ---------------------------------------------------------------------------------------------

    def _begin(self, proposal: Proposal) -> None:
        diff = plan_diff(self.placement, proposal.target)
        self._proposal = proposal
        self._audit.write(
            "plan", kind=proposal.kind, why=proposal.why, epoch=proposal.target.epoch, moves=diff.moves,
            hosts={actor: len(held) for actor, held in diff.host.items()},
            drops={actor: len(held) for actor, held in diff.drop.items()},
        )  # fmt: skip
        routers = [router.actor_id for router in self._roster.routers(Phase.READY, Phase.LEAVING)]
        self.change, instructions = reconcile.begin(proposal.target, diff.host, diff.drop, routers)
        self._carry_out(instructions)

    def tell(self, event: Event) -> None:
        """Something happened that the change under way may wait for."""
        if self.change is None:
            return
        self.change, instructions = reconcile.advance(self.change, event)
        self._carry_out(instructions)

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case reconcile.Host(actor_id, experts):
                    self._host(actor_id, experts)
                case Unhost(actor_id, experts):
                    self.unhost(actor_id, experts)
                case Publish(placement):
                    self.publish(placement)
        if self.change is not None and self.change.ended:
            self._end(self.change)

    def _end(self, change: Change) -> None:
        assert self._proposal is not None
        kind = self._proposal.kind
        self.change = None
        self._metrics.planned(kind, change.step.value)
        self._audit.write(
            "plan_ended", kind=kind, result=change.step.value, epoch=change.target.epoch, error=change.error
        )
        if change.step is Step.ROLLED_BACK:
            log.warning("the %s was rolled back: %s", kind, change.error)
            self._planned = None
            self._on_failure(MoerayError(change.error or "the placement was rolled back"))
        else:
            self.replan()  # more may have come to pass meanwhile; after a roll-back the next tick is soon enough

    def _host(self, actor_id: str, experts: Sequence[ExpertId]) -> None:
        actor = self._roster.get(actor_id)
        if actor is None or actor.calls is None:
            self.tell(reconcile.ActorLost(actor_id))
            return

        proposal = self._proposal

        def hosted(_: Any, error: Exception | None) -> None:
            if error is None:
                self._metrics.mapped(len(experts))
                self._failing.pop(actor_id, None)
            else:
                self._failing.setdefault(actor_id, Backoff()).fail(self._clock())
            if self._proposal is proposal:  # else the change that asked for it was abandoned
                self.tell(reconcile.Hosted(actor_id, None if error is None else str(error)))

        actor.calls.put("host", [tuple(expert) for expert in experts], then=hosted)

    def unhost(self, actor_id: str, experts: Sequence[ExpertId]) -> None:
        """Have it drop experts that no router names."""
        self._call(actor_id, "unhost", [tuple(expert) for expert in experts])
        self._metrics.dropped(len(experts))

    def _call(self, actor_id: str, method: str, *args: Any) -> None:
        actor = self._roster.get(actor_id)
        if actor is not None and actor.calls is not None:
            actor.calls.tell(method, *args)

    def publish(self, placement: Placement, lost: Sequence[str] = ()) -> None:
        """Give every router this placement; `lost` names actors that are dead, so that nobody waits for them."""
        self.placement = placement
        for router in self._roster.routers(Phase.READY, Phase.LEAVING):
            self.publish_to(router, lost)

    def welcome(self, router: Actor) -> None:
        """A router is ready: it gets the placement as it is, and what is under way waits for it, too."""
        self.tell(reconcile.RouterJoined(router.actor_id))
        if self.placement.replicas:
            self.publish_to(router)

    def publish_to(self, router: Actor, lost: Sequence[str] = ()) -> None:
        """Give one router the placement as it is."""
        if router.calls is None:
            return
        actors = {actor_id: self._roster.get(actor_id) for actor_id in self.placement.actors()}
        addresses = {actor_id: actor.address for actor_id, actor in actors.items() if actor and actor.address}
        shares = shares_of([actor for actor in actors.values() if actor], self._source.rates())
        if router.epoch_since == 0.0:
            router.epoch_since = self._clock()
        router.calls.put(
            "publish", self.placement.to_tree(), addresses, shares, list(lost),
            then=lambda epoch, error: self._acked(router, epoch, error),
        )  # fmt: skip

    def _acked(self, router: Actor, epoch: int | None, error: Exception | None) -> None:
        if epoch is None:
            log.warning("publish of %s failed: %s", router.actor_id, error)
            return
        router.epoch = epoch
        if epoch >= self.placement.epoch:
            router.epoch_since = 0.0
        self.tell(reconcile.Acked(router.actor_id, epoch))

    # -- losses ---------------------------------------------------------------------------------------------------

    def on_lost(self, actor: Actor) -> None:
        """Routers hear of it at once; what has no replica any more is hosted elsewhere before anything else."""
        if actor.is_router:
            self.on_left(actor)
            return
        self._failing.pop(actor.actor_id, None)
        self.tell(reconcile.ActorLost(actor.actor_id))
        if actor.actor_id in self.placement.actors():
            self.tell(reconcile.Abandon(f"{actor.actor_id} was lost, which is to be mended first"))
            self.publish(self.placement.without(actor.actor_id), [actor.actor_id])
            self._planned = None
        self.replan()

    def on_left(self, actor: Actor) -> None:
        """It was stopped in good order, which for a router may be before it could acknowledge what is published."""
        self._failing.pop(actor.actor_id, None)
        if actor.is_router:
            self.tell(reconcile.RouterGone(actor.actor_id))

    def heal(self) -> None:
        """Map again what the placement names and publish it again, for rows that nobody takes though all seems well."""
        if self.change is not None:
            return
        for actor_id in self.placement.actors():
            self._call(actor_id, "host", [tuple(expert) for expert in self.placement.hosted_by(actor_id)])
        self.publish(Placement(self.placement.epoch + 1, self.placement.replicas))

    def late_routers(self) -> list[Actor]:
        """Routers that have not acknowledged a placement within their lease."""
        limit = self._clock() - self._config.control.lease_s
        ready = self._roster.routers(Phase.READY, Phase.LEAVING)
        return [router for router in ready if router.epoch_since and router.epoch_since < limit]

    def emptied(self) -> list[Actor]:
        """Expert actors that leave and that no placement names any more."""
        if self.change is not None:
            return []
        named = set(self.placement.actors())
        return [actor for actor in self._roster.experts(Phase.LEAVING) if actor.actor_id not in named]

"""Keeps every expert placed: carries out one change at a time, repairs first. Owned by the controller's loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeray.actors.audit import Audit
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.hosts import shares_of
from moeray.actors.planner import LoadSource, ModelShape, Planner, Proposal
from moeray.actors.roster import Actor, Roster
from moeray.config import Config
from moeray.control import reconcile
from moeray.control.fleet import Phase
from moeray.control.placement import Placement
from moeray.control.plan import plan_diff
from moeray.control.reconcile import Change, Event, Instruction, Publish, Step, Unhost
from moeray.errors import ActorLostError, MoerayError, PlacementError
from moeray.types import ExpertId

log = logging.getLogger(__name__)

STALL_S = 60.0
"""An actor that maps experts may take so long for one of them."""


class PlacementKeeper:
    """`placement` is what routers hold or are to hold, `replicas` the policies' wish for hot experts."""

    def __init__(
        self, config: Config, roster: Roster, audit: Audit, model: ModelShape, source: LoadSource,
        wanted: Callable[[], Mapping[str, int]], on_failure: Callable[[MoerayError], None],
        metrics: ControllerMetrics, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._config = config
        self._roster = roster
        self._audit = audit
        self._source = source
        self._planner = Planner(config, roster, model, source, wanted, clock)
        self._on_failure = on_failure
        self._metrics = metrics
        self._clock = clock
        self.placement = Placement()
        self.replicas: Mapping[ExpertId, int] = {}
        self.change: Change | None = None
        self._proposal: Proposal | None = None
        self._looked_at_skew = 0.0
        self._no_room = ""
        self._progress: dict[str, tuple[int, float]] = {}  # bytes that those who map have mapped, and since when

    def configure(self, config: Config) -> None:
        """Hold a newer config; the placement is thought over under it."""
        self._config = config
        self._planner.configure(config)

    # -- planning -------------------------------------------------------------------------------------------------

    def replan(self, force: bool = False) -> None:
        """Begin a change, if one is needed and none is under way. `force`: balance, whatever the skew is."""
        if self.change is not None:
            return
        now = self._clock()
        look = force or now - self._looked_at_skew >= self._config.control.window_s
        try:
            plan = self._planner.propose(self.placement, self.replicas, look=look, force=force)
        except PlacementError as error:
            self._complain(error)
            self._on_failure(error)
            return
        proposal = plan.proposal
        if plan.short is not None:
            self._complain(plan.short)
        elif plan.weighed:
            self._no_room = ""
        if look:
            self._looked_at_skew = now
        if proposal is not None and proposal.kind == "repair":
            self._planner.unsettle()
        else:
            self._planner.settle(self.placement, self.replicas)
        if proposal is not None:
            self._begin(proposal)

    def propose(self) -> Proposal | None:
        """What would be changed now, and why; nothing is. Raises PlacementError."""
        return self._planner.propose(self.placement, self.replicas).proposal

    def _complain(self, error: PlacementError) -> None:
        """Once while it lasts: it is tried again at every tick."""
        if str(error) != self._no_room:
            self._no_room = str(error)
            log.error("%s", error)
            self._audit.write("no_room", error=str(error))

    # -- carrying out ---------------------------------------------------------------------------------------------

    def _begin(self, proposal: Proposal) -> None:
        diff = plan_diff(self.placement, proposal.stage)
        self._proposal = proposal
        self._audit.write(
            "plan", kind=proposal.kind, why=proposal.why, epoch=proposal.stage.epoch, moves=diff.moves,
            hosts={actor: len(held) for actor, held in diff.host.items()},
            drops={actor: len(held) for actor, held in diff.drop.items()},
        )  # fmt: skip
        routers = [router.actor_id for router in self._roster.routers(Phase.READY, Phase.LEAVING)]
        self.change, instructions = reconcile.begin(proposal.stage, diff.host, diff.drop, routers)
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
            self._planner.unsettle()
        elif (left := self._planner.onwards(self.placement, self.replicas, self._proposal)).proposal is not None:
            self._begin(left.proposal)
        else:
            if left.short is not None:
                self._complain(left.short)
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
            self._planner.answered(actor_id, error)
            if self._proposal is not proposal:
                return  # the change that asked for it was abandoned
            self.tell(reconcile.Hosted(actor_id, None if error is None else str(error)))
            if error is not None and not isinstance(error, ActorLostError):
                self._on_failure(MoerayError(f"{actor_id} could not host its experts: {error}"))

        self._progress[actor_id] = (actor.hosted_bytes, self._clock())
        actor.calls.put("host", [tuple(expert) for expert in experts], then=hosted)

    def look_at_mapping(self) -> None:
        """Who has mapped nothing for long, though it speaks, keeps nobody else waiting: its disk stands still, say."""
        if self.change is None or self.change.step is not Step.HOSTING or not self.placement.replicas:
            return  # the first placement may wait for a hub, for as long as a start may take
        now = self._clock()
        for actor_id in self.change.waiting:
            actor = self._roster.get(actor_id)
            before, since = self._progress[actor_id]
            if actor is not None and actor.hosted_bytes != before:
                self._progress[actor_id] = (actor.hosted_bytes, now)
            elif now - since >= STALL_S:
                error = MoerayError(f"it has mapped nothing for {STALL_S:g} s")
                self._planner.answered(actor_id, error)
                self.tell(reconcile.Hosted(actor_id, str(error)))
                return

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
        router.epoch_since = 0.0 if epoch >= self.placement.epoch else self._clock()  # a newer one is on its way
        self.tell(reconcile.Acked(router.actor_id, epoch))

    # -- losses ---------------------------------------------------------------------------------------------------

    def on_lost(self, actor: Actor) -> None:
        """Routers hear of it at once; what has no replica any more is hosted elsewhere before anything else."""
        if actor.is_router:
            self.on_left(actor)
            return
        self._planner.forget(actor.actor_id)
        self.tell(reconcile.ActorLost(actor.actor_id))
        if actor.actor_id in self.placement.actors():
            self.tell(reconcile.Abandon(f"{actor.actor_id} was lost, which is to be mended first"))
            self.publish(self.placement.without(actor.actor_id), [actor.actor_id])
            self._planner.unsettle()
        if self.placement.replicas:  # else the first one waits for all
            self.replan()

    def on_left(self, actor: Actor) -> None:
        """It was stopped in good order, which for a router may be before it could acknowledge what is published."""
        self._planner.forget(actor.actor_id)
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

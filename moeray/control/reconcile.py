"""One change of the placement, from the wish to the fact: events in, instructions out, whole or not at all.

    HOSTING    weights are mapped wherever the new placement adds an expert
    ACKING     the new epoch is published: additions are usable at once, and what it no longer names gets no new rows
    DONE       every router has acknowledged it, and what is no longer named was dropped

Until it is published a change can be rolled back: what it mapped is dropped again, and no router ever heard of it.
Behind that it only goes forward, since dropping what no router names any more is safe at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moeray.control.placement import Placement
from moeray.types import ExpertId


class Step(StrEnum):
    HOSTING = "hosting"
    ACKING = "acking"
    DONE = "done"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class Host:
    actor_id: str
    experts: tuple[ExpertId, ...]


@dataclass(frozen=True)
class Unhost:
    actor_id: str
    experts: tuple[ExpertId, ...]


@dataclass(frozen=True)
class Publish:
    placement: Placement


Instruction = Host | Unhost | Publish


@dataclass(frozen=True)
class Hosted:
    """The actor has mapped what it was told to; `error` names why it could not."""

    actor_id: str
    error: str | None = None


@dataclass(frozen=True)
class ActorLost:
    actor_id: str


@dataclass(frozen=True)
class Acked:
    """The router holds `epoch` now."""

    router_id: str
    epoch: int


@dataclass(frozen=True)
class RouterJoined:
    """Another router is to hold the placement: its acknowledgement is waited for, too."""

    router_id: str


@dataclass(frozen=True)
class RouterGone:
    """The router is lost, or has left: its acknowledgement is not waited for, now or later."""

    router_id: str


@dataclass(frozen=True)
class Abandon:
    """Something more urgent needs the placement: give up, unless it is published already."""

    why: str


Event = Hosted | ActorLost | Acked | RouterJoined | RouterGone | Abandon


@dataclass(frozen=True)
class Change:
    """A change under way. `adds` and `drops`: experts by actor; `waiting`: the actors or routers not yet heard of."""

    target: Placement
    adds: Mapping[str, tuple[ExpertId, ...]]
    drops: Mapping[str, tuple[ExpertId, ...]]
    routers: frozenset[str]
    step: Step = Step.HOSTING
    waiting: frozenset[str] = frozenset()
    error: str | None = None
    dead: frozenset[str] = field(default=frozenset())

    @property
    def ended(self) -> bool:
        return self.step in (Step.DONE, Step.ROLLED_BACK)


def begin(
    target: Placement,
    adds: Mapping[str, tuple[ExpertId, ...]],
    drops: Mapping[str, tuple[ExpertId, ...]],
    routers: Iterable[str],
) -> tuple[Change, list[Instruction]]:
    """Start a change; with nothing to map it is published at once."""
    change = Change(target, adds, drops, frozenset(routers), waiting=frozenset(adds))
    hosts: list[Instruction] = [Host(actor, experts) for actor, experts in sorted(adds.items())]
    after, more = _settle(change)
    return after, hosts + more


def advance(change: Change, event: Event) -> tuple[Change, list[Instruction]]:
    """The change after an event, and what is to be done. Events of an ended change do nothing."""
    if change.ended:
        return change, []
    match event:
        case Hosted(actor, None) if change.step is Step.HOSTING:
            return _settle(replace(change, waiting=change.waiting - {actor}))
        case Hosted(actor, str() as error) if change.step is Step.HOSTING:
            return _roll_back(change, f"{actor} could not host its experts: {error}")
        case ActorLost(actor):
            return _lose(replace(change, dead=change.dead | {actor}), actor)
        case Acked(router, epoch) if epoch >= change.target.epoch and change.step is Step.ACKING:
            return _settle(replace(change, waiting=change.waiting - {router}))
        case RouterJoined(router):
            more = {router} if change.step is Step.ACKING else set()
            return replace(change, routers=change.routers | {router}, waiting=change.waiting | more), []
        case RouterGone(router):
            return _settle(replace(change, routers=change.routers - {router}, waiting=change.waiting - {router}))
        case Abandon(why) if change.step is Step.HOSTING:
            return _roll_back(change, why)
    return change, []


def _lose(change: Change, actor: str) -> tuple[Change, list[Instruction]]:
    if change.step is Step.HOSTING and actor in change.target.actors():
        return _roll_back(change, f"{actor} was lost")
    return change, []


def _settle(change: Change) -> tuple[Change, list[Instruction]]:
    """Go on to the next step when nobody is waited for any more."""
    if change.waiting:
        return change, []
    if change.step is Step.HOSTING:
        after, more = _settle(replace(change, step=Step.ACKING, waiting=change.routers))
        return after, [Publish(change.target), *more]
    return replace(change, step=Step.DONE), _unhosts(change, change.drops)


def _roll_back(change: Change, why: str) -> tuple[Change, list[Instruction]]:
    return replace(change, step=Step.ROLLED_BACK, error=why), _unhosts(change, change.adds)


def _unhosts(change: Change, experts: Mapping[str, tuple[ExpertId, ...]]) -> list[Instruction]:
    return [Unhost(actor, held) for actor, held in sorted(experts.items()) if actor not in change.dead]

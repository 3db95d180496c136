"""How many actors of each group there should be, against those there are. Pure and level-triggered: the difference
between wish and fact is worked out anew each time, so an actor that waits minutes for a node blocks nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moeray.config import Config


class Phase(StrEnum):
    """`STARTING`: asked for, perhaps waiting for a node. `READY`: can work. `LEAVING`: to be emptied, then stopped."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Member:
    """One actor of a group. `hosted`: experts that the placement gives it; `order`: its number, in order of start;
    `outdated`: it was started with what the config no longer says, so another is to take its place; `draining`: it
    takes nothing new any more."""

    actor_id: str
    group: str
    phase: Phase
    node_id: str = ""
    hosted: int = 0
    order: int = 0
    outdated: bool = False
    draining: bool = False


@dataclass(frozen=True)
class FleetSteps:
    """`start`: a group's name for each actor to start; `cancel`: starts to give up; `leave`: actors to empty; `stay`:
    those being emptied that are wanted again."""

    start: tuple[str, ...] = ()
    cancel: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()


def fleet_steps(members: Sequence[Member], wanted: Mapping[str, int], doomed: Iterable[str] = ()) -> FleetSteps:
    """What brings the fleet to `wanted` actors of each group (those kept in reserve included) and none of any other.

    `doomed`: actors that must go whatever is wanted (their node drains, they were told to): they leave, and others are
    started for them. An outdated actor stays until a new one can work in its place. Too many: starts are given up
    first, the newest before older ones; then the actors leave that let a whole node go free soonest. Too few: those
    that leave and could stay do, before others are started.
    """
    gone = set(doomed)
    leave = [m.actor_id for m in members if m.actor_id in gone and m.phase is Phase.READY]
    cancel = [m.actor_id for m in members if m.actor_id in gone and m.phase is Phase.STARTING]
    start: list[str] = []
    stay: list[str] = []
    staying = [m for m in members if m.actor_id not in gone and m.phase is not Phase.LEAVING]
    for group in dict.fromkeys([*wanted, *(m.group for m in staying)]):
        count = wanted.get(group, 0)
        old = [m for m in staying if m.group == group and m.outdated]
        cancel += [m.actor_id for m in old if m.phase is Phase.STARTING]
        mine = [m for m in staying if m.group == group and not m.outdated]
        leave += _replaced(old, count - sum(m.phase is Phase.READY for m in mine), staying)
        back = _reclaimed([m for m in members if m.group == group and m.actor_id not in gone], count - len(mine))
        stay += back
        start += [group] * (count - len(mine) - len(back))
        surplus = len(mine) - count
        if surplus > 0:
            starting = sorted((m for m in mine if m.phase is Phase.STARTING), key=lambda m: -m.order)
            cancel += [m.actor_id for m in starting[:surplus]]
            left = [m for m in staying if m.actor_id not in cancel]
            leave += _victims([m for m in mine if m.phase is Phase.READY], surplus - len(starting), left)
    return FleetSteps(tuple(start), tuple(cancel), tuple(leave), tuple(stay))


def reserve_of(config: Config) -> dict[str, int]:
    """The warm pool, by group: it belongs to the cheapest one, the first of equals."""
    cheapest = min(config.experts.resolved(), key=lambda group: group.price_per_hour)
    return {cheapest.name: config.control.warm_pool} if config.control.warm_pool else {}


def to_reserve(
    members: Sequence[Member], wanted: Mapping[str, int], reserve: Mapping[str, int], *, starved: bool
) -> dict[str, int]:
    """How many actors of each group to keep beside those `wanted`, at most `reserve`.

    While a wanted actor cannot work yet, only those that can: one that is still to start might take its room. None at
    all where a wanted actor is `starved` of room.
    """
    if starved:
        return {}
    ready = Counter(m.group for m in members if m.phase is Phase.READY)
    if all(ready[group] >= count for group, count in wanted.items()):
        return dict(reserve)
    return {group: min(count, max(0, ready[group] - wanted.get(group, 0))) for group, count in reserve.items()}


def _reclaimed(group: Sequence[Member], count: int) -> list[str]:
    """Of those that are being emptied `count` that can stay, those that still host most first."""
    able = [m for m in group if m.phase is Phase.LEAVING and not (m.draining or m.outdated)]
    return [m.actor_id for m in sorted(able, key=lambda m: (-m.hosted, m.order))[: max(0, count)]]


def _replaced(old: Sequence[Member], count: int, staying: Sequence[Member]) -> list[str]:
    """The outdated actors of a group that may go, where `count` of them are still needed."""
    ready = [m for m in old if m.phase is Phase.READY]
    return _victims(ready, len(ready) - max(0, count), staying)


def _victims(ready: Sequence[Member], count: int, staying: Sequence[Member]) -> list[str]:
    """The actors to let go: from the node with the fewest actors of any kind, again and again, the emptiest first."""
    left = list(ready)
    crowd = Counter(m.node_id for m in staying)
    victims: list[str] = []
    while len(victims) < count:
        victim = min(left, key=lambda m: (crowd[m.node_id], m.hosted, -m.order))
        left.remove(victim)
        crowd[victim.node_id] -= 1
        victims.append(victim.actor_id)
    return victims


def serving(members: Sequence[Member], wanted: Mapping[str, int]) -> tuple[str, ...]:
    """The ready actors that are to host experts: as many of each group as wanted, those that host most first.

    The others are the warm pool: they take the place of one that is lost at once.
    """
    chosen: list[str] = []
    for group, count in wanted.items():
        ready = [m for m in members if m.group == group and m.phase is Phase.READY]
        ready.sort(key=lambda m: (-m.hosted, m.order))
        chosen += [m.actor_id for m in ready[:count]]
    return tuple(chosen)

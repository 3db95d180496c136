"""From what is seen to how many actors and replicas are wanted. Pure: live and simulated runs share it."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import SupportsIndex, cast

from moeray.control.policies import SHIPPED
from moeray.control.policy import GroupLimits, Policy, PolicyInput, Wish
from moeray.errors import ConfigError, PolicyError, in_a_line, one_line
from moeray.types import ExpertId


def load_policies(names: Sequence[str]) -> list[Policy]:
    """The policies by name: a shipped one's, or `package.module:function` (or with a dot) of your own.

    Raises ConfigError for one that is not there or cannot be called, naming the nearest, and for one whose module
    fails.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Policy:
    if name in SHIPPED:
        return SHIPPED[name]
    module_name, _, function = name.rpartition(":" if ":" in name else ".")
    if not module_name:
        raise ConfigError(
            f"config key control.policies: no policy is named {name!r}; the nearest is {_nearest(name, SHIPPED)!r} "
            f"(one of your own is a dotted path, such as my_package.my_module:my_policy)"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"config key control.policies: {name!r} cannot be imported ({one_line(error)}); is its package installed "
            "here?"
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"config key control.policies: {name!r} fails when it is imported ({in_a_line(error)}); mend it, or leave "
            "it out"
        ) from error
    policy = getattr(module, function, None)
    if not callable(policy):
        near = _nearest(function, [key for key, value in vars(module).items() if callable(value)])
        raise ConfigError(
            f"config key control.policies: module {module_name} has no function {function!r}; the nearest is {near!r}"
        )
    return cast(Policy, policy)


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.0)), None)


def decide(policies: Sequence[Policy], seen: PolicyInput, failed: Callable[[PolicyError], None] | None = None) -> Wish:
    """All policies' wishes in one: the largest for each number, within the limits, growing `max_growth` times at most.

    A wish for the minimum (as when idle) thus holds only where nobody else wants more: a schedule's floor stays, and
    the load policies want the minimum themselves when there is no load. Groups and routers that no policy speaks of
    are left out, and experts for which none wants more than the base. No expert gets more replicas than there are
    actors wanted, and no wish leaves fewer actors than each expert has replicas at the least: that would take
    redundancy away that nobody has given up.

    A policy that does not work is told to `failed`, and has no wish; without it, PolicyError is raised.
    """
    wishes: list[Wish] = []
    for policy in policies:
        try:
            wishes.append(_wish_of(policy, seen))
        except PolicyError as error:
            if failed is None:
                raise
            failed(error)
    asked = {
        group: _within(max(wish.actors[group] for wish in wishes if group in wish.actors), limits, seen)
        for group, limits in seen.groups.items()
        if any(group in wish.actors for wish in wishes)
    }
    actors = asked | _for_replicas(asked, seen)
    routers = max((wish.routers for wish in wishes if wish.routers is not None), default=None)
    most = sum(max(actors.get(group, 0), limits.actors) for group, limits in seen.groups.items())
    replicas: dict[ExpertId, int] = {}
    for wish in wishes:
        for expert, count in wish.replicas.items():
            replicas[expert] = max(replicas.get(expert, 0), min(count, most))
    return Wish(
        actors,
        None if routers is None else _within(routers, seen.router_limits, seen),
        {expert: count for expert, count in replicas.items() if count > seen.base_replicas},
        (
            *(reason for wish in wishes for reason in wish.reasons),
            *(
                f"experts.replicas {seen.base_replicas}: {group} at least {count}"
                for group, count in actors.items()
                if count != asked.get(group)
            ),
        ),
    )


def _for_replicas(asked: Mapping[str, int], seen: PolicyInput) -> dict[str, int]:
    """The groups of which more are needed so that there are as many actors as base replicas: the cheapest first.

    Since a shrink never goes below the newest wish (`votes.settle`), this holds for whatever comes of the wish."""
    counts = {group: asked.get(group, limits.actors) for group, limits in seen.groups.items()}
    short = seen.base_replicas - sum(counts.values())
    more: dict[str, int] = {}
    for group in sorted(counts, key=lambda group: seen.groups[group].price_per_hour):
        room = seen.groups[group].max_actors - counts[group]
        if (added := min(short, room)) > 0:
            more[group] = counts[group] + added
            short -= added
    return more


def _wish_of(policy: Policy, seen: PolicyInput) -> Wish:
    """What a policy wishes for, as plain data that nothing of the policy's own can spoil. Raises PolicyError."""
    name = f"{getattr(policy, '__module__', '?')}.{getattr(policy, '__qualname__', policy)}"
    try:
        wish = policy(seen)
        wrong = next(_wrong(wish, seen), None)
        if wrong is None:
            return Wish(
                {group: index(count) for group, count in wish.actors.items()},
                None if wish.routers is None else index(wish.routers),
                {expert: index(count) for expert, count in wish.replicas.items()},
                tuple(wish.reasons),
            )
    except Exception as error:  # whatever a user's code raises
        raise PolicyError(
            f"policy {name} (control.policies) failed: {in_a_line(error)}; mend it, or leave it out"
        ) from error
    raise PolicyError(f"policy {name} (control.policies) {' '.join(wrong.split())}; mend it, or leave it out")


def _wrong(wish: object, seen: PolicyInput) -> Iterator[str]:
    """What cannot be, with what can; what comes later may be looked at only where nothing came before."""
    if not isinstance(wish, Wish):
        yield f"gave {wish!r} instead of a Wish"
        return
    for key in ("actors", "replicas"):
        if not isinstance(value := getattr(wish, key), Mapping):
            yield f"gave a Wish whose {key} are {value!r} instead of a mapping"
    if not isinstance(wish.reasons, tuple | list) or not all(isinstance(reason, str) for reason in wish.reasons):
        yield f"gave a Wish whose reasons are {wish.reasons!r} instead of a tuple of str"
    for group, count in wish.actors.items():
        if group not in seen.groups:
            near = _nearest(str(group), seen.groups)
            yield f"wishes for actors of {group!r}, which is no expert group; the nearest is {near!r}"
        if not _is_count(count):
            yield f"wishes for {count!r} actors of group {group!r}, which is no whole number of 0 or more"
    if wish.routers is not None and not _is_count(wish.routers):
        yield f"wishes for {wish.routers!r} routers, which is no whole number of 0 or more"
    for expert, count in wish.replicas.items():
        if expert not in seen.placement.replicas:
            yield f"wishes for replicas of {expert!r}, which is no expert of the model (layer, expert)"
        if not _is_count(count):
            yield f"wishes for {count!r} replicas of {expert!r}, which is no whole number of 0 or more"


def _is_count(value: object) -> bool:
    """Also where it is a whole number of another library's, such as numpy's."""
    return isinstance(value, SupportsIndex) and index(value) >= 0


def _within(wanted: int, limits: GroupLimits, seen: PolicyInput) -> int:
    grown = math.ceil(limits.actors * seen.settings.max_growth) if limits.actors else limits.max_actors
    return max(limits.min_actors, min(wanted, grown, limits.max_actors))

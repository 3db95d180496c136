"""From what is seen to how many actors and replicas are wanted. Pure: live and simulated runs share it."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

from moeray.control.policies import SHIPPED
from moeray.control.policy import GroupLimits, Policy, PolicyInput, Wish
from moeray.errors import ConfigError, PolicyError
from moeray.types import ExpertId


def load_policies(names: Sequence[str]) -> list[Policy]:
    """The policies by name: a shipped one's, or `package.module:function` (or with a dot) of your own.

    Raises ConfigError for one that is not there or cannot be called, naming the nearest.
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
            f"config key control.policies: {name!r} cannot be imported ({error}); is its package installed here?"
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
    actors wanted.

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
    actors = {
        group: _within(max(wish.actors[group] for wish in wishes if group in wish.actors), limits, seen)
        for group, limits in seen.groups.items()
        if any(group in wish.actors for wish in wishes)
    }
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
        tuple(reason for wish in wishes for reason in wish.reasons),
    )


def _wish_of(policy: Policy, seen: PolicyInput) -> Wish:
    name = f"{getattr(policy, '__module__', '?')}.{getattr(policy, '__qualname__', policy)}"
    try:
        wish = policy(seen)
    except Exception as error:  # whatever a user's code raises
        raise PolicyError(
            f"policy {name} (control.policies) failed: {type(error).__name__}: {error}; mend it, or leave it out"
        ) from error
    if not isinstance(wish, Wish):
        raise PolicyError(f"policy {name} (control.policies) gave {wish!r} instead of a Wish; mend it, or leave it out")
    if (wrong := next(_wrong(wish, seen), None)) is not None:
        raise PolicyError(f"policy {name} (control.policies) wishes for {wrong}; mend it, or leave it out")
    return wish


def _wrong(wish: Wish, seen: PolicyInput) -> Iterator[str]:
    """What cannot be, with what can."""
    for group, count in wish.actors.items():
        if not _is_count(count):
            yield f"{count!r} actors of group {group!r}, which is no whole number of 0 or more"
    if wish.routers is not None and not _is_count(wish.routers):
        yield f"{wish.routers!r} routers, which is no whole number of 0 or more"
    for expert, count in wish.replicas.items():
        if expert not in seen.placement.replicas:
            yield f"replicas of {expert!r}, which is no expert of the model (layer, expert)"
        if not _is_count(count):
            yield f"{count!r} replicas of {expert!r}, which is no whole number of 0 or more"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _within(wanted: int, limits: GroupLimits, seen: PolicyInput) -> int:
    grown = math.ceil(limits.actors * seen.settings.max_growth) if limits.actors else limits.max_actors
    return max(limits.min_actors, min(wanted, grown, limits.max_actors))

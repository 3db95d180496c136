"""What a newer config asks of a running system: some keys it takes at once, for some it renews the actors of a group
one after the other, and some only another system can take. Pure functions of the config before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from moeray.config import Config
from moeray.errors import ConfigError
from moeray.settings.experts import ExpertGroupConfig, ExpertsConfig
from moeray.settings.router import ROUTER, RouterConfig


class Reach(Enum):
    """How far a key reaches into the running system."""

    CONTROL = "read anew whenever something is decided, started or answered"
    EXPERTS = "every expert actor is started with it"
    GROUP = "the actors of one group are started with it"
    ROUTERS = "every router is started with it"
    SYSTEM = "all actors must agree on it, or it says which system this is"


_STARTED_WITH = ("device", "num_cpus", "num_gpus", "threads", "resources")
_REACH = {
    "model": Reach.SYSTEM,
    "revision": Reach.SYSTEM,
    "dtype": Reach.SYSTEM,
    "cache_dir": Reach.SYSTEM,
    "wire": Reach.SYSTEM,
    "engine": Reach.ROUTERS,
    "router": Reach.CONTROL,
    **{f"router.{key}": Reach.ROUTERS for key in (*_STARTED_WITH, "pin_threads")},
    "experts.kernel": Reach.EXPERTS,
    "experts.quantization": Reach.EXPERTS,
    "experts.pin_threads": Reach.EXPERTS,
    "experts.replicas": Reach.CONTROL,
    "experts.groups": Reach.CONTROL,
    **{f"experts.groups.*.{key}": Reach.GROUP for key in _STARTED_WITH},
    "control": Reach.CONTROL,
    "control.audit_log": Reach.SYSTEM,
    "control.resources": Reach.SYSTEM,
    "serve": Reach.CONTROL,
    "serve.name": Reach.SYSTEM,
    "chat_template": Reach.CONTROL,
    "metrics": Reach.SYSTEM,
    "log_format": Reach.CONTROL,
    "log_level": Reach.CONTROL,
    "log_requests": Reach.CONTROL,
}
"""By key or by the beginning of keys, the longest first; `*` is the name of a group."""


_SPELT_OTHERWISE = {"wire.token", "experts.groups"} | {
    f"experts.{f.name}" for f in fields(ExpertsConfig) if f.name in {g.name for g in fields(ExpertGroupConfig)}
}
"""A token that is not given is one made at the start, and the short form describes the one group."""


@dataclass(frozen=True)
class Update:
    """`changed`: every key that differs. `renewed`: group (or `router`) -> the keys for which its actors are replaced.
    `refused`: the keys that need another system; where there are any, nothing is to be changed."""

    changed: tuple[str, ...] = ()
    renewed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def compare(before: Config, after: Config) -> Update:
    """What `after` changes. The cluster token is not compared."""
    old, new = _leaves(before), _leaves(after)
    changed = tuple(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))
    stay = _groups(old) & _groups(new)
    renewed: dict[str, tuple[str, ...]] = {}
    for key in changed:
        for group in _renews(key, stay):
            renewed[group] = (*renewed.get(group, ()), key)
    return Update(changed, renewed, tuple(key for key in changed if reach(key) is Reach.SYSTEM))


def check_change(old: Config, new: Config, token: bytes) -> Update:
    """What a newer config changes. Raises ConfigError where it needs another system than the one with this `token`."""
    update = compare(old, new)
    other_token = new.wire.token is not None and new.wire.token.encode() != token
    if refused := [*update.refused, *(["wire.token"] if other_token else [])]:
        raise ConfigError(
            f"a system that runs cannot change {', '.join(refused)}; stop it first, or choose another serve.name: "
            "the new system starts beside the old one, which ends when no endpoint asks for it any more"
        )
    return update


def reach(key: str) -> Reach:
    """Of a dotted key; a group's keys are `experts.groups.NAME.key`. Raises KeyError for a key that is nobody's."""
    parts = key.split(".")
    if parts[:2] == ["experts", "groups"] and len(parts) > 2:
        parts[2] = "*"
    for length in range(len(parts), 0, -1):
        if (found := _REACH.get(".".join(parts[:length]))) is not None:
            return found
    raise KeyError(key)


def _renews(key: str, groups: frozenset[str]) -> frozenset[str]:
    match reach(key):
        case Reach.EXPERTS:
            return groups
        case Reach.ROUTERS:
            return frozenset((ROUTER,))
        case Reach.GROUP:
            return groups & {key.split(".")[2]}
    return frozenset()


def _groups(leaves: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(key.split(".")[2] for key in leaves if key.startswith("experts.groups."))


def _leaves(config: Config) -> dict[str, Any]:
    """Dotted key -> value. However a config spells its expert groups, each is here under its name."""
    leaves = {key: value for key, value in _walk(config, "") if key not in _SPELT_OTHERWISE}
    for group in config.experts.resolved():
        leaves |= _walk(group, f"experts.groups.{group.name}.")
    return leaves


def _walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in fields(tree):
        value = getattr(tree, f.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def wanted_after(wanted: Mapping[str, int], before: Config, after: Config) -> dict[str, int]:
    """Actors of each group (`router` included) under the new config: the number that it starts with where that is what
    was changed, else as many as were wanted, within the limits of now."""
    old = {name: kind.actors for name, kind in kinds_of(before).items()}
    counts: dict[str, int] = {}
    for name, kind in kinds_of(after).items():
        low, high = kind.actors_span
        count = wanted.get(name, kind.actors) if kind.actors == old.get(name) else kind.actors
        counts[name] = min(max(count, low), high)
    return counts


def kinds_of(config: Config) -> dict[str, ExpertGroupConfig | RouterConfig]:
    """Every group of actors by name, the routers' included."""
    return {**{group.name: group for group in config.experts.resolved()}, ROUTER: config.router}

"""What a new controller takes over from one that died: the actors that go on serving, and the placement they hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import reduce
from typing import Any

from moeray.actors.fleet_keeper import FleetKeeper
from moeray.actors.hosting import ActorHandle, call, kill
from moeray.actors.loop import Loop
from moeray.actors.orders import Orders, newest
from moeray.actors.placement_keeper import PlacementKeeper
from moeray.actors.roster import ROUTER, Actor, Calls, Roster
from moeray.actors.spec import ActorReport, DatedConfig
from moeray.config import Config, config_from
from moeray.control.fleet import Phase
from moeray.control.ledger import Books, newer
from moeray.control.placement import Placement
from moeray.control.update import compare
from moeray.errors import ConfigError, MoerayError
from moeray.settings.experts import ExpertGroupConfig
from moeray.types import Address, ExpertId

log = logging.getLogger(__name__)

DESCRIBE_S = 15.0


@dataclass(frozen=True)
class Found:
    """The running actors with what each says of itself; `dated` is the newest config that any of them holds."""

    token: bytes
    system: str
    revision: str | None
    actors: tuple[tuple[ActorHandle, Mapping[str, Any]], ...]
    dated: DatedConfig

    @property
    def books(self) -> Books | None:
        """The newest copy of what the last controller had counted."""
        return reduce(newer, (says.get("books") for _, says in self.actors), None)

    @property
    def orders(self) -> Orders | None:
        """What was wanted of the system at last."""
        return reduce(newest, (says.get("orders") for _, says in self.actors), None)

    def enter(self, roster: Roster, loop: Loop, fleet: FleetKeeper, places: PlacementKeeper) -> Placement:
        """Put the actors into the roster as ready, watch them, and hold the placement that they hold. What no placement
        names, since the change that mapped it died with its controller, is dropped."""
        kinds = {group.name: group for group in self.dated.config.experts.resolved()}
        for handle, says in self.actors:
            roster.add(_actor(handle, says, kinds, _config_of(says["started"], self.dated.config), loop))
        places.placement = placement_of([says for _, says in self.actors])
        for actor in roster:
            fleet.watchers.watch(actor)
        fleet.configure(self.dated)
        for actor in roster.routers():
            places.publish_to(actor)
        for handle, says in self.actors:
            hosted = [ExpertId(*expert) for expert in says.get("experts", ())]
            left = [e for e in hosted if handle.actor_id not in places.placement.replicas.get(e, ())]
            if left:
                places.unhost(handle.actor_id, left)
        return places.placement


def adopt(handles: Sequence[ActorHandle], dated: DatedConfig) -> Found | None:
    """Ask the actors that were found who they are. None where none serves; those that do not fit are ended.

    `dated` is the config that the new controller was made with: the one before it may have taken a newer one since.
    """
    ready = _ask(handles)
    if not ready:
        return None
    newest = max(ready, key=lambda pair: pair[1].get("epoch", 0))[1]
    held = _newest_config(dated, [says for _, says in ready if says["system"] == newest["system"]])
    groups = {group.name for group in held.config.experts.resolved()} | {ROUTER}
    ours = []
    for handle, says in ready:
        if says["system"] == newest["system"] and says["group"] in groups:
            ours.append((handle, says))
        else:
            kill(handle)
    return Found(newest["token"], newest["system"], newest["revision"], tuple(ours), held) if ours else None


def _newest_config(dated: DatedConfig, says: Sequence[Mapping[str, Any]]) -> DatedConfig:
    """The newest of a system's own configs; what is left of another system is not followed."""
    held = [DatedConfig(_config_of(row["config"], dated.config), row["since"]) for row in says]
    known = [each for each in held if not compare(dated.config, each.config).refused]
    return max([dated, *known], key=lambda each: each.since)


def _config_of(tree: Mapping[str, Any], otherwise: Config) -> Config:
    """`otherwise` for one that an earlier release took and this one does not."""
    try:
        return config_from(tree)
    except ConfigError as error:
        log.warning("the config of an actor that runs is not followed: %s", error)
        return otherwise


def _ask(handles: Sequence[ActorHandle]) -> list[tuple[ActorHandle, Mapping[str, Any]]]:
    """What each actor that serves says of itself; the others are ended."""
    futures = [(handle, call(handle, "describe")) for handle in handles]
    until = time.monotonic() + DESCRIBE_S
    said: list[tuple[ActorHandle, Mapping[str, Any]]] = []
    for handle, future in futures:
        try:
            says = future.result(timeout=max(0.0, until - time.monotonic()))
        except (MoerayError, FutureTimeoutError) as error:
            log.warning("actor %s does not say who it is, so it is ended: %s", handle.actor_id, error)
            kill(handle)
            continue
        if says["state"] == "ready":
            said.append((handle, says))
        else:
            kill(handle)
    return said


def placement_of(says: Sequence[Mapping[str, Any]]) -> Placement:
    """The newest placement that a router holds, less the actors that are gone; else what the experts host."""
    alive = {row["actor_id"] for row in says}
    held = [Placement.from_tree(row["placement"]) for row in says if row["kind"] == "router"]
    newest = max(held, key=lambda placement: placement.epoch, default=Placement())
    if newest.replicas:
        for actor_id in set(newest.actors()) - alive:
            newest = newest.without(actor_id)
        return newest
    replicas: dict[ExpertId, tuple[str, ...]] = {}
    for row in says:
        for layer, expert in row.get("experts", ()):
            key = ExpertId(layer, expert)
            replicas[key] = (*replicas.get(key, ()), row["actor_id"])
    return Placement(1, replicas) if replicas else Placement()


def _actor(
    handle: ActorHandle, says: Mapping[str, Any], kinds: Mapping[str, ExpertGroupConfig], started: Config, loop: Loop
) -> Actor:
    number = int(handle.actor_id.rpartition("-")[2])
    kind = kinds.get(says["group"]) if says["kind"] == "expert" else None
    return Actor(
        handle.actor_id, kind, number, started, Phase.READY, handle, Calls(handle, loop),
        ActorReport(handle.actor_id, says["node"], says["pid"], says["device"], says["free_bytes"]),
        Address(**says["address"]), dict(says.get("facts", {})),
    )  # fmt: skip

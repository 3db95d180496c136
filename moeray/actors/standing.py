"""How the system stands, and what would be done with it now: the controller's own state as plain data."""

from __future__ import annotations

from typing import Any

from moeray.actors.audit import Audit
from moeray.actors.autoscaler import Autoscaler, summary, wish_tree
from moeray.actors.placement_keeper import PlacementKeeper
from moeray.actors.roster import Roster
from moeray.config import Config
from moeray.control.fleet import Phase, reserve_of
from moeray.control.plan import plan_diff
from moeray.control.update import kinds_of


def standing(
    config: Config, roster: Roster, autoscaler: Autoscaler, places: PlacementKeeper, audit: Audit
) -> dict[str, Any]:
    """What is wanted and what is there; `skew`: layer -> max/mean of what its actors served of late."""
    placement, wanted = places.placement, autoscaler.wanted()
    ready = dict.fromkeys(wanted, 0)
    for actor in roster:
        if actor.group in ready:  # else its group has gone from the config, and it leaves
            ready[actor.group] += actor.phase is Phase.READY
    actors = sum(autoscaler.wish.actors.values())
    return {
        "epoch": placement.epoch,
        "wanted": wanted,
        "limits": {name: list(kind.actors_span) for name, kind in kinds_of(config).items()},
        "outdated": sorted(actor.actor_id for actor in roster if actor.outdated),
        "reserve": reserve_of(config),
        "ready": ready,
        "hot_experts": [[*expert, count] for expert, count in sorted(places.replicas.items())],
        "replicas": sum(len(held) for held in placement.replicas.values()),
        "without_replica": sum(not held for held in placement.replicas.values()),
        "without_spare": sum(len(held) < 2 for held in placement.replicas.values()),
        "fewest_replicas": min((len(held) for held in placement.replicas.values()), default=0),
        "replicas_wanted": min(config.experts.replicas, actors),
        "changing": places.change is not None,
        "autoscaling": not autoscaler.paused,
        "skew": {str(layer): round(value, 3) for layer, value in autoscaler.skews().items()},
        "decisions": list(audit.recent)[-10:],
        "audit_log": str(audit.path) if audit.path else None,
    }


def dry_run(autoscaler: Autoscaler, places: PlacementKeeper) -> dict[str, Any]:
    """What the policies want at this moment and which experts would be moved, with the reasons."""
    wish, seen = autoscaler.preview(places.placement)
    proposal = None if places.change is not None else places.propose()
    moves = None
    if proposal is not None:
        diff = plan_diff(places.placement, proposal.target)
        moves = {
            "kind": proposal.kind,
            "why": proposal.why,
            "moves": diff.moves,
            "host": {actor: [list(expert) for expert in held] for actor, held in diff.host.items()},
            "drop": {actor: [list(expert) for expert in held] for actor, held in diff.drop.items()},
        }
    return {
        "now": autoscaler.wanted(),
        "wish": wish_tree(wish),
        "shrink_votes": seen.settings.shrink_votes,
        "autoscaling": not autoscaler.paused,
        "placement": moves,
        "inputs": summary(seen),
    }

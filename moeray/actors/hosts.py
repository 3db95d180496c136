"""What each expert actor can hold and how much of the load it should take. A pure function of what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeray.actors.roster import BASE_BYTES, Actor
from moeray.control.placement import Host

_MEMORY_PART = 0.9
_ALIKE = 1.5
"""Actors of a group whose rates are within this factor of their mean count as equally fast: who has larger batches or
fewer neighbours on its cores is quicker per row, and to give it more rows for it would feed on itself."""
_RATE_STEP = 0.25
"""Other rates are rounded to this part of the mean, so that noise moves no expert."""


def hosts_of(actors: Sequence[Actor], trunk_bytes: Mapping[str, int], rates: Mapping[str, float]) -> list[Host]:
    """One host an actor. `trunk_bytes`: what the routers of a node take of its memory; `rates`: rows/s, where measured.

    CPU actors of one node map the same file: an expert that several of them host is in memory once, and together they
    are bounded by the node. A GPU's free bytes were read by each of its actors, which share them evenly.
    """
    shares = shares_of(actors, rates)
    hosts = []
    for actor in actors:
        assert actor.report is not None
        assert actor.kind is not None
        report, limit = actor.report, actor.kind.memory_gib
        own = (1 << 62) if limit is None else int(limit * 2**30)
        mates = [a for a in actors if a.report and (a.node_id, a.report.device) == (report.node_id, report.device)]
        if report.device == "cpu":
            free = max(a.report.free_bytes for a in mates if a.report)
            pool = int(_MEMORY_PART * (free - trunk_bytes.get(report.node_id, 0) - len(mates) * BASE_BYTES))
            hosts.append(
                Host(actor.actor_id, min(own, max(0, pool)), shares[actor.actor_id], report.node_id, "cpu",
                     report.node_id, max(0, pool))
            )  # fmt: skip
        else:
            room = int(_MEMORY_PART * report.free_bytes / len(mates))
            hosts.append(Host(actor.actor_id, min(own, room), shares[actor.actor_id], report.node_id, "cuda"))
    return hosts


def shares_of(actors: Sequence[Actor], rates: Mapping[str, float]) -> dict[str, float]:
    """How fast each actor is to the others: as measured where every group has rates, else the config's wish."""
    groups = {actor.group for actor in actors}
    known = {
        group: [rates[a.actor_id] for a in actors if a.group == group and rates.get(a.actor_id)] for group in groups
    }
    if not all(known.values()):
        sizes = {group: sum(a.group == group for a in actors) for group in groups}
        return {a.actor_id: a.kind.share / sizes[a.group] for a in actors if a.kind}
    means = {group: sum(values) / len(values) for group, values in known.items()}
    shares = {}
    for actor in actors:
        mean = means[actor.group]
        shares[actor.actor_id] = mean * _step(rates.get(actor.actor_id, mean) / mean)
    return shares


def _step(ratio: float) -> float:
    if 1 / _ALIKE <= ratio <= _ALIKE:
        return 1.0
    return max(_RATE_STEP, round(ratio / _RATE_STEP) * _RATE_STEP)

"""Hysteresis: grow at once, shrink only when several decisions in a row agree. Pure: the history comes in.

The idea is that of dask's `adaptive_core` (a worker goes after `wait_count` recommendations in a row).
"""

from __future__ import annotations

from collections.abc import Sequence

from moeray.control.policy import Wish
from moeray.types import ExpertId


def settle(current: Wish, wishes: Sequence[Wish], shrink_votes: int) -> Wish:
    """What to do now, given what is `current` and the `wishes` so far, oldest first.

    Each number (the actors of a group, the routers, the replicas of an expert) follows the newest wish upwards at once;
    downwards only when the last `shrink_votes` wishes all want less, and then to the largest of them. A group that a
    wish leaves out is to stay as it is; an expert that it leaves out wants no replicas beyond the base. The reasons
    are the newest wish's.
    """
    if not wishes:
        return current
    recent = wishes[-shrink_votes:]
    patient = len(recent) == shrink_votes
    actors = dict(current.actors)
    for group in {**current.actors, **wishes[-1].actors}:
        had = current.actors.get(group)
        actors[group] = _settle(had, [wish.actors.get(group, had) for wish in recent], patient)
    routers = None
    if current.routers is not None or wishes[-1].routers is not None:
        votes = [current.routers if wish.routers is None else wish.routers for wish in recent]
        routers = _settle(current.routers, votes, patient)
    replicas = {}
    for expert in {**current.replicas, **wishes[-1].replicas}:
        had, newest = current.replicas.get(expert, 0), wishes[-1].replicas.get(expert, 0)
        if settled := _shrunk(expert, had, recent) if newest < had and patient else max(had, newest):
            replicas[expert] = settled
    return Wish(actors, routers, replicas, wishes[-1].reasons)


def _shrunk(expert: ExpertId, had: int, recent: Sequence[Wish]) -> int:
    """Down to the largest of the votes. There are many experts and many votes, so the first against it is the last."""
    most = 0
    for wish in reversed(recent):
        vote = wish.replicas.get(expert, 0)
        if vote >= had:
            return had
        if vote > most:
            most = vote
    return most


def _settle(current: int | None, votes: Sequence[int | None], patient: bool) -> int:
    """`votes`, oldest first, None where a wish knew nothing of it and neither did the past."""
    known = [vote for vote in votes if vote is not None]
    newest = known[-1]
    if current is None or newest >= current:
        return newest
    return max(known) if patient and max(known) < current else current

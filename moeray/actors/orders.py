"""What is wanted of a system beyond its config, kept for a controller that comes after this one: by its actors, and by
the cluster, should all of them die with the controller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeray.control.policy import Wish
from moeray.types import ExpertId


@dataclass(frozen=True)
class Orders:
    """`wish`: what it was scaled to; `paused`: whether policies may scale it; `leaving`: actors that were told to go by
    hand, and by when (None: no hurry). `at` and these are unix seconds; orders of the same content are equal.
    `numbers`: group -> the number of its next actor, since no name is used twice."""

    at: float = field(compare=False)
    wish: Wish
    paused: bool
    leaving: Mapping[str, float | None]
    numbers: Mapping[str, int]


def newest(one: Orders | None, other: Orders | None) -> Orders | None:
    """The later ones, where there are any."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda orders: orders.at)


def encode(orders: Orders) -> bytes:
    """For `decode`, less the reasons of the wish."""
    wish = orders.wish
    tree = {
        "at": orders.at,
        "actors": dict(wish.actors),
        "routers": wish.routers,
        "replicas": [[*expert, count] for expert, count in sorted(wish.replicas.items())],
        "paused": orders.paused,
        "leaving": dict(orders.leaving),
        "numbers": dict(orders.numbers),
    }
    return json.dumps(tree).encode()


def decode(data: bytes) -> Orders:
    """Raises ValueError for what this release does not read."""
    try:
        tree = json.loads(data)
        replicas = {ExpertId(layer, expert): count for layer, expert, count in tree["replicas"]}
        wish = Wish(tree["actors"], tree["routers"], replicas)
        return Orders(tree["at"], wish, tree["paused"], tree["leaving"], tree["numbers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"these are no orders: {error!r}") from error

"""What is wanted of a system beyond its config, kept by its actors for a controller that comes after this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeray.control.policy import Wish


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

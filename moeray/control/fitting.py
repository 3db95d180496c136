"""As many replicas as are wished for, or as memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.errors import PlacementError
from moeray.types import ExpertId

_PARTS = (2, 4, 8)
"""Of the experts so many parts of one keep their spares where not all can."""


class Fit(NamedTuple):
    """`short`: why it has fewer replicas than were wished for; None where it has all."""

    placement: Placement
    short: PlacementError | None


def fit(
    load: Mapping[ExpertId, float], hosts: Sequence[Host], *, experts: Mapping[int, int], base: int,
    hot: Mapping[ExpertId, int], **how: Any,
) -> Fit:  # fmt: skip
    """`place` with `base` replicas of each expert and as many as `hot` says of some, but no more than there are hosts;
    with fewer where memory does not hold them, and with one of each at the least.

    `how`: what else `place` takes. Raises PlacementError where memory does not even hold these.
    """
    short: PlacementError | None = None
    for replicas in _ever_fewer(load, experts, max(1, min(base, len(hosts))), hot, len(hosts)):
        try:
            return Fit(place(load, hosts, experts=experts, replicas=replicas, **how), short)
        except PlacementError as error:
            short = short or error
    assert short is not None
    raise short


def _ever_fewer(
    load: Mapping[ExpertId, float], experts: Mapping[int, int], base: int, hot: Mapping[ExpertId, int], most: int
) -> Iterator[dict[ExpertId, int]]:
    """All of them; the base alone; that of the busier half alone, of a quarter, of an eighth; one of each."""
    every = [ExpertId(layer, expert) for layer, count in experts.items() for expert in range(count)]
    more = {expert: min(count, most) for expert, count in hot.items() if min(count, most) > base}
    yield dict.fromkeys(every, base) | more
    if more:
        yield dict.fromkeys(every, base)
    if base > 1:
        busiest = sorted(every, key=lambda expert: (-load.get(expert, 0.0), expert))
        for part in _PARTS:
            yield dict.fromkeys(every, 1) | dict.fromkeys(busiest[: len(busiest) // part], base)
        yield dict.fromkeys(every, 1)

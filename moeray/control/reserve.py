"""A floor that outlasts a lull: a part of what was busy in the last minutes, for the burst that comes next.

Load that comes in bursts is over before a policy that looks at the present has grown, and its first requests are
served by whatever was kept. How much that was worth keeping is told by the bursts before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeray.control.policy import ExpertActorView, PolicyInput, Wish


@dataclass
class Busiest:
    """The most actors of each group that were busy at once. Falling sequences of (moment, busy actors): whatever came
    before a higher one can never again be the most."""

    _falling: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)

    def note(self, experts: Sequence[ExpertActorView], now: float) -> None:
        """Count those that are busy now, each as the part of the time that it computes."""
        busy: dict[str, float] = {}
        for view in experts:
            busy[view.group] = busy.get(view.group, 0.0) + view.busy
        for group, count in busy.items():
            falling = self._falling.setdefault(group, deque())
            while falling and falling[-1][1] <= count:
                falling.pop()
            falling.append((now, count))

    def within(self, span_s: float, now: float) -> Mapping[str, float]:
        """Of each group, in the last `span_s`. Older ones are forgotten."""
        for falling in self._falling.values():
            while falling and falling[0][0] < now - span_s:
                falling.popleft()
        return {group: falling[0][1] for group, falling in self._falling.items() if falling}


def reserve(seen: PolicyInput) -> Wish:
    """At least the part `reserve` of the actors that were busy at once in the last `reserve_s`."""
    part = seen.settings.reserve
    if not part:
        return Wish()
    floors = {group: math.ceil(part * busy - 1e-9) for group, busy in seen.busiest.items() if group in seen.groups}
    return Wish(
        floors,
        reasons=tuple(
            f"group {group}: {floor} kept of {seen.busiest[group]:.1f} actors busy in the last "
            f"{seen.settings.reserve_s:.0f} s"
            for group, floor in floors.items()
            if floor == seen.groups[group].actors > seen.groups[group].min_actors
        ),
    )

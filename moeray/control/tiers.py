"""Groups of one device are a tier: load moves between them, so their need is counted together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput


def in_tiers(seen: PolicyInput, used: Mapping[str, float], factor: float) -> dict[str, int]:
    """`factor` times the actors of each group that are `used`, tier by tier (cuda or cpu)."""
    actors: dict[str, int] = {}
    for device in dict.fromkeys(limits.device for limits in seen.groups.values()):
        groups = {name: limits for name, limits in seen.groups.items() if limits.device == device}
        actors |= _tier(seen, groups, used, factor)
    return actors


def _tier(
    seen: PolicyInput, groups: Mapping[str, GroupLimits], used: Mapping[str, float], factor: float
) -> dict[str, int]:
    """The actors of the groups of one tier. Load moves between them, so their need is counted together: growth goes to
    the cheapest group, and what is too much goes from the dearest (per row, where rates are known).

    With one group this is ceil(factor * used).
    """
    views = by_group(seen)
    if not any(group in views for group in groups):
        return {}  # nobody reports, so nothing is known
    rates = {group: mean([view.rate for view in views.get(group, []) if view.rate > 0]) for group in groups}
    power = {group: rate if all(rates.values()) else 1.0 for group, rate in rates.items()}
    need = factor * sum(used[group] * power[group] for group in groups)
    short = need - sum(limits.actors * power[group] for group, limits in groups.items())
    wanted = {group: limits.actors for group, limits in groups.items()}
    cheapest = sorted(groups, key=lambda group: groups[group].price_per_hour / power[group])
    grow = short > 0
    for group in cheapest if grow else reversed(cheapest):
        limits = groups[group]
        steps = max(0, ceiled(short / power[group])) if grow else min(0, ceiled(short / power[group]))
        most = max(limits.actors, min(limits.max_actors, math.ceil(limits.actors * seen.settings.max_growth)))
        wanted[group] = max(limits.min_actors, min(most, limits.actors + steps))
        short -= (wanted[group] - limits.actors) * power[group]
    return wanted


def by_group(seen: PolicyInput) -> dict[str, list[ExpertActorView]]:
    views: dict[str, list[ExpertActorView]] = {}
    for view in seen.experts:
        views.setdefault(view.group, []).append(view)
    return views


def mean(values: list[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0


def ceiled(value: float) -> int:
    """0.6 + 0.6 over 0.6 is 2, whatever floats say."""
    return math.ceil(value - 1e-9)

"""The policies that are shipped. Each looks at a PolicyInput and says what it wants, and why."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from cronsim import CronSim

from moeray.control.hot_experts import hot_experts
from moeray.control.latency import latency
from moeray.control.policy import Policy, PolicyInput, Wish
from moeray.control.reserve import reserve
from moeray.control.tiers import by_group, ceiled, in_tiers
from moeray.settings.control import ScheduleConfig

KV_TARGET = 0.8
"""The part of a router's KV cache that is aimed at: above it, sequences are soon preempted."""


def target_utilisation(seen: PolicyInput) -> Wish:
    """As many actors as would each be busy for `target_utilisation` of the time, and as many routers as would each
    have `target_running` requests and not more than `KV_TARGET` of the KV cache in use.

    An actor cannot be busier than always, so busy actors alone do not say how much too few they are. Requests that wait
    at the routers do: they are counted as if they kept as many actors busy as those that run.
    """
    actors = in_tiers(seen, {group: _busy(seen, group) for group in seen.groups}, _backlog(seen) / _target(seen))
    reasons = [
        f"group {group}: {_busy(seen, group):.2f} actors busy, {_backlog(seen):.1f} times as many requests as run, "
        f"{count} wanted at {seen.settings.target_utilisation:.0%}"
        for group, count in actors.items()
        if count != seen.groups[group].actors
    ]
    routers = _routers(seen)
    if routers is not None and routers != seen.router_limits.actors:
        reasons.append(f"routers: {routers} wanted at {seen.settings.target_running} requests each")
    return Wish(actors, routers, reasons=tuple(reasons))


def _routers(seen: PolicyInput) -> int | None:
    if not seen.routers:
        return None
    requests = sum(router.load.running + router.load.waiting for router in seen.routers) / seen.settings.target_running
    cache = sum(router.load.kv_usage for router in seen.routers) / KV_TARGET
    return max(seen.router_limits.min_actors, ceiled(max(requests, cache)))


def _target(seen: PolicyInput) -> float:
    return seen.settings.target_utilisation


def _busy(seen: PolicyInput, group: str) -> float:
    return sum(view.busy for view in seen.experts if view.group == group)


def _backlog(seen: PolicyInput) -> float:
    """All requests at the routers, in units of those that run; 1 where none waits."""
    running = sum(router.load.running for router in seen.routers)
    waiting = sum(router.load.waiting for router in seen.routers)
    return 1 + waiting / max(running, 1.0)


def idle(seen: PolicyInput) -> Wish:
    """The minimum of everything once no row was served for `idle_s`. Before that, no opinion."""
    if seen.idle_s < seen.settings.idle_s:
        return Wish()
    least = {group: limits.min_actors for group, limits in seen.groups.items()}
    return Wish(least, seen.router_limits.min_actors, reasons=(f"idle for {seen.idle_s:.0f} s",))


def schedule(seen: PolicyInput) -> Wish:
    """A floor for each group (or `router`) of `control.schedule` while one of its time spans lasts."""
    actors: dict[str, int] = {}
    reasons = []
    for entry in seen.settings.schedule:
        if lasts(entry, seen.now):
            actors[entry.group] = max(actors.get(entry.group, 0), entry.actors)
            reasons.append(f"schedule {entry.cron!r}: {entry.group} at least {entry.actors}")
    routers = actors.pop("router", None)
    return Wish(actors, routers, reasons=tuple(reasons))


def lasts(entry: ScheduleConfig, now: float) -> bool:
    """Whether `now` (unix seconds) lies within `duration_s` of the last moment that `cron` names (UTC)."""
    second = math.floor(now) + 1  # the walk back starts before the given moment, and now itself counts
    fired = next(CronSim(entry.cron, datetime.fromtimestamp(second, UTC), reverse=True), None)
    return fired is not None and now - fired.timestamp() < entry.duration_s


def queue_wait(seen: PolicyInput) -> Wish:
    """More actors for a group whose worst p99 queue wait is above `slo_queue_wait_s`: in proportion, at least one more.

    The proportion is of those that take rows, so that those that are still starting count as part of the cure. Below
    the objective the policy has no opinion, since a short queue does not say how many actors would do.
    """
    actors: dict[str, int] = {}
    reasons = []
    slo = seen.settings.slo_queue_wait_s
    for group, views in by_group(seen).items():
        worst = max(view.queue_wait_p99_s for view in views)
        if group not in seen.groups or worst <= slo:
            continue
        actors[group] = max(len(views) + 1, math.ceil(len(views) * worst / slo))
        reasons.append(f"group {group}: p99 queue wait {worst:.3f} s is above {slo:g} s")
    return Wish(actors, reasons=tuple(reasons))


SHIPPED: dict[str, Policy] = {
    policy.__name__: policy
    for policy in (target_utilisation, latency, hot_experts, idle, schedule, queue_wait, reserve)
}

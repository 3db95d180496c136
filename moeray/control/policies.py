"""The policies that are shipped. Each looks at a PolicyInput and says what it wants, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from cronsim import CronSim

from moeray.control.eplb import replicate, skew_left
from moeray.control.policy import ExpertActorView, GroupLimits, Policy, PolicyInput, Wish
from moeray.control.reserve import reserve
from moeray.settings.control import ScheduleConfig
from moeray.types import ExpertId

LEAST_PART = 0.33
"""Expert actors that take a smaller part than this of what the trunk takes cannot shorten a step by much more."""
_TRUSTED = 100.0
"""Requests whose lateness weighs as much as what is expected without having seen any."""
_AIMS = (0.5, 1.35)
"""Between which multiples of `slo_aim` lateness moves what is aimed at."""
_IDLE = 0.1
"""Sequences at a router, in the mean over the window, below which it counts as idle."""

_FULL = 0.85
"""Busier than this on average, actors are a queue whose wait grows without bound: no shrink may lead there."""
_KEPT = 1.25
"""A layer without replicas has to be so many times as skewed as one with replicas to come before it, and so many times
the replicas needed are too many. What differs less is noise, and to follow it would move experts at every decision."""

KV_TARGET = 0.8
"""The part of a router's KV cache that is aimed at: above it, sequences are soon preempted."""


# -- target_utilisation -----------------------------------------------------------------------------------------------


def target_utilisation(seen: PolicyInput) -> Wish:
    """As many actors as would each be busy for `target_utilisation` of the time, and as many routers as would each
    have `target_running` requests and not more than `KV_TARGET` of the KV cache in use.

    An actor cannot be busier than always, so busy actors alone do not say how much too few they are. Requests that wait
    at the routers do: they are counted as if they kept as many actors busy as those that run.
    """
    actors = _in_tiers(seen, {group: _busy(seen, group) for group in seen.groups}, _backlog(seen) / _target(seen))
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
    return max(seen.router_limits.min_actors, _ceil(max(requests, cache)))


def _target(seen: PolicyInput) -> float:
    return seen.settings.target_utilisation


def _in_tiers(seen: PolicyInput, used: Mapping[str, float], factor: float) -> dict[str, int]:
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
    views = _by_group(seen)
    if not any(group in views for group in groups):
        return {}  # nobody reports, so nothing is known
    rates = {group: _mean([view.rate for view in views.get(group, []) if view.rate > 0]) for group in groups}
    power = {group: rate if all(rates.values()) else 1.0 for group, rate in rates.items()}
    need = factor * sum(used[group] * power[group] for group in groups)
    short = need - sum(limits.actors * power[group] for group, limits in groups.items())
    wanted = {group: limits.actors for group, limits in groups.items()}
    cheapest = sorted(groups, key=lambda group: groups[group].price_per_hour / power[group])
    grow = short > 0
    for group in cheapest if grow else reversed(cheapest):
        limits = groups[group]
        steps = max(0, _ceil(short / power[group])) if grow else min(0, _ceil(short / power[group]))
        most = max(limits.actors, min(limits.max_actors, math.ceil(limits.actors * seen.settings.max_growth)))
        wanted[group] = max(limits.min_actors, min(most, limits.actors + steps))
        short -= (wanted[group] - limits.actors) * power[group]
    return wanted


def _by_group(seen: PolicyInput) -> dict[str, list[ExpertActorView]]:
    views: dict[str, list[ExpertActorView]] = {}
    for view in seen.experts:
        views.setdefault(view.group, []).append(view)
    return views


def _busy(seen: PolicyInput, group: str) -> float:
    return sum(view.busy for view in seen.experts if view.group == group)


def _backlog(seen: PolicyInput) -> float:
    """All requests at the routers, in units of those that run; 1 where none waits."""
    running = sum(router.load.running for router in seen.routers)
    waiting = sum(router.load.waiting for router in seen.routers)
    return 1 + waiting / max(running, 1.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9)  # 0.6 + 0.6 over 0.6 is 2, whatever floats say


# -- latency ----------------------------------------------------------------------------------------------------------


def latency(seen: PolicyInput) -> Wish:
    """As many actors as keep the time to the first token within `slo_ttft_s` and that between tokens in `slo_tpot_s`.

    Prompt tokens that routers have still to compute are done at the pace that their prefills have now; a decoding
    sequence waits for its next token as it did for the last ones. Since load comes unevenly, both waits are aimed at a
    part of what is allowed: `slo_aim`, more while fewer requests are late than may be, less while more are. (Where
    routers cut prompts short to keep steps to `engine.step_s`, that is the wait between tokens aimed at.) Of them,
    only what waits for expert actors changes with their number, at best in inverse proportion: that part has to fit
    into what the trunk leaves. A growth that was too small is seen at the next decision; a shrink stops where those who
    stay would be busy for `_FULL` of the time, since waits rise faster there.
    Without work at the routers the minimum is wanted.
    """
    if seen.settings.slo_ttft_s is None and seen.settings.slo_tpot_s is None:
        return Wish()
    serving = {group: float(len(views)) for group, views in _by_group(seen).items()}
    used = {group: serving.get(group, 0.0) for group in seen.groups}
    behind = _behind_the_waits(seen, sum(serving.values()))
    factor, why = max([*_prompts(seen), *_tokens(seen)], default=(0.0, "no work at the routers"))
    if factor:
        busy = min(1.0, _mean([view.busy for view in seen.experts]) / _FULL)
        factor, why = max((behind * factor, why), (busy, "busy actors"))
    actors = _in_tiers(seen, used, factor)
    changed = any(count != seen.groups[group].actors for group, count in actors.items())
    return Wish(actors, reasons=(f"{why}: {factor:.2f} times the {sum(used.values()):.0f} actors",) if changed else ())


def _behind_the_waits(seen: PolicyInput, serving: float) -> float:
    """The part of those that serve for which those waits were waited for. Where many have just come, most waits are
    older than they are, and counting them in would have as many come again."""
    waited = max((router.load.actors for router in seen.routers), default=0.0)
    return min(1.0, waited / serving) if waited and serving else 1.0


def _prompts(seen: PolicyInput) -> Iterator[tuple[float, str]]:
    """By how much the actors are to be multiplied for the prompts of all routers together, and why.

    One long prompt takes its time on any number of actors; what they can help is a backlog.
    """
    slo = seen.settings.slo_ttft_s
    loads = [router.load for router in seen.routers if router.load.prefill_rate]
    if slo is not None and loads:
        rate = sum(load.prefill_rate for load in loads) / len(loads)
        wait_s = sum(router.load.pending_tokens for router in seen.routers) / rate / len(seen.routers)
        part = sum(load.expert_part for load in loads) / len(loads)
        yield _fit(wait_s, part, _aim(seen) * slo), f"{wait_s:.2f} s of prompts to compute"


def _tokens(seen: PolicyInput) -> Iterator[tuple[float, str]]:
    """The same for the tokens of all that run: a request's mean is kept, so it is the mean that counts."""
    slo = seen.settings.slo_tpot_s
    loads = [router.load for router in seen.routers if router.load.tpot_s and router.load.running > _IDLE]
    if slo is not None and loads:
        running = sum(load.running for load in loads)
        tpot_s = sum(load.running * load.tpot_s for load in loads) / running
        experts_s = sum(load.running * load.tpot_s * load.expert_part for load in loads) / running
        aim_s = _aim(seen) * slo if seen.step_s is None else min(seen.step_s, slo)
        yield _fit(tpot_s, experts_s / tpot_s, aim_s), f"{tpot_s:.3f} s between tokens"


def _aim(seen: PolicyInput) -> float:
    """The part of an objective that is aimed at, by the part of the requests that were late of late.

    Proportional control on a quantile: the root is between a jump at the first late request and none at all.
    """
    allowed = 1 - seen.settings.slo_attainment
    requests = sum(router.load.requests for router in seen.routers)
    late = sum(router.load.late for router in seen.routers)
    part = (late + allowed * _TRUSTED) / (requests + _TRUSTED)
    least, most = _AIMS
    return min(1.0, seen.settings.slo_aim * min(most, max(least, math.sqrt(allowed / part))))


def _fit(wait_s: float, expert_part: float, aim_s: float) -> float:
    """By how much the actors are to be multiplied to bring a wait to what is aimed at."""
    experts_s = expert_part * wait_s
    rest_s = wait_s - experts_s
    return experts_s / max(aim_s - rest_s, LEAST_PART * rest_s)


# -- hot_experts ------------------------------------------------------------------------------------------------------


def hot_experts(seen: PolicyInput) -> Wish:
    """More replicas for the experts with most load per replica, in layers whose max/mean per actor is above `max_skew`.

    Moving experts evens a layer out only down to its heaviest replica, so that is what is split: the fewest replicas
    with which no replica has more than `max_skew` times the mean actor's load. A layer is helped only if that can be
    reached, with the actors that there are and within `replica_budget` (a part of all experts, the most skewed layers
    first); else replicas would cost memory and change little. Replicas that there are and that do stay as they are.
    """
    budget = int(seen.settings.replica_budget * len(seen.placement.replicas))
    actors = len(seen.experts)
    layers: dict[int, dict[ExpertId, float]] = {}
    for expert in seen.placement.replicas:
        layers.setdefault(expert.layer, {})[expert] = seen.load.get(expert, 0.0)
    wanted: dict[ExpertId, int] = {}
    reasons = []
    # Judged with the base replicas: were it the present ones, a replica that helps would be given up for helping.
    skews = {layer: skew_left(load, dict.fromkeys(load, seen.base_replicas), actors) for layer, load in layers.items()}
    held = {layer: _held(layers[layer], seen) for layer, skew in skews.items() if skew > seen.settings.max_skew}
    rank = {layer: skews[layer] * (_KEPT if sum(counts.values()) > len(counts) * seen.base_replicas else 1.0)
            for layer, counts in held.items()}  # fmt: skip
    for layer in sorted(held, key=lambda layer: (-rank[layer], layer)):
        counts = _kept_or_split(layers[layer], held[layer], seen, budget)
        if counts is None:
            continue
        more = {expert: count for expert, count in counts.items() if count > seen.base_replicas}
        budget -= sum(more.values()) - seen.base_replicas * len(more)
        wanted |= more
        reasons.append(f"layer {layer}: replicas for {len(more)} hot experts, heaviest/mean is {skews[layer]:.2f}")
    return Wish(replicas=wanted, reasons=tuple(reasons))


def _held(load: Mapping[ExpertId, float], seen: PolicyInput) -> dict[ExpertId, int]:
    """The replicas that there are of a layer's experts."""
    return {expert: max(len(seen.placement.replicas[expert]), seen.base_replicas) for expert in load}


def _kept_or_split(
    load: Mapping[ExpertId, float], held: Mapping[ExpertId, int], seen: PolicyInput, budget: int
) -> Mapping[ExpertId, int] | None:
    """The replicas there are, if they do and not many fewer would, so that noise in the load moves nothing."""
    base = seen.base_replicas * len(load)
    split = _split(load, seen, budget)
    extra = sum(held.values()) - base
    fits = extra <= budget and skew_left(load, held, len(seen.experts)) <= seen.settings.max_skew * (1 + 1e-9)
    if fits and (split is None or extra <= _KEPT * (sum(split.values()) - base)):
        return held
    return split


def _split(load: Mapping[ExpertId, float], seen: PolicyInput, budget: int) -> dict[ExpertId, int] | None:
    """The fewest replicas that bring the layer down to `max_skew`; None where the budget or the actors do not do."""
    base, actors, aim = seen.base_replicas, len(seen.experts), seen.settings.max_skew
    counts = replicate(load, base * len(load) + budget, base=base, most=actors, max_skew=aim)
    return counts if skew_left(load, counts, actors) <= aim * (1 + 1e-9) else None


# -- idle, schedule, queue_wait ---------------------------------------------------------------------------------------


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
    for group, views in _by_group(seen).items():
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

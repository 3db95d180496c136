"""The policy of the time to the first token and of that between tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moeray.control.policy import PolicyInput, Wish
from moeray.control.tiers import by_group, in_tiers, mean

LEAST_PART = 0.2
"""Expert actors that take a smaller part than this of what the trunk takes cannot shorten a step by much more."""
_TRUSTED = 100.0
"""Requests whose lateness weighs as much as what is expected without having seen any."""
_AIMS = (0.7, 1.35)
"""Between which multiples of `slo_aim` lateness moves what is aimed at."""
_AIMED = 0.85
"""This part of the lateness that is allowed is aimed at: what is seen of it comes late."""
_IDLE = 0.1
"""Sequences at a router, in the mean over the window, below which it counts as idle."""
_FULL = 0.95
"""Busier than this on average, actors are a queue whose wait grows without bound: no shrink may lead there."""
_PACE = 0.92
"""Prompts may come this part as fast as routers compute them, for good: a fuller queue grows without bound."""
AHEAD_S = 900.0
"""Faster than that they may come for so long, before the wait for them is what is aimed at."""
_LEAST_PACE = 0.1
"""However long a backlog is to be worked off, prompts may come so fast."""


def latency(seen: PolicyInput) -> Wish:
    """As many actors as keep the time to the first token within `slo_ttft_s` and that between tokens in `slo_tpot_s`.

    Prompt tokens that routers have still to compute are done at the pace that their prefills have now; a decoding
    sequence waits for its next token as it did for the last ones. Since load comes unevenly, both waits are aimed at a
    part of what is allowed: `slo_aim`, more while fewer requests are late than may be, less while more are. (Where
    routers cut prompts short to keep to `slo_pace`, that is the wait between tokens aimed at.) Where prompts
    come faster than they are computed, the wait for them is aimed at before it is there. Of all this, only what waits
    for expert actors changes with their number, at best in inverse proportion: that part has to fit into what the trunk
    leaves. A growth that was too small is seen at the next decision; a shrink stops where those who stay would be busy
    for `_FULL` of the time, since waits rise faster there.
    Without work at the routers, and some seconds after the last, the minimum is wanted.
    """
    if seen.settings.slo_ttft_s is None and seen.settings.slo_tpot_s is None:
        return Wish()
    serving = {group: float(len(views)) for group, views in by_group(seen).items()}
    used = {group: serving.get(group, 0.0) for group in seen.groups}
    behind = _behind_the_waits(seen, sum(serving.values()))
    factor, why = max([*_prompts(seen), *_tokens(seen)], default=(0.0, "no work at the routers"))
    if factor:
        busy = min(1.0, mean([view.busy for view in seen.experts]) / _FULL)
        factor, why = max((behind * factor, why), (busy, "busy actors"))
    actors = in_tiers(seen, used, factor)
    changed = any(count != seen.groups[group].actors for group, count in actors.items())
    return Wish(actors, reasons=(f"{why}: {factor:.2f} times the {sum(used.values()):.0f} actors",) if changed else ())


def _behind_the_waits(seen: PolicyInput, serving: float) -> float:
    """The part of those that serve for which those waits were waited for. Where many have just come, most waits are
    older than they are, and counting them in would have as many come again."""
    waited = max((router.load.actors for router in seen.routers), default=0.0)
    return min(1.0, waited / serving) if waited and serving else 1.0


def _prompts(seen: PolicyInput) -> Iterator[tuple[float, str]]:
    """By how much the actors are to be multiplied for the prompts of all routers together, and why: for the backlog
    that there is, and for the one that there will be.

    One long prompt takes its time on any number of actors; what they can help is a backlog.
    """
    slo = seen.settings.slo_ttft_s
    loads = [router.load for router in seen.routers if router.load.prefill_rate]
    if slo is not None and loads:
        rate = mean([load.prefill_rate for load in loads])
        part = mean([load.expert_part for load in loads])
        wait_s = mean([router.load.pending_tokens for router in seen.routers]) / rate
        aim_s = _aim(seen) * slo
        yield _fit(wait_s, part, aim_s), f"{wait_s:.2f} s of prompts to compute"
        pace = mean([router.load.prompt_rate for router in seen.routers]) / rate
        most = max(_LEAST_PACE, _PACE + (aim_s - wait_s) / AHEAD_S)
        yield _fit(pace, part, most), f"prompts come at {pace:.2f} of the routers' pace"


def _tokens(seen: PolicyInput) -> Iterator[tuple[float, str]]:
    """The same for the tokens of all that run: a request's mean is kept, so it is the mean that counts."""
    slo = seen.settings.slo_tpot_s
    loads = [router.load for router in seen.routers if router.load.tpot_s and router.load.running > _IDLE]
    if slo is not None and loads:
        running = sum(load.running for load in loads)
        tpot_s = sum(load.running * load.tpot_s for load in loads) / running
        experts_s = sum(load.running * load.tpot_s * load.expert_part for load in loads) / running
        aim_s = (_aim(seen) if seen.settings.slo_pace is None else seen.settings.slo_pace) * slo
        yield _fit(tpot_s, experts_s / tpot_s, aim_s), f"{tpot_s:.3f} s between tokens"


def _aim(seen: PolicyInput) -> float:
    """The part of an objective that is aimed at, by the part of the requests that were late of late.

    Proportional control on a quantile: the root is between a jump at the first late request and none at all.
    """
    allowed = _AIMED * (1 - seen.settings.slo_attainment)
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

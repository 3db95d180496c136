"""How fast an added expert actor takes rows, and what adding and removing one costs the streams that run meanwhile."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from moeray.bench.environment import surroundings
from moeray.bench.traffic import System, Traffic
from moeray.errors import MoerayError
from moeray.types import GenerationRequest, SamplingParams

SETTLE_S = 120.0
POLL_S = 0.25
"""How often the system is looked at, a question to every actor. The first row's moment is the actor's own."""

Status = dict[str, Any]


@dataclass(frozen=True)
class GrowPlan:
    """`streams` requests at any time, each of `max_tokens` after `prompt_tokens`; `repeat` times up and down again.
    `window_s`: how long throughput is measured before and after each change."""

    streams: int = 16
    repeat: int = 5
    window_s: float = 5.0
    max_tokens: int = 256
    prompt_tokens: int = 16
    group: str = "experts"
    vocab: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """One actor added and removed again.

    `first_row_s`: from the call to the first row that the new actor had served; `shrink_s`: from the call until the
    actor that leaves had stopped. Ratios compare the tokens per second of a window with those before it: until the
    first row, until all had settled (the reserve filled up again), after that, and while the actor left. `noise_ratio`:
    the lowest tenth of windows before the call, as long as that until the first row, had no more: what such a window
    has where nothing happens. `lost_s`: of decoding, until the first row.
    """

    first_row_s: float
    lost_s: float
    noise_ratio: float
    settled_s: float
    shrink_s: float
    before: float
    grow_ratio: float
    settle_ratio: float
    after_ratio: float
    shrink_ratio: float


async def measure(
    system: System, plan: GrowPlan, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure on a system that has room for one more actor of the group, and whose autoscaling is off."""
    rng = random.Random(plan.seed)

    def request(stream: int, number: int) -> GenerationRequest:
        prompt = tuple(rng.randrange(3, plan.vocab) for _ in range(plan.prompt_tokens))
        sampling = SamplingParams(max_tokens=plan.max_tokens, temperature=0.0, ignore_eos=True)
        return GenerationRequest(f"grow-{stream}-{number}", prompt, sampling)

    rounds = []
    async with Traffic(system, request, plan.streams) as traffic:
        await until(system, lambda status: settled(status) and traffic.tokens >= 4 * plan.streams, SETTLE_S)
        for done in range(plan.repeat):
            report("rounds", done, plan.repeat)
            rounds.append(await _round(system, traffic, plan))
        report("rounds", plan.repeat, plan.repeat)
    return _result(plan, rounds, traffic)


async def _round(system: System, traffic: Traffic, plan: GrowPlan) -> Round:
    begin = time.time()
    await asyncio.sleep(plan.window_s)
    status = await system.status()
    count = status["wanted"][plan.group]
    known = _serving(status)
    grown = time.time()
    before = traffic.rate(begin, grown)
    await system.call("scale", {plan.group: count + 1})
    await asyncio.sleep(POLL_S)  # looking would cost what is measured
    status = await until(system, lambda status: _firsts(status, known, grown), SETTLE_S)
    first = min(_firsts(status, known, grown))
    await until(system, settled, SETTLE_S)
    calm = time.time()
    await asyncio.sleep(plan.window_s)
    shrunk = time.time()
    after = traffic.rate(calm, shrunk)
    await system.call("scale", {plan.group: count})
    await until(system, settled, SETTLE_S)
    gone = time.time()
    grow_ratio = traffic.rate(grown, first) / before
    return Round(
        first_row_s=first - grown,
        lost_s=(first - grown) * (1.0 - grow_ratio),
        noise_ratio=low_rate(traffic.rate, begin, grown, first - grown) / before,
        settled_s=calm - grown,
        shrink_s=gone - shrunk,
        before=before,
        grow_ratio=grow_ratio,
        settle_ratio=traffic.rate(grown, calm) / before,
        after_ratio=after / before,
        shrink_ratio=traffic.rate(shrunk, gone) / after,
    )


def low_rate(rate: Callable[[float, float], float], begin: float, end: float, length: float) -> float:
    """What a tenth of the windows of that length between two moments, one after the other, do not exceed."""
    length = min(length, end - begin)
    count = int((end - begin) / length)
    rates = sorted(rate(begin + n * length, begin + (n + 1) * length) for n in range(count))
    return rates[(count - 1) // 10]


def _serving(status: Status) -> set[str]:
    return {row["actor"] for row in status["actors"] if row["kind"] == "expert" and row["state"] == "ready"}


def _firsts(status: Status, known: set[str], since: float) -> list[float]:
    """When the expert actors that did not serve before have served their first row."""
    new = [row for row in status["actors"] if row["kind"] == "expert" and row["actor"] not in known]
    firsts = [row.get("first_row_at") for row in new]
    return [first for first in firsts if first is not None and first > since]


def _result(plan: GrowPlan, rounds: list[Round], traffic: Traffic) -> dict[str, Any]:
    """The figures as plain data: each one's median and worst."""
    rows = [asdict(each) for each in rounds]
    figures = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        worst = max if key.endswith("_s") else min
        figures[key] = {"median": statistics.median(values), "worst": worst(values)}
    return {
        "plan": asdict(plan), "figures": figures, "rounds": rows, "requests": traffic.requests,
        "lost_requests": len(traffic.errors), "errors": sorted(set(traffic.errors))[:5],
    } | surroundings()  # fmt: skip


async def until(system: System, what: Callable[[Status], Any], timeout: float) -> Status:
    """The status, as soon as `what` holds of it. Raises MoerayError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not what(status := await system.status()):
        if time.monotonic() > end:
            raise MoerayError(
                f"the system did not settle within {timeout:g} s: it wants {status['wanted']} actors and has "
                f"{status['ready']}; `moeray status` shows what it lacks"
            )
        await asyncio.sleep(POLL_S)
    return status


def settled(status: Status) -> bool:
    """As many actors as are wanted, the warm pool filled, nothing under way."""
    wanted = {group: count + status["reserve"].get(group, 0) for group, count in status["wanted"].items()}
    passing = any(row["state"] in ("pending", "starting", "silent", "draining") for row in status["actors"])
    return not status["changing"] and not passing and dict(status["ready"]) == wanted

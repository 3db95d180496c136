"""Growth under load: how soon a new replica serves, what decoding loses meanwhile, what requests a shrink loses."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeray.bench.environment import surroundings
from moeray.bench.traffic import System, Traffic
from moeray.errors import MoerayError
from moeray.types import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class GrowPlan:
    """`by`: how many actors of `group` are added; `window_s`: how long each decode rate is measured; `limit_s`: the
    longest wait for the first row, and for the shrink."""

    group: str = "experts"
    by: int = 1
    streams: int = 16
    prompt_tokens: int = 8
    max_tokens: int = 128
    window_s: float = 10.0
    limit_s: float = 120.0
    poll_s: float = 0.05
    seed: int = 0


Report = Callable[[str, int, int], None]


async def measure(
    system: System, plan: GrowPlan, vocab: int, report: Report = lambda what, done, total: None
) -> dict[str, Any]:
    """Rates are tokens per second over all streams: before the growth, from the command on, and once all is quiet."""
    count = (await system.status())["wanted"][plan.group]
    async with Traffic(system, _request_of(plan, vocab), plan.streams) as traffic:
        await asyncio.sleep(plan.window_s)  # everything is warm then
        marks = {"before": time.monotonic()}
        await asyncio.sleep(plan.window_s)
        report("scale up", 0, 1)
        marks["during"] = time.monotonic()
        first_row = await _grow(system, plan, count + plan.by)
        await asyncio.sleep(max(0.0, marks["during"] + plan.window_s - time.monotonic()))
        await _until(system, plan, _is_whole)
        marks["after"] = time.monotonic()
        await asyncio.sleep(plan.window_s)
        report("scale down", 1, 1)
        marks["shrinking"] = time.monotonic()
        await system.call("scale", plan.group, count)
        shrunk = await _until(system, plan, lambda status: status["wanted"][plan.group] == count and _is_whole(status))
        rates = {name: traffic.rate(at, at + plan.window_s) for name, at in marks.items() if name != "shrinking"}
    before = rates["before"] or 1.0
    return {
        "plan": asdict(plan), "first_row_seconds": first_row, "shrunk_seconds": shrunk,
        "tokens_per_second": rates, "during_ratio": rates["during"] / before, "after_ratio": rates["after"] / before,
        "requests": traffic.requests, "lost_requests": len(traffic.errors), "errors": sorted(set(traffic.errors))[:5],
    } | surroundings()  # fmt: skip


def _request_of(plan: GrowPlan, vocab: int) -> Callable[[int, int], GenerationRequest]:
    rng = random.Random(plan.seed)

    def request(stream: int, n: int) -> GenerationRequest:
        prompt = tuple(rng.randrange(3, vocab) for _ in range(plan.prompt_tokens))
        sampling = SamplingParams(max_tokens=plan.max_tokens, temperature=0.0, ignore_eos=True)
        return GenerationRequest(f"grow-{stream}-{n}", prompt, sampling)

    return request


def rows_of(status: Mapping[str, Any]) -> dict[str, int]:
    """Rows served so far by each expert actor that answers."""
    return {row["actor"]: row["rows_total"] for row in status["actors"] if row.get("rows_total") is not None}


async def _grow(system: System, plan: GrowPlan, count: int) -> float:
    """Seconds from the command until an actor that had served nothing has served a row. Raises MoerayError."""
    served = {actor for actor, rows in rows_of(await system.status()).items() if rows}
    began = time.monotonic()
    await system.call("scale", plan.group, count)
    took = await _until(system, plan, lambda status: any(
        rows for actor, rows in rows_of(status).items() if actor not in served
    ))  # fmt: skip
    if took is None:
        raise MoerayError(f"no new actor served a row within {plan.limit_s:g} s; `moeray status` shows what it lacks")
    return time.monotonic() - began


async def _until(system: System, plan: GrowPlan, holds: Callable[[Mapping[str, Any]], bool]) -> float | None:
    """Seconds until the status is so, None where it is not within the limit."""
    began = time.monotonic()
    while time.monotonic() < began + plan.limit_s:
        if holds(await system.status()):
            return time.monotonic() - began
        await asyncio.sleep(plan.poll_s)
    return None


def _is_whole(status: Mapping[str, Any]) -> bool:
    """As many actors as are wanted, the warm pool filled, nothing under way."""
    wanted = {group: count + status["reserve"].get(group, 0) for group, count in status["wanted"].items()}
    passing = any(row["state"] in ("starting", "silent", "draining") for row in status["actors"])
    return not status["changing"] and not passing and dict(status["ready"]) == wanted

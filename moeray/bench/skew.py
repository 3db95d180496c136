"""A hot expert: how soon the controller evens its layer out, what that takes, and whether it goes back and forth."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moeray.bench.checkpoint import Shape, Steering
from moeray.bench.environment import surroundings
from moeray.bench.traffic import System, Traffic
from moeray.types import ExpertId, GenerationRequest, SamplingParams

SHAPE = Shape(hidden=64, intermediate=128, experts=8, top_k=1, layers=2, vocab=1024, heads=4)
STEERING = Steering()


@dataclass(frozen=True)
class SkewPlan:
    """`hot`: the part of a skewed prompt's tokens that are steered to the hot expert; `aim`: the max/mean load of an
    actor that counts as even; `quiet_s`: how long the skewed load is held; `shrink_s`: the longest wait for replicas
    to go."""

    hot: float = 0.4
    streams: int = 8
    prompt_tokens: int = 192
    max_tokens: int = 2
    even_s: float = 20.0
    quiet_s: float = 300.0
    shrink_s: float = 180.0
    aim: float = 1.3
    poll_s: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """`at`: seconds since the phase began; `skew`: of the hot expert's layer; `hot`: replicas of each expert that is to
    have more than the others; `replicas`: of all experts; `epoch`: of the placement."""

    at: float
    skew: float
    hot: Mapping[ExpertId, int]
    replicas: int
    epoch: int


def settled_s(samples: Sequence[Sample], aim: float) -> float | None:
    """When the skew fell below `aim` for good: the first sample after the last that is not. None if it did not."""
    high = [i for i, sample in enumerate(samples) if sample.skew >= aim]
    if not samples or (high and high[-1] == len(samples) - 1):
        return None
    return samples[high[-1] + 1].at if high else 0.0


def reversals(samples: Sequence[Sample]) -> int:
    """How often the wished replicas of an expert change direction, over all experts."""
    experts = {expert for sample in samples for expert in sample.hot}
    return sum(_turns([sample.hot.get(expert, 0) for sample in samples]) for expert in experts)


def _turns(counts: Sequence[int]) -> int:
    steps = [b > a for a, b in itertools.pairwise(counts) if a != b]
    return sum(a != b for a, b in itertools.pairwise(steps))


async def measure(
    system: System, plan: SkewPlan, vocab: int, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """Even load, skewed load, even load again. Times in seconds."""
    traffic = _Prompts(plan, vocab)
    base = (await system.status())["replicas"]
    async with Traffic(system, traffic.request, plan.streams) as streams:
        even, _ = await _phase(system, "even load", plan.even_s, plan, report)
        traffic.hot = plan.hot
        skewed, part = await _phase(system, "skewed load", plan.quiet_s, plan, report)
        traffic.hot = 0.0
        after, _ = await _phase(
            system, "even load again", plan.shrink_s, plan, report, until=lambda sample: sample.replicas <= base
        )
    return {
        "plan": asdict(plan), "hot_part": part, "skew_before": even[-1].skew,
        "skew_highest": max(sample.skew for sample in skewed), "skew_last": skewed[-1].skew,
        "even_again_seconds": settled_s(skewed, plan.aim),
        "replicas_before": base, "replicas_most": max(sample.replicas for sample in skewed),
        "replicas_given": max(sample.hot.get(_hot_expert(), 1) for sample in skewed),
        "reversals": reversals(skewed), "placements": skewed[-1].epoch - skewed[0].epoch,
        "shrunk_seconds": after[-1].at if after[-1].replicas <= base else None,
        "requests": streams.requests, "lost_requests": len(streams.errors), "errors": sorted(set(streams.errors))[:5],
        "samples": [[phase, round(s.at, 1), s.skew, s.replicas]
                    for phase, some in (("even", even), ("skewed", skewed), ("after", after)) for s in some],
    } | surroundings()  # fmt: skip


def _hot_expert() -> ExpertId:
    return ExpertId(STEERING.layer, STEERING.expert)


class _Prompts:
    """Requests of random tokens; `hot` is the part of them that are steered to the hot expert."""

    def __init__(self, plan: SkewPlan, vocab: int) -> None:
        self._plan = plan
        self._vocab = vocab
        self._rng = random.Random(plan.seed)
        self.hot = 0.0

    def request(self, stream: int, n: int) -> GenerationRequest:
        prompt = tuple(self._token() for _ in range(self._plan.prompt_tokens))
        sampling = SamplingParams(max_tokens=self._plan.max_tokens, temperature=0.0, ignore_eos=True)
        return GenerationRequest(f"skew-{stream}-{n}", prompt, sampling)

    def _token(self) -> int:
        if self._rng.random() < self.hot:
            return self._rng.randrange(STEERING.tokens)
        return self._rng.randrange(STEERING.tokens, self._vocab)


async def _phase(
    system: System, name: str, seconds: float, plan: SkewPlan, report: Callable[[str, int, int], None],
    until: Callable[[Sample], bool] = lambda sample: False,
) -> tuple[list[Sample], float]:  # fmt: skip
    """Samples until the time is over or `until` holds, and the hot expert's part of its layer's rows in the phase."""
    before = await _rows(system)
    began, samples = time.monotonic(), list[Sample]()
    while not samples or (samples[-1].at < seconds and not until(samples[-1])):
        await asyncio.sleep(plan.poll_s)
        samples.append(_sample(await system.status(), time.monotonic() - began))
        report(name, min(int(samples[-1].at), int(seconds)), int(seconds))
    served = {expert: rows - before.get(expert, 0) for expert, rows in (await _rows(system)).items()}
    return samples, served.get(_hot_expert(), 0) / max(1, sum(served.values()))


async def _rows(system: System) -> dict[ExpertId, int]:
    """Rows so far of each expert of the hot layer."""
    load = await system.call("load")
    return {ExpertId(layer, expert): rows for layer, expert, rows in load if layer == STEERING.layer}


def _sample(status: Mapping[str, Any], at: float) -> Sample:
    hot = {ExpertId(layer, expert): count for layer, expert, count in status["hot_experts"]}
    skew = status["skew"].get(str(STEERING.layer), 1.0)
    return Sample(at, skew, hot, status["replicas"], status["epoch"])

"""Requests outlive their routers: whatever becomes of them, a stream goes on without a gap or a duplicate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from moeray.cluster.local import NODE
from moeray.serve.system import SystemBackend
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput
from tests.checkpoints import make_tiny
from tests.fleet import Fleet, FleetPort, generated
from tests.systems import tokens_of

LONG = 150

SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=LONG, temperature=0.0, ignore_eos=True),
    "seeded": SamplingParams(max_tokens=LONG, temperature=1.0, seed=11, ignore_eos=True),
    "narrow": SamplingParams(max_tokens=LONG, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=5),
    "penalties": SamplingParams(
        max_tokens=LONG,
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias=((40, 2.0),),
        ignore_eos=True,
    ),
    "logprobs": SamplingParams(max_tokens=LONG, temperature=0.9, seed=3, logprobs=3, ignore_eos=True),
    "ends by itself": SamplingParams(max_tokens=LONG, temperature=1.3, seed=8, stop_token_ids=(60, 61, 62, 63)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("deepseek_v3", tmp_path_factory.mktemp("resume") / "m")


def requests(names: Sequence[str] = tuple(SAMPLINGS)) -> list[GenerationRequest]:
    return [
        GenerationRequest(name, tuple((7 * i + 3 * place) % 300 + 6 for i in range(12 + 5 * place)), SAMPLINGS[name])
        for place, name in enumerate(SAMPLINGS)
        if name in names
    ]


@asynccontextmanager
async def backend_over(fleet: Fleet, port: FleetPort | None = None) -> AsyncIterator[SystemBackend]:
    backend = SystemBackend(fleet.config, port or FleetPort(fleet), NODE)
    backend.start()
    try:
        await backend.ready(60)
        yield backend
    finally:
        await backend.close()


@dataclass
class Streams:
    """Runs requests side by side; `disturb` is called once, when each of them has `after` tokens or its end."""

    backend: SystemBackend
    after: int
    disturb: Callable[[], object]

    async def run(self, asked: Sequence[GenerationRequest]) -> list[list[TokenOutput]]:
        left = {request.request_id for request in asked}
        due = asyncio.Event()

        async def one(request: GenerationRequest) -> list[TokenOutput]:
            outputs = []
            async for output in self.backend.generate(request):
                outputs.append(output)
                if len(outputs) >= self.after or output.finish_reason:
                    left.discard(request.request_id)
                if not left:
                    due.set()
            return outputs

        async def disturb() -> None:
            await due.wait()
            await asyncio.to_thread(self.disturb)

        *outputs, _ = await asyncio.gather(*map(one, asked), disturb())
        return outputs


def nothing() -> None:
    """The undisturbed run."""


@pytest.fixture(scope="module")
def undisturbed(model):
    async def run():
        async with backend_over(fleet) as backend:
            return await Streams(backend, 1, nothing).run(requests())

    with Fleet(model) as fleet:
        fleet.add_router()
        outputs = asyncio.run(run())
    assert outputs[-1][-1].finish_reason is FinishReason.STOP
    return {request.request_id: each for request, each in zip(requests(), outputs, strict=True)}


def assert_same(outputs: Sequence[TokenOutput], expected: Sequence[TokenOutput]) -> None:
    assert tokens_of(outputs) == tokens_of(expected)
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in expected]
    assert [o.cached_tokens for o in outputs] == [o.cached_tokens for o in expected]
    for one, other in zip(outputs, expected, strict=True):
        assert [p.logprob for p in one.logprobs] == pytest.approx([p.logprob for p in other.logprobs], abs=1e-3)
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert [lp for _, lp in mine.top] == pytest.approx([lp for _, lp in its.top], abs=1e-3)


def check_all(outputs, undisturbed):
    assert {each[-1].request_id for each in outputs} <= set(undisturbed)
    for each in outputs:
        assert_same(each, undisturbed[each[-1].request_id])


def test_a_router_that_dies_is_survived_by_its_streams(model, undisturbed):
    """The only router, and its replacement comes up later."""

    async def run():
        async with backend_over(fleet) as backend:
            outputs = await Streams(backend, 8, replace_router).run(requests())
            assert backend.state.status == "ready"
            return outputs

    def replace_router():
        fleet.kill(first)
        added.append(fleet.add_router())

    added = []
    with Fleet(model) as fleet:
        first = fleet.add_router()
        outputs = asyncio.run(run())
        assert generated(first) >= 5 * 8
        assert generated(added[0]) > 0
        assert generated(first) + generated(added[0]) >= sum(map(len, outputs))
    check_all(outputs, undisturbed)
    assert max(output.attempt for each in outputs for output in each) == 1


def test_again_and_again(model, undisturbed):
    """Each replacement dies in its turn, and the attempts are counted on."""

    async def run():
        async with backend_over(fleet) as backend:
            asked, parts = requests(["logprobs"])[0], []
            async for output in backend.generate(asked):
                parts.append(output)
                if len(parts) in (20, 60, 100):
                    await asyncio.to_thread(fleet.kill, fleet.routers[0])
                    await asyncio.to_thread(fleet.add_router)
            return parts

    with Fleet(model) as fleet:
        fleet.add_router()
        outputs = asyncio.run(run())
    assert_same(outputs, undisturbed["logprobs"])
    assert outputs[-1].attempt == 3

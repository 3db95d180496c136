"""Requests outlive their routers: whatever becomes of them, a stream goes on without a gap or a duplicate."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from moeray.cluster.local import NODE
from moeray.errors import QueueFullError, RouterLostError
from moeray.recorder import Recorder
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
    "ends by itself": SamplingParams(max_tokens=LONG, temperature=1.3, seed=8, stop_token_ids=(76,)),
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
async def backend_over(
    fleet: Fleet, port: FleetPort | None = None, recorder: Recorder | None = None
) -> AsyncIterator[SystemBackend]:
    backend = SystemBackend(fleet.config, port or FleetPort(fleet), NODE, recorder)
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
    on_output: Callable[[TokenOutput], object] = lambda output: None

    async def run(self, asked: Sequence[GenerationRequest]) -> list[list[TokenOutput]]:
        left = {request.request_id for request in asked}
        due = asyncio.Event()

        async def one(request: GenerationRequest) -> list[TokenOutput]:
            outputs = []
            async for output in self.backend.generate(request):
                outputs.append(output)
                self.on_output(output)
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
    recorder = Recorder()

    async def run():
        async with backend_over(fleet, recorder=recorder) as backend:
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
    assert recorder.read()[1]["moeray_requests_moved_total"] == {(): 3}


def test_the_survivor_takes_over(model, undisturbed):
    async def run():
        async with backend_over(fleet) as backend:
            return await Streams(backend, 8, lambda: fleet.kill(fleet.routers[0])).run(requests())

    with Fleet(model) as fleet:
        first, second = fleet.add_router(), fleet.add_router()
        outputs = asyncio.run(run())
        assert fleet.routers == [second]
        # Half of the requests each at first, then all of them.
        assert generated(first) >= 3 * 8
        assert generated(second) > generated(first)
    check_all(outputs, undisturbed)
    assert sorted(each[-1].attempt for each in outputs) == [0, 0, 0, 1, 1, 1]


def test_two_routers_share_the_requests(model):
    async def run():
        async with backend_over(fleet) as backend:
            asked = [GenerationRequest(f"r{i}", (5 + i, 9), SAMPLINGS["greedy"]) for i in range(8)]
            await Streams(backend, 1, nothing).run(asked)

    with Fleet(model) as fleet:
        routers = [fleet.add_router(), fleet.add_router()]
        asyncio.run(run())
        assert [generated(router) for router in routers] == [4 * LONG, 4 * LONG]


@pytest.mark.parametrize("migrate", [False, True])
def test_a_draining_router_is_left_without_an_error(model, undisturbed, migrate):
    """What it has begun it finishes, or hands over; new requests go to the other one."""

    async def run():
        async with backend_over(fleet) as backend:
            outputs = await Streams(backend, 8, drain).run(requests())
            again = [replace(request, request_id=request.request_id + " again") for request in requests()]
            return outputs, await Streams(backend, 1, nothing).run(again)

    def drain():
        drained.append(fleet.routers[0].drain(60.0, migrate))

    drained = []
    with Fleet(model) as fleet:
        first = fleet.add_router()
        fleet.add_router()
        outputs, later = asyncio.run(run())
        at_the_end = generated(first)
        assert at_the_end < 4 * LONG
    assert drained == [not migrate]
    check_all(outputs, undisturbed)
    assert max(each[-1].attempt for each in outputs) == int(migrate)
    assert [tokens_of(each) for each in later] == [tokens_of(each) for each in outputs]


def test_a_controller_that_does_not_answer_disturbs_nobody(model, undisturbed):
    """It is silent while a router dies; the other one takes over, and a router that comes later is found."""

    async def run():
        port = FleetPort(fleet)
        async with backend_over(fleet, port) as backend:

            def disturb():
                port.silent.set()
                fleet.kill(fleet.routers[0])

            outputs = await Streams(backend, 8, disturb).run(requests())
            await asyncio.wait_for(port.asked_in_vain.wait(), 20)
            assert backend.state.status == "ready"
            await asyncio.to_thread(fleet.kill, fleet.routers[0])
            late = asyncio.create_task(Streams(backend, 1, nothing).run(requests(["greedy"])))
            await asyncio.to_thread(fleet.add_router)
            port.silent.clear()
            return outputs + await late

    with Fleet(model) as fleet:
        fleet.add_router()
        fleet.add_router()
        outputs = asyncio.run(run())
    assert len(outputs) == len(SAMPLINGS) + 1
    check_all(outputs, undisturbed)


def test_without_a_router_a_request_waits_until_its_own_deadline(model):
    async def run():
        async with backend_over(fleet) as backend:
            stream = backend.generate(requests(["greedy"])[0])
            await anext(stream)
            await asyncio.to_thread(fleet.kill, fleet.routers[0])
            with pytest.raises(RouterLostError, match="request_timeout_s"):
                async for _ in stream:
                    pass
            assert backend.state.status == "waiting"
            assert "no router" in backend.state.detail
            assert backend.model is not None

    with Fleet(model, serve__request_timeout_s=1.0) as fleet:
        fleet.add_router()
        asyncio.run(run())


def test_the_figure_of_the_prefix_cache_is_the_first_attempt_s(model, undisturbed):
    async def run():
        async with backend_over(fleet) as backend:
            asked = requests(["ends by itself"])
            await Streams(backend, 1, nothing).run(asked)
            again = [replace(asked[0], request_id="again")]
            outputs = await Streams(backend, 8, replace_router).run(again)
            return outputs[0]

    def replace_router():
        fleet.kill(fleet.routers[0])
        fleet.add_router()

    with Fleet(model) as fleet:
        fleet.add_router()
        outputs = asyncio.run(run())
    assert outputs[-1].attempt == 1
    assert {output.cached_tokens for output in outputs} == {32}
    assert tokens_of(outputs) == tokens_of(undisturbed["ends by itself"])


def step_slowly(router, until):
    """A step takes 50 ms at least, until the event is set."""
    engine = router._loop._engine
    step = engine.step

    def slow_step():
        until.wait(0.05)
        return step()

    engine.step = slow_step


def test_a_full_router_is_passed_over_and_full_ones_refuse_only_what_is_new(model):
    """One runs and one waits in each router: the fifth request is refused, but one that had begun is not."""

    async def run():
        async with backend_over(fleet) as backend:
            asked = [GenerationRequest(f"r{i}", (5 + i, 9), SAMPLINGS["greedy"]) for i in range(4)]
            streams = [backend.generate(request) for request in asked]
            running = [await anext(streams[0]), await anext(streams[1])]
            waiting = [asyncio.create_task(anext(stream)) for stream in streams[2:]]
            while sum(router.status()["queue"] for router in fleet.routers) < 2:
                assert not any(task.done() for task in waiting), "the first ones ended before the others had come"
                await asyncio.sleep(0.01)  # a loop that never rests keeps the interpreter from the routers' threads
            with pytest.raises(QueueFullError):
                await anext(backend.generate(replace(asked[0], request_id="one too many")))
            await asyncio.to_thread(fleet.kill, fleet.routers[0])
            killed.set()
            parts = [[part] for part in running + list(await asyncio.gather(*waiting))]

            async def rest(stream, part):
                return part + [output async for output in stream]

            return await asyncio.gather(*map(rest, streams, parts))

    killed = threading.Event()
    with Fleet(model, engine__max_running=1, engine__max_waiting=1) as fleet:
        for _ in range(2):
            step_slowly(fleet.add_router(), killed)
        outputs = asyncio.run(run())
    assert [len(tokens_of(each)) for each in outputs] == [LONG] * 4
    assert sorted({output.attempt for each in outputs for output in each}) == [0, 1]


def test_a_stopped_process_that_wakes_is_fenced_and_a_killed_one_is_survived(model, undisturbed):
    """SIGSTOP, SIGCONT while its requests go on elsewhere, then SIGKILL in the middle of others."""

    async def run():
        async with backend_over(fleet, port) as backend:
            return await stopped_and_woken(backend), await killed(backend)

    async def stopped_and_woken(backend):
        moved = asyncio.Event()
        waking = asyncio.create_task(wake(moved))
        outputs = await Streams(backend, 8, stop, on_output=lambda o: o.attempt and moved.set()).run(requests())
        await waking
        return outputs

    async def wake(moved):
        await moved.wait()
        os.kill(process.pid, signal.SIGCONT)

    async def killed(backend):
        while backend._pool._routers[process.address].mending is not None:
            await backend._pool._changed.wait()
        return await Streams(backend, 8, process.kill).run(requests())

    def stop():
        os.kill(process.pid, signal.SIGSTOP)
        fleet.add_router()

    with Fleet(model) as fleet, fleet.router_process() as process:
        port = FleetPort(fleet)
        first, second = asyncio.run(run())
    assert process.address.actor_id in port.suspects
    check_all(first, undisturbed)
    assert {each[-1].attempt for each in first} == {1}
    assert [tokens_of(each) for each in second] == [tokens_of(each) for each in first]
    assert sorted(each[-1].attempt for each in second) == [0, 0, 0, 1, 1, 1]

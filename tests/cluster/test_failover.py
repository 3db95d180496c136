"""Deaths of real Ray actors in mid-stream: every request finishes, with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import ray

from moeray.bench.checkpoint import Shape, write_random_moe
from tests.cluster.live import Live, is_whole, kill, live_system
from tests.systems import tiny_config

SHAPE = Shape(hidden=64, intermediate=96, experts=8, top_k=2, layers=3, vocab=320, heads=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import torch

    return write_random_moe(SHAPE, tmp_path_factory.mktemp("failover") / "moe", torch.float32)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=8, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def system(model, tmp_path, **overrides):
    small = {
        "experts__num_cpus": 0.1, "router__num_cpus": 0.1, "wire__grpc": True,
        "control__audit_log": str(tmp_path / "audit.jsonl"),
    }  # fmt: skip
    return live_system(tiny_config(model, **small | overrides))


async def survives(live: Live, disturb) -> None:
    """The same tokens before, during and after the disturbance."""
    calm = await live.all_tokens()
    assert len({tuple(tokens) for tokens in calm}) == len(calm)
    assert await live.all_tokens(disturb) == calm
    await live.whole()
    assert await live.all_tokens() == calm


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_death_of_an_expert_actor(model, tmp_path, replicas, number):
    async def run():
        async with system(model, tmp_path, experts__replicas=replicas, control__warm_pool=1) as live:
            victim = (await live.rows("expert"))[0]
            await survives(live, lambda: kill(victim, number))
            assert victim["actor"] not in {row["actor"] for row in (await live.whole())["actors"]}

    asyncio.run(run())


def test_the_death_of_the_only_expert_actor(model, tmp_path):
    async def run():
        async with system(model, tmp_path, experts__actors=1) as live:
            victim = (await live.rows("expert"))[0]
            await survives(live, lambda: kill(victim))

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("routers", [1, 2])
def test_the_death_of_a_router(model, tmp_path, routers, number):
    async def run():
        async with system(model, tmp_path, router__actors=routers) as live:
            victims = await live.rows("router")
            await survives(live, lambda: [kill(row, number) for row in victims])

    asyncio.run(run())


def test_the_death_of_the_controller(model, tmp_path):
    async def run():
        async with system(model, tmp_path, experts__max_actors=3, experts__replicas=2) as live:
            await live.ask("scale", "experts", 3)
            before = await live.whole()
            pid = (await asyncio.wrap_future(live.controller.process.remote().future()))[1]
            await survives(live, lambda: os.kill(pid, signal.SIGKILL))
            after = await live.whole()
            assert {r["actor"]: r["pid"] for r in after["actors"]} == {r["actor"]: r["pid"] for r in before["actors"]}
            assert after["wanted"] == {"experts": 3, "router": 1}
            assert after["epoch"] >= before["epoch"]
            victim = (await live.rows("expert"))[0]
            await survives(live, lambda: kill(victim))  # and it mends as the first one did

    asyncio.run(run())


def test_everything_at_once(model, tmp_path):
    async def run():
        async with system(model, tmp_path, experts__replicas=2, experts__actors=3) as live:
            pid = (await asyncio.wrap_future(live.controller.process.remote().future()))[1]
            experts, routers = await live.rows("expert"), await live.rows("router")

            def disturb():
                os.kill(pid, signal.SIGKILL)
                kill(experts[0])
                kill(routers[0])

            await survives(live, disturb)

    asyncio.run(run())


def test_scaling_by_hand_while_requests_run(model, tmp_path):
    async def run():
        async with system(model, tmp_path, experts__max_actors=4, experts__min_actors=1, router__max_actors=2) as live:
            calm = await live.all_tokens()
            for group, count in (("experts", 4), ("router", 2), ("experts", 1), ("router", 1), ("experts", 2)):

                async def scale(group=group, count=count):
                    await live.ask("scale", group, count)

                assert await live.all_tokens(scale) == calm
                status = await live.until(lambda s, g=group, n=count: is_whole(s) and s["ready"][g] == n)
                assert await live.all_tokens() == calm
            assert status["fewest_replicas"] == 1

    asyncio.run(run())


def test_draining_an_actor_moves_its_experts_first(model, tmp_path):
    async def run():
        async with system(model, tmp_path) as live:
            for kind in ("expert", "router"):
                victim = (await live.rows(kind))[0]["actor"]

                async def drain(victim=victim):
                    await live.ask("drain", victim, 60.0)

                await survives(live, drain)
                status = await live.until(lambda s, v=victim: v not in {r["actor"] for r in s["actors"]})
                lost = [d for d in status["decisions"] if d["event"] == "lost"]
                assert not lost

    asyncio.run(run())

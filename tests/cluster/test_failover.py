"""Deaths of real Ray actors in mid-stream: every request finishes, with the tokens of an undisturbed run.

Two systems live through all of it, one after the other: the poorest (one replica, one router, a warm pool of one) and
one with a spare of everything, which computes the halves of each step at the same time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import pytest
import ray
import torch

from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.serve import ray_port
from tests.cluster.live import Live, is_whole, kill, live_system
from tests.scraping import samples, total
from tests.systems import tiny_config

pytestmark = pytest.mark.ray

SHAPE = Shape(hidden=64, intermediate=96, experts=8, top_k=2, layers=3, vocab=320, heads=4)
TOKENS = "moeray_generation_tokens_total"
POOR = {"control__warm_pool": 1, "experts__min_actors": 1, "experts__max_actors": 4, "router__max_actors": 2}
RICH = {"experts__replicas": 2, "router__actors": 2, "experts__max_actors": 3, "engine__overlap": "on"}


@pytest.fixture(scope="module")
def ray_here():
    system_config = {"metrics_report_interval_ms": 1000}
    ray.init(
        "local", num_cpus=8, log_to_driver=False, logging_level="ERROR", include_dashboard=False,
        _system_config=system_config,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=[POOR, RICH], ids=["poor", "rich"])
def running(request, ray_here, tmp_path_factory):
    """(a way to run a coroutine on the system's event loop, the system, its undisturbed tokens)"""
    folder = tmp_path_factory.mktemp("failover")
    model = write_random_moe(SHAPE, folder / "moe", torch.float32)
    config = tiny_config(
        model, experts__num_cpus=0.1, router__num_cpus=0.1, control__audit_log=str(folder / "audit.jsonl"),
        metrics__ray=True,
        serve__model_name=f"moe-{request.param_index}",
        **request.param,
    )  # fmt: skip
    with asyncio.Runner() as runner:
        context = live_system(config)
        live = runner.run(context.__aenter__())
        calm = runner.run(live.all_tokens())
        assert len({tuple(tokens) for tokens in calm}) == len(calm)
        yield runner.run, live, calm
        runner.run(context.__aexit__(None, None, None))


async def survives(live: Live, calm: list[list[int]], disturb) -> None:
    """The same tokens during and after the disturbance, and everything is there again in the end. What was counted
    before is counted still, throughout."""
    await live.scrape()
    assert await live.all_tokens(disturb) == calm
    await live.scrape()
    await live.whole()
    before = total(await live.scrape(), TOKENS)
    assert await live.all_tokens() == calm
    assert total(await live.scrape(), TOKENS) == before + sum(map(len, calm))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_the_death_of_an_expert_actor(running, number):
    run, live, calm = running
    victim = run(live.rows("expert"))[0]
    run(survives(live, calm, lambda: kill(victim, number)))
    # That it leaves is known with its next report, by which time all may have been answered.
    run(live.until(lambda status: victim["actor"] not in {row["actor"] for row in status["actors"]}))
    run(live.whole())


def test_a_scrape_does_not_wait_for_an_actor_that_hangs(running):
    run, live, _ = running
    victim = run(live.rows("expert"))[0]

    async def scrape_twice():
        while not total(await live.scrape(), "moeray_expert_rows_total", actor=victim["actor"]):
            pass  # what it has done was not told yet
        kill(victim, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(2):
            found = await live.scrape()
            assert total(found, "moeray_expert_rows_total", actor=victim["actor"]) > 0
        return time.monotonic() - began

    try:
        assert run(scrape_twice()) < 2.5  # a hung actor is given up after 3 s at the earliest
    finally:
        kill(victim)
    run(live.whole())


def test_the_death_of_every_expert_actor(running):
    run, live, calm = running
    victims = run(live.rows("expert")) + run(live.rows("expert", "warm"))
    run(survives(live, calm, lambda: [kill(row) for row in victims]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_death_of_every_router(running, number):
    run, live, calm = running
    victims = run(live.rows("router"))
    run(survives(live, calm, lambda: [kill(row, number) for row in victims]))


def test_the_death_of_the_controller(running):
    run, live, calm = running
    run(live.ask("scale", {"experts": 3}))
    before = run(live.whole())
    run(survives(live, calm, lambda: os.kill(before["controller"]["pid"], signal.SIGKILL)))
    after = run(live.whole())
    assert after["controller"]["pid"] != before["controller"]["pid"]
    assert {r["actor"]: r["pid"] for r in after["actors"]} == {r["actor"]: r["pid"] for r in before["actors"]}
    assert after["wanted"] == before["wanted"]
    assert after["epoch"] >= before["epoch"]
    victim = run(live.rows("expert"))[0]
    run(survives(live, calm, lambda: kill(victim)))  # and it mends as the first one did


def test_a_controller_that_hangs(running, monkeypatch):
    """Ray never notices: the endpoint has it ended, and what died meanwhile is mended."""
    run, live, calm = running
    monkeypatch.setattr(ray_port, "RENEW_TIMEOUT_S", 1.0)
    before = run(live.whole())
    victim = run(live.rows("expert"))[0]
    run(survives(live, calm, lambda: (os.kill(before["controller"]["pid"], signal.SIGSTOP), kill(victim))))
    after = run(live.whole())
    assert after["controller"]["pid"] != before["controller"]["pid"]
    assert after["wanted"] == before["wanted"]


def test_deaths_of_every_kind_at_once(running):
    run, live, calm = running
    controller = run(live.whole())["controller"]["pid"]
    victims = [run(live.rows("expert"))[0], run(live.rows("router"))[0]]
    run(survives(live, calm, lambda: [os.kill(controller, signal.SIGKILL), *map(kill, victims)]))


def test_scaling_by_hand_while_requests_run(running):
    run, live, calm = running
    before = run(live.whole())["wanted"]
    for group, count in (("experts", 3), ("experts", 2), ("router", 2)):

        async def scale(group=group, count=count):
            await live.ask("scale", {group: count})

        assert run(live.all_tokens(scale)) == calm
        run(live.until(lambda s, g=group, n=count: is_whole(s) and s["wanted"][g] == n))
        assert run(live.all_tokens()) == calm
    run(live.ask("scale", {"router": before["router"]}))
    run(live.whole())


@pytest.mark.parametrize("kind", ["expert", "router"])
def test_draining_an_actor_moves_its_work_first(running, kind):
    run, live, calm = running
    victim = run(live.rows(kind))[0]["actor"]
    run(survives(live, calm, lambda: live.ask("drain", [victim], 120.0)))
    status = run(live.until(lambda s: victim not in {row["actor"] for row in s["actors"]}))
    assert ("lost", victim) not in {(d["event"], d.get("actor")) for d in status["decisions"]}


def test_rays_agent_has_the_series_too_and_counts_nothing_twice(running):
    """Behind all these deaths: each controller tells what came on top of the one before it."""
    run, live, _ = running
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    name = live.backend.model.name

    async def repeated():
        async with httpx.AsyncClient(timeout=30.0) as http, asyncio.timeout(60):
            while True:
                found = samples((await http.get(url)).content)
                if any(sample == f"ray_{TOKENS}" and ("model_name", name) in labels for sample, labels in found):
                    return total(found, f"ray_{TOKENS}", model_name=name)

    assert 0 < run(repeated()) <= total(run(live.scrape()), TOKENS)


def test_the_death_of_the_controller_and_every_actor(running):
    """What they counted is gone, and what was wanted is not."""
    run, live, calm = running
    run(live.ask("scale", {"experts": 3}))
    run(live.ask("pause", True))
    before = run(live.whole())

    def kill_all():
        os.kill(before["controller"]["pid"], signal.SIGKILL)
        for row in before["actors"]:
            kill(row)

    assert run(live.all_tokens(kill_all)) == calm
    after = run(live.whole())
    assert not {row["pid"] for row in after["actors"]} & {row["pid"] for row in before["actors"]}
    assert after["wanted"] == before["wanted"]
    assert not after["autoscaling"]

"""The benchmarks of scaling, in short: what they compute from what they saw, and one small run of each."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from click.testing import CliRunner

from moeray.bench import grow, skew
from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.bench.plan import Problem, measure
from moeray.bench.skew import Sample, reversals, settled_s
from moeray.bench.traffic import Traffic
from moeray.cli.bench import command
from moeray.cli.session import local_system
from moeray.types import ExpertId, GenerationRequest, TokenOutput
from tests.systems import tiny_config

HOT, OTHER = ExpertId(0, 0), ExpertId(1, 3)


def samples(skews: list[float]) -> list[Sample]:
    return [Sample(float(at), value, {}, 16, 1) for at, value in enumerate(skews)]


@pytest.mark.parametrize(
    ("skews", "settled"),
    [
        ([], None),
        ([1.0, 1.1], 0.0),
        ([1.0, 2.0, 1.5, 1.2, 1.1], 3.0),
        ([1.0, 2.0, 1.2, 1.4, 1.1], 4.0),  # back above: that it was below before does not count
        ([1.0, 2.0, 1.2, 1.3], None),
    ],
)
def test_settled_is_the_last_time_that_the_skew_falls_below_the_aim(skews, settled):
    assert settled_s(samples(skews), 1.3) == settled


@pytest.mark.parametrize(
    ("counts", "turns"),
    [
        ([{}, {HOT: 2}, {HOT: 3}], 0),
        ([{}, {HOT: 2}, {}], 1),
        ([{}, {HOT: 2}, {}, {HOT: 2}], 2),
        ([{HOT: 2}, {HOT: 2, OTHER: 2}, {HOT: 2}, {}], 1),
        ([{HOT: 2}, {OTHER: 2}, {HOT: 2}], 2),  # as many replicas in all, and yet back and forth
    ],
)
def test_reversals_count_the_turns_of_every_expert(counts, turns):
    assert reversals([Sample(0.0, 1.0, hot, 16, 1) for hot in counts]) == turns


def test_planning_time_grows_with_the_experts_not_with_their_square():
    small, large = Problem(layers=8, experts=64, actors=100), Problem(layers=32, experts=64, actors=400)

    def cpu(problem: Problem) -> float:
        return sum(row["cpu_milliseconds"] for row in measure(problem, 3)["rows"])

    cpu(small)  # warm
    assert cpu(large) < 12 * cpu(small)  # 4 times as many experts and actors: 4 times as long, 16 if it were squared


def test_plan_prints_every_change_as_json():
    arguments = ["plan", "--layers", "2", "--experts", "8", "--actors", "4", "--repeat", "1", "--output", "json"]
    result = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    moves = {row["change"]: row["moves"] for row in result["rows"]}
    assert moves["from scratch"] >= 16
    assert moves["unchanged load"] == 0


@pytest.mark.slow
def test_a_hot_expert_is_given_replicas_and_its_layer_is_even_again(tmp_path):
    model = write_random_moe(skew.SHAPE, tmp_path / "moe", torch.float32, steering=skew.STEERING)
    config = tiny_config(
        model, experts__actors=4, engine__kv_blocks=1024, control__report_s=0.2, control__interval_s=0.4,
        control__window_s=2.0, control__shrink_votes=5, control__audit_log=str(tmp_path / "audit.jsonl"),
    )  # fmt: skip
    plan = skew.SkewPlan(even_s=3.0, quiet_s=20.0, shrink_s=60.0, poll_s=0.2)

    async def run():
        async with local_system(config) as system:
            return await skew.measure(system, plan, skew.SHAPE.vocab)

    figures = asyncio.run(run())
    assert 0.3 < figures["hot_part"] < 0.55
    assert figures["replicas_given"] >= 2
    assert figures["skew_last"] < figures["skew_highest"]
    assert figures["skew_last"] < 1.3
    assert figures["shrunk_seconds"] is not None
    assert figures["lost_requests"] == 0


def test_an_actor_that_is_added_under_load_serves_and_leaves_without_a_lost_request(tmp_path):
    shape = Shape(hidden=64, intermediate=96, experts=8, top_k=2, layers=2, vocab=320, heads=4)
    model = write_random_moe(shape, tmp_path / "moe", torch.float32)
    config = tiny_config(
        model, experts__max_actors=3, control__warm_pool=1, control__autoscale=False, control__report_s=0.2,
        control__audit_log=str(tmp_path / "audit.jsonl"),
    )  # fmt: skip
    plan = grow.GrowPlan(streams=4, repeat=2, max_tokens=16, window_s=1.0, vocab=shape.vocab)

    async def run():
        async with local_system(config) as system:
            figures = await grow.measure(system, plan)
            status = await system.status()
            return figures, status["wanted"]["experts"]

    figures, left = asyncio.run(run())
    assert len(figures["rounds"]) == 2
    assert set(figures["figures"]) == set(figures["rounds"][0])
    for each in figures["rounds"]:
        assert each["first_row_s"] > 0
        assert each["shrink_s"] > 0
        assert each["before"] > 0
        assert each["settle_ratio"] > 0
    assert figures["requests"] > 4
    assert figures["lost_requests"] == 0
    assert left == 2


@pytest.mark.parametrize(
    ("length", "low"),
    [(1.0, 5.0), (0.5, 5.0), (2.0, 7.5), (0.25, 5.0), (0.05, 5.0), (60.0, 9.5)],
)
def test_noise_is_what_the_lowest_tenth_of_windows_as_long_have(length, low):
    """10 tokens in each second, but in the fourth one 5."""

    def rate(begin, end):
        return 10.0 - 5.0 * max(0.0, min(end, 4.0) - max(begin, 3.0)) / (end - begin)

    assert grow.low_rate(rate, 0.0, 10.0, length) == pytest.approx(low)


def test_a_rate_counts_tokens_evenly_over_the_wait_for_them(monkeypatch):
    moments = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr("moeray.bench.traffic.time.time", lambda: next(moments))

    class Answers:
        async def generate(self, request):
            yield TokenOutput(request.request_id, 0, (1, 2, 3, 4))
            yield TokenOutput(request.request_id, 0, (5,))

    async def run():
        traffic = Traffic(Answers(), lambda stream, n: None, 1)
        await traffic._send(GenerationRequest("0", (1,)))
        return traffic

    traffic = asyncio.run(run())
    assert traffic.tokens == 5
    assert traffic.rate(0.0, 3.0) == pytest.approx(5 / 3)
    assert traffic.rate(1.0, 2.5) == pytest.approx(2.5 / 1.5)
    assert traffic.rate(5.0, 6.0) == 0.0

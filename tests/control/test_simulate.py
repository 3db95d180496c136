"""What must hold of any simulated run, whatever the figures."""

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from moeray.config import config_from
from moeray.control.comparison import compare, routers_for, token_bound
from moeray.control.cost import Costs, StepCosts, load_costs
from moeray.control.elastic import ElasticRun
from moeray.control.fixed import FixedRuns, best_static
from moeray.control.members import Members
from moeray.control.objectives import Objectives
from moeray.control.outcome import Slo
from moeray.control.popularity import MoeShape, PopularityModel, inclusion
from moeray.control.simulate import Engine
from moeray.control.tally import queue_wait
from moeray.control.trace import trace_of
from moeray.control.world import World
from moeray.errors import PlacementError, SimulationError
from moeray.settings.engine import LEAST_CHUNK, EngineConfig

SHAPE = MoeShape(4, 16, 4)
COSTS = Costs(trunk_tokens=(1, 2048), trunk_s=(0.002, 0.02), trunk_layers=4, row_s=5e-5, start_s=4, map_s=0.5)
ANY = Slo(math.inf, math.inf)


def waves(seconds=240, rate=8.0, depth=0.9, seed=0):
    """Poisson arrivals whose rate is a sine."""
    rng = np.random.default_rng(seed)
    rows = []
    for second in range(seconds):
        now = rate * (1 + depth * math.sin(2 * math.pi * second / 120))
        rows += [
            (second + x, int(rng.integers(20, 600)), int(rng.integers(1, 60))) for x in rng.random(rng.poisson(now))
        ]
    return trace_of("waves", rows)


def world(trace=None, *, most=24, routers=3, skew="uniform", **control):
    config = config_from(
        {
            "experts": {"actors": 2, "min_actors": 1, "max_actors": most},
            "router": {"actors": routers},
            "control": control,
        }
    )
    return World(waves() if trace is None else trace, config, COSTS, SHAPE, PopularityModel(skew, SHAPE, 0))


def test_a_pace_is_kept_to_the_objective_that_the_run_is_judged_by():
    """Bursts of short answers, whose first token may be late."""
    rows = [(60.0 * burst + 0.02 * i, 300, 12) for burst in range(4) for i in range(60)]
    slo = Slo(30.0, 0.06)
    plain, paced = world(trace_of("bursts", rows)), world(trace_of("bursts", rows), slo_pace=0.85)
    found = [
        compare(it, slo, slo_factor=2, warm_start=True, interval_s=30, seed=0, report=lambda *progress: None)
        for it in (plain, paced)
    ]
    assert found[0].slo == found[1].slo == slo
    assert found[1].elastic.p99.tpot_s < found[0].elastic.p99.tpot_s
    assert found[1].static.actor_hours <= found[0].static.actor_hours  # the best with and without


def test_as_many_routers_as_what_they_compute_keeps_half_busy():
    """Twice the load needs twice as many, and attention to long prompts more than their tokens alone."""
    config, costs = config_from({}), replace(COSTS, trunk_s=(0.02, 0.2))
    rows = [(0.1 * i, 3000, 50) for i in range(600)]
    needed = routers_for(trace_of("t", rows), config, costs, SHAPE)
    twice = routers_for(trace_of("t", [row for row in rows for _ in range(2)]), config, costs, SHAPE)
    seeing = replace(costs, prefill_context_s=1e-6)
    assert needed > 4
    assert abs(twice - 2 * needed) <= 1
    more = 2 * 600 * (seeing.prefill_context_s * 3000**2 / 2) / 60
    assert routers_for(trace_of("t", rows), config, seeing, SHAPE) == pytest.approx(needed + more, abs=1)
    assert routers_for(trace_of("t", [(0.0, 1, 1)]), config, costs, SHAPE) == 1


@pytest.fixture(scope="module")
def compared():
    return compare(world(), None, slo_factor=2, warm_start=True, interval_s=30, seed=0, report=lambda *progress: None)


@pytest.mark.parametrize(
    ("minutes", "rates", "bound"),
    [
        (1, [1], 0.0),
        (2, [1, 1], 0.0),
        (5, [1] * 5, 0.0),
        (2, [1, 3], 1 / 3),
        (3, [3, 0, 3], 1 / 3),
        (2.4, [1, 1, 1], 0.0),  # the last has 84 s
        (2.5, [1, 2, 4], 1 - (60 + 120 + 120) / 150 / (240 / 90)),
        (1.8, [1, 1], 0.0),
        (0.5, [4], 0.0),
    ],
)
def test_an_oracle_by_tokens_looks_at_what_was_observed(minutes, rates, bound):
    """`rates`: requests per second, minute by minute, of which so many minutes were looked at."""
    rows = [(60 * minute + i / rate, 99, 1) for minute, rate in enumerate(rates) for i in range(60 * rate)]
    seen = [row for row in rows if row[0] < 60 * minutes]
    trace = replace(trace_of("minutes", seen), duration_s=60 * minutes)
    assert token_bound(trace, 60) == pytest.approx(bound, abs=1e-9)


def test_a_lone_request_has_no_peak():
    assert token_bound(trace_of("one", [(0.0, 100, 3)]), 60) == pytest.approx(0.0)


def test_no_system_is_too_small_for_the_experts():
    it = world(most=6)
    experts = replace(it.config.experts, actors=2, min_actors=1, max_actors=6, replicas=2, memory_gib=0.5)
    half = replace(
        it, config=replace(it.config, experts=experts), expert_bytes=(1 << 29) // (SHAPE.layers * SHAPE.experts)
    )
    assert half.fewest_actors == 2
    assert replace(half, expert_bytes=half.expert_bytes * 2).fewest_actors == 4
    with pytest.raises(PlacementError, match="add nodes or actors"):
        _ = replace(half, expert_bytes=half.expert_bytes * 4).fewest_actors


@pytest.mark.parametrize("skew", ["uniform", "zipf", "shifting"])
def test_every_request_finishes_and_no_token_is_lost(skew):
    it = world(skew=skew)
    for outcome in (
        FixedRuns(it).run("static", FixedRuns(it).constant(4), ANY),
        ElasticRun(it, {"experts": 2}).run(ANY, lambda now: None),
    ):
        assert not np.isnan(outcome.latencies.last_s).any()
        assert (outcome.latencies.first_s > 0).all()
        assert (outcome.latencies.last_s >= outcome.latencies.first_s).all()
        ends = [s.at_s for s in outcome.curve[1:]] + [outcome.end_s]
        served = sum(s.served * (end - s.at_s) for s, end in zip(outcome.curve, ends, strict=True))
        assert served == pytest.approx(it.trace.prompt.sum() + it.trace.output.sum())


def test_actor_hours_are_the_integral_of_the_curve(compared):
    for outcome in compared.outcomes:
        curve, total = outcome.curve, 0.0
        for here, there in zip(curve, [*curve[1:], None], strict=True):
            total += here.actors * ((outcome.end_s if there is None else there.at_s) - here.at_s) / 3600
        assert outcome.actor_hours == pytest.approx(total)


def test_more_actors_never_raise_the_p99():
    runs = FixedRuns(world())
    p99s = [runs.run("", runs.constant(count), ANY).p99 for count in (1, 2, 4, 8, 16)]
    assert all(b.ttft_s <= a.ttft_s * 1.001 for a, b in itertools.pairwise(p99s))
    assert all(b.tpot_s <= a.tpot_s * 1.001 for a, b in itertools.pairwise(p99s))


def test_the_best_static_is_the_smallest_that_meets_the_slo():
    runs = FixedRuns(world())
    slo = Slo(1.0, 0.1)
    best = best_static(runs, slo)
    actors = best.curve[0].actors
    assert 1 < actors < 24
    assert best.attainment >= 0.99
    assert runs.static(actors - 1, slo) is None


def test_the_oracle_costs_least_and_static_and_oracle_meet_the_slo(compared):
    assert compared.static.attainment >= 0.99
    assert compared.oracle.attainment >= 0.99
    assert compared.oracle.actor_hours < compared.static.actor_hours


def test_an_slo_out_of_reach_says_so():
    with pytest.raises(SimulationError, match=r"24 actors.*raise --slo"):
        best_static(FixedRuns(world()), Slo(1e-4, 1e-4))


def test_a_seed_gives_the_same_run():
    runs = [ElasticRun(world(skew="zipf"), {"experts": 4}, seed=3).run(ANY, lambda now: None) for _ in range(2)]
    assert runs[0].curve == runs[1].curve
    assert (runs[0].latencies.last_s == runs[1].latencies.last_s).all()


def test_the_actors_grow_with_a_step_and_shrink_after_it():
    """Little, then much, then little load; growth is counted from the moment it is asked for."""
    rows = [(t, 300, 10) for t in np.arange(0, 100, 2.0)]
    rows += [(t, 300, 10) for t in np.arange(100, 200, 0.05)]
    rows += [(t, 300, 10) for t in np.arange(200, 500, 2.0)]
    outcome = ElasticRun(world(trace_of("step", rows)), {"experts": 2}).run(ANY, lambda now: None)
    at = {sample.at_s: sample for sample in outcome.curve}
    assert at[190].actors > 2 * at[98].actors
    assert at[490].actors < at[190].actors / 2
    growing = next(s for s in outcome.curve if s.at_s > 100 and s.actors > at[98].actors)
    assert growing.serving <= at[98].serving


def test_the_latency_policy_keeps_an_slo_with_fewer_actors_than_the_peak_needs():
    """Load that rises fortyfold within minutes, and goes again."""
    gaps = 0.05 * 40 ** np.abs(np.linspace(-1, 1, 3000))
    rows = [(t, 300, 10) for t in np.cumsum(gaps)]
    slo = Slo(6.0, 0.3)
    it = world(
        trace_of("wave", rows), policies=("latency", "hot_experts"), slo_ttft_s=6.0, slo_tpot_s=0.3, max_growth=4.0
    )
    static = best_static(FixedRuns(it), slo)
    outcome = ElasticRun(it, {"experts": static.curve[0].actors}).run(slo, lambda now: None)
    assert outcome.actor_hours < 0.8 * static.actor_hours
    assert outcome.attainment > 0.95
    assert outcome.reversals <= 12


def test_warm_actors_cost_from_the_start():
    cold = ElasticRun(world(), {"experts": 4}).run(ANY, lambda now: None)
    warm = ElasticRun(world(warm_pool=3), {"experts": 4}).run(ANY, lambda now: None)
    assert warm.curve[0].actors == cold.curve[0].actors + 3


def groups_world(**control):
    """The work of `fast` is the cheaper, an actor of `small`, where the warm pool is, the cheapest."""
    groups = [
        {"name": "fast", "actors": 2, "max_actors": 6, "price_per_hour": 2.0, "share": 9.0},
        {"name": "small", "actors": 2, "max_actors": 6, "price_per_hour": 0.5},
    ]
    config = config_from({"experts": {"groups": groups}, "router": {"actors": 2}, "control": control})
    return World(waves(20), config, COSTS, SHAPE, PopularityModel("uniform", SHAPE, 0))


def test_the_warm_pool_costs_what_the_cheapest_group_does():
    cold, warm = (
        ElasticRun(groups_world(warm_pool=count), {"fast": 2, "small": 2}).run(ANY, lambda now: None).curve[0]
        for count in (0, 3)
    )
    assert (warm.actors, warm.serving) == (cold.actors + 3, cold.serving)
    assert warm.price_per_hour == cold.price_per_hour + 3 * 0.5


def test_a_group_grows_out_of_its_own_warm_pool():
    members = Members(actors_per_node=8, start_s=5.0, reserve={"small": 2})
    members.start_ready("small", 1)
    members.step(0.0)
    assert (members.count("small"), len(members.serving(9.0)), len(members.victims("small", 9, 9.0))) == (1, 1, 1)
    members.grow("fast", 1, 9.0)
    assert [m.ready_at for m in members.members if m.group == "fast"] == [14.0]
    members.grow("small", 3, 9.0)
    assert sorted(m.ready_at for m in members.members if m.group == "small") == [0.0, 5.0, 5.0, 14.0]
    assert members.count("small") == 4
    members.step(9.0)
    assert sorted(m.ready_at for m in members.members if m.warm) == [14.0, 14.0]


@pytest.mark.parametrize(
    ("from_s", "most"),
    [(0, 2), (50, 6)],  # begun at 7:58:40 it is over before 8; at 7:59:30 it is not
)
def test_schedules_go_by_the_clock_of_the_trace(from_s, most):
    schedule = [{"cron": "0 8 * * *", "actors": 6, "duration_s": 3600}]
    dated = replace(waves(120), began_at=datetime(2026, 3, 4, 7, 58, 40, tzinfo=UTC).timestamp())
    it = world(dated.window(from_s, 60), policies=("schedule",), schedule=schedule)
    curve = ElasticRun(it, {"experts": 2}).run(ANY, lambda now: None).curve
    assert max(sample.actors for sample in curve if sample.at_s < 60) == most


def test_memory_bounds_the_smallest_system():
    config = config_from({"experts": {"actors": 1, "max_actors": 8, "memory_gib": 1}, "router": {"actors": 3}})
    size = 2**30 // 16  # 64 experts of this size need 4 actors
    it = World(waves(), config, COSTS, SHAPE, PopularityModel("uniform", SHAPE, 0), expert_bytes=size)
    assert best_static(FixedRuns(it), Slo(1e6, 1e6)).curve[0].actors == 4


def test_no_router_takes_more_than_max_running_and_steps_keep_the_token_budget():
    trace = trace_of("burst", [(0.0, 100, 50)] * 40)
    engine_config = EngineConfig(max_running=8, max_batch_tokens=64, prefill_chunk=32)
    costs = StepCosts(COSTS, SHAPE, 64)
    it = world(trace)
    placement = it.settled_placement(it.hosts(2), it.hindsight.load)
    engine = Engine(trace, engine_config, costs, it_table(costs, it, placement), 1)
    most = 0
    while not engine.done:
        engine.advance(engine.now + 0.01)
        (router,) = engine.routers
        most = max(most, len(router.prefills) + len(router.decodes))
        assert router.tokens <= 64
    assert most == 8
    assert engine.prompt_tokens == 40 * 100
    assert engine.generation_tokens == 40 * 50


def test_steps_beside_decodes_are_cut_to_last_no_longer():
    """As `engine.pace` does it; what is cut costs throughput, and no token."""
    trace = trace_of("mixed", [(0.0, 4, 400)] * 4 + [(0.5, 500, 2)] * 4)
    it = world(trace)
    costs = StepCosts(COSTS, SHAPE, 256)
    table = it_table(costs, it, it.settled_placement(it.hosts(2), it.hindsight.load))
    longest, ends = {}, {}
    for step_s in (None, 0.05):
        engine = Engine(trace, EngineConfig(max_batch_tokens=256), costs, table, 1, Objectives(step_s=step_s))
        longest[step_s] = 0.0
        while not engine.done:
            engine.advance(engine.now + 0.01)
            (router,) = engine.routers
            if router.decodes and router.tokens > len(router.decodes) + LEAST_CHUNK:
                longest[step_s] = max(longest[step_s], router.step_s)
        assert engine.prompt_tokens == trace.prompt.sum()
        ends[step_s] = engine.now
    assert longest[0.05] <= 0.05 < longest[None]
    assert ends[0.05] >= ends[None]


def test_a_placement_is_in_force_within_a_step_and_work_is_counted_as_it_is_done():
    """A step of which a half is done when the actors become four times as fast."""
    trace = trace_of("one", [(0.0, 64, 1)])
    costs = StepCosts(replace(COSTS, trunk_s=(0.0,) * len(COSTS.trunk_s), hop_s=0.0, hop_row_s=0.0), SHAPE, 64)
    it = world(trace)
    placement = it.settled_placement(it.hosts(2), it.hindsight.load)
    slow, fast = (
        costs.table(placement, it.popularity.of_epoch(0), {host.actor_id: speed for host in it.hosts(2)})
        for speed in (1.0, 4.0)
    )
    engine = Engine(trace, EngineConfig(max_running=8, max_batch_tokens=64), costs, slow, 1)
    whole = slow.slowest_s[64]
    engine.advance(whole / 2)
    assert sum(engine.steps_by_tokens) == pytest.approx(0.5)
    engine.publish(fast)
    engine.advance(math.inf)
    assert sum(engine.steps_by_tokens) == pytest.approx(1)
    assert engine.latencies().first_s[0] == pytest.approx(whole / 2 + whole / 8)


def test_the_oracle_needs_nobody_where_nothing_comes():
    busy = [(0.2 * i, 300, 20) for i in range(150)]
    quiet = world(trace_of("pause", [*busy, *((300 + at, prompt, output) for at, prompt, output in busy)]))
    result = compare(quiet, None, slo_factor=2, warm_start=True, interval_s=30, seed=0, report=lambda *progress: None)
    pause = [sample.actors for sample in result.oracle.curve if 90 <= sample.at_s < 270]
    assert pause
    assert set(pause) == {quiet.fewest_actors}
    assert result.oracle.attainment >= 0.99


def it_table(costs, it, placement):
    return costs.table(placement, it.popularity.of_epoch(0), {host.actor_id: 1.0 for host in it.hosts(2)})


def test_a_lone_request_takes_what_its_steps_take():
    """One prompt of 100 tokens and 3 answers, on an idle system: a prefill step and two decode steps."""
    it = world(trace_of("one", [(0.0, 100, 3)]))
    outcome = FixedRuns(it).run("", FixedRuns(it).constant(4), ANY)
    costs, hosts = it.step_costs, it.hosts(4)
    table = it.table_of(it.settled_placement(hosts, it.hindsight.load), hosts, 0)
    prefill = costs.trunk_s[100] + table.slowest_s[100]
    decode = costs.trunk_s[1] + costs.decode_s + table.slowest_s[1]
    assert outcome.latencies.first_s[0] == pytest.approx(prefill)
    assert outcome.latencies.last_s[0] == pytest.approx(prefill + 2 * decode)


def test_attention_takes_its_time_for_each_token_that_is_seen():
    """A prompt of 128 tokens in two steps, whose second half sees the first one too, and 200 answers after it."""
    it = world(trace_of("one", [(0.0, 128, 201)]))
    placement = it.settled_placement(it.hosts(2), it.hindsight.load)

    def run(costs):
        costs = StepCosts(costs, SHAPE, 64)
        engine = Engine(it.trace, EngineConfig(max_batch_tokens=64), costs, it_table(costs, it, placement), 1)
        engine.advance(math.inf)
        return engine.latencies()

    blind, seeing = run(COSTS), run(replace(COSTS, decode_context_s=3e-6, prefill_context_s=5e-7))
    first_s = 5e-7 * 128**2 / 2
    assert seeing.first_s - blind.first_s == pytest.approx(first_s)
    assert seeing.last_s - blind.last_s == pytest.approx(first_s + 3e-6 * sum(range(128, 328)))


def test_a_large_system_is_simulated():
    """61 layers of 256 experts on 1,000 actors."""
    shape = MoeShape(61, 256, 8)
    config = config_from({"experts": {"actors": 1000, "min_actors": 1, "max_actors": 1000}, "router": {"actors": 4}})
    it = World(waves(20, 2), config, Costs(), shape, PopularityModel("zipf", shape, 0))
    outcome = ElasticRun(it, {"experts": 1000}).run(ANY, lambda now: None)
    assert outcome.curve[0].actors == 1000
    assert not np.isnan(outcome.latencies.last_s).any()


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_a_token_chooses_an_expert_once(top_k):
    chosen = inclusion(1 / np.arange(1, 17), top_k)
    assert chosen.sum() == pytest.approx(top_k)
    assert chosen.max() <= 1
    assert (np.diff(chosen) <= 1e-12).all()


def test_shifting_popularity_shifts_and_the_others_do_not():
    for skew, same in (("uniform", True), ("zipf", True), ("shifting", False)):
        model = PopularityModel(skew, SHAPE, 0)
        late = model.of_epoch(model.epoch_at(600))
        assert np.allclose(model.of_epoch(0).chosen_LE, late.chosen_LE) is same


def test_leavers_empty_whole_nodes():
    members = Members(actors_per_node=4, start_s=1)
    members.start_ready("g", 10)
    assert members.nodes() == 3
    leaving = members.victims("g", 2, 5.0)
    assert {m.node for m in leaving} == {2}
    members.leave(leaving, 6.0)
    members.step(6.0)
    assert members.nodes() == 2


@pytest.mark.parametrize(
    ("busy", "expected"), [(0.0, 0.0), (0.01, 0.0), (0.5, 2 * math.log(50)), (0.9, 10 * math.log(90))]
)
def test_queue_wait_is_that_of_an_mm1_queue(busy, expected):
    assert queue_wait(1.0, busy, 1000, 0.99) == pytest.approx(expected, abs=1e-9)


def test_a_forward_waits_for_one_of_each_other_router_at_most():
    assert queue_wait(0.5, 0.999, 3, 0.99) == 1.5
    assert queue_wait(0.5, 0.999, 0, 0.99) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "is not JSON"),
        ("{}", "has no `costs`"),
        ('{"costs": {"row": 1}}', "unknown key costs.row"),
        ('{"costs": {"row_s": -1}}', "costs.row_s must be 0 or more"),
        ('{"costs": {"trunk_tokens": [1, 2], "trunk_s": [1]}}', "as many as"),
        ('{"costs": {"trunk_layers": 0}}', "costs.trunk_layers must be 1 or more"),
        (
            '{"costs": {"trunk_s": [0, 0, 0, 1], "hop_s": 0, "hop_row_s": 0, "forward_s": 0, "row_s": 0, '
            '"expert_s": 0}}',
            "a step of one token must take time",
        ),
    ],
)
def test_a_wrong_cost_file_is_named(tmp_path, text, message):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(SimulationError, match=r"costs.json") as raised:
        load_costs(path)
    assert message in str(raised.value)


def test_the_first_step_after_a_rest_is_longer_and_every_token_has_a_way_to_go():
    """Two requests far apart find the router at rest; only the first of a request's steps wakes it."""
    trace = trace_of("apart", [(0.0, 8, 5), (100.0, 8, 5)])
    it = world(trace)
    placement = it.settled_placement(it.hosts(2), it.hindsight.load)

    def latencies(costs):
        step_costs = StepCosts(costs, SHAPE, 64)
        engine = Engine(trace, EngineConfig(max_batch_tokens=64), step_costs, it_table(step_costs, it, placement), 1)
        engine.advance(math.inf)
        return engine.latencies()

    plain, slower = latencies(COSTS), latencies(replace(COSTS, request_s=0.25, wake_s=0.5))
    assert slower.first_s - plain.first_s == pytest.approx([0.75, 0.75])
    assert slower.last_s - plain.last_s == pytest.approx([0.75, 0.75])

"""How many of a trace's requests keep a simulated machine busy for half of the time."""

import pytest

from moeray.bench.sizing import HALF_BUSY, busy_part, fitting_scale, starting_table
from moeray.config import config_from
from moeray.control.cost import Costs
from moeray.control.popularity import MoeShape, PopularityModel
from moeray.control.trace import trace_of
from moeray.control.world import World

SHAPE = MoeShape(4, 16, 4)


def world(requests, each_s, *, routers=1, slower=1.0):
    trace = trace_of("t", [(i * each_s, 50 + 7 * i % 400, 5 + i % 60) for i in range(requests)])
    config = config_from({"experts": {"actors": 2}, "router": {"actors": routers}})
    costs = Costs(trunk_tokens=(1, 2048), trunk_s=(0.002 * slower, 0.02 * slower), trunk_layers=4)
    return World(trace, config, costs, SHAPE, PopularityModel("uniform", SHAPE, 0))


@pytest.mark.parametrize(
    "it",
    [world(200, 0.1), world(200, 2.0), world(3000, 0.02), world(400, 0.1, routers=3), world(2000, 0.1, slower=5.0)],
    ids=["now and then", "seldom", "many", "three routers", "slow"],
)
def test_the_routers_compute_for_half_of_the_time(it):
    assert busy_part(it, starting_table(it), fitting_scale(it)) == pytest.approx(HALF_BUSY, abs=0.07)


def test_a_machine_that_is_slower_gets_fewer_requests():
    assert fitting_scale(world(2000, 0.1, slower=5.0)) < fitting_scale(world(2000, 0.1)) / 2


def test_some_requests_are_left_on_the_slowest_machine_and_a_short_trace_is_not_repeated_for_ever():
    assert len(world(500, 0.1).trace.scaled(fitting_scale(world(500, 0.1, slower=1e4)))) >= 20
    assert fitting_scale(world(1, 1.0)) <= 64

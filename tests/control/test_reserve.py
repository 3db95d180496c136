from dataclasses import replace

import pytest

from moeray.control.placement import Placement
from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput, Wish
from moeray.control.reserve import Busiest, reserve
from moeray.settings.control import ControlConfig


def views(**busy):
    return [
        ExpertActorView(f"{group}-{i}", group, "n0", b) for group, parts in busy.items() for i, b in enumerate(parts)
    ]


def seen(busiest, part):
    return PolicyInput(
        now=0.0, idle_s=0.0, load={}, peak={}, experts=(), routers=(), placement=Placement(),
        groups={"a": GroupLimits(8, 1, 20)}, router_limits=GroupLimits(1, 1, 1), base_replicas=1,
        settings=ControlConfig(reserve=part), busiest=busiest,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("busiest", "part", "actors"),
    [
        ({"a": 10.0}, 0.3, {"a": 3}),
        ({"a": 10.1}, 0.3, {"a": 4}),
        ({"a": 0.0}, 0.3, {"a": 0}),  # `decide` knows the minimum
        ({"a": 10.0, "gone": 5.0}, 1.0, {"a": 10}),
        ({"a": 10.0}, 0.0, {}),
        ({}, 0.3, {}),  # nothing has been seen yet
    ],
)
def test_a_part_of_the_busiest_is_kept(busiest, part, actors):
    assert reserve(seen(busiest, part)).actors == actors


def test_why_actors_stay_is_said_where_the_reserve_holds_them():
    held = seen({"a": 26.0}, 0.3)
    assert reserve(held).reasons == ("group a: 8 kept of 26.0 actors busy in the last 600 s",)
    assert reserve(replace(held, busiest={"a": 20.0})) == Wish({"a": 6})


def test_the_busiest_moment_counts_until_its_time_is_over():
    busiest = Busiest()
    for at, busy in enumerate([(0.5, 0.5), (1.0, 0.9), (0.25, 0.25), (0.5, 0.0), (0.0, 0.0)]):
        busiest.note(views(a=busy, b=(0.125 * at,)), at)
    found = [busiest.within(span, 4.0) for span in (3.0, 2.0, 1.0)]
    assert [most["a"] for most in found] == [1.9, 0.5, 0.5]
    assert {most["b"] for most in found} == {0.5}
    assert busiest.within(1.0, 9.0) == {}

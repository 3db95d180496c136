"""Fleet decisions as tables: members and wishes in, steps out."""

import pytest

from moeray.config import config_from
from moeray.control.fleet import FleetSteps, Member, Phase, fleet_steps, reserve_of, serving, to_reserve

READY, STARTING, LEAVING = Phase.READY, Phase.STARTING, Phase.LEAVING


def crew(*rows):
    """(id, group, phase, node, hosted) -> members, in order of start."""
    return [Member(name, group, phase, node, hosted, i) for i, (name, group, phase, node, hosted) in enumerate(rows)]


TWO = crew(("a0", "a", READY, "n0", 4), ("a1", "a", READY, "n1", 4))

CASES = {
    "nothing to do": (TWO, {"a": 2}, (), FleetSteps()),
    "grow by two": (TWO, {"a": 4}, (), FleetSteps(start=("a", "a"))),
    "a start under way counts": (
        [*TWO, Member("a2", "a", STARTING, order=2)], {"a": 4}, (), FleetSteps(start=("a",)),
    ),
    "a start that is no longer wanted is given up, the newest first": (
        [*TWO, Member("a2", "a", STARTING, order=2), Member("a3", "a", STARTING, order=3)],
        {"a": 3}, (), FleetSteps(cancel=("a3",)),
    ),
    "starts go before ready actors": (
        [*TWO, Member("a2", "a", STARTING, order=2)], {"a": 1}, (), FleetSteps(cancel=("a2",), leave=("a1",)),
    ),
    "the emptier of two lone actors leaves": (
        crew(("a0", "a", READY, "n0", 1), ("a1", "a", READY, "n1", 4)), {"a": 1}, (), FleetSteps(leave=("a0",)),
    ),
    "one on a crowded node stays when another node can go free": (
        crew(("a0", "a", READY, "n0", 1), ("a1", "a", READY, "n1", 9), ("router-0", "router", READY, "n0", 0)),
        {"a": 1, "router": 1}, (), FleetSteps(leave=("a1",)),
    ),
    "whole nodes are emptied one after the other": (
        crew(*((f"a{i}", "a", READY, f"n{i % 2}", 2) for i in range(4))), {"a": 2}, (), FleetSteps(leave=("a3", "a1")),
    ),
    "a doomed actor leaves and another is started for it": (
        TWO, {"a": 2}, ("a0",), FleetSteps(start=("a",), leave=("a0",)),
    ),
    "one that leaves already is not told again, nor counted": (
        crew(("a0", "a", LEAVING, "n0", 4), ("a1", "a", READY, "n1", 4)), {"a": 2}, ("a0",), FleetSteps(start=("a",)),
    ),
    "a doomed start is given up": (
        [*TWO, Member("a2", "a", STARTING, "n9", order=2)], {"a": 2}, ("a2",), FleetSteps(cancel=("a2",)),
    ),
    "one that leaves is wanted again, before another is started": (
        crew(("a0", "a", LEAVING, "n0", 1), ("a1", "a", LEAVING, "n0", 4), ("a2", "a", READY, "n1", 4)),
        {"a": 2}, (), FleetSteps(stay=("a1",)),
    ),
    "one that takes nothing any more, or must go, is not wanted again": (
        [*crew(("a0", "a", LEAVING, "n0", 1), ("a1", "a", READY, "n1", 4)),
         Member("a2", "a", LEAVING, "n0", 3, 2, draining=True)],
        {"a": 2}, ("a0",), FleetSteps(start=("a",)),
    ),
    "groups are apart": (
        crew(("a0", "a", READY, "n0", 4), ("b0", "b", READY, "n0", 4), ("b1", "b", READY, "n1", 4)),
        {"a": 2, "b": 1}, (), FleetSteps(start=("a",), leave=("b1",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps(name):
    members, wanted, doomed, expected = CASES[name]
    assert fleet_steps(members, wanted, doomed) == expected


def test_those_who_host_serve_and_the_rest_is_the_warm_pool():
    members = crew(
        ("a0", "a", READY, "n0", 0), ("a1", "a", READY, "n0", 5), ("a2", "a", STARTING, "", 0),
        ("a3", "a", READY, "n1", 3), ("a4", "a", LEAVING, "n1", 7), ("b0", "b", READY, "n1", 0),
    )  # fmt: skip
    assert serving(members, {"a": 2, "b": 1}) == ("a1", "a3", "b0")
    assert serving(members, {"a": 3}) == ("a1", "a3", "a0")
    assert serving(members, {"a": 9}) == ("a1", "a3", "a0")


def member(i, phase=READY, group="experts", outdated=False):
    return Member(f"experts-{i}", group, phase, order=i, outdated=outdated)


def test_an_outdated_actor_stays_until_another_can_work_in_its_place():
    old = [member(0, outdated=True), member(1, outdated=True)]
    assert fleet_steps(old, {"experts": 2}) == FleetSteps(start=("experts", "experts"))
    begun = [*old, member(2, Phase.STARTING), member(3, Phase.STARTING)]
    assert fleet_steps(begun, {"experts": 2}) == FleetSteps()
    half = [*old, member(2), member(3, Phase.STARTING)]
    assert fleet_steps(half, {"experts": 2}) == FleetSteps(leave=("experts-1",))
    done = [member(0, outdated=True), member(2), member(3)]
    assert fleet_steps(done, {"experts": 2}) == FleetSteps(leave=("experts-0",))


def test_fewer_are_wanted_while_actors_are_outdated():
    old = [member(i, outdated=True) for i in range(3)]
    steps = fleet_steps([*old, member(3, Phase.STARTING, outdated=True)], {"experts": 1})
    assert steps == FleetSteps(start=("experts",), cancel=("experts-3",), leave=("experts-2", "experts-1"))


def test_a_group_that_nobody_wants_any_more_leaves():
    members = [member(0), member(1, Phase.STARTING), member(2, group="other")]
    assert fleet_steps(members, {"other": 1}) == FleetSteps(cancel=("experts-1",), leave=("experts-0",))


ROUTER = Member("router-0", "router", READY)
SPARE = Member("a2", "a", READY, order=2)


@pytest.mark.parametrize(
    ("members", "starved", "expected"),
    [
        ([*TWO, ROUTER], False, {"a": 1}),
        ([*TWO, SPARE, ROUTER], False, {"a": 1}),
        ([*TWO, Member("router-0", "router", STARTING)], False, {"a": 0}),
        ([*TWO, Member("a2", "a", STARTING), Member("router-0", "router", STARTING)], False, {"a": 0}),
        ([*TWO, SPARE, Member("router-0", "router", STARTING)], False, {"a": 1}),
        ([*TWO, SPARE, Member("a3", "a", READY), Member("router-0", "router", LEAVING)], False, {"a": 1}),
        ([TWO[0], Member("a1", "a", STARTING), ROUTER], False, {"a": 0}),
        ([*TWO, SPARE, Member("router-0", "router", STARTING)], True, {}),
        ([], False, {"a": 0}),
    ],
)
def test_what_is_kept_in_reserve_takes_no_room_from_what_is_wanted(members, starved, expected):
    assert to_reserve(members, {"a": 2, "router": 1}, {"a": 1}, starved=starved) == expected


@pytest.mark.parametrize(
    ("prices", "warm_pool", "reserve"),
    [
        ({"a": 2.0, "b": 0.1}, 2, {"b": 2}),
        ({"a": 1.0, "b": 1.0}, 1, {"a": 1}),  # the first of equals
        ({"a": 2.0, "b": 0.1}, 0, {}),
    ],
)
def test_the_warm_pool_belongs_to_the_cheapest_group(prices, warm_pool, reserve):
    groups = [{"name": name, "price_per_hour": price} for name, price in prices.items()]
    config = config_from({"experts": {"groups": groups}, "control": {"warm_pool": warm_pool}})
    assert reserve_of(config) == reserve

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from moeray.control.deciding import decide, load_policies
from moeray.control.placement import Placement
from moeray.control.policies import SHIPPED, hot_experts, idle, latency, queue_wait, schedule, target_utilisation
from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput, RouterView, Wish
from moeray.control.router_load import RouterLoad
from moeray.control.votes import settle
from moeray.errors import ConfigError, PolicyError
from moeray.settings.control import ControlConfig, ScheduleConfig
from moeray.types import ExpertId

NOON = datetime(2026, 3, 4, 12, 0, tzinfo=UTC).timestamp()


def view(i, busy=0.0, group="experts", rate=0.0, wait=0.0):
    return ExpertActorView(f"{group}-{i}", group, "n0", busy, rate, wait)


def seen(busy=(0.6, 0.6), limits=None, routers=(), settings=None, **changes):
    """Two actors of one group at the target, unless told otherwise."""
    return replace(
        PolicyInput(
            now=NOON,
            idle_s=0.0,
            load={},
            peak={},
            experts=tuple(view(i, part) for i, part in enumerate(busy)),
            routers=tuple(RouterView(f"r{i}", "n0", RouterLoad(*state)) for i, state in enumerate(routers)),
            placement=Placement(),
            groups=limits or {"experts": GroupLimits(len(busy), 1, 10)},
            router_limits=GroupLimits(max(1, len(routers)), 1, 4),
            base_replicas=1,
            settings=settings or ControlConfig(),
        ),
        **changes,
    )


@pytest.mark.parametrize(
    ("busy", "wanted"),
    [
        ((0.6, 0.6), 2),  # at the target
        ((0.9, 0.9), 3),
        ((1.0, 1.0, 1.0), 5),
        ((0.3, 0.3), 1),
        ((0.3, 0.31), 2),
        ((0.0, 0.0), 1),  # the minimum
        ((1.0,) * 9, 10),  # the maximum
    ],
)
def test_target_utilisation(busy, wanted):
    assert target_utilisation(seen(busy)).actors == {"experts": wanted}


@pytest.mark.parametrize(
    ("routers", "wanted"),
    [
        (((8.0, 0.0, 0.0),), 2),
        (((8.0, 8.0, 0.0),), 4),  # twice the requests that are served
        (((8.0, 0.0, 0.0), (8.0, 8.0, 0.0)), 3),
        (((0.0, 2.0, 0.0),), 4),  # nothing runs yet; at most max_growth
    ],
)
def test_requests_that_wait_count_as_load(routers, wanted):
    assert target_utilisation(seen((0.6, 0.6), routers=routers)).actors == {"experts": wanted}


SLO = ControlConfig(slo_ttft_s=4.0, slo_tpot_s=0.2, slo_aim=0.5)
"""Aims at 2 s of prompts and 0.1 s between tokens."""


def router(tpot_s=0.0, pending=0, rate=0.0, part=0.5, running=4.0):
    return RouterLoad(running, pending_tokens=pending, tpot_s=tpot_s, prefill_rate=rate, expert_part=part)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([router(0.1)], 4),  # at the aim: 0.05 s of trunk and as much of experts
        ([router(0.12)], 6),  # 0.06 s of experts have to fit into 0.04 s
        ([router(0.06)], 2),  # 0.03 s may be 0.07 s
        ([router(0.3, part=0.1)], 3),  # the trunk alone is too slow: actors would not help
        ([router(0.05, part=0.9), router(0.15, part=0.9)], 4),  # the mean of the tokens counts
        ([router(0.1, pending=1000, rate=1000.0)], 4),  # 1 s of prompts is no hurry
        ([router(0.1, pending=2500, rate=1000.0)], 7),  # 1.25 s of experts into 0.75 s
        ([router(0.1, pending=5000, rate=1000.0), router(0.1)], 7),  # as much for each of the two
        ([router(pending=90000, rate=1000.0, part=0.9)], 8),  # at most max_growth
        ([router(running=0.0)], 1),
        ([RouterLoad()], 1),
    ],
)
def test_latency_fits_the_experts_into_what_the_trunk_leaves(loads, wanted):
    routers = tuple(RouterView(f"r{i}", "n0", load) for i, load in enumerate(loads))
    assert latency(replace(seen((0.1,) * 4, settings=SLO), routers=routers)).actors == {"experts": wanted}


@pytest.mark.parametrize(
    ("busy", "tpot_s", "wanted"),
    [
        (0.2, 0.06, 2),  # waits alone decide
        (0.6, 0.06, 3),  # two would have more work than time
        (0.95, 0.06, 4),
        (1.0, 0.06, 4),  # busy actors alone are no reason to grow
        (1.0, 0.12, 6),
    ],
)
def test_latency_shrinks_to_no_fewer_actors_than_the_work_keeps_busy(busy, tpot_s, wanted):
    routers = (RouterView("r0", "n0", router(tpot_s)),)
    assert latency(replace(seen((busy,) * 4, settings=SLO), routers=routers)).actors == {"experts": wanted}


@pytest.mark.parametrize(
    ("came", "pending", "part", "wanted"),
    [
        ((0.0,), 0, 0.5, 1),  # nothing comes
        ((900.0,), 2000, 0.5, 4),  # as fast as is aimed at, with the backlog that is
        ((1000.0,), 2000, 0.5, 5),  # half of the time into two fifths of it
        ((1000.0,), 0, 0.5, 5),  # a wait that is far from there is no comfort: two seconds are soon gone
        ((450.0,), 0, 0.5, 2),
        ((1800.0, 0.0), 0, 0.5, 4),  # routers share what comes
        ((3000.0,), 0, 0.5, 8),  # at most max_growth
        ((1000.0,), 0, 0.1, 3),  # what the trunk takes alone is most
        ((0.0,), 700_000, 0.5, 8),  # a backlog of many minutes
        ((1000.0,), 700_000, 1.0, 8),
        ((0.0,), 700_000, 0.0, 1),
    ],
)
def test_latency_keeps_up_with_the_pace_at_which_prompts_come(came, pending, part, wanted):
    """1000 tokens a second are computed."""
    loads = [replace(router(pending=pending, rate=1000.0, part=part), prompt_rate=rate) for rate in came]
    routers = tuple(RouterView(f"r{i}", "n0", load) for i, load in enumerate(loads))
    assert latency(replace(seen((0.3,) * 4, settings=SLO), routers=routers)).actors == {"experts": wanted}


def test_latency_lets_prompts_come_faster_for_a_while_where_they_may_wait_for_long():
    """At half a minute of 500 s, 1.4 times the pace is borne for a quarter of an hour."""
    settings = ControlConfig(slo_ttft_s=1000.0, slo_aim=0.5)
    load = replace(router(pending=30_000, rate=1000.0), prompt_rate=1400.0)
    input_ = replace(seen((0.9,) * 4, settings=settings), routers=(RouterView("r0", "n0", load),))
    assert latency(input_).actors == {"experts": 4}


@pytest.mark.parametrize(
    ("waited", "wanted"),
    [
        (0.0, 6),  # not known: those that serve
        (4.0, 6),
        (2.0, 3),  # half of them have just come: the waits are those of two actors, to which three would do
        (9.0, 6),  # some have gone since
    ],
)
def test_latency_knows_whose_waits_it_sees(waited, wanted):
    load = replace(router(0.12), actors=waited)
    input_ = replace(seen((0.1,) * 4, settings=SLO), routers=(RouterView("r0", "n0", load),))
    assert latency(input_).actors == {"experts": wanted}


@pytest.mark.parametrize(
    ("requests", "late", "wanted"),
    [
        (0.0, 0.0, 4),  # nothing is known: aim at half of the objective
        (1000.0, 8.5, 4),  # as many as are aimed at
        (1000.0, 10.0, 5),  # as many as may be
        (2000.0, 0.0, 3),  # none: a tenth of a second and a third may be aimed at
        (1000.0, 40.0, 8),  # too many: seven tenths of the aim are hardly more than what the trunk takes
        (20.0, 0.0, 4),  # few say little
    ],
)
def test_latency_aims_lower_while_too_many_requests_are_late(requests, late, wanted):
    load = replace(router(0.1), requests=requests, late=late)
    input_ = replace(seen((0.1,) * 4, settings=SLO), routers=(RouterView("r0", "n0", load),))
    assert latency(input_).actors == {"experts": wanted}


@pytest.mark.parametrize(("pace", "wanted"), [(None, 5), (0.75, 4), (1.0, 3)])
def test_latency_aims_at_the_pace_that_routers_keep(pace, wanted):
    """With `slo_pace` the wait between tokens is that part of what is allowed, whatever `slo_aim` is."""
    routers = (RouterView("r", "n0", RouterLoad(running=4.0, tpot_s=0.15, expert_part=1.0)),)
    settings = ControlConfig(slo_tpot_s=0.2, slo_aim=0.6, slo_pace=pace)
    input_ = replace(seen((0.1,) * 4, settings=settings), routers=routers)
    assert latency(input_).actors == {"experts": wanted}


def test_latency_without_an_objective_has_no_opinion():
    assert latency(seen()) == Wish()


def test_latency_counts_from_the_actors_that_take_rows():
    """Those that start are the cure already asked for."""
    routers = (RouterView("r0", "n0", router(0.12)),)
    limits = {"experts": GroupLimits(6, 1, 10)}
    four = replace(seen((0.6,) * 4, limits=limits, settings=SLO), routers=routers)
    assert latency(four).actors == {"experts": 6}


def test_actors_that_are_starting_count_as_growth_already_asked_for():
    wish = target_utilisation(seen((0.9, 0.9), limits={"experts": GroupLimits(3, 1, 10)}))
    assert wish.actors == {"experts": 3}


def test_a_group_of_which_nothing_is_known_is_left_alone():
    assert target_utilisation(seen((), limits={"experts": GroupLimits(2, 1, 10)})).actors == {}


TWO = {"cheap": GroupLimits(2, 1, 3, price_per_hour=1.0), "dear": GroupLimits(2, 1, 9, price_per_hour=3.0)}


@pytest.mark.parametrize(
    ("busy", "limits", "rates", "wanted"),
    [
        ((0.9, 0.9), TWO, (0, 0), {"cheap": 3, "dear": 3}),  # 6 actors in all; the cheap group is then full
        ((0.6, 0.8), TWO, (0, 0), {"cheap": 3, "dear": 2}),  # the dear group's load brings a cheap actor
        ((0.3, 0.3), TWO, (0, 0), {"cheap": 1, "dear": 1}),
        ((0.5, 0.4), TWO, (0, 0), {"cheap": 2, "dear": 1}),  # the dear one goes first
        ((0.6, 0.7), TWO, (100, 1000), {"cheap": 2, "dear": 3}),  # per row the fast group is the cheap one
        (
            (0.6, 0.9),
            {"cheap": GroupLimits(2, 1, 9), "dear": GroupLimits(2, 1, 9, 3.0, "cuda")},
            (0, 0),
            {"cheap": 2, "dear": 3},  # another tier is no substitute
        ),
    ],
)
def test_the_cheaper_group_of_a_tier_grows_first(busy, limits, rates, wanted):
    views = [
        view(i, part, group, rate) for group, part, rate in zip(limits, busy, rates, strict=True) for i in range(2)
    ]
    assert target_utilisation(seen(limits=limits, experts=tuple(views))).actors == wanted


@pytest.mark.parametrize(
    ("routers", "wanted"),
    [
        ([(32, 0, 0.1)], 1),
        ([(32, 1, 0.1)], 2),
        ([(10, 0, 0.9), (10, 0, 0.9)], 3),  # the caches are nearly full
        ([(1, 0, 0.0), (1, 0, 0.0)], 1),
        ([], None),
    ],
)
def test_routers_by_requests_and_cache(routers, wanted):
    assert target_utilisation(seen(routers=routers)).routers == wanted


def layer_of(*loads, layer=0):
    return {ExpertId(layer, i): float(load) for i, load in enumerate(loads)}


def hot(load, actors=4, **changes):
    placement = Placement(1, dict.fromkeys(load, ("experts-0",)))
    return hot_experts(seen((0.5,) * actors, load=load, placement=placement, **changes)).replicas


@pytest.mark.parametrize(
    ("loads", "budget", "wanted"),
    [
        ((10, 10, 10, 10), 1.0, {}),
        ((30, 10, 10, 10), 0.25, {0: 2}),  # a mean actor has 15, so 30 is one too many
        ((70, 10, 10, 10, 10, 10), 1.0, {0: 2}),  # mean 30: 35 is within 1.25 of it
        ((100, 1, 1, 1), 0.25, {}),  # would take 4 replicas, and the budget is one: it would not help
        ((100, 1, 1, 1), 1.0, {0: 4}),
        ((0, 0, 0, 0), 1.0, {}),
    ],
)
def test_hot_experts(loads, budget, wanted):
    replicas = hot(layer_of(*loads), settings=ControlConfig(replica_budget=budget))
    assert replicas == {ExpertId(0, expert): count for expert, count in wanted.items()}


@pytest.mark.parametrize(
    ("load_s", "wanted"), [(0.0, {}), (1.0, {}), (2.0, {}), (2.2, {ExpertId(0, 0): 2}), (30.0, {ExpertId(0, 0): 2})]
)
def test_hot_experts_are_not_known_by_a_few_rows(load_s, wanted):
    assert hot(layer_of(30, 10, 10, 10), load_s=load_s) == wanted


def test_the_budget_goes_to_the_most_skewed_layer_first():
    load = layer_of(30, 10, 10, 10) | layer_of(40, 10, 10, 10, layer=1)
    one = ControlConfig(replica_budget=1 / 8)
    assert hot(load, settings=one) == {ExpertId(1, 0): 2}
    two = ControlConfig(replica_budget=2 / 8)
    assert hot(load, settings=two) == {ExpertId(1, 0): 2, ExpertId(0, 0): 2}


@pytest.mark.parametrize(
    ("held", "budget", "wanted"),
    [
        ((2, 1, 1, 1), 1.0, {0: 2}),
        ((3, 1, 1, 1), 1.0, {0: 2}),  # twice as many more as would do
        ((3, 1, 1, 1), 0.25, {0: 2}),  # the budget is less than there is
        ((1, 2, 1, 1), 1.0, {0: 2}),  # those that there are do not do
    ],
)
def test_replicas_are_kept_only_where_they_do(held, budget, wanted):
    load = layer_of(30, 10, 10, 10)
    placement = Placement(1, {ExpertId(0, e): tuple(f"experts-{i}" for i in range(n)) for e, n in enumerate(held)})
    settings = ControlConfig(replica_budget=budget)
    wish = hot_experts(seen((0.5,) * 4, load=load, placement=placement, settings=settings))
    assert wish.replicas == {ExpertId(0, expert): count for expert, count in wanted.items()}


@pytest.mark.parametrize(("other", "helped"), [(22, 0), (26, 0), (40, 1)])
def test_a_layer_keeps_its_replicas_unless_another_is_much_more_skewed(other, helped):
    load = layer_of(20, 10, 10, 10) | layer_of(other, 10, 10, 10, layer=1)
    held = dict.fromkeys(load, ("experts-0",)) | {ExpertId(0, 0): ("experts-0", "experts-1")}
    one = ControlConfig(replica_budget=1 / 8)
    wish = hot_experts(seen((0.5,) * 4, load=load, placement=Placement(1, held), settings=one))
    assert wish.replicas == {ExpertId(helped, 0): 2}


def test_an_expert_is_split_over_no_more_than_the_actors():
    assert hot(layer_of(1000, 1), actors=2, settings=ControlConfig(replica_budget=9.0)) == {ExpertId(0, 0): 2}


def test_base_replicas_count():
    assert hot(layer_of(30, 10, 10, 10), base_replicas=2) == {}


@pytest.mark.parametrize(
    ("idle_s", "wish"), [(299.0, Wish()), (300.0, Wish({"experts": 1}, 1, reasons=("idle for 300 s",)))]
)
def test_idle(idle_s, wish):
    assert idle(seen(idle_s=idle_s)) == wish


@pytest.mark.parametrize(
    ("cron", "duration_s", "active"),
    [
        ("0 12 * * *", 60, True),  # this very second
        ("0 11 * * *", 3600, False),  # just over
        ("0 11 * * *", 3601, True),
        ("1 12 * * *", 3600, False),  # to come
        ("0 8 * * WED", 86400, True),  # it is a Wednesday
        ("0 8 * * 4", 3600, False),
        ("0 0 1 3 *", 4 * 86400, True),
    ],
)
def test_schedule(cron, duration_s, active):
    settings = ControlConfig(schedule=(ScheduleConfig(cron, "experts", 5, duration_s),))
    assert schedule(seen(settings=settings)).actors == ({"experts": 5} if active else {})


def test_overlapping_floors_and_the_routers():
    entries = tuple(
        ScheduleConfig("0 * * * *", group, n) for group, n in [("experts", 3), ("experts", 6), ("router", 2)]
    )
    wish = schedule(seen(settings=ControlConfig(schedule=entries)))
    assert (wish.actors, wish.routers) == ({"experts": 6}, 2)


@pytest.mark.parametrize(
    ("waits", "actors", "wanted"),
    [
        ((0.1, 0.25), 2, {}),
        ((0.1, 0.26), 2, {"experts": 3}),
        ((0.1, 0.1, 0.1, 0.4), 4, {"experts": 7}),
        ((2.0, 2.0), 2, {"experts": 16}),  # `decide` bounds the growth
        ((2.0, 2.0), 9, {"experts": 16}),  # those that are starting are part of it
    ],
)
def test_queue_wait(waits, actors, wanted):
    views = tuple(view(i, wait=wait) for i, wait in enumerate(waits))
    assert queue_wait(seen(experts=views, limits={"experts": GroupLimits(actors, 1, 10)})).actors == wanted


# -- decide -----------------------------------------------------------------------------------------------------------

ALL = load_policies(ControlConfig().policies)


def test_the_shipped_policies_are_those_of_the_config():
    assert tuple(SHIPPED) == ControlConfig().policies


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_utilisation", 0.01),
        ("slo_queue_wait_s", 0.001),
        ("max_growth", 1e6),
        ("replica_budget", 1000.0),
        ("target_running", 1_000_000),
    ],
)
def test_they_decide_at_the_bounds_of_what_may_be_set(key, value):
    views = tuple(view(i, 1.0, wait=3600.0) for i in range(2))
    busy = seen(experts=views, load=layer_of(100, 1, 1), placement=PLACED, settings=ControlConfig(**{key: value}))
    assert 1 <= decide(ALL, busy).actors["experts"] <= 10


def test_idle_means_the_minimum_unless_a_schedule_holds_a_floor():
    calm = seen((0.0,) * 6, idle_s=1000.0, routers=[(0, 0, 0.0)] * 3)
    assert (decide(ALL, calm).actors, decide(ALL, calm).routers) == ({"experts": 1}, 1)
    floor = ControlConfig(schedule=(ScheduleConfig("0 12 * * *", "experts", 4),))
    assert decide(ALL, replace(calm, settings=floor)).actors == {"experts": 4}


def test_the_largest_wish_wins_and_reasons_add_up():
    slow = seen(experts=(view(0, 0.1, wait=0.3), view(1, 0.1)))
    wish = decide(ALL, slow)
    assert wish.actors == {"experts": 3}
    assert len(wish.reasons) == 2


@pytest.mark.parametrize(("wanted", "got"), [(0, 2), (5, 5), (7, 6), (100, 6)])
def test_limits_and_growth_bound_a_wish(wanted, got):
    greedy = lambda _: Wish({"experts": wanted}, wanted)  # noqa: E731
    limits = {"experts": GroupLimits(3, 2, 8)}
    wish = decide([greedy], seen(limits=limits, router_limits=GroupLimits(3, 2, 6)))
    assert (wish.actors, wish.routers) == ({"experts": got}, got)


@pytest.mark.parametrize(
    ("replicas", "groups", "wish", "wanted"),
    [
        (2, {"a": (2, 1, 4)}, {"a": 1}, {"a": 2}),
        (1, {"a": (2, 1, 4)}, {"a": 1}, {"a": 1}),
        (2, {"a": (3, 1, 4)}, {}, {"a": 3}),  # nobody has an opinion
        (3, {"a": (1, 1, 4)}, {"a": 1}, {"a": 3}),  # scaled down by hand: at once, whatever `max_growth` is
        (4, {"dear": (2, 1, 4, 2.0), "cheap": (4, 1, 9, 0.1)}, {"dear": 1, "cheap": 1}, {"dear": 1, "cheap": 3}),
        (6, {"dear": (3, 1, 4, 2.0), "cheap": (3, 1, 4, 0.1)}, {"dear": 1, "cheap": 1}, {"dear": 2, "cheap": 4}),
        (4, {"dear": (3, 1, 4, 2.0), "cheap": (2, 1, 4, 0.1)}, {"cheap": 1}, {"dear": 3, "cheap": 1}),
        (4, {"dear": (2, 1, 4, 2.0), "cheap": (2, 1, 4, 0.1)}, {"cheap": 1}, {"dear": 2, "cheap": 2}),
    ],
)
def test_no_decision_leaves_fewer_actors_than_replicas(replicas, groups, wish, wanted):
    """However long it lasts, and whatever the hysteresis makes of it."""
    limits = {name: GroupLimits(*numbers) for name, numbers in groups.items()}
    current, history = Wish({name: limits.actors for name, limits in limits.items()}), []
    for _ in range(4):
        limits = {name: replace(limits[name], actors=count) for name, count in current.actors.items()}
        history.append(decide([wishes(wish)], seen(limits=limits, base_replicas=replicas)))
        before, current = current, settle(current, history, shrink_votes=3)
        assert sum(current.actors.values()) >= min(replicas, sum(before.actors.values()))
    assert current.actors == wanted


def test_the_reasons_say_that_it_is_for_the_replicas():
    calm = seen((0.0,) * 2, limits={"experts": GroupLimits(2, 1, 4)}, idle_s=1000.0, base_replicas=2)
    assert decide(ALL, calm).reasons[-1] == "experts.replicas 2: experts at least 2"


def test_without_an_opinion_nothing_is_said():
    assert decide([lambda _: Wish()], seen()) == Wish()


PLACED = Placement(1, {ExpertId(0, 0): ("a0",), ExpertId(0, 1): ("a1",)})


def wishes(*args, **fields):
    return lambda _: Wish(*args, **fields)


def test_replicas_are_bounded_by_the_actors_wanted():
    greedy = wishes(replicas={ExpertId(0, 0): 9, ExpertId(0, 1): 1})
    wish = decide([greedy], seen(placement=PLACED))
    assert wish.replicas == {ExpertId(0, 0): 2}


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{__name__}:mine", f"{__name__}.mine"])
def test_a_policy_of_ones_own(name):
    assert decide(load_policies([name]), seen()).actors == {"experts": 4}  # bounded by max_growth


def mine(_):
    return Wish({"experts": 7})


def test_whole_numbers_of_any_kind_are_wishes():
    wish = Wish({"experts": np.int64(3)}, np.int32(2), {ExpertId(0, 0): np.uint8(2)})
    decided = decide([lambda _: wish], seen(placement=PLACED))
    assert (decided.actors, decided.routers, decided.replicas) == ({"experts": 3}, 2, {ExpertId(0, 0): 2})
    assert {type(n) for n in (*decided.actors.values(), decided.routers, *decided.replicas.values())} == {int}


def raises(_):
    raise LookupError("no such load")


def says_nothing(_):
    return None


class Sulky:
    def __repr__(self):
        raise RuntimeError("I have no words")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (raises, r"raises \(control.policies\) failed: LookupError: no such load"),
        (says_nothing, "gave None instead"),
        (wishes({"experts": 2.5}), "wishes for 2.5 actors of group 'experts', which is no whole number"),
        (wishes({"experts": "3"}), "wishes for '3' actors of group 'experts'"),
        (wishes({"experts": -1}), "wishes for -1 actors"),
        (wishes({"experts": np.float64(2.0)}), r"wishes for np.float64\(2.0\) actors"),
        (wishes(routers=1.5), "wishes for 1.5 routers"),
        (wishes(replicas={ExpertId(0, 0): 1.7}), "wishes for 1.7 replicas of ExpertId"),
        (wishes(replicas={ExpertId(7, 0): 2}), r"replicas of ExpertId\(layer=7, expert=0\), which is no expert"),
        (wishes(None), "gave a Wish whose actors are None instead of a mapping"),
        (wishes([1]), r"gave a Wish whose actors are \[1\] instead of a mapping"),
        (wishes(replicas=None), "gave a Wish whose replicas are None instead of a mapping"),
        (wishes(reasons=None), "gave a Wish whose reasons are None instead of a tuple of str"),
        (wishes(reasons="because"), "gave a Wish whose reasons are 'because' instead of a tuple of str"),
        (wishes(reasons=(1,)), r"gave a Wish whose reasons are \(1,\) instead of a tuple of str"),
        (wishes({"exprts": 4}), "wishes for actors of 'exprts', which is no expert group; the nearest is 'experts'"),
        (wishes({1: 4}), "wishes for actors of 1, which is no expert group"),
        (wishes({"experts": Sulky()}), "failed: RuntimeError: I have no words; mend it"),
    ],
)
def test_a_policy_that_does_not_work_is_named_and_the_others_go_on(policy, words):
    heard = []
    assert decide([policy, mine], seen(placement=PLACED), heard.append).actors == {"experts": 4}
    assert len(heard) == 1
    with pytest.raises(PolicyError, match=words):
        decide([policy, mine], seen(placement=PLACED))
    assert "\n" not in str(heard[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("target_utilization", ["target_utilization", "target_utilisation"]),
        ("nowhere.to.be:found", ["nowhere", "installed"]),
        ("moeray.control.policies:hot_expert", ["hot_expert", "hot_experts"]),
        ("moeray.control.policies:KV_TARGET", ["KV_TARGET"]),
    ],
)
def test_a_policy_that_is_not_there_is_named_with_the_nearest(name, words):
    with pytest.raises(ConfigError) as error:
        load_policies([name])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no\\nlicence')", "RuntimeError: no licence"),
        ("def policy(:", "SyntaxError"),
        ("from nowhere import policy", "No module named 'nowhere'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_policy_whose_module_fails_is_named_in_one_line(tmp_path, monkeypatch, code, words):
    (tmp_path / "broken_policies.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"control.policies: 'broken_policies:policy'") as error:
        load_policies(["broken_policies:policy"])
    assert words in str(error.value)
    assert "\n" not in str(error.value)

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.control.eplb import place, repair, replicate, skew_left
from moeray.control.fitting import fit
from moeray.control.placement import Host, Placement
from moeray.control.plan import plan_diff
from moeray.errors import PlacementError
from moeray.types import ExpertId

BIG = 1 << 40


def layer_of(*loads, layer=0):
    return {ExpertId(layer, i): float(load) for i, load in enumerate(loads)}


def ends(placement, load, hosts):
    """layer -> actor -> load for the actor's share (over the mean share)."""
    mean = sum(host.share for host in hosts) / len(hosts)
    speed = {host.actor_id: host.share / mean for host in hosts}
    out = {}
    for expert, actors in placement.replicas.items():
        row = out.setdefault(expert.layer, dict.fromkeys(speed, 0.0))
        for actor in actors:
            row[actor] += load.get(expert, 0.0) / len(actors) / speed[actor]
    return out


def balance(placement, load, hosts):
    """layer -> max/mean, the mean being what an even split would give every host."""
    total = Counter()
    for expert, rows in load.items():
        total[expert.layer] += rows
    return {
        layer: max(row.values()) * len(hosts) / total[layer]
        for layer, row in ends(placement, load, hosts).items()
        if total[layer]
    }


# -- the published example --------------------------------------------------------------------------------------------

WEIGHTS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
# Room for 6 instead of 4: replicas are not chosen node by node here, so that a node may get 9 of a layer and one 7.
GPUS = [Host(f"gpu{i}", 6, node_id=f"n{i // 4}", tier="cuda") for i in range(8)]


def published():
    table = {}
    for layer, slots in enumerate(PUBLISHED):
        for slot, expert in enumerate(slots):
            table.setdefault(ExpertId(layer, expert), []).append(f"gpu{slot // 2}")
    return Placement(1, {expert: tuple(actors) for expert, actors in table.items()})


@pytest.mark.parametrize("routing_groups", [1, 4])
def test_the_published_example_of_deepseeks_eplb(routing_groups):
    load = layer_of(*WEIGHTS[0]) | layer_of(*WEIGHTS[1], layer=1)
    replicas = replicate(layer_of(*WEIGHTS[0]), 16) | replicate(layer_of(*WEIGHTS[1], layer=1), 16)
    placement = place(
        load, GPUS, experts={0: 12, 1: 12}, expert_bytes={0: 1, 1: 1}, replicas=replicas, routing_groups=routing_groups
    )
    theirs, ours = balance(published(), load, GPUS), balance(placement, load, GPUS)
    assert sum(replicas.values()) == 32
    assert all(ours[layer] <= theirs[layer] + 1e-9 for layer in (0, 1))
    assert all(len(placement.hosted_by(gpu.actor_id)) <= 6 for gpu in GPUS)
    if routing_groups == 4:
        node = {gpu.actor_id: gpu.node_id for gpu in GPUS}
        for layer in (0, 1):
            for group in range(4):
                homes = {node[a] for e in range(3) for a in placement.replicas[ExpertId(layer, 3 * group + e)]}
                assert len(homes) == 1


def test_the_published_replica_counts():
    counts = replicate(layer_of(*WEIGHTS[0]), 16)
    assert counts == {ExpertId(0, e): PUBLISHED[0].count(e) for e in range(12)}


@pytest.mark.parametrize(
    ("loads", "slots", "options", "counts"),
    [
        ((6, 3, 1), 3, {}, (1, 1, 1)),
        ((6, 3, 1), 5, {}, (3, 1, 1)),
        ((6, 3, 1), 8, {"base": 2}, (4, 2, 2)),
        ((60, 3, 1), 9, {"most": 2}, (2, 1, 1)),  # the heaviest cannot be split further
        ((6, 3, 3), 9, {"most": 2, "max_skew": 1.0}, (1, 1, 1)),  # two actors: 6 and 3 + 3
        ((0, 0), 4, {}, (1, 1)),  # nothing to gain
        ((), 4, {}, ()),
    ],
)
def test_replicate(loads, slots, options, counts):
    assert tuple(replicate(layer_of(*loads), slots, **options).values()) == counts


def test_skew_left_is_that_of_the_heaviest_replica():
    load = layer_of(30, 10, 10, 10)
    assert skew_left(load, dict.fromkeys(load, 1), 4) == 2.0
    assert skew_left(load, dict.fromkeys(load, 1), 2) == 1.0
    assert skew_left(layer_of(0, 0), {}, 2) == 1.0


# -- where what goes --------------------------------------------------------------------------------------------------


def test_the_heavy_expert_goes_to_the_fast_host():
    hosts = [Host("slow", BIG), Host("fast", BIG, 10.0, tier="cuda")]
    placement = place(layer_of(1, 1, 20), hosts, experts={0: 3}, expert_bytes={0: 1})
    assert placement.replicas[ExpertId(0, 2)] == ("fast",)
    assert set(placement.actors()) == {"fast", "slow"}


def test_spares_go_to_another_node_and_to_the_cheap_tier():
    gpus = [Host(f"gpu{i}", BIG, 4.0, f"n{i}", "cuda") for i in range(2)]
    cpus = [Host(f"cpu{i}", BIG, 4.0, f"n{i}", "cpu") for i in range(2)]
    placement = place(layer_of(8, 8, 8, 8), gpus + cpus, experts={0: 4}, expert_bytes={0: 1}, replicas=2)
    node = {host.actor_id: host.node_id for host in gpus + cpus}
    for first, second in placement.replicas.values():
        assert node[first] != node[second]
    assert any(second.startswith("cpu") for _, second in placement.replicas.values())


def test_a_pool_counts_a_shared_expert_once():
    pooled = [Host(f"a{i}", 4, node_id="n", pool="n", pool_bytes=4) for i in range(2)]
    both = place({}, pooled, experts={0: 4}, expert_bytes={0: 1}, replicas=2)
    assert all(len(actors) == 2 for actors in both.replicas.values())
    with pytest.raises(PlacementError, match="shared memories"):
        place({}, pooled, experts={0: 5}, expert_bytes={0: 1})


def test_a_tight_fit_is_found():
    hosts = [Host("large", 4), Host("b", 2), Host("c", 2)]
    placement = place({}, hosts, experts={0: 4}, expert_bytes={0: 1}, replicas=2)
    assert Counter(a for actors in placement.replicas.values() for a in actors) == {"large": 4, "b": 2, "c": 2}


def test_routing_groups_have_to_divide_the_experts():
    with pytest.raises(PlacementError, match="3 routing groups"):
        place({}, GPUS, experts={0: 4}, expert_bytes={0: 1}, routing_groups=3)


# -- from a placement that is there -----------------------------------------------------------------------------------

FOUR = [Host(f"a{i}", BIG, node_id=f"n{i % 2}") for i in range(4)]


def test_a_layer_within_the_tolerance_is_left_alone():
    load = layer_of(*[10.0] * 8) | layer_of(*[10.0] * 8, layer=1)
    old = place(load, FOUR, experts={0: 8, 1: 8}, expert_bytes={0: 1, 1: 1})
    now = load | layer_of(11, *[10.0] * 7) | layer_of(30, 10, 10, 10, 10, 10, 10, 10, layer=1)
    new = place(now, FOUR, experts={0: 8, 1: 8}, expert_bytes={0: 1, 1: 1}, current=old, max_skew=1.25)
    assert new.epoch == old.epoch + 1
    moved = {e.layer for experts in plan_diff(old, new).host.values() for e in experts}
    assert moved == {1}
    assert balance(new, now, FOUR)[1] < balance(old, now, FOUR)[1]


def test_a_move_that_costs_more_than_it_gains_is_not_made():
    old = place(layer_of(*[10.0] * 8), FOUR, experts={0: 8}, expert_bytes={0: 1})
    now = layer_of(14, *[10.0] * 7)
    costly = place(now, FOUR, experts={0: 8}, expert_bytes={0: 1}, current=old, migration_cost=1.0)
    assert plan_diff(old, costly).moves == 0


@pytest.mark.parametrize("actors", [2, 4, 12])
def test_a_new_actor_takes_its_part_and_no_more(actors):
    load = layer_of(*[10.0] * 48)
    old_hosts = [Host(f"a{i}", BIG) for i in range(actors)]
    options = {"experts": {0: 48}, "expert_bytes": {0: 1}, "max_skew": 1.25, "migration_cost": 0.02}
    old = place(load, old_hosts, **options)
    new = place(load, [*old_hosts, Host("new", BIG)], **options, current=old)
    assert 48 // (actors + 1) - 1 <= plan_diff(old, new).moves <= 48 // (actors + 1) + 1
    assert set(plan_diff(old, new).host) == {"new"}


def test_a_new_actor_gets_load_even_where_each_layer_is_as_even_as_can_be():
    """Fewer experts a layer than actors: only the totals tell that an actor is idle."""
    old_hosts = [Host(f"a{i}", BIG) for i in range(8)]
    experts = dict.fromkeys(range(20), 4)
    load = {ExpertId(layer, e): 10.0 for layer in experts for e in range(4)}
    options = {"experts": experts, "expert_bytes": dict.fromkeys(experts, 1), "max_skew": 1.25, "migration_cost": 0.02}
    old = place(load, old_hosts, **options)
    new = place(load, [*old_hosts, Host("new", BIG)], **options, current=old)
    assert 7 <= plan_diff(old, new).moves <= 9
    assert set(plan_diff(old, new).host) == {"new"}


def test_more_and_fewer_replicas_move_nothing_else():
    load = layer_of(40, *[10.0] * 7)
    one = place(load, FOUR, experts={0: 8}, expert_bytes={0: 1})
    two = place(
        load, FOUR, experts={0: 8}, expert_bytes={0: 1}, current=one, replicas={ExpertId(0, 0): 2}, max_skew=2.0
    )
    assert plan_diff(one, two).moves == 1
    back = place(load, FOUR, experts={0: 8}, expert_bytes={0: 1}, current=two, max_skew=9.0)
    assert plan_diff(two, back).moves == 0
    assert len(back.replicas[ExpertId(0, 0)]) == 1


# -- repair -----------------------------------------------------------------------------------------------------------


def test_repair_touches_only_what_was_lost():
    load = layer_of(*range(1, 13))
    old = place(load, FOUR, experts={0: 12}, expert_bytes={0: 1})
    lost, left = FOUR[0].actor_id, FOUR[1:]
    new = repair(old, left, load, expert_bytes={0: 1})
    assert new.epoch == old.epoch + 1
    for expert, actors in old.replicas.items():
        assert (new.replicas[expert] == actors) == (lost not in actors)
    assert lost not in new.actors()
    assert balance(new, load, left)[0] < 1.3


def test_repair_restores_the_replicas_as_far_as_there_are_hosts():
    old = place({}, FOUR, experts={0: 6}, expert_bytes={0: 1}, replicas=2)
    three = repair(old, FOUR[1:], {}, expert_bytes={0: 1}, replicas=2)
    assert all(len(set(actors)) == 2 for actors in three.replicas.values())
    one = repair(three, FOUR[3:], {}, expert_bytes={0: 1}, replicas=2)
    assert all(actors == ("a3",) for actors in one.replicas.values())


def test_repair_keeps_a_surplus_and_a_host_that_is_over_full():
    old = Placement(5, {ExpertId(0, 0): ("a0", "a1", "gone"), ExpertId(0, 1): ("gone",)})
    hosts = [Host("a0", 0), Host("a1", 2)]
    assert repair(old, hosts, {}, expert_bytes={0: 1}).replicas == {
        ExpertId(0, 0): ("a0", "a1"),
        ExpertId(0, 1): ("a1",),
    }


def test_repair_names_what_fits_nowhere():
    old = Placement(5, {ExpertId(3, e): ("gone",) for e in range(3)})
    with pytest.raises(PlacementError, match=r"2 replica\(s\).*3/1, 3/2"):
        repair(old, [Host("a", 1)], layer_of(3, 2, 1, layer=3), expert_bytes={3: 1})
    with pytest.raises(PlacementError, match="no expert actor is left"):
        repair(old, [], {}, expert_bytes={3: 1})


def test_repair_of_a_part_of_the_experts():
    old = Placement(1, {ExpertId(7, 40): ("gone",), ExpertId(7, 9): ("a",)})
    new = repair(old, [Host("a", 9)], {}, expert_bytes={7: 1})
    assert new.replicas == {ExpertId(7, 9): ("a",), ExpertId(7, 40): ("a",)}


# -- properties -------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 3))
    experts = {layer: draw(st.integers(1, 12)) for layer in range(layers)}
    load = {
        ExpertId(layer, e): draw(st.floats(0, 1000, allow_nan=False)) for layer, n in experts.items() for e in range(n)
    }
    count = draw(st.integers(1, 6))
    total = sum(experts.values())
    hosts = [
        Host(
            f"a{i}",
            draw(st.integers(total, 2 * total)),
            draw(st.sampled_from([1.0, 1.0, 2.0, 5.3])),
            f"n{draw(st.integers(0, 2))}",
            draw(st.sampled_from(["cpu", "cuda"])),
        )
        for i in range(count)
    ]
    replicas = {expert: draw(st.integers(1, min(3, count))) for expert in draw(st.sets(st.sampled_from(sorted(load))))}
    return experts, load, hosts, replicas


def check(placement, experts, hosts, replicas):
    assert set(placement.replicas) == {ExpertId(layer, e) for layer, n in experts.items() for e in range(n)}
    for expert, actors in placement.replicas.items():
        assert len(set(actors)) == len(actors) == replicas.get(expert, 1)
    for host in hosts:
        assert len(placement.hosted_by(host.actor_id)) <= host.capacity_bytes


@settings(max_examples=150, deadline=None)
@given(problems(), st.data())
def test_a_placement_is_whole_and_stays_when_nothing_changes(problem, data):
    experts, load, hosts, replicas = problem
    options = {"experts": experts, "expert_bytes": dict.fromkeys(experts, 1), "replicas": replicas}
    placement = place(load, hosts, **options)
    check(placement, experts, hosts, replicas)
    again = place(load, hosts, **options, current=placement)
    assert plan_diff(placement, again).moves == 0
    assert again == replace(placement, epoch=placement.epoch + 1)
    other = {expert: data.draw(st.floats(0, 1000)) for expert in load}
    moved = place(other, hosts, **options, current=placement, migration_cost=0.02, max_skew=1.25)
    check(moved, experts, hosts, replicas)
    before, after = balance(placement, other, hosts), balance(moved, other, hosts)
    # Idle experts weigh a little, which may cost their layer that much.
    assert all(after[layer] <= before[layer] * 1.05 + 1e-9 for layer in after)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_balance_stays_below_or_near_that_of_the_even_spread(problem):
    """Greedy packing has no guarantee layer by layer: one in 600 random problems was worse, by up to half."""
    experts, load, hosts, replicas = problem
    options = {"experts": experts, "expert_bytes": dict.fromkeys(experts, 1), "replicas": replicas}
    even, loaded = place({}, hosts, **options), place(load, hosts, **options)
    worse, better = balance(even, load, hosts), balance(loaded, load, hosts)
    assert all(better[layer] <= worse[layer] * 2 + 1e-9 for layer in better)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_repair_is_whole_and_minimal(problem, data):
    experts, load, hosts, replicas = problem
    placement = place(load, hosts, experts=experts, expert_bytes=dict.fromkeys(experts, 1), replicas=replicas)
    left = [host for host in hosts if data.draw(st.booleans())] or hosts[:1]
    there = {host.actor_id for host in left}
    fixed = repair(placement, left, load, expert_bytes=dict.fromkeys(experts, 1))
    for expert, actors in placement.replicas.items():
        kept = tuple(actor for actor in actors if actor in there)
        assert fixed.replicas[expert] == kept or (not kept and len(fixed.replicas[expert]) == 1)


def test_memory_that_just_suffices_suffices():
    """Of three experts one needs both hosts, which leaves the small one no room for another."""
    replicas = {ExpertId(0, 0): 1, ExpertId(0, 1): 2, ExpertId(0, 2): 1}
    load = {ExpertId(0, 0): 9.0, ExpertId(0, 1): 1.0, ExpertId(0, 2): 8.0}
    hosts = [Host("big", 3), Host("small", 1)]
    target = place(load, hosts, experts={0: 3}, expert_bytes={0: 1}, replicas=replicas)
    assert target.hosted_by("small") == (ExpertId(0, 1),)


@pytest.mark.parametrize(
    ("room", "expected"),
    [((4, 4, 4), (2, 2, 3, 2)), ((3, 3, 2), (2, 2, 2, 2)), ((2, 2, 2), (2, 1, 2, 1)), ((2, 2), (1, 1, 1, 1))],
    ids=["all", "none that is hot", "spares of the busier half", "one of each"],
)
def test_as_many_replicas_as_memory_holds(room, expected):
    hosts = [Host(f"h{i}", bytes_) for i, bytes_ in enumerate(room)]
    load = {ExpertId(0, expert): rows for expert, rows in enumerate((9.0, 1.0, 8.0, 2.0))}
    hot = {ExpertId(0, 2): 3}
    placement, short = fit(load, hosts, experts={0: 4}, expert_bytes={0: 1}, base=2, hot=hot)
    assert tuple(len(placement.replicas[ExpertId(0, expert)]) for expert in range(4)) == expected
    assert (short is None) == (room == (4, 4, 4))
    for too_few in ([Host("h", 3)], []):
        with pytest.raises(PlacementError):
            fit(load, too_few, experts={0: 4}, expert_bytes={0: 1}, base=2, hot=hot)

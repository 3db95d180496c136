"""Changes of a placement that do not fit into memory at once."""

from __future__ import annotations

import random

import pytest

from moeray.control.placement import Host, Placement
from moeray.control.staging import next_stage
from moeray.types import ExpertId

A, B, C, D = (ExpertId(0, expert) for expert in range(4))
ONE = {0: 1, 1: 2}


def hosts(pool="", pool_bytes=1 << 62, **rooms):
    return [Host(actor, room, pool=pool, pool_bytes=pool_bytes) for actor, room in rooms.items()]


def stages(current, target, where, sizes=ONE):
    seen = []
    while current.replicas != target.replicas:
        current = next_stage(current, target, where, sizes)
        if current is None:
            return [*seen, None]
        seen.append(dict(current.replicas))
    return seen


@pytest.mark.parametrize(
    ("current", "target", "where", "expected"),
    [
        pytest.param({}, {A: "x", B: "y"}, hosts(x=1, y=1), [{A: "x", B: "y"}], id="the first"),
        pytest.param({A: "x", B: "y"}, {A: "y", B: "x"}, hosts(x=2, y=2), [{A: "y", B: "x"}], id="there is room"),
        pytest.param(
            {A: "x", B: "y"}, {A: "y", B: "x"}, hosts(x=2, y=1), [{A: "x", B: "x"}, {A: "y", B: "x"}], id="one has room"
        ),
        pytest.param({A: "x", B: "y"}, {A: "y", B: "x"}, hosts(x=1, y=1), [None], id="nobody has room"),
        pytest.param(
            {A: "xy", B: "z"}, {A: "x", B: "y"}, hosts(x=1, y=1, z=1), [{A: "x", B: "z"}, {A: "x", B: "y"}],
            id="a spare that is to go makes room",
        ),
        pytest.param(
            {A: "xy", B: "zw"}, {A: "xz", B: "yw"}, hosts(x=1, y=1, z=1, w=1), [{A: "x", B: "w"}, {A: "xz", B: "wy"}],
            id="spares that change places go first where nothing else can",
        ),
        pytest.param(
            {A: "xy", B: "zw", C: "uv"}, {A: "xz", B: "yw", C: "us"}, hosts(x=1, y=1, z=1, w=1, u=1, v=1, s=1),
            [{A: "xy", B: "zw", C: "us"}, {A: "x", B: "w", C: "us"}, {A: "xz", B: "yw", C: "us"}],
            id="what finds room moves before anything is given up",
        ),
        pytest.param({A: "x", B: ""}, {A: "x", B: "y"}, hosts(x=1, y=1), [{A: "x", B: "y"}], id="repair"),
        pytest.param(
            {A: "x", B: ""}, {A: "y", B: "y"}, hosts(x=1, y=1), [{A: "x", B: "y"}, None], id="what has none goes first"
        ),
        pytest.param(
            {A: "g", B: "x"}, {A: "x", B: "x"}, hosts(x=2), [{A: "x", B: "x"}], id="an actor that leaves is no host"
        ),
        pytest.param(
            {A: "x", B: "y"}, {A: "y", B: "x"}, hosts("p", 2, x=2, y=2), [{A: "y", B: "x"}], id="in a pool it is there"
        ),
        pytest.param(
            {A: "x", C: "z"}, {A: "z", C: "x"}, [*hosts("p", 1, x=2), *hosts("q", 1, z=2)], [None], id="full pools"
        ),
        pytest.param(
            {A: "x", B: "x"}, {A: "x", B: "y"}, hosts(x=1, y=1), [{A: "x", B: "y"}], id="more than there is room for"
        ),
    ],
)  # fmt: skip
def test_stages(current, target, where, expected):
    def placed(told):
        return {expert: tuple(actors) for expert, actors in told.items()}

    got = stages(Placement(1, placed(current)), Placement(9, placed(target)), where)
    want = [told and {expert: sorted(held) for expert, held in placed(told).items()} for told in expected]
    assert [told and {expert: sorted(held) for expert, held in told.items()} for told in got] == want


def test_epochs_follow_the_current_one():
    assert next_stage(Placement(7), Placement(9, {A: ("x",)}), hosts(x=1), ONE) == Placement(8, {A: ("x",)})


@pytest.mark.parametrize("seed", range(200))
def test_no_stage_is_too_large_or_leaves_an_expert_without_a_replica(seed):
    rng = random.Random(seed)
    actors = [f"a{i}" for i in range(rng.randint(2, 6))]
    experts = [ExpertId(layer, e) for layer in range(2) for e in range(rng.randint(1, 6))]
    pools = {actor: rng.choice(["", "p", "q"]) for actor in actors}
    now, then = (
        {expert: tuple(rng.sample(actors, rng.randint(1, min(3, len(actors))))) for expert in experts} for _ in range(2)
    )
    where = []
    for actor in actors:
        pool = [actor] if not pools[actor] else [mate for mate in actors if pools[mate] == pools[actor]]
        own = max(taken(placed, [actor]) for placed in (now, then)) + rng.randint(0, 2)
        shared = max(taken(placed, pool) for placed in (now, then)) + random.Random(len(pool)).randint(0, 2)
        where.append(Host(actor, own, pool=pools[actor], pool_bytes=shared))
    current, target = Placement(1, now), Placement(2, then)
    while current.replicas != target.replicas:
        stage = next_stage(current, target, where, ONE)
        if stage is None:
            assert stuck(current, target, where)
            return
        for host in where:
            mates = [h.actor_id for h in where if (h.pool or h.actor_id) == (host.pool or host.actor_id)]
            for members, room in (([host.actor_id], host.capacity_bytes), (mates, host.pool_bytes)):
                assert taken({e: (*held, *current.replicas[e]) for e, held in stage.replicas.items()}, members) <= room
        for expert, held in stage.replicas.items():
            assert len(held) >= 1
            assert set(held) <= {*current.replicas[expert], *then[expert]}
            assert set(held) >= set(current.replicas[expert]) & set(then[expert])
        assert distance(stage, target) < distance(current, target)
        current = stage


def distance(current, target):
    return sum(len(set(current.replicas[e]) ^ set(held)) for e, held in target.replicas.items())


def taken(placed, actors):
    """Bytes of the experts that some of the actors hold."""
    return sum(ONE[expert.layer] for expert, held in placed.items() if set(held) & set(actors))


def stuck(current, target, where):
    """Nothing that is to come has room, and of what is to go from there nothing may."""
    full = set()
    for host in where:
        mates = [h.actor_id for h in where if (h.pool or h.actor_id) == (host.pool or host.actor_id)]
        for expert, held in target.replicas.items():
            if host.actor_id in held and host.actor_id not in current.replicas[expert]:
                size = ONE[expert.layer]
                pooled = 0 if set(mates) & set(current.replicas[expert]) else size
                own = taken(current.replicas, [host.actor_id]) + size > host.capacity_bytes
                assert own or taken(current.replicas, mates) + pooled > host.pool_bytes
                full |= set(mates)
    going = [(e, a) for e, held in current.replicas.items() for a in held if a not in target.replicas[e] and a in full]
    return all(len(current.replicas[expert]) == 1 for expert, _ in going)

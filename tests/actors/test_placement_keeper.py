"""Keeping experts placed while actors come, go, fail and answer late: the real keeper over actors that are a few lines.

Each actor answers its calls in order, whenever the test lets it.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

from moeray.actors.audit import Audit
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.placement_keeper import STALL_S, PlacementKeeper
from moeray.actors.planner import ModelShape
from moeray.actors.roster import Actor, Roster
from moeray.actors.spec import ActorReport
from moeray.config import config_from
from moeray.control.fleet import Phase
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport
from moeray.errors import ActorLostError, CheckpointError
from moeray.types import Address, ExpertId

GIB = 1 << 30
LAYERS, EXPERTS = 2, 4
ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


class Calls:
    """What an actor was told and has not answered yet."""

    def __init__(self):
        self.waiting = deque()

    def put(self, method, *args, then):
        self.waiting.append((method, args, then))

    def tell(self, method, *args):
        self.put(method, *args, then=lambda *_: None)


class Load:
    """What is known of the load."""

    def __init__(self):
        self.rows, self.speeds = {}, {}

    def load(self):
        return self.rows

    def rates(self):
        return self.speeds


class World:
    """A keeper and the actors that it keeps; `room`: experts that an expert actor holds at most."""

    def __init__(self, replicas=1, room=None):
        experts = {"actors": 3, "replicas": replicas, "min_actors": 1, "max_actors": 9, "memory_gib": room}
        self.config = config_from({"model": "m", "experts": experts, "control": {"max_skew": 1.1, "window_s": 1.0}})
        self.now = 0.0
        self.wanted = {"experts": 3, "router": 1}
        self.roster, self.load, self.audit = Roster(), Load(), Audit(None)
        shape = ModelShape(dict.fromkeys(range(LAYERS), EXPERTS), dict.fromkeys(range(LAYERS), GIB), 0)
        self.keeper = PlacementKeeper(
            self.config, self.roster, self.audit, shape, self.load, lambda: self.wanted, lambda error: None,
            ControllerMetrics(self.config), lambda: self.now,
        )  # fmt: skip
        self.mapped = {}
        self.held = {}
        self.most = 0  # experts that an actor has ever held at one time
        self.sick = set()
        self.hung = set()  # they answer nothing, and their channels go on
        self._started = 0

    def add(self, group="experts"):
        name = f"{group}-{self._started}"
        kind = self.config.experts.resolved()[0] if group == "experts" else None
        report, address = ActorReport(name, "n", 1, "cpu", 1 << 50), Address(name, "n", "unix")
        actor = Actor(name, kind, self._started, self.config, Phase.READY, report=report, address=address)
        actor.calls = Calls()
        self._started += 1
        self.roster.add(actor)
        if kind is None:
            self.held[name] = Placement()
            self.keeper.welcome(actor)
        else:
            self.mapped[name] = set()
        return actor

    def remove(self, actor):
        self.roster.remove(actor.actor_id)
        self.mapped.pop(actor.actor_id, None)
        self.held.pop(actor.actor_id, None)

    def lose(self, actor):
        self.remove(actor)
        self.keeper.on_lost(actor)

    def answer(self, actor):
        """The actor does what it was told first, if it was told anything."""
        if not actor.calls.waiting:
            return False
        name = actor.actor_id
        if name in self.hung:
            return False
        method, args, then = actor.calls.waiting.popleft()
        if method == "host" and name in self.sick:
            then(None, CheckpointError("a read error"))
        elif method == "host":
            self.mapped[name] |= {ExpertId(*expert) for expert in args[0]}
            self.most = max(self.most, len(self.mapped[name]))
            then(1, None)
        elif method == "unhost":
            self.mapped[name] -= {ExpertId(*expert) for expert in args[0]}
            then(1, None)
        else:
            told = Placement.from_tree(args[0])
            self.held[name] = max(self.held[name], told, key=lambda placement: placement.epoch)
            then(self.held[name].epoch, None)
        return True

    def progress(self, actor):
        """It reports that it has mapped something."""
        actor.latest = ExpertReport(actor.actor_id, "1", memory_bytes=actor.hosted_bytes + GIB)

    def step(self, likely=1.0, rng=random):
        self.now += 0.25
        self.keeper.look_at_mapping()
        self.keeper.replan()
        for actor in self.keeper.emptied():
            self.remove(actor)
        for actor in self.roster:
            while rng.random() < likely and self.answer(actor):
                pass

    def settle(self, seconds=10.0):
        for _ in range(int(4 * seconds)):
            self.step()
        return self

    def hosted(self, actor):
        return set(self.keeper.placement.hosted_by(actor.actor_id))

    def without(self):
        return [expert for expert in ALL if not self.keeper.placement.replicas.get(expert)]

    def named_and_gone(self):
        """(router, actor, expert) of living actors to which a router may still send what they have dropped."""
        return [
            (router, actor, expert)
            for router, placement in self.held.items()
            for expert, held in placement.replicas.items()
            for actor in held
            if expert not in self.mapped.get(actor, {expert})
        ]

    def check(self):
        """All is as the placement says, and nothing is under way."""
        placement = self.keeper.placement
        assert self.keeper.change is None
        assert all(held == placement for held in self.held.values())
        assert all(mapped == set(placement.hosted_by(name)) for name, mapped in self.mapped.items())
        assert all(len(set(held)) == len(held) for held in placement.replicas.values())


def started(actors=3, **world):
    made = World(**world)
    made.wanted["experts"] = actors
    made.add("router")
    experts = [made.add() for _ in range(actors)]
    made.settle()
    made.check()
    assert not made.without()
    return made, experts


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_it_comes_to_rest_with_every_expert_placed(seed, replicas):
    rng = random.Random(seed)
    world, _ = started(replicas=replicas)
    for _ in range(60):
        happen(world, rng)
        world.step(0.6, rng)
        assert not world.named_and_gone()
    world.sick.clear()
    world.settle(150.0)  # longer than a pause after failures
    world.check()
    least = min(replicas, world.wanted["experts"], len(world.roster.experts(Phase.READY)))
    assert all(len(held) >= least for held in world.keeper.placement.replicas.values())
    assert not world.roster.experts(Phase.LEAVING)


@pytest.mark.parametrize("room", [3, 4, 5])
@pytest.mark.parametrize("seed", range(20))
def test_no_actor_ever_holds_more_than_it_has_room_for(seed, room):
    rng = random.Random(seed)
    world, _ = started(room=room)
    for _ in range(60):
        happen(world, rng)
        if rng.random() < 0.3:
            world.keeper.replan(force=True)
        world.step(0.6, rng)
        assert world.most <= room
        assert not world.named_and_gone()
    world.sick.clear()
    world.wanted["experts"] = 4
    while len(world.roster.experts(Phase.READY)) < 4:
        world.add()
    world.settle(150.0)
    world.check()
    assert world.most <= room
    assert not world.without()
    assert not world.roster.experts(Phase.LEAVING)


def test_experts_change_places_by_way_of_the_last_free_place():
    world, experts = started(actors=2, room=5)
    world.keeper.replicas = {ALL[0]: 2}
    world.settle().check()
    roomy, full = sorted(experts, key=lambda actor: len(world.hosted(actor)))
    assert [len(world.hosted(actor)) for actor in (roomy, full)] == [4, 5]
    hot = [expert for expert in world.hosted(roomy) - world.hosted(full) if expert.layer == 1]
    world.load.rows = dict.fromkeys(ALL, 1.0) | dict.fromkeys(hot, 100.0)
    before = len(world.audit.recent)
    world.settle().check()
    began = [entry for entry in list(world.audit.recent)[before:] if entry["event"] == "plan"]
    assert [entry["hosts"].keys() for entry in began] == [{roomy.actor_id}, {full.actor_id}]
    assert len({(entry["kind"], entry["why"]) for entry in began}) == 1
    assert 0 < len(world.hosted(full) & set(hot)) < len(hot)
    assert world.most == 5


def happen(world, rng):
    experts, routers, dice = world.roster.experts(), world.roster.routers(), rng.random()
    ready = world.roster.experts(Phase.READY)
    if dice < 0.06:
        world.wanted["experts"] = rng.randint(1, 4)
    elif dice < 0.12 and len(experts) < 6:
        world.add()
    elif dice < 0.18 and len(ready) > 1:
        world.lose(rng.choice(ready))
    elif dice < 0.24 and len(ready) > 1:
        rng.choice(ready).phase = Phase.LEAVING
    elif dice < 0.28:
        world.add("router")
    elif dice < 0.32 and len(routers) > 1:
        world.lose(rng.choice(routers))
    elif dice < 0.40:
        world.load.rows = {expert: 100 * rng.random() ** 4 for expert in ALL}
    elif dice < 0.45:
        world.keeper.replicas = {rng.choice(ALL): 2}
    elif dice < 0.48:
        world.keeper.heal()
    elif dice < 0.52 and experts:
        world.sick ^= {rng.choice(experts).actor_id}


def test_a_late_answer_of_an_abandoned_change_says_nothing_of_the_next_one():
    world, (first, *_) = started(actors=2)
    world.wanted["experts"] = 3
    third = world.add()
    world.keeper.replan()  # asks the third to host some
    assert world.keeper.change is not None
    world.lose(first)  # whose experts are to be hosted by the others instead, before anything else
    assert world.answer(third)  # what it was asked for the change that is abandoned
    published = world.keeper.placement.hosted_by(third.actor_id)
    assert set(published) <= world.mapped[third.actor_id]
    world.settle().check()
    assert not world.without()


def test_an_actor_that_maps_nothing_more_keeps_no_expert_without_a_replica():
    world, (hung, lost, _) = started(actors=3)
    failures = []
    world.keeper._on_failure = failures.append
    world.hung.add(hung.actor_id)
    world.lose(lost)
    world.settle(STALL_S / 2)
    assert world.without()
    world.progress(hung)
    world.settle(STALL_S - 5.0)
    assert world.keeper.change is not None
    world.settle(10.0)
    assert not world.without()
    assert world.keeper.change is None
    assert any("mapped nothing" in str(entry.get("error")) for entry in world.audit.recent)
    world.hung.clear()
    world.settle(150.0).check()
    assert not failures


def test_an_actor_that_dies_while_the_first_placement_is_mapped_is_no_failed_start():
    for how in ("watched", "asked"):
        world, failures = World(), []
        world.keeper._on_failure = failures.append
        world.add("router")
        first, *_ = [world.add() for _ in range(3)]
        world.keeper.replan()
        if how == "asked":
            _, _, then = first.calls.waiting.popleft()
            then(None, ActorLostError("it is gone"))
        world.lose(first)
        world.add()
        world.settle().check()
        assert not world.without()
        assert not failures


def test_the_first_placement_is_not_begun_by_a_loss():
    world = World()
    _, second = world.add(), world.add()
    world.lose(second)
    assert world.keeper.change is None


def test_an_actor_that_leaves_while_a_repair_maps_its_experts_is_emptied():
    world, (only,) = started(actors=1, replicas=2)
    world.wanted["experts"] = 2
    other = world.add()
    world.keeper.replan()
    assert world.keeper.change is not None
    other.phase, world.wanted["experts"] = Phase.LEAVING, 1
    world.settle()
    assert world.roster.get(other.actor_id) is None
    assert world.hosted(only) == set(ALL)


def test_an_actor_that_cannot_map_is_left_out_and_asked_again_later():
    world, (first, *_) = started(actors=3)
    world.wanted["experts"] = 4
    sick = world.add()
    world.sick.add(sick.actor_id)
    world.lose(first)
    world.settle(20.0)
    world.check()
    assert not world.without()
    assert not world.hosted(sick)
    plans = [entry for entry in world.audit.recent if entry["event"] == "plan"]
    assert len(plans) < 12
    world.sick.clear()
    world.settle(150.0)
    assert world.hosted(sick)


def test_experts_without_a_replica_get_one_where_there_is_no_room_for_spares():
    world, (first, second, *_) = started(actors=4, replicas=2, room=5)
    world.lose(first)
    world.lose(second)  # 10 places are left for 8 experts, and not for 16
    world.settle()
    world.check()
    assert not world.without()
    assert any("expert actors" in str(entry.get("error")) for entry in world.audit.recent)


@pytest.mark.parametrize(("actors", "room"), [(4, 4), (4, 5), (3, 6), (3, 7)])
def test_memory_for_some_of_the_replicas_is_filled_once(actors, room):
    world, experts = started(actors=actors, replicas=2, room=room)
    world.wanted["experts"] = 2
    for lost in experts[2:]:
        world.lose(lost)
    world.settle(20.0).check()
    assert not world.without()
    epoch = world.keeper.placement.epoch
    assert epoch < 12
    world.settle(30.0).check()
    assert world.keeper.placement.epoch == epoch
    held = sum(len(actors) for actors in world.keeper.placement.replicas.values())
    assert held >= min(2 * room, 16) - 4  # whole halves, quarters and eighths of the experts have a spare


def test_replicas_that_memory_does_not_hold_stop_nothing_else():
    world, (first, *_) = started(actors=3, room=4)
    world.keeper.replicas = dict.fromkeys(ALL, 3)
    world.wanted["experts"] = 2
    first.phase = Phase.LEAVING
    world.settle()
    assert world.roster.get(first.actor_id) is None
    world.check()
    assert not world.without()


def test_a_shortage_is_written_down_whenever_it_comes_and_once_while_it_lasts():
    world, _ = started(actors=2, replicas=1, room=5)

    def written():
        return sum(entry["event"] == "no_room" for entry in world.audit.recent)

    for times in (1, 2):
        world.keeper.replicas = dict.fromkeys(ALL, 2)
        world.settle()
        assert written() == times
        world.keeper.replicas = {}
        world.settle().check()
        assert written() == times


def test_a_router_that_acknowledges_one_placement_has_a_new_lease_for_the_next():
    world, (first, *_) = started(actors=4, replicas=2)
    (router,) = world.roster.routers()
    lease = world.config.control.lease_s
    world.lose(first)
    world.now += 0.9 * lease
    world.keeper.publish(Placement(world.keeper.placement.epoch + 1, world.keeper.placement.replicas))
    world.answer(router)  # the first of the two
    world.now += 0.9 * lease
    assert not world.keeper.late_routers()
    world.now += 0.2 * lease
    assert world.keeper.late_routers() == [router]


def test_a_measured_speed_moves_experts_once():
    """Of two actors of one group one turns out to be four times as fast."""
    world, (fast, slow) = started(actors=2)
    world.load.rows = dict.fromkeys(ALL, 10.0)
    world.settle().check()
    even = world.hosted(fast), world.hosted(slow)
    assert len(even[0]) == len(even[1]) == len(ALL) // 2
    world.load.speeds = {fast.actor_id: 400.0, slow.actor_id: 100.0}
    world.settle().check()
    assert len(world.hosted(fast)) > len(world.hosted(slow)) > 0
    plans = sum(entry["event"] == "plan" for entry in world.audit.recent)
    world.settle().check()
    assert sum(entry["event"] == "plan" for entry in world.audit.recent) == plans

"""A cluster on which not every actor has room: who waits says so, and the warm pool gives way to the only router."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

from moeray.actors import departures, roster
from moeray.cluster.local import LocalCluster
from moeray.model.loading import open_model
from tests.actors.test_controller import audit, config_of, settled, until
from tests.checkpoints import make_tiny
from tests.systems import GREEDY24, LocalSystem, tokens_of

PROMPTS = [[5, 9, 33], [8] * 7]


class Queued:
    """An actor that has been asked for. As with Ray, its calls are answered once there is a process."""

    def __init__(self, actor_id, make, cluster):
        self.actor_id = actor_id
        self._make = make
        self._cluster = cluster
        self.waiting = []
        self.process = None

    def admit(self):
        self.process = self._make()
        for future, method, args in self.waiting:
            self._forward(future, method, args)

    def call(self, method, *args):
        if self.process is not None:
            return self.process.call(method, *args)
        future = Future()
        self.waiting.append((future, method, args))
        return future

    def _forward(self, future, method, args):
        def done(answer):
            error = answer.exception()
            future.set_result(answer.result()) if error is None else future.set_exception(error)

        self.process.call(method, *args).add_done_callback(done)

    def kill(self):
        if self.process is not None:
            self.process.kill()
        self._cluster.leave(self)


class CrowdedCluster(LocalCluster):
    """Has room for so many actors; the others wait in the order in which they were asked for."""

    def __init__(self, room):
        super().__init__()
        self._room = room
        self.queued = []
        self._lock = threading.RLock()

    def start_expert(self, spec, group):
        return self._ask(spec.actor_id, lambda: super(CrowdedCluster, self).start_expert(spec, group))

    def start_router(self, spec, router):
        return self._ask(spec.actor_id, lambda: super(CrowdedCluster, self).start_router(spec, router))

    def _ask(self, actor_id, make):
        with self._lock:
            self.queued.append(Queued(actor_id, make, self))
            asked = self.queued[-1]
            self._admit()
        return asked

    def leave(self, gone):
        with self._lock:
            self.queued = [queued for queued in self.queued if queued is not gone]
            self._admit()

    def resize(self, room):
        """Others take room, or leave it; whoever has a process keeps it."""
        with self._lock:
            self._room = room
            self._admit()

    def _admit(self):
        for queued in self.queued:
            if queued.process is None and sum(q.process is not None for q in self.queued) < self._room:
                queued.admit()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("room") / "m")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(roster, "ROOM_S", 0.5)


def tokens(system):
    """Of a router that serves now."""
    until(system.controller, lambda _: system.controller.state()["info"].routers)
    system.info = system.controller.state()["info"]
    return [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)]


def states(status):
    return {row["actor"]: row["state"] for row in status["actors"]}


def test_the_warm_pool_gives_its_room_to_the_only_router(model, tmp_path):
    cluster = CrowdedCluster(3)
    with LocalSystem(config_of(model, tmp_path, experts__actors=1, control__warm_pool=1), cluster) as system:
        before = tokens(system)
        until(system.controller, settled)
        cluster.resize(2)  # another job takes what the router leaves
        system.handle("router-0").kill()
        states_then = states(until(system.controller, lambda s: states(s).get("router-1") == "ready"))
        assert states_then["experts-0"] == "ready"
        assert states_then.get("experts-1") is None
        until(system.controller, lambda s: "pending" in states(s).values())  # the pool is still wanted
        assert tokens(system) == before
        cluster.resize(3)
        until(system.controller, settled)


def test_a_deadline_given_later_holds_for_a_router_that_leaves_already(model, tmp_path):
    cluster = CrowdedCluster(2)
    with LocalSystem(config_of(model, tmp_path, experts__actors=1), cluster) as system:
        before = tokens(system)
        system.controller.commands.drain(["router-0"])
        until(system.controller, lambda s: states(s).get("router-1") == "pending")
        system.controller.commands.drain(["router-0"], 0.5)
        until(system.controller, lambda s: states(s).get("router-1") == "ready")
        assert tokens(system) == before


def test_an_actor_that_does_not_get_ready_is_given_up_for_another(model, tmp_path):
    """As one that hangs before it listens, of which nobody can tell whether it waits for room."""
    cluster = CrowdedCluster(2)
    with LocalSystem(config_of(model, tmp_path, experts__actors=1, experts__max_actors=2), cluster) as system:
        before = tokens(system)
        until(system.controller, settled)
        system.controller.commands.scale({"experts": 2})
        until(system.controller, lambda s: states(s).get("experts-1") == "pending")
        control = replace(system.config.control, start_s=0.5)
        system.controller.configure(replace(system.config, control=control), time.time())
        until(system.controller, lambda s: states(s).get("experts-2") == "pending")
        control = replace(control, start_s=60.0)
        system.controller.configure(replace(system.config, control=control), time.time())
        cluster.resize(3)
        until(system.controller, lambda s: settled(s) and s["ready"]["experts"] == 2)
        assert tokens(system) == before
    (failed, *_) = [entry for entry in audit(tmp_path) if entry["event"] == "start_failed"]
    assert failed["actor"] == "experts-1"
    assert "control.start_s" in failed["error"]


def test_an_end_does_not_wait_for_who_has_no_process(model, tmp_path):
    cluster = CrowdedCluster(3)
    with LocalSystem(config_of(model, tmp_path, experts__actors=1, experts__max_actors=3), cluster) as system:
        system.controller.commands.scale({"experts": 3})
        until(system.controller, lambda s: "pending" in states(s).values())
        waiting = [queued for queued in cluster.queued if queued.process is None]
    assert len(waiting) == 1
    assert "stop" not in [method for _, method, _ in waiting[0].waiting]
    assert not cluster.queued


def test_who_cannot_be_spared_stays(model, tmp_path):
    """One actor has no room for all experts, so nobody can leave; wanted again, they go on, and nobody waits."""
    files = open_model(str(model), None, node="here")
    most = max(files.expert_bytes("none").values()) * (sum(files.expert_counts().values()) // 2 + 2)
    small = {"experts__actors": 3, "experts__min_actors": 1, "experts__max_actors": 3, "control__autoscale": False}
    config = config_of(model, tmp_path, experts__memory_gib=most / 2**30, **small)
    with LocalSystem(config, CrowdedCluster(4)) as system:
        before = tokens(system)
        system.controller.commands.scale({"experts": 1})
        until(system.controller, lambda s: list(states(s).values()).count("draining") == 2)
        system.controller.commands.scale({"experts": 3})
        after = until(system.controller, settled)
        assert sorted(states(after)) == ["experts-0", "experts-1", "experts-2", "router-0"]
        assert tokens(system) == before


def test_the_only_router_stays_until_there_is_room_for_another(model, tmp_path):
    cluster = CrowdedCluster(2)
    with LocalSystem(config_of(model, tmp_path, experts__actors=1), cluster) as system:
        before = tokens(system)
        system.controller.commands.drain(["router-0"])
        waiting = until(system.controller, lambda s: states(s).get("router-1") == "pending")
        assert states(waiting)["router-0"] == "draining"
        assert tokens(system) == before
        cluster.resize(3)
        moved = until(system.controller, lambda s: settled(s) and "router-0" not in states(s))
        assert states(moved)["router-1"] == "ready"
        assert tokens(system) == before


class FragileCluster(LocalCluster):
    """The second expert actor dies while it maps its first experts, once."""

    def __init__(self):
        super().__init__()
        self.died = []

    def start_expert(self, spec, group):
        handle = super().start_expert(spec, group)
        call = handle.call

        def dies(method, *args):
            if method == "host" and spec.actor_id == "experts-1" and not self.died:
                self.died.append(spec.actor_id)
                handle.kill()  # its channels close, and what it was told is never answered
                return Future()
            return call(method, *args)

        handle.call = dies
        return handle


def test_an_actor_that_dies_during_the_start_is_replaced(model, tmp_path):
    cluster = FragileCluster()
    with LocalSystem(config_of(model, tmp_path, experts__actors=2, experts__max_actors=2), cluster) as system:
        assert cluster.died
        status = until(system.controller, settled)
        assert sorted(states(status)) == ["experts-0", "experts-2", "router-0"]
        assert tokens(system)
    assert ("lost", "experts-1") in {(entry["event"], entry.get("actor")) for entry in audit(tmp_path)}


class Unanswered:
    """An actor that does what it is told, of which nobody hears that it has done this."""

    def __init__(self, process, what):
        self.actor_id = process.actor_id
        self._process = process
        self._what = what

    def call(self, method, *args):
        answer = self._process.call(method, *args)
        return Future() if method == self._what else answer

    def kill(self):
        self._process.kill()


class SilentCluster(LocalCluster):
    def __init__(self, what):
        super().__init__()
        self._what = what

    def start_expert(self, spec, group):
        process = super().start_expert(spec, group)
        return Unanswered(process, self._what) if spec.actor_id == "experts-2" else process


@pytest.mark.parametrize("what", ["drain", "metrics", "stop"])
def test_an_actor_whose_end_nobody_hears_of_has_left_when_its_time_is_over(model, tmp_path, monkeypatch, what):
    monkeypatch.setattr(departures, "STOP_S", 0.2)
    config = config_of(model, tmp_path, experts__actors=3, experts__min_actors=2, control__drain_s=0.2)
    with LocalSystem(config, SilentCluster(what)) as system:
        system.controller.commands.scale({"experts": 2})
        status = until(system.controller, settled)
        assert sorted(states(status)) == ["experts-0", "experts-1", "router-0"]
    happened = {(entry["event"], entry.get("actor")) for entry in audit(tmp_path)}
    assert ("stopped", "experts-2") in happened
    assert ("lost", "experts-2") not in happened

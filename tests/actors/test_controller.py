"""The controller over real actors in this process: scaling, draining, the warm pool, and a second controller."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moeray.actors import handover
from moeray.actors.controller import Controller
from moeray.cluster.local import NODE, LocalCluster
from moeray.errors import ConfigError, MoerayError, PlacementError
from tests.checkpoints import make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

PROMPTS = [[5, 9, 33], list(range(10, 70)), [8] * 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("controller") / "m")


@pytest.fixture(scope="module")
def expected(model):
    with LocalSystem(tiny_config(model)) as system:
        return [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)]


def config_of(model, tmp_path, **overrides):
    return tiny_config(model, control__audit_log=str(tmp_path / "audit.jsonl"), **overrides)


def until(controller, what, timeout=60.0):
    """The status, as soon as `what` holds of it; each look is a round trip to every actor."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        status = controller.status()
        if what(status):
            return status
    raise AssertionError(f"it did not come to pass: {status}")


def settled(status):
    return (
        not status["changing"]
        and all(status["ready"][g] == n + status["reserve"].get(g, 0) for g, n in status["wanted"].items())
        and status["fewest_replicas"] >= status["replicas_wanted"]
        and not any(row["state"] in ("pending", "starting", "silent", "draining") for row in status["actors"])
    )


def tokens(system):
    return [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)]


def audit(tmp_path):
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def test_growing_and_shrinking_by_hand(model, expected, tmp_path):
    config = config_of(model, tmp_path, experts__min_actors=1, experts__max_actors=4)
    with LocalSystem(config) as system:
        controller = system.controller
        for count in (4, 1, 3):
            assert controller.commands.scale({"experts": count})["experts"] == count
            status = until(controller, settled)
            hosts = [row for row in status["actors"] if row["kind"] == "expert"]
            assert len(hosts) == count
            assert all(row["experts"] > 0 for row in hosts)
            assert tokens(system) == expected
    events = [entry["event"] for entry in audit(tmp_path)]
    assert events.count("scale") == 3
    assert "lost" not in events
    assert {"plan", "plan_ended", "leave", "stopped"} <= set(events)


def test_a_controller_says_where_it_runs_before_anything_else_does(model, tmp_path):
    system = LocalSystem(config_of(model, tmp_path))
    before = system.controller.status()
    assert before["status"] == "loading"
    assert before["controller"] == {"node": NODE, "pid": os.getpid()}
    with system:
        assert system.controller.status()["controller"] == before["controller"]


def test_a_system_that_was_stopped_does_not_say_that_it_is_ready(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        assert system.controller.status()["status"] == "ready"
    assert system.controller.status()["status"] == "stopping"
    assert system.controller.state()["info"] is None


def test_a_size_beyond_the_limits_is_refused(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path, experts__max_actors=3)) as system:
        with pytest.raises(ConfigError, match="outside 2 to 3"):
            system.controller.commands.scale({"experts": 4})
        with pytest.raises(ConfigError, match="no group 'other'"):
            system.controller.commands.scale({"other": 1})
        with pytest.raises(MoerayError, match="experts-0, experts-1, router-0"):
            system.controller.commands.drain(["experts-7"])


def test_of_several_sizes_or_actors_all_are_taken_or_none(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path, experts__max_actors=3, router__max_actors=2)) as system:
        commands = system.controller.commands
        with pytest.raises(ConfigError, match="router=9 is outside 1 to 2"):
            commands.scale({"experts": 3, "router": 9})
        with pytest.raises(MoerayError, match="no actor 'experts-7'"):
            commands.drain(["experts-0", "experts-7"])
        assert system.controller.status()["wanted"] == {"experts": 2, "router": 1}
        assert not {"scale", "drain"} & {entry["event"] for entry in audit(tmp_path)}
        assert commands.scale({"experts": 3, "router": 2}) == {"experts": 3, "router": 2}
        assert commands.drain(["experts-0", "router-0"], None, ["elsewhere"]) == ["experts-0", "router-0"]
        gone = {"experts-0", "router-0"}
        until(system.controller, lambda s: settled(s) and not gone & {row["actor"] for row in s["actors"]})
        here = {row["actor"] for row in system.controller.status()["actors"]}
        told = commands.drain(["router-1"], None, [NODE])
        assert (told[0], set(told)) == ("router-1", here)
        until(system.controller, lambda s: settled(s) and not here & {row["actor"] for row in s["actors"]})


def test_a_warm_actor_takes_over_and_the_pool_is_filled_again(model, expected, tmp_path):
    with LocalSystem(config_of(model, tmp_path, control__warm_pool=1)) as system:
        before = until(system.controller, settled)
        warm = [row["actor"] for row in before["actors"] if row["state"] == "warm"]
        assert len(warm) == 1
        victim = next(r["actor"] for r in before["actors"] if r["kind"] == "expert" and r["state"] == "ready")
        system.handle(victim).call("stop").result(10)
        assert tokens(system) == expected
        after = until(system.controller, lambda s: settled(s) and victim not in {r["actor"] for r in s["actors"]})
        serving = {row["actor"] for row in after["actors"] if row["state"] == "ready" and row["kind"] == "expert"}
        assert warm[0] in serving
        assert sum(row["state"] == "warm" for row in after["actors"]) == 1
        assert tokens(system) == expected


def test_draining_replaces_without_a_loss(model, expected, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        for actor in ("experts-0", "router-0"):
            system.controller.commands.drain([actor])
            until(system.controller, lambda s, a=actor: settled(s) and a not in {r["actor"] for r in s["actors"]})
        system.info = system.controller.state()["info"]
        assert tokens(system) == expected
    assert "lost" not in [entry["event"] for entry in audit(tmp_path)]


def test_a_plan_changes_nothing(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path, experts__max_actors=4)) as system:
        before = system.controller.status()["epoch"]
        plan = system.controller.commands.plan()
        assert plan["now"] == {"experts": 2, "router": 1}
        assert plan["placement"] is None
        assert plan["autoscaling"] is True
        assert system.controller.status()["epoch"] == before
        assert json.dumps(plan)


def test_pausing_is_kept_by_the_next_controller_which_takes_everything_over(model, expected, tmp_path):
    config = config_of(model, tmp_path, experts__max_actors=3, experts__replicas=2)
    with LocalSystem(config) as system:
        first = system.controller
        first.commands.scale({"experts": 3})
        before = until(first, settled)
        first.commands.pause(True)
        first.abandon()
        assert tokens(system) == expected  # nobody controls, and all goes on
        routers = system.info.routers
        system.take_over()
        assert system.info.routers == routers
        after = until(system.controller, settled)
        assert after["wanted"] == {"experts": 3, "router": 1}
        assert not after["autoscaling"]
        assert {row["actor"] for row in after["actors"]} == {row["actor"] for row in before["actors"]}
        assert tokens(system) == expected
        system.handle("experts-2").call("stop").result(10)
        assert tokens(system) == expected
        until(system.controller, settled)
    left = {thread.name for thread in threading.enumerate()}
    assert not {name for name in left if name.startswith(("controller", "watch-", "vigil", "step-loop"))}


def test_a_running_system_is_taken_over_where_no_audit_log_can_be_kept(model, expected, tmp_path):
    folder = tmp_path / "audit"
    with LocalSystem(config_of(model, folder, experts__actors=2)) as system:
        system.controller.abandon()
        shutil.rmtree(folder)
        folder.write_text("in the way")
        system.take_over()
        system.handle("experts-1").call("stop").result(10)
        assert tokens(system) == expected
        assert until(system.controller, settled)["decisions"]
    refused = LocalSystem(system.config)
    with pytest.raises(ConfigError, match="no audit log can be kept"):
        refused.controller.start()


def test_what_the_config_says_of_autoscaling_holds_for_the_next_controller(model, tmp_path):
    """Unless somebody said otherwise since the system began; a pause of an earlier system is past."""
    config = config_of(model, tmp_path, control__autoscale=False)

    def next_one(system):
        system.controller.abandon()
        system.take_over()
        return system.controller.status()["autoscaling"]

    with LocalSystem(config) as system:
        assert not next_one(system)
        system.controller.commands.pause(False)
        assert next_one(system)
        system.controller.commands.pause(True)
    scaling = replace(config, control=replace(config.control, autoscale=True))
    with LocalSystem(scaling) as system:
        assert next_one(system)


def test_a_takeover_goes_on_from_what_was_wanted_whoever_died_meanwhile(model, expected, tmp_path):
    """Two of three expert actors die with the controller, and one is about to go: nobody forgets that."""
    config = config_of(
        model, tmp_path, experts__actors=2, experts__min_actors=1, experts__max_actors=4, experts__replicas=2,
        control__autoscale=False,
    )  # fmt: skip
    with LocalSystem(config) as system:
        system.controller.commands.scale({"experts": 3})
        until(system.controller, settled)
        system.controller.commands.drain(["experts-0"], within_s=60.0)
        system.controller.abandon()
        for victim in ("experts-1", "experts-2"):
            system.handle(victim).call("stop").result(10)
        system.take_over()
        after = until(system.controller, lambda s: settled(s) and "experts-0" not in {r["actor"] for r in s["actors"]})
        assert after["wanted"] == {"experts": 3, "router": 1}
        assert after["ready"]["experts"] == 3
        assert not {row["actor"] for row in after["actors"]} & {"experts-1", "experts-2"}  # no name is used twice
        assert tokens(system) == expected


def lose_all(system):
    """The controller and every actor, in no good order."""
    system.controller.abandon()
    for handle in system.cluster.find():
        handle.kill()


def test_what_was_wanted_outlives_the_controller_and_all_actors(model, expected, tmp_path):
    config = config_of(model, tmp_path, experts__actors=2, experts__max_actors=4, router__max_actors=2)
    with LocalSystem(config) as system:
        system.controller.commands.scale({"experts": 3, "router": 2})
        system.controller.commands.pause(True)
        before = until(system.controller, settled)
        lose_all(system)
        system.take_over()
        after = until(system.controller, settled)
        assert after["wanted"] == {"experts": 3, "router": 2}
        assert not after["autoscaling"]
        assert "restored" in {entry["event"] for entry in audit(tmp_path)}
        assert not {row["actor"] for row in after["actors"]} & {row["actor"] for row in before["actors"]}
        assert tokens(system) == expected
    with LocalSystem(config, system.cluster) as system:  # that one was stopped, and this one is another
        assert until(system.controller, settled)["wanted"] == {"experts": 2, "router": 1}
        assert system.controller.status()["autoscaling"]


class Narrow(LocalCluster):
    """There is room for no expert actor beyond `room`."""

    room = 9

    def start_expert(self, spec, group):
        if sum(handle.actor_id.startswith("experts") for handle in self.find()) >= self.room:
            raise PlacementError("no node has room")
        return super().start_expert(spec, group)


def test_a_system_comes_back_where_there_is_no_room_any_more_for_what_it_was_scaled_to(model, expected, tmp_path):
    cluster = Narrow()
    config = config_of(model, tmp_path, experts__actors=2, experts__max_actors=4)
    with LocalSystem(config, cluster) as system:
        system.controller.commands.scale({"experts": 4})
        until(system.controller, settled)
        lose_all(system)
        cluster.room = 2
        system.take_over()
        assert system.controller.status()["wanted"] == {"experts": 4, "router": 1}
        assert tokens(system) == expected
        cluster.room = 9
        until(system.controller, settled)


class Forgetful(LocalCluster):
    """What it gives back are no orders."""

    def recall(self):
        return b"{}"


def test_a_system_starts_where_what_the_cluster_keeps_cannot_be_read(model, tmp_path, caplog):
    with LocalSystem(config_of(model, tmp_path, experts__actors=2), Forgetful()) as system:
        assert until(system.controller, settled)["wanted"] == {"experts": 2, "router": 1}
    assert "these are no orders" in caplog.text


def test_what_a_change_has_mapped_that_died_with_its_controller_is_dropped(model, expected, tmp_path):
    config = config_of(model, tmp_path, experts__replicas=1, control__autoscale=False)
    with LocalSystem(config) as system:
        before = {row["actor"]: row.get("experts") for row in system.controller.status()["actors"]}
        every = [(layer, expert) for layer, expert, _ in system.controller.load()]
        system.controller.abandon()
        system.handle("experts-0").call("host", every).result(20)
        system.take_over()
        until(system.controller, lambda s: {row["actor"]: row.get("experts") for row in s["actors"]} == before)
        assert tokens(system) == expected


class Crowded(LocalCluster):
    """While it is `full` it starts nothing."""

    full = False

    def start_expert(self, spec, group):
        if self.full:
            raise PlacementError("there is no room")
        return super().start_expert(spec, group)


def test_a_takeover_without_room_serves_on_with_what_is_left(model, tmp_path):
    """An expert actor has died with the controller, and no other can be started: nothing that runs is ended."""
    config = config_of(model, tmp_path, experts__replicas=1, control__autoscale=False)
    with LocalSystem(config, Crowded()) as system:
        system.controller.abandon()
        system.handle("experts-1").call("stop").result(10)
        survivor = system.handle("experts-0")
        system.cluster.full = True
        system.take_over()
        until(system.controller, lambda s: "start_failed" in {entry["event"] for entry in audit(tmp_path)})
        assert system.controller.state()["status"] == "ready"
        assert survivor.call("status").result(10)["state"] == "ready"
        system.cluster.full = False
        until(system.controller, settled)


def test_a_takeover_waits_for_a_model_that_cannot_be_opened_at_the_moment(model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("moeray.actors.opening.OPEN_RETRY_S", 0.05)
    here, away = tmp_path / "model", tmp_path / "away"
    here.symlink_to(model)
    with LocalSystem(config_of(here, tmp_path)) as system, ThreadPoolExecutor(1) as pool:
        system.controller.abandon()
        here.rename(away)
        system.controller = Controller(system.config, system.cluster)
        taken = pool.submit(system.controller.start)
        until(system.controller, lambda s: "opening the model, which failed" in s["detail"])
        assert tokens(system) == expected
        away.rename(here)
        taken.result(60)
        until(system.controller, settled)
        assert tokens(system) == expected


def test_a_config_that_needs_another_system_is_refused_from_the_start(model, tmp_path):
    config = config_of(model, tmp_path)
    controller = Controller(config, LocalCluster(), since=1.0)
    with pytest.raises(ConfigError, match=r"cannot change wire\.max_payload_bytes"):
        controller.configure(replace(config, wire=replace(config.wire, max_payload_bytes=1 << 25)), 2.0)
    assert controller.configure(config, 2.0) is False
    controller.stop()


def test_a_stop_in_the_middle_of_a_takeover_leaves_nobody_behind(model, tmp_path):
    config = config_of(model, tmp_path)
    with LocalSystem(config) as system:
        system.controller.abandon()
        assert len(system.cluster.find()) == 3
        Controller(config, system.cluster).stop()
        assert system.cluster.find() == []


def test_new_requests_go_to_the_only_router_until_another_can_take_it_over(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        system.controller.commands.drain(["router-0"])

        def replaced(status):
            assert system.controller.state()["info"].routers  # at every look, not only at last
            return settled(status) and "router-0" not in {row["actor"] for row in status["actors"]}

        until(system.controller, replaced)


def test_a_router_that_drains_hears_of_placements_until_its_end(model, tmp_path):
    long = replace(GREEDY24, max_tokens=480)
    config = config_of(
        model, tmp_path, experts__min_actors=1, experts__max_actors=3, router__max_actors=2, control__drain_s=60
    )
    with LocalSystem(config) as system, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(system.generate, [[5 + i, 9, 33] for i in range(8)], long)
        until(system.controller, lambda s: any(row["kind"] == "router" and row["running"] for row in s["actors"]))
        system.controller.commands.drain(["router-0"])
        until(system.controller, lambda s: s["ready"]["router"] == 1 and "router-0" in states(s, "draining"))
        before = system.controller.status()["epoch"]
        system.controller.commands.scale({"experts": 3})
        status = until(system.controller, lambda s: s["epoch"] > before and not s["changing"])
        assert "router-0" in states(status, "draining")
        assert [len(tokens_of(outputs)) for outputs in answer.result(60)] == [480] * 8
        until(system.controller, lambda s: settled(s) and "router-0" not in {row["actor"] for row in s["actors"]})
    assert "lost" not in [entry["event"] for entry in audit(tmp_path)]


def states(status, state):
    return {row["actor"] for row in status["actors"] if row["state"] == state}


def test_orders_outlive_a_clock_that_goes_back(model, tmp_path, monkeypatch):
    """A controller whose clock is behind that of the one before is obeyed, and believed by the one after."""
    config = config_of(model, tmp_path, experts__actors=1, experts__max_actors=3, control__autoscale=False)
    with LocalSystem(config) as system:
        assert system.controller.commands.scale({"experts": 3}) == {"experts": 3, "router": 1}
        system.controller.abandon()
        behind = SimpleNamespace(time=lambda: time.time() - 60.0, monotonic=time.monotonic)
        monkeypatch.setattr(handover, "time", behind)
        system.take_over()
        until(system.controller, settled)
        assert system.controller.commands.scale({"experts": 2}) == {"experts": 2, "router": 1}
        system.controller.abandon()
        monkeypatch.undo()
        system.take_over()
        assert until(system.controller, settled)["wanted"] == {"experts": 2, "router": 1}

"""Who gets which system: a failed one gives way to a new config, a living one is not taken over."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from queue import SimpleQueue

import pytest
import ray

from moeray.cluster import ray_controller
from moeray.cluster.local import LocalCluster
from moeray.cluster.ray import find_controller
from moeray.cluster.ray_controller import ControllerProcess
from moeray.errors import MoerayError
from moeray.serve.ray_port import RayPort
from moeray.serve.system import SystemBackend
from tests.checkpoints import make_tiny
from tests.systems import LocalSystem, tiny_config

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster():
    ray.init("local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    yield
    ray.shutdown()


async def start(config) -> str:
    """The model that is served, or the error's text."""
    backend = SystemBackend(config, RayPort(config), ray.get_runtime_context().get_node_id())
    backend.start()
    try:
        return (await backend.ready(120)).name
    except MoerayError as error:
        return str(error)
    finally:
        await backend.close()


def test_a_failed_system_gives_way_and_a_living_one_stays(cluster, tmp_path):
    model = make_tiny("mixtral", tmp_path / "first")
    other = make_tiny("mixtral", tmp_path / "second")
    wrong = tiny_config(tmp_path / "absent")
    assert "absent" in asyncio.run(start(wrong))
    config = replace(wrong, model=str(model))
    assert asyncio.run(start(config)) == "first"
    assert asyncio.run(start(config)) == "first"
    assert "already serves" in asyncio.run(start(replace(config, model=str(other))))
    controller = find_controller("moeray")
    ray.get(controller.stop.remote(), timeout=60)
    ray.kill(controller)


def test_more_than_the_cluster_has_is_refused(cluster, tmp_path):
    model = make_tiny("mixtral", tmp_path / "m")
    assert "100 CPU" in asyncio.run(start(tiny_config(model, experts__actors=1, experts__num_cpus=99.5)))


class Unsteady(LocalCluster):
    """What runs in it cannot be asked for, for a reason that nobody has thought of."""

    steady = True

    def find(self):
        if not self.steady:
            raise RuntimeError("no answer")
        return super().find()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_takeover_that_fails_is_left_to_the_next_process(tmp_path, monkeypatch):
    """Only while somebody wants the system; and what runs is not touched."""
    config = tiny_config(make_tiny("mixtral", tmp_path / "m"))
    with LocalSystem(config, Unsteady()) as system:
        system.controller.abandon()
        system.cluster.steady = False
        exits = SimpleQueue()

        def leave(code):
            exits.put(code)
            raise SystemExit  # of the thread

        monkeypatch.setattr(ray_controller, "LEASE_S", 4.0)
        monkeypatch.setattr(ray_controller, "RayCluster", lambda name: system.cluster)
        monkeypatch.setattr(ray_controller, "setup_logging", lambda *_, **__: None)
        monkeypatch.setattr(ray_controller.os, "_exit", leave)
        monkeypatch.setattr(ray_controller.logging, "shutdown", lambda: None)
        process = ControllerProcess(config)
        while (state := process.renew(config))["status"] == "loading":
            continue
        assert (state["status"], state["detail"]) == ("failed", "RuntimeError('no answer')")
        process.renew(config)
        assert exits.get(timeout=10) == 1
        system.cluster.steady = True
        assert {handle.call("status").result(10)["state"] for handle in system.cluster.find()} == {"ready"}
        system.take_over()

"""Who gets which system: a failed one gives way to a new config, a living one is not taken over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import ray

from moeray.cluster.ray import find_controller
from moeray.errors import MoerayError
from moeray.serve.app import RayPort
from moeray.serve.system import SystemBackend
from tests.checkpoints import make_tiny
from tests.systems import tiny_config

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

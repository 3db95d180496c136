"""Two Ray nodes: rows between them travel over TCP or gRPC, within one over the unix socket; tokens stay the same.

The nodes share an address (they are processes of one machine), so locality is Ray's node id. No socket and no cache
folder of moeray's is common to both.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from moeray.actors.folders import runtime_dir
from moeray.cluster.ray import ask, start_controller
from moeray.serve.ray_port import RayPort
from moeray.serve.system import SystemBackend
from moeray.types import GenerationRequest
from tests.checkpoints import make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

pytestmark = pytest.mark.ray

PROMPTS = ((5, 9, 33, 7), tuple(range(10, 60)), (3,))


@pytest.fixture
def two_nodes():
    head = {"num_cpus": 2, "resources": {"near": 10}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, resources={"far": 10})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def spread(path: Path, remote: str):
    return tiny_config(
        path,
        wire__remote=remote,
        router__resources={"near": 1},
        experts__groups=[
            {"name": "near", "actors": 1, "device": "cpu", "resources": {"near": 1}},
            {"name": "far", "actors": 2, "device": "cpu", "resources": {"far": 1}},
        ],
    )


async def run(config) -> list[list[int]]:
    backend = SystemBackend(config, RayPort(config), ray.get_runtime_context().get_node_id())
    backend.start()
    await backend.ready(120)

    async def one(i: int) -> list[int]:
        request = GenerationRequest(f"r{i}", PROMPTS[i], GREEDY24)
        return tokens_of([output async for output in backend.generate(request)])

    try:
        return await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))
    finally:
        await backend.close()


@pytest.mark.parametrize("remote", ["tcp", "grpc"])
def test_rows_cross_nodes(two_nodes, tmp_path, remote):
    path = make_tiny("olmoe", tmp_path / "olmoe")
    with LocalSystem(tiny_config(path)) as system:
        expected = [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)]
    config = spread(path, remote)
    controller = start_controller(config)
    try:
        assert asyncio.run(run(config)) == expected
        status = ask(controller, "status")
        nodes = {row["actor"]: row["node"] for row in status["actors"]}
        assert nodes["router-0"] == nodes["near-0"] != nodes["far-0"] == nodes["far-1"]
        metrics = ask(controller, "metrics")[0].decode()
        rows = {hop: float(_value(metrics, f'moeray_dispatch_rows_total{{hop="{hop}"}}')) for hop in ("unix", remote)}
        assert rows["unix"] > 0
        assert rows[remote] > 0
        _check_private(set(nodes.values()), ask(controller, "state")["info"].system)
    finally:
        ray.get(controller.stop.remote(), timeout=60)
        ray.kill(controller)


def _value(metrics: str, series: str) -> str:
    return next(line.split()[-1] for line in metrics.splitlines() if line.startswith(series))


def _check_private(nodes: set[str], system: str) -> None:
    folders = {runtime_dir(node, system) for node in nodes}
    assert len(folders) == 2
    for folder in folders:
        sockets = [path for path in folder.iterdir() if path.is_socket()]
        assert sockets
        assert all(os.stat(path).st_mode & 0o777 == 0o600 for path in sockets)

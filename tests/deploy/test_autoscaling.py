"""The worker groups of the RayCluster and the config that goes with them, under Ray's own autoscaler.

Ray reads the groups from the manifest as it does under KubeRay, and adds nodes (processes of this machine) of their
resources for the actors that moeray asks for.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import ray
from ray._common.utils import reset_ray_address

from moeray.config import load_config
from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port
from tests.cluster.live import is_whole, kill, live_system
from tests.deploy.manifests import FOLDER
from tests.deploy.test_config import node_types

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD_ID = "f" * 51 + "00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
IDLE_S = 5.0
MOST = 2
"""Nodes of a worker group."""


@pytest.fixture
def autoscaled(tmp_path):
    """A cluster that has a head alone, and may add nodes of the manifest's worker groups."""
    port = free_port()
    groups = {name: node for name, node in node_types("cluster").items() if name not in ("headgroup", "experts-gpu")}
    for group in groups.values():
        group["min_workers"], group["max_workers"] = 0, MOST
        group["resources"].pop("memory")
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(autoscaling_config(groups, f"127.0.0.1:{port}")))
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=0",
        "--node-ip-address=127.0.0.1", f"--autoscaling-config={file}", "--include-dashboard=false",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    env = {
        **os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }  # fmt: skip
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            assert is_open(port, head), (tmp_path / "head.log").read_text()[-3000:]
            reset_ray_address()
            address = f"127.0.0.1:{port}"
            ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="ERROR")
            yield
        finally:
            ray.shutdown()
            end(psutil.Process(head.pid))
            head.wait(20)
            reset_ray_address()  # or the next ray.init of this machine would look for it


def is_open(port, head):
    """Waits for the head's port; False where the head ends instead."""
    pause = threading.Event()
    while head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        pause.wait(0.2)
    return False


def end(process):
    """It and all that it started, the added nodes too."""
    ours = [*process.children(recursive=True), process]
    for each in ours:
        each.terminate()
    for each in psutil.wait_procs(ours, timeout=20)[1]:
        each.kill()


def autoscaling_config(groups, address):
    provider = {
        "type": "external", "module": PROVIDER, "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": HEAD_ID, "gcs_address": address,
    }  # fmt: skip
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    for group in groups.values():
        group["resources"]["object_store_memory"] = 100_000_000
    return {
        "cluster_name": "moeray", "provider": provider, "head_node_type": "ray.head.default",
        "available_node_types": {**groups, "ray.head.default": head},
        "max_workers": 8, "upscaling_speed": 1000, "idle_timeout_minutes": IDLE_S / 60, "auth": {}, "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "docker": {},
    }  # fmt: skip


def small(model, folder):
    """The config of the manifests, for a tiny model and without GPUs."""
    file = load_config(FOLDER / "cluster" / "moeray.yaml")
    cpu = next(group for group in file.experts.groups if group.device == "cpu")
    assert cpu.num_cpus is None
    return load_config(
        FOLDER / "cluster" / "moeray.yaml",
        {
            "model": str(model), "dtype": "float32", "engine.kv_blocks": 512, "wire.host": "127.0.0.1",
            "control.audit_log": str(folder / "audit.jsonl"), "control.autoscale": False,
            "experts.groups": [
                {"name": "cpu", "device": "cpu", "actors": 1, "max_actors": MOST + 1, "num_cpus": cpu.threads / 2,
                 "threads": 1, "resources": cpu.resources}
            ],
        },
    )  # fmt: skip


def nodes_of(resource):
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and resource in node["Resources"]}


async def until(what, give_up=120.0):
    async with asyncio.timeout(give_up):
        while not what():
            await asyncio.sleep(0.2)


def asked_of_ray():
    """Our actors that Ray runs or seeks a node for."""
    return {row["name"].rpartition(":")[2] for row in ray.util.list_named_actors(all_namespaces=True)}


def ready(count):
    return lambda status: is_whole(status) and status["ready"]["cpu"] == count


@pytest.mark.usefixtures("autoscaled")
def test_pods_follow_actors(tmp_path):
    """From a head alone: one node for the router and one for each expert actor, and none when nobody needs it. An actor
    for which no node can come blocks nothing, and is given up when it is no longer wanted."""
    model = make_tiny("olmoe", tmp_path / "tiny")

    async def run():
        async with live_system(small(model, tmp_path)) as live:
            status = await live.until(is_whole)
            nodes = {row["actor"]: row["node"] for row in status["actors"]}
            assert {nodes["router-0"]} == nodes_of("router")
            assert {nodes["cpu-0"]} == nodes_of("experts-cpu")
            assert status["controller"]["node"] not in nodes.values()
            calm = await live.all_tokens()
            await live.ask("scale", {"cpu": MOST})
            await live.until(ready(MOST))
            assert len(nodes_of("experts-cpu")) == MOST
            assert await live.all_tokens() == calm
            await check_pending(live, calm)
            await live.ask("scale", {"cpu": 1})
            await live.until(ready(1))
            await until(lambda: len(nodes_of("experts-cpu")) == 1)
            assert await live.all_tokens() == calm
        await until(lambda: not nodes_of("experts-cpu") | nodes_of("router"))

    asyncio.run(run())


async def check_pending(live, calm):
    """One actor more than there can be nodes for, while another is killed."""
    await live.ask("scale", {"cpu": MOST + 1})
    await until(lambda: f"cpu-{MOST}" in asked_of_ray())
    victim = (await live.rows("expert"))[0]
    assert await live.all_tokens(lambda: kill(victim)) == calm
    mended = await live.until(lambda s: s["fewest_replicas"] and s["ready"]["cpu"] == MOST and not s["changing"])
    there = {row["actor"]: row["state"] for row in mended["actors"] if row["kind"] == "expert"}
    assert victim["actor"] not in there
    pending = {actor for actor, state in there.items() if state in ("starting", "pending")}
    assert len(pending) == 1
    await live.ask("scale", {"cpu": MOST})
    await live.until(ready(MOST))
    await until(lambda: not pending & asked_of_ray())
    assert await live.all_tokens() == calm

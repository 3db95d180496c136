"""Losses larger than a process, on a real Ray cluster that lives through all of them, one after the other: a node that
is drained, one that is lost, the ingress, and in the end the GCS. Tokens stay those of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import torch
from ray import serve
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.config import Config
from moeray.serve.app import application
from tests.checkpoints import save_tokenizer
from tests.cli.test_serve import free_port
from tests.cluster.live import Live, is_whole, kill, live_system
from tests.cluster.test_serve_tools import wait_until_ready
from tests.jobs.test_ray_job import until
from tests.systems import tiny_config

pytestmark = pytest.mark.ray

SHAPE = Shape(hidden=64, intermediate=96, experts=8, top_k=2, layers=3, vocab=320, heads=4)
REDIS = shutil.which("redis-server")
PLACES = 3
"""Actors of ours that fit on a node, so that the next one goes to the next node."""
DEADLINE_S = 240.0
NAME = "nodes"
UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass
class World:
    cluster: Cluster
    config: Config
    runner: asyncio.Runner
    live: Live
    calm: list[list[int]]

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={"place": PLACES})  # which waits for it

    def events(self, since: float = 0.0) -> list[dict[str, Any]]:
        lines = Path(self.config.control.audit_log or "").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["at"] >= since]

    async def stream_until(self, what: Any) -> dict[str, Any]:
        """Requests run one set after the other, each with the calm run's tokens, until `what` holds of the status."""
        waiting = asyncio.create_task(self.live.until(what, DEADLINE_S))
        while not waiting.done():
            assert await self.live.all_tokens() == self.calm
        return await waiting


@pytest.fixture(scope="module")
def redis():
    """The address of a Redis server of our own; None where there is none to start."""
    if REDIS is None:
        yield None
        return
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen([REDIS, *options], stdout=subprocess.DEVNULL)
    yield f"127.0.0.1:{port}"
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def world(redis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    model = write_random_moe(SHAPE, folder / "moe", torch.float32)
    save_tokenizer(model)
    place = {"place": 1}
    experts = {"name": "experts", "actors": 2, "min_actors": 1, "max_actors": 4, "num_cpus": 0.1, "resources": place}
    config = tiny_config(
        model, experts__groups=[experts], router__num_cpus=0.1, router__resources=place,
        serve__name=NAME, router__max_actors=2, control__autoscale=False, wire__remote="auto",
        control__audit_log=str(folder / "audit.jsonl"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if redis:
            patch.setenv("RAY_REDIS_ADDRESS", redis)
        patient = {"health_check_failure_threshold": 8}  # so that a busy machine does not let Ray notice first
        head = {"num_cpus": 2, "include_dashboard": False, "_system_config": patient}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.delenv("RAY_REDIS_ADDRESS", raising=False)
    cluster.add_node(num_cpus=1, resources={"place": PLACES})
    cluster.wait_for_nodes()
    reset_ray_address()  # no command that looks for "the" cluster of this machine is to find this one
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    with asyncio.Runner() as runner:
        context = live_system(config)
        live = runner.run(context.__aenter__())
        yield World(cluster, config, runner, live, runner.run(live.all_tokens()))
        runner.run(context.__aexit__(None, None, None))
    ray.shutdown()
    cluster.shutdown()


def leave(world: World, old: str, new: str, drain: Callable[..., Any], *which: str) -> None:
    """All actors go from node `old` to `new` by `moeray drain`, which ends well, and no request notices it."""
    began = time.time()
    where = ("--name", NAME, "--address", world.cluster.address, *which)
    command = [sys.executable, "-m", "moeray.cli.main", "drain", *where, "--within", f"{DEADLINE_S:g}", "--wait"]

    def run() -> None:
        done = drain(command, timeout=DEADLINE_S, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    status = world.run(world.live.whole())
    assert {row["node"] for row in status["actors"]} == {old}
    assert status["controller"]["node"] == world.cluster.head_node.node_id
    assert world.run(world.live.all_tokens(lambda: asyncio.to_thread(run))) == world.calm
    moved = lambda s: is_whole(s) and {row["node"] for row in s["actors"]} == {new}  # noqa: E731
    world.run(world.stream_until(moved))
    assert time.time() < began + DEADLINE_S
    happened = {entry["event"] for entry in world.events(began)}
    assert "node_draining" in happened
    assert "lost" not in happened


def test_a_node_that_drains_is_left_before_its_deadline(world):
    old = world.cluster.worker_nodes.copy().pop()
    new = world.add_node()
    processes = [psutil.Process(row["pid"]) for row in world.run(world.live.whole())["actors"]]
    leave(world, old.node_id, new.node_id, subprocess.run, "--node", old.node_id[:16])
    assert psutil.wait_procs(processes, timeout=20)[1] == []
    world.cluster.remove_node(old)


class Pod:
    """A node that sees no processes but its own, as in a pod: what asks there for the node of Ray's finds this one."""

    def __init__(self, address: str, folder: Path) -> None:
        ray_start = [str(Path(sys.executable).with_name("ray")), "start", "--address", address, "--block"]
        room = ["--num-cpus", "1", "--resources", json.dumps({"place": PLACES}), "--disable-usage-stats"]
        room += ["--dashboard-agent-listen-port", str(free_port())]
        env = {"RAY_AUTH_MODE": "disabled"} | os.environ | {"MOERAY_RUNTIME_DIR": str(folder)}  # as the cluster's own
        env["RAY_raylet_start_wait_time_s"] = "120"  # on a machine that has other things to do
        before = {node["NodeID"] for node in ray.nodes()}
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._shell = subprocess.Popen([*UNSHARE, *ray_start, *room], env=env, stdout=log, stderr=log)
        self.node_id = until(lambda: self._joined(before), "the pod's node is in the cluster")

    def _joined(self, before: set[str]) -> str | None:
        assert self._shell.poll() is None, self._log.read_text()
        return next((node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in before), None)

    def exec(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` and a hook do."""
        (first,) = psutil.Process(self._shell.pid).children()
        return subprocess.run(["nsenter", f"--target={first.pid}", "--pid", "--mount", *command], **options)

    def delete(self) -> None:
        self._shell.kill()
        self._shell.wait()


@pytest.fixture
def pod(world):
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a namespace of processes")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pod") as folder:  # sockets want a short path
        pod = Pod(world.cluster.address, Path(folder))
        yield pod
        pod.delete()


def test_the_hook_of_a_pod_that_ends_drains_the_node_that_it_runs_on(world, pod):
    old = world.cluster.worker_nodes.copy().pop()
    leave(world, old.node_id, pod.node_id, subprocess.run, "--node", old.node_id[:16])
    world.cluster.remove_node(old)
    new = world.add_node()
    leave(world, pod.node_id, new.node_id, pod.exec, "--here")


def test_the_loss_of_a_node_is_mended_before_ray_has_noticed_it(world):
    node = world.add_node()
    world.run(world.live.ask("scale", {"experts": 4}))
    status = world.run(world.live.until(lambda s: is_whole(s) and s["wanted"]["experts"] == 4, DEADLINE_S))
    victims = {row["actor"] for row in status["actors"] if row["node"] == node.node_id}
    assert len(victims) == 2
    began = time.time()

    def lose() -> Any:
        return asyncio.to_thread(world.cluster.remove_node, node, allow_graceful=False)

    def mended(status: dict[str, Any]) -> bool:
        there = {row["actor"] for row in status["actors"]}
        return status["fewest_replicas"] > 0 and not status["changing"] and not victims & there

    assert world.run(world.live.all_tokens(lose)) == world.calm
    world.run(world.live.until(mended))
    assert any(row["NodeID"] == node.node_id and row["Alive"] for row in ray.nodes())
    lost = {entry["actor"] for entry in world.events(began) if entry["event"] == "lost"}
    assert lost == victims
    assert world.run(world.live.all_tokens()) == world.calm
    world.run(world.live.ask("scale", {"experts": 2}))
    world.run(world.live.whole())


def test_the_death_of_the_ingress_leaves_the_system_as_it_is(world):
    before = {row["actor"]: row["pid"] for row in world.run(world.live.whole())["actors"]}
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    try:
        serve.run(application(world.config), name=NAME)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        whole = "".join(stream(client, 24))
        replica = replica_of(world.cluster)
        cut_off = stream(client, 2000)
        next(cut_off)
        replica.kill()
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(cut_off)
        wait_until_ready(url)
        assert "".join(stream(client, 24)) == whole
        assert replica_of(world.cluster).pid != replica.pid
    finally:
        serve.shutdown()
    assert {row["actor"]: row["pid"] for row in world.run(world.live.whole())["actors"]} == before


def stream(client: openai.OpenAI, tokens: int) -> Iterator[str]:
    chunks = client.completions.create(
        model="moe", prompt="hello", max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return (chunk.choices[0].text for chunk in chunks)


def replica_of(cluster: Cluster) -> psutil.Process:
    """The process of the one ingress replica, on whichever node."""
    raylets = [raylet for node in cluster.list_all_nodes() for raylet in node.all_processes["raylet"]]
    workers = [worker for raylet in raylets for worker in psutil.Process(raylet.process.pid).children()]
    (replica,) = [worker for worker in workers if f"ServeReplica:{NAME}:ingress" in title_of(worker)]
    return replica


def title_of(process: psutil.Process) -> str:
    """Its command line; of one that ended since it was listed (a raylet's idle workers come and go), nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def without_gcs(world):
    """The GCS is killed while requests run. There is one in the end: Ray ends a driver that waits for a minute."""
    if REDIS is None:
        pytest.skip("redis-server is not installed; Ray's GCS keeps its state in it")
    world.run(world.live.whole())
    head = world.cluster.head_node
    assert world.run(world.live.all_tokens(lambda: asyncio.to_thread(head.kill_gcs_server))) == world.calm
    yield world
    if "gcs_server" not in head.all_processes:
        head.start_gcs_server()


def test_requests_and_repairs_go_on_without_the_gcs(without_gcs):
    world = without_gcs
    assert world.run(world.live.all_tokens()) == world.calm
    victim = world.run(world.live.rows("expert"))[0]
    assert world.run(world.live.all_tokens(lambda: kill(victim))) == world.calm
    mended = lambda s: s["fewest_replicas"] and victim["actor"] not in {row["actor"] for row in s["actors"]}  # noqa: E731
    world.run(world.live.until(mended, 15.0))
    assert world.run(world.live.all_tokens()) == world.calm


def test_a_gcs_that_comes_back_lets_the_system_grow_again(without_gcs):
    world = without_gcs
    start_gcs = world.cluster.head_node.start_gcs_server
    assert world.run(world.live.all_tokens(lambda: asyncio.to_thread(start_gcs))) == world.calm
    world.run(world.live.whole())
    world.add_node()
    world.run(world.live.ask("scale", {"experts": 3}))
    world.run(world.stream_until(lambda s: is_whole(s) and s["ready"]["experts"] == 3))

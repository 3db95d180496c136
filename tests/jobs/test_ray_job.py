"""`ray job submit -- moeray batch ...` on a cluster of `ray start --head`: kills, another try, a system that runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from moeray.cluster.ray import NAMESPACE, ask, find_controller, start_controller, stop_controller
from moeray.config import Config
from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port
from tests.jobs.support import CHAT, COMPLETIONS, answers, entry, grown_to, write_lines
from tests.systems import tiny_config

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))
DEADLINE_S = 600.0
"""For what hangs: how long a start takes says nothing on a machine with other work."""
SERVED = "served"


@dataclass
class Cluster:
    address: str
    dashboard: str
    model: Path
    client: JobSubmissionClient

    def submit(self, source: Path, output: Path, *options: str, model: str | None = None, **submission: str) -> str:
        """The id of a job."""
        job = f"batch-{time.monotonic_ns()}"
        wanted = [f"--{key.replace('_', '-')}={value}" for key, value in submission.items()]
        done = subprocess.run(
            [
                RAY, "job", "submit", "--address", self.dashboard, "--submission-id", job, "--no-wait", *wanted, "--",
                "moeray", "batch", "--model", model or str(self.model), "--input", str(source), "--output", str(output),
                "--dtype", "float32", "--engine-kv-blocks", "256", "--experts-num-cpus", "0.1", "--router-num-cpus",
                "0.1", "--summary", "json", *options,
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return job

    def ended(self, job: str) -> bool:
        return self.client.get_job_status(job).is_terminal()

    def write(self, job: str, output: Path, size: int) -> None:
        """Until the job has written so many bytes, and goes on."""
        try:
            grown_to(output, size, lambda: self.ended(job))
            assert not self.ended(job), "it ended before it could be disturbed"
        except AssertionError as error:
            raise AssertionError(f"{error}; its log:\n{self.client.get_job_logs(job)}") from error

    def wait(self, job: str) -> tuple[JobStatus, str]:
        """How the job ended, and its log."""
        until(lambda: self.ended(job), f"{job} ends")
        return self.client.get_job_status(job), self.client.get_job_logs(job)


def until(what: Callable[[], Any], name: str, within: float = DEADLINE_S) -> Any:
    pause, deadline = threading.Event(), time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, f"it did not come to pass within {within:g} s: {name}"
        pause.wait(0.1)
    return found


def summary(log: str) -> dict[str, Any]:
    return next(json.loads(line) for line in log.splitlines() if line.startswith('{"outcome"'))


def driver(output: Path) -> psutil.Process:
    """The process of the job that writes `output`, and not the shell around it."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(output) in words and "batch" in words and "submit" not in words:
            return process
    raise AssertionError(f"no process writes {output}")


def systems() -> set[str]:
    """The names of the systems that have an actor."""
    rows = ray.util.list_named_actors(all_namespaces=True)
    return {row["name"].partition(":")[0] for row in rows if row["namespace"] == NAMESPACE}


def requests(path: Path, count: int) -> Path:
    return write_lines(
        path,
        (
            entry(f"r{i}", "tiny", f"message {i}", CHAT if i % 2 else COMPLETIONS, max_tokens=12, ignore_eos=True)
            for i in range(count)
        ),
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    model = make_tiny("qwen3_moe", folder / "tiny", tokenizer=True)
    port, dashboard = free_port(), free_port()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Whether Ray asks for a token otherwise depends on what this user has started before.
    env = {**os.environ, "PATH": path, "MOERAY_CACHE_DIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    env.pop("RAY_ADDRESS", None)
    log = (folder / "log").open("w+")
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", "--num-cpus", "4", "--port", str(port), "--dashboard-port",
            str(dashboard), "--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port",
            str(free_port()), "--disable-usage-stats",
        ],
        env=env, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        client = until(lambda: _client(address, head), f"the cluster is up: {Path(log.name).read_text()[-2000:]}")
        ray.init(f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
        yield Cluster(f"127.0.0.1:{port}", address, model, client)
    finally:
        ray.shutdown()
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def _client(address: str, head: subprocess.Popen[bytes]) -> JobSubmissionClient | None:
    assert head.poll() is None, "ray start has ended"
    try:
        client = JobSubmissionClient(address)
        client.submit_job(entrypoint="true")  # which the agent takes, and that may be there later than the dashboard
    except (ConnectionError, RuntimeError):
        return None
    return client


def kill_and_resubmit(cluster: Cluster, tmp_path: Path, lines: int, *options: str) -> str:
    """A job is killed half-way and submitted again: every line once. The second one's log."""
    source, output = requests(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    job = cluster.submit(source, output, *options)
    cluster.write(job, output, lines * 200)
    driver(output).kill()
    status, log = cluster.wait(job)
    assert status is JobStatus.FAILED, log
    done = output.read_bytes().count(b"\n")
    assert lines / 4 < done < lines, log

    status, log = cluster.wait(cluster.submit(source, output, *options))
    assert status is JobStatus.SUCCEEDED, log
    assert answers(output).keys() == {f"r{i}" for i in range(lines)}
    figures = summary(log)
    assert (figures["earlier"], figures["answered"], figures["left"]) == (done, lines - done, 0)
    return log


def test_a_job_that_is_killed_is_submitted_again_and_takes_its_system_over(cluster, tmp_path):
    log = kill_and_resubmit(cluster, tmp_path, 200, "--concurrency", "16")
    assert "that an earlier run has left" in log
    assert "lines, 0 errors" in log  # plain lines of progress
    assert not any("-batch-" in name for name in systems())


@pytest.mark.slow
def test_a_thousand_lines(cluster, tmp_path):
    kill_and_resubmit(cluster, tmp_path, 1000)
    assert not any("-batch-" in name for name in systems())


@pytest.fixture(scope="module")
def served(cluster) -> Iterator[Config]:
    """A system that serves under a name of its own, renewed as an endpoint does."""
    config = tiny_config(
        cluster.model, serve__name=SERVED, experts__num_cpus=0.1, router__num_cpus=0.1, serve__request_timeout_s=77.0
    )
    controller = start_controller(config)
    try:
        until(lambda: ray.get(controller.renew.remote(config))["status"] == "ready", "the system is ready")
        yield config
    finally:
        stop_controller(controller)


@pytest.mark.slow
def test_a_job_uses_the_system_that_runs_and_leaves_it_as_it_is(cluster, served, tmp_path):
    before = ask(find_controller(SERVED), "status")
    source, output = requests(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    folder = tmp_path / "work"
    folder.mkdir()
    status, log = cluster.wait(cluster.submit(source, output, "--serve-name", SERVED, working_dir=str(folder)))
    assert status is JobStatus.SUCCEEDED, log
    assert "with the config that it has" in log
    assert len(answers(output)) == 40
    assert not any("-batch-" in name for name in systems())
    after = ask(find_controller(SERVED), "status")
    assert [row["pid"] for row in after["actors"]] == [row["pid"] for row in before["actors"]]
    assert after["status"] == "ready"


@pytest.mark.slow
def test_a_running_system_with_another_model_is_a_clear_error(cluster, served, tmp_path):
    source, output = requests(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    status, log = cluster.wait(cluster.submit(source, output, "--serve-name", SERVED, model="other/model"))
    assert status is JobStatus.FAILED
    assert f"serves {cluster.model}, not other/model; leave --model out" in log
    assert ask(find_controller(SERVED), "status")["status"] == "ready"


@pytest.mark.slow
def test_a_job_that_is_stopped_ends_its_system(cluster, tmp_path):
    """`ray job stop` sends SIGTERM, and SIGKILL three seconds later: the system's end is asked for by then."""
    source, output = requests(tmp_path / "in.jsonl", 400), tmp_path / "out.jsonl"
    job = cluster.submit(source, output, "--concurrency", "8")
    cluster.write(job, output, 20_000)
    subprocess.run([RAY, "job", "stop", "--address", cluster.dashboard, job], check=True, timeout=120)
    status, log = cluster.wait(job)
    assert status is JobStatus.STOPPED
    assert "SIGTERM, stopping" in log
    done = answers(output).keys()
    assert 0 < len(done) < 400
    until(lambda: not any("-batch-" in name for name in systems()), "its actors are gone", within=40.0)


@pytest.mark.slow
def test_the_system_that_a_killed_job_has_left_gives_way_to_one_with_another_config(cluster, tmp_path):
    source, output = requests(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    job = cluster.submit(source, output, "--concurrency", "8")
    cluster.write(job, output, 20_000)
    driver(output).kill()
    cluster.wait(job)
    status, log = cluster.wait(cluster.submit(source, output, "--experts-actors", "3"))
    assert status is JobStatus.SUCCEEDED, log
    assert "starting a system of its own" in log
    assert len(answers(output)) == 200
    assert not any("-batch-" in name for name in systems())

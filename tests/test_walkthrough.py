"""The README from top to bottom: each of its commands is run here, or named with the test that runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port
from tests.jobs.test_ray_job import until
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.ray

ELSEWHERE = {
    "pip install -e .": ".ci/run",
    "pip install -e '.[dev]' && pytest": ".ci/run",
    "moeray demo": "tests/cli/test_demo.py",
    "export MOERAY_API_KEY=SECRET && moeray serve MODEL --config moeray.yaml --port 9000": "tests/cli/test_serve.py",
    "serve run moeray.serve.app:build model=MODEL": "tests/cluster/test_serve_tools.py",
    "serve deploy deploy/serve.yaml": "tests/cluster/test_serve_tools.py",
    "moeray chaos --kill any --every 5s --for 60s --streams 16": "tests/cli/test_chaos.py",
    "prometheus --config.file deploy/prometheus/prometheus.yml": "tests/dashboards/test_live.py",
}
"""Command -> what runs it, with other numbers or ports."""
SERVE = "moeray serve MODEL"
BIN = str(Path(sys.executable).parent)
LIMIT_S = 180.0


def steps() -> list[str]:
    """The README's commands in its order, one a line, without comments."""
    lines = (line for block in blocks(ROOT / "README.md") for line in block.splitlines())
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


@dataclass
class Reader:
    """Somebody who types the README's commands in a folder of their own."""

    folder: Path
    model: Path
    url: str
    ray: str
    dashboard: str

    def typed(self, command: str) -> str:
        """The command with the reader's own model and ports."""
        own = {
            "MODEL": str(self.model), "smollm2-moe": self.model.name, "http://127.0.0.1:8000": self.url,
            "in.jsonl": f"{self.folder}/in.jsonl", "out.jsonl": f"{self.folder}/out.jsonl",
        }  # fmt: skip
        for theirs, ours in own.items():
            command = command.replace(theirs, ours)
        return command

    def start(self, command: str, **options: object) -> subprocess.Popen[str]:
        env = {
            **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ADDRESS": self.ray, "MOERAY_CACHE_DIR":
            str(self.folder / "cache"), "RAY_API_SERVER_ADDRESS": self.dashboard, "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", "-c", f"exec {self.typed(command)}"], cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    def run(self, command: str) -> str:
        """What it prints. It has to succeed."""
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        assert process.returncode == 0, f"{command}\n{out[-2000:]}\n{err[-3000:]}"
        return out


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    model = make_tiny("qwen3_moe", folder / "tiny-moe", tokenizer=True)
    port, gcs, dashboard = free_port(), free_port(), free_port()
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": model.name, "prompt": f"number {i}", "max_tokens": 4}}
        for i in range(20)
    ]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    who = Reader(folder, model, f"http://127.0.0.1:{port}", f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    ray = [f"{BIN}/ray", "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    ports = [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    log = (folder / "ray.log").open("w")
    head = subprocess.Popen([*ray, *ports, "--disable-usage-stats"], env=env, stdout=log, stderr=log)
    try:
        until(lambda: answers(f"{who.dashboard}/api/version", head), "the cluster is up")
        yield from serving(who, port)
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def answers(url: str, head: subprocess.Popen[bytes]) -> bool:
    assert head.poll() is None, "ray start has ended"
    try:
        return httpx.get(url, timeout=10.0).is_success
    except httpx.HTTPError:
        return False


def serving(who: Reader, port: int) -> Iterator[Reader]:
    """The reader beside a `moeray serve`."""
    served = who.start(
        f"{SERVE} --port {port} --engine-kv-blocks 256 --experts-max-actors 3 --experts-num-cpus 0.1 "
        "--router-num-cpus 0.1"
    )
    try:
        line = served.stdout.readline()
        assert "serving" in line, served.communicate(timeout=10)[1][-3000:]
        yield who
    finally:
        served.send_signal(signal.SIGINT)
        ended = served.wait(60)
    assert ended == 0


def test_each_command_has_its_test():
    there = set(steps())
    assert SERVE in there
    assert set(ELSEWHERE) <= there, "a command left the README"
    for path in ELSEWHERE.values():
        assert (ROOT / path).exists()


@pytest.mark.slow
def test_the_readers_commands(reader):
    """In the README's order, against one running system."""
    assert httpx.get(f"{reader.url}/health", timeout=30.0).status_code == 200
    said = {}
    for command in steps():
        if command in ELSEWHERE or command == SERVE:
            continue
        if "--watch" in command:
            said[command] = watched(reader, command)
        else:
            said[command] = reader.run(command)
    text = {command.split("  ")[0]: out for command, out in said.items()}
    assert "[DONE]" in next(out for command, out in text.items() if command.startswith("curl"))
    assert "experts-1" in text["moeray status"]
    answers = [json.loads(line) for line in (reader.folder / "out.jsonl").read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"line-{i}" for i in range(20)}


def watched(reader: Reader, command: str) -> str:
    """The first readings of a command that goes on until Ctrl-C."""
    process = reader.start(command)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "router-0" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    return "".join(lines)

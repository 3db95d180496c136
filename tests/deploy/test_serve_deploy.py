"""`serve deploy` of the shipped file on a real Ray cluster, and of changed ones over it while clients stream."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import ray
import yaml

from moeray.cluster.ray import ask, find_controller
from moeray.cluster.ray_controller import LEASE_S
from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port
from tests.cluster.test_serve_tools import wait_until_ready

pytestmark = pytest.mark.ray

SERVE = Path(sys.executable).with_name("serve")
SHIPPED = Path(__file__).parents[2] / "deploy" / "serve.yaml"
PROMPTS = ["the quick brown fox", "hello", "stop here, and go on there", "one two three four five"]
TOKENS = 120


class Deployed:
    """The shipped file under changes, deployed by Serve's own command. `file` is what was deployed last."""

    def __init__(self, dashboard: str, folder: Path) -> None:
        self.dashboard = f"http://{dashboard}"
        self.path = folder / "serve.yaml"
        self.file = yaml.safe_load(SHIPPED.read_text())
        self.url = f"http://127.0.0.1:{free_port()}"
        self.file["http_options"]["port"] = int(self.url.rpartition(":")[2])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def args(self):
        return self.file["applications"][0]["args"]

    @property
    def user_config(self):
        return self.file["applications"][0]["deployments"][0]["user_config"]

    def deploy(self) -> None:
        self.path.write_text(yaml.safe_dump(self.file))
        subprocess.run([SERVE, "deploy", self.path, "--address", self.dashboard], check=True, timeout=120)

    def replicas(self) -> set[str]:
        """The names of the ingress replicas that there are; a restarted one has another."""
        names = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == "serve"]
        return {name for name in names if "#ingress#" in name}

    def until(self, what, give_up=150.0):
        """The system's status, as soon as `what` holds of it."""
        end, status = time.monotonic() + give_up, {}
        while time.monotonic() < end:
            status = httpx.get(f"{self.url}/status", timeout=60).json()
            if what(status):
                return status
        raise AssertionError(f"it did not come to pass: {status}")

    def until_replaced(self, replicas, give_up=180.0) -> None:
        end = time.monotonic() + give_up
        while (now := self.replicas()) & replicas or len(now) < 2:
            assert time.monotonic() < end, f"the replicas {replicas} were not replaced: {now}"

    def until_serve_says(self, words, give_up=180.0) -> None:
        end, said = time.monotonic() + give_up, ""
        while words not in said:
            assert time.monotonic() < end, said
            command = [SERVE, "status", "--name", "moeray", "--address", self.dashboard]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            said = " ".join(done.stdout.split())

    def text(self, prompt: str) -> str:
        stream = self.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    @contextmanager
    def clients(self, expected):
        """Clients that stream one answer after the other meanwhile: none fails, and all have the calm run's text."""
        over, begun = threading.Event(), threading.Barrier(len(PROMPTS) + 1)

        def stream(prompt: str) -> list[str]:
            texts = [self.text(prompt)]
            begun.wait(120)
            while not over.is_set():
                texts.append(self.text(prompt))
            return texts

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = [pool.submit(stream, prompt) for prompt in PROMPTS]
            try:
                begun.wait(120)
                yield
            finally:
                over.set()
        for answer, text in zip(answers, expected, strict=True):
            texts = answer.result()
            assert len(texts) > 1
            assert set(texts) == {text}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOERAY_CACHE_DIR", str(folder / "cache"))
        context = ray.init(
            "local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=True
        )  # fmt: skip
        system = Deployed(context.dashboard_url, folder)
        model = make_tiny("olmoe", folder / "tiny", tokenizer=True)
        system.args.update(model=str(model), dtype="float32", engine={"kv_blocks": 512})
        system.user_config["control"]["autoscale"] = False
        system.user_config["experts"]["groups"][0]["num_cpus"] = 0.1
        system.deploy()
        system.statuses = wait_until_ready(system.url)
        yield system
        from ray import serve

        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def expected(deployed):
    return [deployed.text(prompt) for prompt in PROMPTS]


def whole(status):
    ready = all(status["ready"][group] == count for group, count in status["wanted"].items())
    return ready and not status["changing"] and not status["outdated"]


def actors(status):
    return {row["actor"] for row in status["actors"]}


def test_the_shipped_file_is_deployed_and_answers(deployed, expected):
    assert 503 in deployed.statuses  # it answers while it loads
    assert len(set(expected)) > 1


def test_limits_change_in_place_under_live_streams(deployed, expected):
    """The second `serve deploy` restarts nothing: not an actor, and no replica, so that connections stay."""
    before, replicas = deployed.until(whole), deployed.replicas()
    assert before["limits"] == {"experts": [1, 8], "router": [1, 2]}
    deployed.user_config["experts"]["groups"][0].update(actors=3, max_actors=4)
    deployed.user_config["control"]["slo_ttft_s"] = 2.0
    with deployed.clients(expected):
        deployed.deploy()
        after = deployed.until(lambda s: s["limits"]["experts"] == [1, 4] and s["wanted"]["experts"] == 3 and whole(s))
    assert actors(after) - actors(before) == {"experts-2"}
    assert actors(before) < actors(after)
    assert deployed.replicas() == replicas
    changed = [entry for entry in after["decisions"] if entry["event"] == "config"][-1]["changed"]
    assert changed == [
        "control.slo_ttft_s", "experts.groups.experts.actors", "experts.groups.experts.max_actors"
    ]  # fmt: skip


def test_moeray_status_shows_the_new_limits(deployed):
    command = [sys.executable, "-m", "moeray.cli.main", "status"]
    env = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=env).stdout
    assert "experts 3/3 (1 to 4)" in shown


@pytest.mark.slow
def test_actors_are_renewed_by_a_rolling_update_under_live_streams(deployed, expected):
    """Changed `args`: Serve replaces the replicas, each when its streams have ended, and the routers are renewed."""
    before, replicas = deployed.until(whole), deployed.replicas()
    deployed.args["engine"]["prefill_chunk"] = 64
    deployed.args["serve"] = {"wait_for_system": True}
    with deployed.clients(expected):
        deployed.deploy()
        after = deployed.until(lambda s: whole(s) and "router-0" not in actors(s))
        deployed.until_replaced(replicas)
    assert actors(before) ^ actors(after) == {"router-0", "router-1"}


@pytest.mark.slow
def test_a_config_that_cannot_be_taken_changes_nothing(deployed, expected):
    replicas = deployed.replicas()
    for wrong, words in (({"dtype": "bfloat16"}, "cannot change dtype"), ({"controll": {}}, "control")):
        deployed.user_config.update(wrong)
        deployed.deploy()
        said = deployed.until(lambda s: s["decisions"][-1]["event"] == "config_refused")["decisions"][-1]
        assert words in said["error"]
        for key in wrong:
            del deployed.user_config[key]
        deployed.user_config["control"]["shrink_votes"] = 10 + len(words)
        deployed.deploy()
        deployed.until(lambda s: s["decisions"][-1]["event"] == "config")
    assert deployed.replicas() == replicas
    assert [deployed.text(prompt) for prompt in PROMPTS] == expected


@pytest.mark.slow
def test_a_rolling_update_that_is_refused_ends_with_its_first_replica(deployed, expected):
    dtype = deployed.args["dtype"]
    with deployed.clients(expected):
        deployed.args["dtype"] = "bfloat16"
        deployed.deploy()
        deployed.until_serve_says("cannot change dtype")
        assert deployed.replicas(), "the others serve on"
        deployed.args["dtype"] = dtype
        deployed.deploy()
        deployed.until_serve_says("status: RUNNING")


@pytest.mark.slow
def test_another_system_takes_over_from_this_one(deployed, expected):
    """What no running system can take, under another name: nobody is refused, and the first one ends by itself."""
    replicas = deployed.replicas()
    deployed.args["serve"] = {"wait_for_system": True, "name": "second"}
    deployed.args["wire"] = {"max_channels": 128}
    with deployed.clients(expected):
        deployed.deploy()
        deployed.until_replaced(replicas)
    assert "router-0" in actors(deployed.until(whole))  # it counts from 0 again
    assert ask(find_controller("second"), "state")["status"] == "ready"
    end = time.monotonic() + 3 * LEASE_S
    while "moeray:controller" in {row["name"] for row in ray.util.list_named_actors(all_namespaces=True)}:
        assert time.monotonic() < end, "the first system does not end"
        assert [deployed.text(prompt) for prompt in PROMPTS] == expected

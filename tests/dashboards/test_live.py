"""A real Prometheus over a real system: it scrapes the endpoint under load, answers every query of every panel, and
raises the alert of an expert actor that is killed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from moeray.cli.dashboard_data import Prometheus, Viewer
from moeray.dashboards.autoscaling import AUTOSCALING
from moeray.dashboards.catalog import DASHBOARDS
from moeray.errors import MoerayError
from moeray.metrics import METRICS
from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port, moeray

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
SCRAPE_S = 1.0
STREAMS = 4

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"),
]


@contextmanager
def stopped_at_end(process: subprocess.Popen[Any], number: int) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(number)
        process.wait(60)


@contextmanager
def load(url: str) -> Iterator[None]:
    """Completions, some at a time, until the end."""
    ended = threading.Event()
    errors: list[str] = []

    def stream(number: int) -> None:
        body = {"model": "tiny-moe", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=60.0) as client:
            while not ended.is_set():
                answer = client.post("/v1/completions", json=body | {"prompt": f"{number} and so on" * 4})
                if answer.status_code != 200:
                    errors.append(answer.text)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert not errors


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[str]:
    """The URL of a served tiny model with two replicas of each expert and objectives, under load."""
    folder = tmp_path_factory.mktemp("live")
    model = make_tiny("qwen3_moe", folder / "tiny-moe", tokenizer=True)
    port = free_port()
    with (folder / "log").open("w") as log:
        process = moeray(
            "serve", str(model), "--port", str(port), "--dtype", "float32", "--engine-kv-blocks", "512",
            "--experts-num-cpus", "0.1", "--router-num-cpus", "0.1", "--experts-replicas", "2", "--experts-max-actors",
            "3", "--control-slo-ttft-s", "5", "--control-slo-tpot-s", "1",
            stdout=subprocess.PIPE, stderr=log, env={**os.environ, "MOERAY_CACHE_DIR": str(folder)},
        )  # fmt: skip
        with stopped_at_end(process, signal.SIGINT):
            assert "serving" in process.stdout.readline(), (folder / "log").read_text()[-3000:]
            url = f"http://127.0.0.1:{port}"
            with load(url):
                yield url


@pytest.fixture(scope="module")
def prometheus(endpoint, tmp_path_factory) -> Iterator[Prometheus]:
    """A Prometheus with the shipped config, but that it asks this endpoint, every second, and by two names: as if there
    were two ingress replicas."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S:.0f}s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(SHIPPED / pattern) for pattern in config["rule_files"]]
    served = httpx.URL(endpoint).port
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{served}", f"localhost:{served}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
        with stopped_at_end(process, signal.SIGTERM), Prometheus(f"http://127.0.0.1:{port}") as asked:
            yield asked


def eventually(ask: Callable[[], Any], wanted: Any, seconds: float = 90.0) -> None:
    """Ask until the answer is the wanted one; Prometheus learns something new at each scrape."""
    deadline, scrape = time.monotonic() + seconds, threading.Event()
    while True:
        try:
            answer = ask()
        except MoerayError as error:  # it is not up yet, or has not scraped anything
            answer = error
        if answer == wanted:
            return
        assert time.monotonic() < deadline, f"after {seconds:g} s: {answer}"
        scrape.wait(SCRAPE_S / 2)


def value(prometheus: Prometheus, query: str) -> float:
    found = prometheus.ask("query", query=query)["result"]
    return float(found[0]["value"][1]) if found else 0.0


def silent_panels(prometheus: Prometheus) -> list[str]:
    """The queries without an answer."""
    silent = []
    for dashboard in DASHBOARDS:
        viewer = Viewer(prometheus, time.time(), 60.0, SCRAPE_S)
        viewer.choose(dashboard)
        for panel in dashboard.panels:
            for query in panel.queries:
                lines = viewer.answers(query, panel.instant, panel.step_s)
                if not any(math.isfinite(value) for line in lines for _, value in line.points):
                    silent.append(f"{dashboard.name}: {panel.title}: {viewer.filled(query.expr)}")
    return silent


def run_moeray(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeray.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def firing(prometheus: Prometheus) -> set[str]:
    alerts = prometheus.ask("alerts")["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def test_every_query_of_every_panel_has_an_answer(prometheus):
    eventually(lambda: silent_panels(prometheus), [])


def test_what_is_scraped_is_what_the_table_says(prometheus):
    series = prometheus.ask("series", **{"match[]": '{__name__=~"moeray_.+"}'})
    found: dict[str, set[frozenset[str]]] = {}
    for labels in series:
        name = labels["__name__"]
        family = name if name in METRICS else name.rsplit("_", 1)[0]
        found.setdefault(family, set()).add(frozenset(labels) - {"__name__", "job", "instance", "le"})
    assert found == {name: {frozenset(spec.labels)} for name, spec in METRICS.items()}


def test_copies_of_several_endpoints_are_not_added_up(endpoint, prometheus):
    wanted = httpx.get(f"{endpoint}/status", timeout=30.0).json()["wanted"]
    panel = next(panel for panel in AUTOSCALING.panels if panel.title == "Actors wanted")
    viewer = Viewer(prometheus, time.time(), 60.0, SCRAPE_S)
    viewer.choose(AUTOSCALING)
    (line,) = viewer.lines(panel)
    assert line.last == sum(wanted.values())
    assert value(prometheus, "sum(moeray_actors_desired)") == 2 * line.last


@pytest.mark.parametrize(
    "query",
    [
        "sum(moeray_generation_tokens_total)", "sum(moeray_prompt_tokens_total)", "sum(moeray_expert_rows_total)",
        "sum(moeray_expert_busy_seconds_total)", "sum(moeray_dispatch_bytes_total)", "sum(moeray_actor_cost_total)",
        "sum(moeray_expert_load_rows_total)", 'sum(moeray_http_requests_total{handler="/v1/completions"})',
        "sum(moeray_slo_requests_total)", "sum(moeray_step_seconds_count)",
    ],
)  # fmt: skip
def test_counters_rise_under_load(prometheus, query):
    before = value(prometheus, query)
    eventually(lambda: value(prometheus, query) > before, True)


def test_recording_rules_record(prometheus):
    names = [rule["name"] for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    recorded = [name for name in names if name.startswith("moeray:")]
    assert len(recorded) > 10
    eventually(lambda: [name for name in recorded if not prometheus.ask("query", query=name)["result"]], [])


@pytest.mark.slow
def test_pictures_of_the_dashboards(prometheus, tmp_path):
    pytest.importorskip("matplotlib")
    eventually(lambda: silent_panels(prometheus), [])
    done = run_moeray("dashboards", str(tmp_path), "--draw", prometheus.url, "--minutes", "1", "--scrape", "1")
    assert done.returncode == 0, done.stderr
    for dashboard in DASHBOARDS:
        assert (tmp_path / f"{dashboard.name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_a_prometheus(tmp_path):
    pytest.importorskip("matplotlib")
    done = run_moeray("dashboards", str(tmp_path), "--draw", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no Prometheus at" in done.stderr


def test_a_killed_expert_actor_raises_its_alert_and_a_mark_on_the_panels(endpoint, prometheus):
    assert "MoerayExpertLost" not in firing(prometheus)
    status = httpx.get(f"{endpoint}/status", timeout=30.0).json()
    victim = next(row for row in status["actors"] if row["kind"] == "expert" and row["state"] == "ready")
    os.kill(victim["pid"], signal.SIGKILL)
    eventually(lambda: "MoerayExpertLost" in firing(prometheus), True)
    viewer = Viewer(prometheus, time.time(), 60.0, SCRAPE_S)
    viewer.choose(DASHBOARDS[0])
    lost = next(annotation for annotation in DASHBOARDS[0].annotations if annotation.name == "Actor lost")
    assert viewer.marks(lost)
    assert firing(prometheus) == {"MoerayExpertLost"}

"""The system's series at Ray's own metrics agent."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import ray

from moeray.cluster.ray_metrics import RayMetrics, flat
from moeray.recorder import Recorder
from tests.scraping import samples, total

pytestmark = pytest.mark.ray


def filled() -> Recorder:
    recorder = Recorder(model_name="m")
    recorder.counter("moeray_request_success_total", finished_reason="stop").add(3)
    recorder.gauge("moeray_placement_epoch").set(7)
    recorder.histogram("moeray_step_seconds").observe_all([0.003, 0.02, 0.02])
    return recorder


def test_a_histogram_is_flat():
    found = {(name, labels.get("le")): value for name, labels, value in flat(filled().read()[1], "histogram")}
    assert found["moeray_step_seconds_bucket", "0.0025"] == 0
    assert found["moeray_step_seconds_bucket", "0.005"] == 1
    assert found["moeray_step_seconds_bucket", "+Inf"] == found["moeray_step_seconds_count", None] == 3
    assert found["moeray_step_seconds_sum", None] == pytest.approx(0.043)


@pytest.fixture(scope="module")
def agent():
    """Where the node's metrics agent is scraped."""
    ray.init(
        "local", num_cpus=1, log_to_driver=False, logging_level="ERROR", include_dashboard=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


def scraped(url, name, value, within_s=60.0):
    """The agent's samples, as soon as that one has come to `value`."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        found = samples(httpx.get(url, timeout=10.0).content)
        if any(sample == name and got == value for (sample, _), got in found.items()):
            return found
    raise AssertionError({key: got for key, got in found.items() if "moeray" in key[0]})


def test_series_are_repeated_to_rays_agent(agent):
    recorder = filled()
    sink = RayMetrics(lambda: recorder.read()[1], period_s=0.2)
    try:
        found = scraped(agent, "ray_moeray_request_success_total", 3)
        assert total(found, "ray_moeray_request_success_total", model_name="m", finished_reason="stop") == 3
        recorder.counter("moeray_request_success_total", finished_reason="stop").add(2)
        recorder.gauge("moeray_placement_epoch").set(8)
        scraped(agent, "ray_moeray_request_success_total", 5)
        found = scraped(agent, "ray_moeray_placement_epoch", 8)
        assert total(found, "ray_moeray_step_seconds_bucket", le="0.025") == 3
        assert total(found, "ray_moeray_step_seconds_sum") == pytest.approx(0.043)
    finally:
        sink.close()


def test_who_goes_on_for_another_repeats_only_what_is_new(agent):
    recorder = Recorder(model_name="m")
    counter = recorder.counter("moeray_request_success_total", finished_reason="length")
    counter.add(40)
    read = threading.Semaphore(0)

    def series():
        read.release()
        return recorder.read()[1]

    sink = RayMetrics(series, resumed=True, period_s=0.2)
    try:
        for _ in range(2):  # the first has been taken in when the second is asked for
            assert read.acquire(timeout=30)
        counter.add(2)
        scraped(agent, "ray_moeray_request_success_total", 2)
    finally:
        sink.close()

"""The recorder and the text that is made of it."""

from __future__ import annotations

import threading

import msgpack
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from moeray.exposition import exposition
from moeray.metrics import METRICS
from moeray.recorder import Recorder, snapshot_from, snapshot_tree


def read(recorder: Recorder):
    return recorder.read()[1]


def filled() -> Recorder:
    recorder = Recorder(model_name="m", actor="router-0", group="router")
    recorder.counter("moeray_request_success_total", finished_reason="stop").add(2)
    recorder.gauge("moeray_num_requests_running").set(3)
    latency = recorder.histogram("moeray_time_to_first_token_seconds")
    latency.observe(0.001)
    latency.observe_all([0.3, 1000.0])
    return recorder


def test_series_begin_at_zero_and_constant_labels_go_where_they_belong():
    recorder = Recorder(model_name="m", actor="router-0")
    moved = recorder.counter("moeray_requests_moved_total")
    recorder.counter("moeray_request_success_total", finished_reason="stop")
    assert read(recorder) == {
        "moeray_requests_moved_total": {(): 0.0},
        "moeray_request_success_total": {("m", "stop"): 0.0},
    }
    moved.add()
    recorder.counter("moeray_requests_moved_total").add(2)
    assert read(recorder)["moeray_requests_moved_total"] == {(): 3.0}


def test_what_somebody_else_counts_never_falls():
    recorder = Recorder()
    counter = recorder.counter("moeray_requests_moved_total")
    for total in (5, 3):
        counter.raise_to(total)
    assert read(recorder)["moeray_requests_moved_total"] == {(): 5.0}


@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        ("counter", "moeray_nonsense_total", {}),
        ("counter", "moeray_dispatch_rows_total", {}),
        ("counter", "moeray_dispatch_rows_total", {"hop": "unix", "colour": "red"}),
        ("gauge", "moeray_requests_moved_total", {}),
        ("counter", "moeray_step_seconds", {}),
    ],
)
def test_what_the_table_lacks_is_refused(kind, name, labels):
    with pytest.raises(KeyError):
        getattr(Recorder(), kind)(name, **labels)


def test_no_count_is_lost_between_threads():
    recorder = Recorder()
    counter, histogram = recorder.counter("moeray_requests_moved_total"), recorder.histogram("moeray_step_seconds")

    def run():
        for _ in range(5000):
            counter.add()
            histogram.observe(1.0)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(recorder)["moeray_requests_moved_total"] == {(): 20_000}
    assert read(recorder)["moeray_step_seconds"][()][-1] == 20_000


def test_a_snapshot_is_a_copy_and_survives_a_frame():
    recorder = filled()
    before = read(recorder)
    recorder.histogram("moeray_time_to_first_token_seconds").observe(1.0)
    assert before != read(recorder)
    assert snapshot_from(msgpack.unpackb(msgpack.packb(snapshot_tree(before)))) == before
    assert snapshot_from([["moeray_of_another_version_total", [[[], 1]]]]) == {}


@pytest.mark.parametrize(
    ("accept", "content_type", "parser"),
    [
        ("", "text/plain; version=0.0.4", parse),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
            "application/openmetrics-text",
            parse_openmetrics,
        ),
    ],
)
def test_the_text_holds_every_metric_of_the_table(accept, content_type, parser):
    text, kind = exposition(read(filled()), accept)
    assert kind.startswith(content_type)
    families = {family.name: family for family in parser(text.decode())}
    for name, spec in METRICS.items():
        family = families[name.removesuffix("_total") if spec.kind == "counter" else name]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
    samples = {(s.name, s.labels.get("le")): s.value for f in families.values() for s in f.samples}
    assert samples["moeray_request_success_total", None] == 2
    assert samples["moeray_num_requests_running", None] == 3
    assert samples["moeray_time_to_first_token_seconds_bucket", "0.001"] == 1
    assert samples["moeray_time_to_first_token_seconds_bucket", "0.5"] == 2
    assert samples["moeray_time_to_first_token_seconds_bucket", "+Inf"] == 3
    assert samples["moeray_time_to_first_token_seconds_count", None] == 3
    assert samples["moeray_time_to_first_token_seconds_sum", None] == pytest.approx(1000.301)

"""Every metric of moeray in one table, a recorder that each actor keeps, and the merge that one endpoint serves.

Names follow Prometheus (base units, `_total`) and, for requests, vLLM's under the prefix `moeray_`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MICRO = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class MetricSpec:
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, MetricSpec] = {
    "moeray_request_total": MetricSpec("counter", "Requests that ended, by finish reason.", ("reason",)),
    "moeray_prompt_tokens_total": MetricSpec("counter", "Prompt tokens computed or taken from the prefix cache."),
    "moeray_generation_tokens_total": MetricSpec("counter", "Tokens generated."),
    "moeray_prefix_cache_hit_tokens_total": MetricSpec("counter", "Prompt tokens taken from the prefix cache."),
    "moeray_preemptions_total": MetricSpec("counter", "Sequences preempted because blocks ran out."),
    "moeray_time_to_first_token_seconds": MetricSpec(
        "histogram", "From a request's arrival at the router to its first token.", (), _SECONDS
    ),
    "moeray_time_per_output_token_seconds": MetricSpec(
        "histogram", "Time between a request's tokens after the first.", (), _SECONDS
    ),
    "moeray_e2e_request_latency_seconds": MetricSpec(
        "histogram", "From a request's arrival at the router to its last token.", (), _SECONDS
    ),
    "moeray_step_seconds": MetricSpec("histogram", "Duration of an engine step.", (), _SECONDS),
    "moeray_num_requests_running": MetricSpec("gauge", "Sequences that hold blocks.", ("actor",)),
    "moeray_num_requests_waiting": MetricSpec("gauge", "Sequences that wait for blocks.", ("actor",)),
    "moeray_kv_cache_usage_ratio": MetricSpec("gauge", "Used part of the KV cache.", ("actor",)),
    "moeray_dispatch_seconds": MetricSpec(
        "histogram", "From sending an actor's rows to receiving their outputs.", ("hop",), _MICRO
    ),
    "moeray_dispatch_rows_total": MetricSpec("counter", "Rows dispatched, by hop.", ("hop",)),
    "moeray_dispatch_retries_total": MetricSpec("counter", "Rows sent again after a loss, by reason.", ("reason",)),
    "moeray_expert_rows_total": MetricSpec("counter", "Rows that an expert actor served.", ("actor",)),
    "moeray_expert_busy_seconds_total": MetricSpec("counter", "Time an expert actor computed.", ("actor",)),
    "moeray_expert_service_seconds": MetricSpec("histogram", "Compute time of one forward.", (), _MICRO),
    "moeray_expert_weight_bytes": MetricSpec("gauge", "Stored bytes of the experts an actor hosts.", ("actor",)),
    "moeray_expert_load_rows_total": MetricSpec(
        "counter", "Rows by expert; from the controller alone.", ("layer", "expert")
    ),
    "moeray_actors": MetricSpec("gauge", "Actors by kind and state.", ("kind", "state")),
    "moeray_actors_desired": MetricSpec("gauge", "Actors that are wanted, by group.", ("group",)),
    "moeray_plans_total": MetricSpec("counter", "Changes of the placement, by kind and result.", ("kind", "result")),
    "moeray_layer_skew_ratio": MetricSpec("gauge", "Max/mean rows of the actors of a layer, of late.", ("layer",)),
    "moeray_placement_epoch": MetricSpec("gauge", "The newest placement epoch."),
}

Snapshot = dict[str, dict[tuple[str, ...], Any]]
"""Metric name -> label values -> a number, or for a histogram [count per bucket..., over the last one, sum]."""


class Recorder:
    """Counts of one actor. Thread-safe; a name or label that the table lacks is a KeyError at the first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Snapshot = {}

    def add(self, name: str, amount: float, **labels: object) -> None:
        """Raise a counter."""
        key = _key(name, labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            series[key] = series.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: object) -> None:
        """Set a gauge."""
        key = _key(name, labels)
        with self._lock:
            self._values.setdefault(name, {})[key] = value

    def observe(self, name: str, value: float, **labels: object) -> None:
        """Add an observation to a histogram."""
        key, buckets = _key(name, labels), METRICS[name].buckets
        with self._lock:
            row = self._values.setdefault(name, {}).setdefault(key, [0] * (len(buckets) + 1) + [0.0])
            row[bisect_left(buckets, value)] += 1
            row[-1] += value

    def snapshot(self) -> Snapshot:
        """A copy, of plain data."""
        with self._lock:
            return {
                name: {key: list(value) if isinstance(value, list) else value for key, value in series.items()}
                for name, series in self._values.items()
            }


def _key(name: str, labels: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(labels[label]) for label in METRICS[name].labels)


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Add up counters and histograms series by series; of a gauge with the same labels the last one stays."""
    merged: Snapshot = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            kind, into = METRICS[name].kind, merged.setdefault(name, {})
            for key, value in series.items():
                if kind == "gauge" or key not in into:
                    into[key] = list(value) if isinstance(value, list) else value
                elif kind == "counter":
                    into[key] += value
                else:
                    into[key] = [a + b for a, b in zip(into[key], value, strict=True)]
    return merged


def exposition(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' text format, every metric of the table included."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    return bytes(generate_latest(registry))


class _Collector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, spec in METRICS.items():
            yield _family(name, spec, self._snapshot.get(name, {}))


def _family(name: str, spec: MetricSpec, series: dict[tuple[str, ...], Any]) -> Metric:
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(name, spec.help, labels=spec.labels)
        for key, row in series.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, spec.buckets), "+Inf"), row, strict=False):
                total += count
                buckets.append((bound, total))
            histogram.add_metric(key, buckets, sum_value=row[-1])
        return histogram
    cls = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = cls(name, spec.help, labels=spec.labels)
    if not spec.labels:
        series = {(): series.get((), 0.0)}
    for key, value in series.items():
        family.add_metric(key, value)
    return family

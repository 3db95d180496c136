"""A snapshot as Prometheus reads it: every metric of the table, in the format that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from moeray.metrics import METRICS, MetricSpec
from moeray.recorder import Labels, Snapshot


def exposition(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """(the text, its content type): OpenMetrics where the HTTP header `accept` asks for it, else the plain format."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    encode, content_type = choose_encoder(accept)
    return bytes(encode(registry)), content_type


class _Collector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, spec in METRICS.items():
            yield _family(name, spec, self._snapshot.get(name, {}))


def _family(name: str, spec: MetricSpec, series: Mapping[Labels, Any]) -> Metric:
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(name, spec.help, labels=spec.labels)
        for key, row in series.items():
            buckets, total = cumulated(spec, row)
            histogram.add_metric(key, buckets, sum_value=total)
        return histogram
    cls = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = cls(name, spec.help, labels=spec.labels)
    for key, value in series.items():
        family.add_metric(key, value)
    return family


def cumulated(spec: MetricSpec, row: list[float]) -> tuple[list[tuple[str, float]], float]:
    """A histogram's row as Prometheus has it: ((`le`, observations up to it)..., the last one +Inf) and the sum."""
    count, buckets = 0.0, []
    for bound, there in zip((*map(str, spec.buckets), "+Inf"), row, strict=False):
        count += there
        buckets.append((bound, count))
    return buckets, row[-1]

"""The system's series once more, through Ray's own metrics agents: `ray_moeray_*` for whoever scrapes Ray.

A histogram comes as three gauges, `_bucket` by `le`, `_sum` and `_count`, which PromQL reads as it does a histogram:
Ray's own takes single observations only, and its agent guesses their sum.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from ray.util.metrics import Counter, Gauge

from moeray.errors import MoerayError
from moeray.exposition import cumulated
from moeray.metrics import METRICS
from moeray.recorder import Labels, Snapshot

log = logging.getLogger(__name__)

PERIOD_S = 5.0

Sample = tuple[str, dict[str, str], float]
"""Metric name, labels, value."""


class RayMetrics:
    """Repeats what `series` gives each `period_s` seconds, in a thread of its own, until it is closed.

    Ray's counters are a process's, and stay when it has died. So one that goes on for another (`resumed`) tells only
    what comes on top of what it finds: the sum over processes is the system's count.
    """

    def __init__(self, series: Callable[[], Snapshot], resumed: bool = False, period_s: float = PERIOD_S) -> None:
        self._series = series
        self._resumed = resumed
        self._period_s = period_s
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._told: dict[tuple[str, Labels], float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            try:
                self._repeat(self._series())
            except MoerayError as error:
                log.debug("nothing to repeat to Ray: %s", error)
            except Exception:  # such as of a name that Ray does not take: the next time may be better
                log.exception("the metrics could not be repeated to Ray")

    def _repeat(self, snapshot: Snapshot) -> None:
        told = {}
        for name, labels, value in flat(snapshot, "counter"):
            if name not in self._counters:
                self._counters[name] = Counter(name, METRICS[name].help, METRICS[name].labels)
            key = name, tuple(labels.values())
            if (more := value - self._told.get(key, 0.0)) > 0 and not self._resumed:
                self._counters[name].inc(more, labels)
            told[key] = value
        self._told, self._resumed = told, False
        for kind in ("gauge", "histogram"):
            for name, labels, value in flat(snapshot, kind):
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, _help(name), tuple(labels))
                self._gauges[name].set(value, labels)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(self._period_s)


def flat(snapshot: Snapshot, kind: str) -> Iterator[Sample]:
    """The samples of all metrics of a kind, those of a histogram as Prometheus names them."""
    for name, series in snapshot.items():
        spec = METRICS[name]
        if spec.kind != kind:
            continue
        for key, value in series.items():
            labels = dict(zip(spec.labels, key, strict=True))
            if kind != "histogram":
                yield name, labels, value
                continue
            buckets, total = cumulated(spec, value)
            for bound, count in buckets:
                yield f"{name}_bucket", {**labels, "le": bound}, count
            yield f"{name}_sum", labels, total
            yield f"{name}_count", labels, buckets[-1][1]


def _help(sample: str) -> str:
    for name in (sample, sample.rpartition("_")[0]):
        if name in METRICS:
            return METRICS[name].help
    raise KeyError(sample)

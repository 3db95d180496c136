"""Throughput and latency of late, from samples of the merged metrics: differences of counters and of histograms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moeray.control.ledger import merge
from moeray.metrics import METRICS
from moeray.recorder import Snapshot

RATE_S = 5.0
"""Rates are means over so many seconds."""
LATENCY_S = 30.0
"""Quantiles are of what ended within so many seconds."""

_RATES = {
    "generation_tokens_per_s": "moeray_generation_tokens_total",
    "prompt_tokens_per_s": "moeray_prompt_tokens_total",
}
_LATENCIES = {"ttft": "moeray_time_to_first_token_seconds", "tpot": "moeray_time_per_output_token_seconds"}
_QUANTILES = {"p50": 0.5, "p95": 0.95}
_RUNNING, _WAITING = "moeray_num_requests_running", "moeray_num_requests_waiting"
_KV_USAGE = "moeray_kv_cache_usage_ratio"
_WATCHED = frozenset((*_RATES.values(), *_LATENCIES.values(), _RUNNING, _WAITING, _KV_USAGE))


@dataclass(frozen=True)
class Sample:
    """All actors' metrics, merged, at one time (seconds of any one clock): those that the figures are made of."""

    at: float
    metrics: Snapshot

    @classmethod
    def of(cls, at: float, parts: Iterable[Snapshot]) -> Sample:
        """`merge` adds the parts up to the system's metrics."""
        watched = ({name: series for name, series in part.items() if name in _WATCHED} for part in parts)
        return cls(at, merge(watched))


def figures(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The newest of `samples` (in order of time, at least one) held against those before it.

    Tokens per second; `ttft_p50_s` and the like in seconds; requests running and waiting; the fullest router's part of
    its KV cache. None where nothing can be said: a rate needs two samples, a latency some requests.
    """
    now, last = samples[-1], samples[-1].metrics
    recent = _first_within(samples, RATE_S)
    before = _first_within(samples, LATENCY_S).metrics
    out: dict[str, float | None] = {}
    for name, metric in _RATES.items():
        gained = _total(last, metric) - _total(recent.metrics, metric)
        out[name] = max(0.0, gained) / (now.at - recent.at) if now.at > recent.at else None
    for name, metric in _LATENCIES.items():
        counts = [max(0, b - a) for a, b in zip(_counts(before, metric), _counts(last, metric), strict=True)]
        for label, q in _QUANTILES.items():
            out[f"{name}_{label}_s"] = quantile(q, METRICS[metric].buckets, counts)
    out["running"] = _total(last, _RUNNING)
    out["waiting"] = _total(last, _WAITING)
    out["kv_usage"] = max(last.get(_KV_USAGE, {}).values(), default=0.0)
    return out


def quantile(q: float, bounds: Sequence[float], counts: Sequence[float]) -> float | None:
    """The q-quantile (0 to 1) of a histogram with so many observations up to each bound and, last, above them all.

    Evenly distributed within a bucket, as Prometheus has it; above the last bound it is that bound. None without
    observations.
    """
    rank = q * sum(counts)
    if not sum(counts):
        return None
    low, passed = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and passed + count >= rank:
            return low + (bound - low) * (rank - passed) / count
        low, passed = bound, passed + count
    return bounds[-1]


def _first_within(samples: Sequence[Sample], seconds: float) -> Sample:
    """The oldest sample that is at most so old."""
    newest = samples[-1]
    return next(sample for sample in samples if sample.at >= newest.at - seconds)


def _total(metrics: Snapshot, name: str) -> float:
    return float(sum(metrics.get(name, {}).values()))


def _counts(metrics: Snapshot, name: str) -> list[Any]:
    """Observations by bucket, over all labels."""
    rows = [row[:-1] for row in metrics.get(name, {}).values()]
    return [sum(column) for column in zip(*rows, strict=True)] or [0] * (len(METRICS[name].buckets) + 1)

"""An engine's counters in the three forms that a router tells them in: a report, a status row, metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeray.control.reports import RouterReport
from moeray.engine.engine import EngineStats
from moeray.recorder import Recorder


def with_stats(report: RouterReport, stats: EngineStats | None) -> RouterReport:
    """The report with the engine's counts; without an engine they stay 0."""
    if stats is None:
        return report
    return replace(
        report,
        running=stats.running,
        waiting=stats.waiting,
        kv_usage=stats.kv_cache_usage_ratio,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
        pending_tokens=stats.pending_tokens,
        steps=stats.steps,
        step_s=stats.step_seconds_total,
        decode_tokens=stats.decode_tokens,
        decode_s=stats.decode_seconds_total,
        prefill_tokens=stats.prefill_tokens,
        prefill_s=stats.prefill_seconds_total,
    )


def status_of(stats: EngineStats | None) -> dict[str, Any]:
    """The engine's part of a router's row in `moeray status`."""
    return {
        "running": stats.running if stats else 0,
        "queue": stats.waiting if stats else 0,
        "kv_cache_usage_ratio": stats.kv_cache_usage_ratio if stats else 0.0,
        "kv_blocks_used": stats.kv_blocks_used if stats else 0,
        "generation_tokens": stats.generation_tokens if stats else 0,
    }


class EngineFigures:
    """The engine's counts in a router's recorder, brought up to date when somebody reads it."""

    def __init__(self, recorder: Recorder) -> None:
        self._running = recorder.gauge("moeray_num_requests_running")
        self._waiting = recorder.gauge("moeray_num_requests_waiting")
        self._kv_usage = recorder.gauge("moeray_kv_cache_usage_ratio")
        self._prompt_tokens = recorder.counter("moeray_prompt_tokens_total")
        self._generation_tokens = recorder.counter("moeray_generation_tokens_total")
        self._prefix_queries = recorder.counter("moeray_prefix_cache_queries_total")
        self._prefix_hits = recorder.counter("moeray_prefix_cache_hits_total")
        self._preemptions = recorder.counter("moeray_num_preemptions_total")

    def update(self, stats: EngineStats | None) -> None:
        """Without an engine all stays 0."""
        if stats is None:
            return
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(stats.kv_cache_usage_ratio)
        self._prompt_tokens.raise_to(stats.prompt_tokens)
        self._generation_tokens.raise_to(stats.generation_tokens)
        self._prefix_queries.raise_to(stats.prefix_query_tokens)
        self._prefix_hits.raise_to(stats.prefix_hit_tokens)
        self._preemptions.raise_to(stats.preemptions)

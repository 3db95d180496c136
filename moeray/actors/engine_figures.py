"""An engine's counters in the three forms that a router tells them in: a report, a status row, a metrics snapshot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeray.control.reports import RouterReport
from moeray.engine.engine import EngineStats
from moeray.metrics import Recorder, Snapshot


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


def metrics_of(actor_id: str, recorder: Recorder, stats: EngineStats | None) -> Snapshot:
    """What the recorder holds, with the engine's gauges and counters."""
    if stats is None:
        return recorder.snapshot()
    recorder.set("moeray_num_requests_running", stats.running, actor=actor_id)
    recorder.set("moeray_num_requests_waiting", stats.waiting, actor=actor_id)
    recorder.set("moeray_kv_cache_usage_ratio", stats.kv_cache_usage_ratio, actor=actor_id)
    counters = {
        "moeray_prompt_tokens_total": stats.prompt_tokens,
        "moeray_prefix_cache_hit_tokens_total": stats.prefix_hit_tokens,
        "moeray_preemptions_total": stats.preemptions,
    }
    return recorder.snapshot() | {name: {(): float(value)} for name, value in counters.items()}

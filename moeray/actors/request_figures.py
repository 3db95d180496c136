"""What becomes of a router's requests, as vLLM counts it: latencies, lengths and ends, and the objectives missed."""

from __future__ import annotations

from moeray.actors.life import Life
from moeray.control.objectives import Objectives
from moeray.recorder import Recorder
from moeray.types import FinishReason


class RequestFigures:
    """Used by the step loop's thread; `ended` and `late` may be read by any.

    `ended`: requests that ended with all their tokens, `late`: those of them that missed an objective. `objectives` may
    be replaced between two steps.
    """

    def __init__(self, recorder: Recorder, objectives: Objectives) -> None:
        self.objectives = objectives
        self.ended = self.late = 0
        self._judged = recorder.counter("moeray_slo_requests_total")
        self._judged_late = recorder.counter("moeray_slo_late_requests_total")
        self._queue_time = recorder.histogram("moeray_request_queue_time_seconds")
        self._first_token = recorder.histogram("moeray_time_to_first_token_seconds")
        self._next_token = recorder.histogram("moeray_time_per_output_token_seconds")
        self._latency = recorder.histogram("moeray_e2e_request_latency_seconds")
        self._prompt_tokens = recorder.histogram("moeray_request_prompt_tokens")
        self._generation_tokens = recorder.histogram("moeray_request_generation_tokens")
        self._ends = {
            reason: recorder.counter("moeray_request_success_total", finished_reason=reason.value)
            for reason in FinishReason
        }

    def began(self, life: Life, now: float) -> None:
        """Its first step has begun."""
        self._queue_time.observe(now - life.arrived)

    def token(self, life: Life, count: int, now: float) -> None:
        """It got `count` tokens."""
        life.given += count
        if life.last_token is not None:
            self._next_token.observe(now - life.last_token)
        elif not life.resumed:
            self._first_token.observe(now - life.arrived)
        life.first_token = life.first_token or now
        life.last_token = now

    def end(self, life: Life, reason: FinishReason, now: float) -> None:
        """It has ended: with all its tokens, with an error, or (ABORT) because nobody waits for it any more."""
        self._ends[reason].add()
        if reason is FinishReason.ABORT:
            return
        self._latency.observe(now - life.arrived)
        self._prompt_tokens.observe(life.prompt_tokens)
        self._generation_tokens.observe(life.tokens)
        if reason is not FinishReason.ERROR and life.first_token is not None:
            late = self.objectives.late(life.first_token - life.arrived, now - life.arrived, life.given)
            self.ended += 1
            self.late += late
            self._judged.add()
            self._judged_late.add(late)

"""Whether a request kept to what the config allows."""

from __future__ import annotations

from dataclasses import dataclass

from moeray.settings.control import ControlConfig


@dataclass(frozen=True)
class Objectives:
    """Seconds to the first token, and between the others in the mean; None allows anything. `step_s`: how long prompts
    may make the steps of what decodes."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    step_s: float | None = None

    @classmethod
    def of(cls, control: ControlConfig) -> Objectives:
        tpot_s, pace = control.slo_tpot_s, control.slo_pace
        return cls(control.slo_ttft_s, tpot_s, None if tpot_s is None or pace is None else pace * tpot_s)

    def late(self, first_s: float, last_s: float, tokens: int) -> bool:
        """`first_s`, `last_s`: when the first and the last of its tokens came, since its arrival."""
        if self.ttft_s is not None and first_s > self.ttft_s:
            return True
        return self.tpot_s is not None and tokens > 1 and (last_s - first_s) / (tokens - 1) > self.tpot_s

"""When something that fails may be tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass

RETRY_S = (1.0, 60.0)
"""It is tried again after the first pause, doubled at each failure up to the second."""


@dataclass
class Backoff:
    """Seconds of the caller's clock. What fails meanwhile, side by side, is the same failure."""

    pause_s: float = 0.0
    until: float = -math.inf

    def fail(self, now: float) -> None:
        if now >= self.until:
            self.pause_s = min(max(2 * self.pause_s, RETRY_S[0]), RETRY_S[1])
            self.until = now + self.pause_s

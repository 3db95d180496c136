"""One request on one router, from its arrival to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeray.types import GenerationRequest


@dataclass
class Life:
    """One attempt at a request. Times are of time.monotonic; `given` counts the tokens of this attempt."""

    request: GenerationRequest
    arrived: float
    first_token: float | None = None
    last_token: float | None = None
    given: int = 0
    cached_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def until(self) -> float:
        """When the client's patience ends; infinite where it said nothing."""
        return math.inf if self.request.timeout_s is None else self.arrived + self.request.timeout_s

    @property
    def tokens(self) -> int:
        """Those of earlier attempts too."""
        return len(self.request.output_ids) + self.given

    @property
    def resumed(self) -> bool:
        """There are tokens of earlier attempts, so the first one here is not the request's first."""
        return bool(self.request.output_ids)

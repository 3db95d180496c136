"""How far a batch is, and how fast: counts that its event loop keeps, and the pace of late."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

WINDOW_S = 30.0


@dataclass
class Tally:
    """`earlier` of the input's `lines` were settled by an earlier run, `failed_earlier` of these with an error.

    `answered` and `failed` are this run's, `generated` its tokens, those of unfinished lines included. `codes` counts
    this run's errors by their codes, and `seconds` is how long lines were asked.
    """

    lines: int = 0
    earlier: int = 0
    failed_earlier: int = 0
    answered: int = 0
    failed: int = 0
    in_flight: int = 0
    generated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)

    def fail(self, code: str) -> None:
        self.failed += 1
        self.codes[code] += 1

    @property
    def done(self) -> int:
        """Lines that are settled, whenever."""
        return self.earlier + self.answered + self.failed

    @property
    def errors(self) -> int:
        """Lines in the error file."""
        return self.failed_earlier + self.failed

    @property
    def complete(self) -> bool:
        return self.done == self.lines


@dataclass(frozen=True, slots=True)
class Reading:
    """A tally at one moment, in seconds of a monotonic clock."""

    at: float
    done: int
    generated: int


class Pace:
    """Speed over the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque()

    def read(self, reading: Reading) -> None:
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].at <= reading.at - WINDOW_S:
            self._readings.popleft()

    def tokens_per_second(self) -> float:
        first, last = self._readings[0], self._readings[-1]
        return (last.generated - first.generated) / (last.at - first.at) if last.at > first.at else 0.0

    def seconds_left(self, lines: int) -> float | None:
        """Until all of `lines` are done at this pace; None while none was of late."""
        first, last = self._readings[0], self._readings[-1]
        if last.done == first.done:
            return None
        return (lines - last.done) * (last.at - first.at) / (last.done - first.done)

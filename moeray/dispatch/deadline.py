"""How long an actor may take to answer one forward. Pure.

The smoothing is that of TCP's retransmission timer (Jacobson and Karels 1988, RFC 6298): a mean and a mean deviation,
exponentially weighted, and a doubling after each timeout. What is new is the number of rows: the cost of a forward
lies between constant (its weights are read once) and proportional to its rows, so a forecast takes the dearer of both.
"""

from __future__ import annotations

from typing import NamedTuple

SLACK = 4.0
"""A forward may take so many times its forecast before its actor is given up."""
LEAST_S = 0.5
FRESH_S = 5.0
FRESH_ROW_S = 0.001
"""A first contact, or an expert whose pages may not be in memory yet, gets `FRESH_S` and this for each row."""

DIAL_S = 1.0
"""To be reached takes a process that runs moments, whatever it computes."""

_MEAN_WEIGHT = 1 / 8
_DEVIATION_WEIGHT = 1 / 4
_DEVIATIONS = 4.0


class Latency(NamedTuple):
    """One actor's round trips, smoothed: seconds, and the rows that they carried; `rows` 0 means none was seen.

    `timeouts`: how many deadlines it missed since its last answer.
    """

    mean_s: float = 0.0
    deviation_s: float = 0.0
    rows: float = 0.0
    timeouts: int = 0


def observed(latency: Latency, rows: int, seconds: float) -> Latency:
    """After an answer: `rows` (at least 1) took `seconds`."""
    if not latency.rows:
        return Latency(seconds, seconds / 2, float(rows))
    ratio = rows / latency.rows
    low, high = latency.mean_s * min(1.0, ratio), latency.mean_s * max(1.0, ratio)
    off = max(low - seconds, seconds - high, 0.0)
    return Latency(
        latency.mean_s + _MEAN_WEIGHT * (seconds - latency.mean_s),
        latency.deviation_s + _DEVIATION_WEIGHT * (off - latency.deviation_s),
        latency.rows + _MEAN_WEIGHT * (rows - latency.rows),
    )


def timed_out(latency: Latency) -> Latency:
    """After a missed deadline."""
    return latency._replace(timeouts=latency.timeouts + 1)


def deadline_s(latency: Latency, rows: int, *, fresh: bool, most_s: float) -> float:
    """Seconds from sending `rows` until the actor is given up, at most `most_s`.

    `fresh`: something of the forward is new to the actor (its first, or an expert that it has not served yet).
    """
    least = FRESH_S + FRESH_ROW_S * rows if fresh or not latency.rows else LEAST_S
    forecast = 0.0
    if latency.rows:
        forecast = (latency.mean_s + _DEVIATIONS * latency.deviation_s) * max(1.0, rows / latency.rows)
    return min(most_s, max(least, SLACK * forecast) * 2.0 ** min(latency.timeouts, 16))


def dial_s(latency: Latency) -> float:
    """Seconds that an actor has to be reached."""
    return float(min(FRESH_S, DIAL_S * 2.0 ** min(latency.timeouts, 16)))

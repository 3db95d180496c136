"""What the actors' reports add up to: rates, busy parts and waits over recent windows. No clock: times come in."""

from __future__ import annotations

from collections.abc import Mapping

from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, RouterReport
from moeray.types import ExpertId


class LoadBook:
    """Folds reports into windows. One owner: not thread-safe. Times are seconds of any one clock."""

    def __init__(self, window_s: float, *, buckets: int = 60) -> None:
        """`window_s`: time constant of the exponential windows; `buckets`: one-second ones of the sliding window."""

    def fold(self, report: ExpertReport | RouterReport, now: float) -> None:
        """Take one report, which arrived at `now`."""

    def forget(self, actor_id: str) -> None:
        """Drop what is known of an actor that is gone; what it served stays in the experts' rates and fades."""

    def expert_rates(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert, over the exponential window."""
        raise NotImplementedError

    def peak(self, now: float) -> dict[ExpertId, float]:
        """Rows per second of each expert in the sliding window's busiest second."""
        raise NotImplementedError

    def busy(self, now: float) -> dict[str, float]:
        """The part of the last window that each expert actor computed, 0 to 1."""
        raise NotImplementedError

    def service_rates(self) -> dict[str, float]:
        """Rows per second of computing, over a long memory; actors that have served nothing are left out."""
        raise NotImplementedError

    def queue_waits(self, now: float) -> dict[str, float]:
        """The worst p99 queue wait of each expert actor in the last window, in seconds."""
        raise NotImplementedError

    def routers(self, now: float) -> dict[str, tuple[float, float, float]]:
        """Means of (running, waiting, kv_usage) of each router over the window."""
        raise NotImplementedError

    def idle_s(self, now: float) -> float:
        """Seconds since a row was last served (since the first report where none was)."""
        raise NotImplementedError

    def skew_observed(self, now: float) -> dict[int, float]:
        """Layer -> max/mean of the rows per second that each actor really served."""
        raise NotImplementedError


def skew(load: Mapping[ExpertId, float], placement: Placement) -> dict[int, float]:
    """Layer -> max/mean load of the actors that host an expert of it."""
    raise NotImplementedError

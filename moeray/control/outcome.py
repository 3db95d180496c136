"""What came of a simulated run: latencies against an SLO, and what the actors cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from moeray.control.simulate import Latencies
from moeray.control.trace import Trace

Floats = NDArray[np.float64]

ATTAINED = 0.99
"""The part of the requests that must meet the SLO: its limits are on the p99."""


@dataclass(frozen=True)
class Slo:
    """A request meets it with its first token within `ttft_s` of its arrival, and its other tokens at most `tpot_s`
    apart in the mean. A run meets it when 99 % of the requests do."""

    ttft_s: float
    tpot_s: float

    def met(self, latencies: Latencies, trace: Trace) -> NDArray[np.bool_]:
        """Of each request; one that has not finished does not meet it."""
        return (latencies.first_s <= self.ttft_s) & (tpot(latencies, trace) <= self.tpot_s)

    def attainment(self, latencies: Latencies, trace: Trace) -> float:
        return float(self.met(latencies, trace).mean())


def tpot(latencies: Latencies, trace: Trace) -> Floats:
    """Mean seconds between the tokens of each request after its first (0 where there is one only)."""
    return np.where(trace.output > 1, (latencies.last_s - latencies.first_s) / np.maximum(trace.output - 1, 1), 0.0)


@dataclass(frozen=True)
class Sample:
    """From `at_s` to the next sample: expert actors that cost money (starting, leaving and warm ones too), those that
    serve, their nodes, routers, replicas of all experts together; tokens per second that came and that were served."""

    at_s: float
    actors: int
    serving: int
    nodes: int
    routers: int
    replicas: int
    price_per_hour: float
    demand: float = 0.0
    served: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run. `curve` lasts until `end_s`."""

    name: str
    latencies: Latencies
    curve: tuple[Sample, ...]
    end_s: float
    attainment: float
    p99: Slo
    p50: Slo

    def hours(self, of: Callable[[Sample], float]) -> float:
        """The integral of one of the curve's numbers, in hours."""
        ends = [sample.at_s for sample in self.curve[1:]] + [self.end_s]
        return sum(of(s) * (end - s.at_s) for s, end in zip(self.curve, ends, strict=True)) / 3600

    @property
    def actor_hours(self) -> float:
        return self.hours(lambda sample: sample.actors)

    @property
    def reversals(self) -> int:
        """How often the number of actors turned from rising to falling or back."""
        moves = np.diff([sample.actors for sample in self.curve])
        signs = np.sign(moves[moves != 0])
        return int((signs[1:] != signs[:-1]).sum())

    def summary(self) -> dict[str, float]:
        """Plain numbers for a table or JSON."""
        return {
            "actor_hours": self.actor_hours,
            "node_hours": self.hours(lambda sample: sample.nodes),
            "router_hours": self.hours(lambda sample: sample.routers),
            "cost": self.hours(lambda sample: sample.price_per_hour),
            "actors_min": min(sample.actors for sample in self.curve),
            "actors_max": max(sample.actors for sample in self.curve),
            "reversals": self.reversals,
            "slo_attainment": self.attainment,
            "ttft_p50_s": self.p50.ttft_s,
            "ttft_p99_s": self.p99.ttft_s,
            "tpot_p50_s": self.p50.tpot_s,
            "tpot_p99_s": self.p99.tpot_s,
        }

    def rows(self) -> list[dict[str, float]]:
        """The curve for a CSV file."""
        return [asdict(sample) for sample in self.curve]


def outcome(
    name: str, trace: Trace, latencies: Latencies, curve: list[Sample], served: list[int], end_s: float, slo: Slo
) -> Outcome:
    """Put a run's measurements together. `served`: tokens that were done in all at the end of each sample's time."""
    each = tpot(latencies, trace)
    quantile = [Slo(*(float(np.quantile(v, q)) for v in (latencies.first_s, each))) for q in (0.5, 0.99)]
    edges = np.array([*(sample.at_s for sample in curve), max(end_s, curve[-1].at_s + 1e-9)])
    lengths = np.maximum(np.diff(edges), 1e-9)
    came = np.histogram(trace.arrival_s, edges, weights=(trace.prompt + trace.output).astype(np.float64))[0] / lengths
    done = np.diff([0, *served]) / lengths
    full = tuple(
        Sample(**asdict(s) | {"demand": float(c), "served": float(d)})
        for s, c, d in zip(curve, came, done, strict=True)
    )
    return Outcome(name, latencies, full, end_s, slo.attainment(latencies, trace), quantile[1], quantile[0])

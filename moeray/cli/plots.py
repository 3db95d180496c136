"""The curves of a simulation as PNG and CSV. matplotlib is an extra: `pip install moeray[plot]`."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from moeray.control.comparison import Comparison
from moeray.control.outcome import Outcome, tpot
from moeray.control.trace import Trace
from moeray.errors import MoerayError


def require_matplotlib(flag: str = "--plot") -> None:
    """Raises MoerayError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise MoerayError(f"{flag} needs matplotlib; install it with `pip install 'moeray[plot]'`")


def write_plots(result: Comparison, trace: Trace, folder: str | Path) -> None:
    """Write `simulation.png`, and for each run `NAME.csv` (its curve) and `NAME-requests.csv` (its latencies)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for outcome in result.outcomes:
        _write_curve(outcome, folder / f"{outcome.name}.csv")
        _write_requests(outcome, trace, folder / f"{outcome.name}-requests.csv")
    _write_png(result, trace, folder / "simulation.png")


def _write_curve(outcome: Outcome, path: Path) -> None:
    rows = outcome.rows()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_requests(outcome: Outcome, trace: Trace, path: Path) -> None:
    between = tpot(outcome.latencies, trace)
    columns = (
        trace.arrival_s,
        trace.prompt,
        trace.output,
        outcome.latencies.first_s,
        outcome.latencies.last_s,
        between,
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "prompt", "output", "first_token_s", "last_token_s", "between_tokens_s"))
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))


def _write_png(result: Comparison, trace: Trace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (demand, actors, replicas, latency) = pyplot.subplots(4, 1, sharex=True, figsize=(11, 12))
    edges = np.arange(int(trace.duration_s // 10) + 2) * 10.0
    came = np.histogram(trace.arrival_s, edges, weights=(trace.prompt + trace.output).astype(np.float64))[0] / 10
    demand.step(edges[:-1] / 60, came, where="post")
    demand.set_ylabel("tokens/s that come")
    for outcome in result.outcomes:
        minutes = [sample.at_s / 60 for sample in outcome.curve]
        actors.step(minutes, [sample.actors for sample in outcome.curve], where="post", label=outcome.name)
        replicas.step(minutes, [sample.replicas for sample in outcome.curve], where="post", label=outcome.name)
        at, p50, p99 = _by_minute(outcome, trace)
        (line,) = latency.plot(at, p99, label=f"{outcome.name} p99")
        latency.plot(at, p50, ":", color=line.get_color(), label=f"{outcome.name} p50")
    latency.axhline(result.slo.ttft_s, color="grey", linestyle="--", label="SLO")
    latency.set_yscale("log")
    actors.set_ylabel("expert actors")
    replicas.set_ylabel("replicas of all experts")
    latency.set_ylabel("first token, s")
    latency.set_xlabel("minutes")
    for axes in (actors, replicas, latency):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_minute(outcome: Outcome, trace: Trace) -> tuple[list[int], list[float], list[float]]:
    """(minutes with requests, p50 and p99 of the first token of those that came in each)."""
    minute = (trace.arrival_s // 60).astype(np.int64)
    present = [int(m) for m in np.unique(minute)]
    first = [outcome.latencies.first_s[minute == m] for m in present]
    return present, [float(np.quantile(f, 0.5)) for f in first], [float(np.quantile(f, 0.99)) for f in first]

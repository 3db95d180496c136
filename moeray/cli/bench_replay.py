"""`moeray bench replay [MODEL] --trace FILE`: a trace live, and the same simulated."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import NOT_NEGATIVE, POSITIVE, Finite, config_of, config_options
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.bench.replay import Replayed
    from moeray.cli.progress import Report
    from moeray.config import Config
    from moeray.control.outcome import Outcome
    from moeray.control.trace import Trace
    from moeray.control.world import World

_DEFAULTS = {
    "experts__max_actors": 4, "experts__num_cpus": 0.1, "experts__threads": 1, "router__num_cpus": 0.1,
    "serve__name": "moeray-replay", "engine__kv_blocks": 4096,
}  # fmt: skip


@click.command("replay")
@click.argument("model", required=False)
@click.option("--trace", "trace_file", required=True, help="Azure CSV or Mooncake JSON lines.")
@click.option("--costs", "costs_file", help="Of `moeray bench calibrate` for this model [default: measured first].")
@click.option("--from", "from_minute", type=NOT_NEGATIVE, default=0, show_default=True, help="Minute to begin.")
@click.option("--minutes", type=POSITIVE, default=5, show_default=True)
@click.option("--scale", type=POSITIVE, help="Requests per second, times this [default: so many that the routers "
              "compute for half of the time].")  # fmt: skip
@click.option("--shorten", type=Finite(1), default=1, show_default=True, help="Tokens, divided by this.")
@click.option("--local", is_flag=True, help="All actors in this process, without Ray.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, trace_file: str, costs_file: str | None, from_minute: float, minutes: float,
    scale: float | None, shorten: float, local: bool, output: str, config_file: str | None, **flags: Any,
) -> None:  # fmt: skip
    """Replay a part of a trace against a system of its own, and simulate the same with costs measured here.

    Costs are measured before the replay and after it, and what is between them counts: a machine that others use is not
    always as fast. Requests are cut to the model's context. The simulation knows this machine's number of cores. Exits
    1 when a request was lost.
    """
    from moeray.bench.checkpoint import write_small_moe
    from moeray.bench.sizing import fitting_scale
    from moeray.cli.bench_calibrate import calibrated
    from moeray.control.cost import load_costs, mean_costs
    from moeray.control.trace import read_trace

    trace = read_trace(trace_file).window(60 * from_minute, 60 * minutes).shortened(shorten)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        config = config_of(model or write_small_moe(Path(folder)), config_file, flags, **defaults)

        def measured(name: str) -> Path:
            path = Path(folder) / name
            path.write_text(json.dumps(calibrated(config, local, report=lambda what: report(what, 0, 1))))
            return path

        path = Path(costs_file) if costs_file else measured("before.json")
        world = _world(config, trace, path)  # before the replay: a file at fault is told at once
        scale = scale or fitting_scale(world)
        trace, live = asyncio.run(_live(config, trace.scaled(scale), local, report))
        began = world.costs
        ended = began if costs_file else load_costs(measured("after.json"))
    drift = 1.0 if costs_file else sum(ended.trunk_s) / sum(began.trunk_s)
    world = replace(world, trace=trace, costs=mean_costs(began, ended))
    result = {"scale": scale} | _tree(trace, live, _simulate(world), drift)
    if output == "json":
        click.echo(json.dumps(result))
    else:
        _print(result)
    if live.errors:
        raise SystemExit(1)


async def _live(config: Config, trace: Trace, local: bool, report: Report) -> tuple[Trace, Replayed]:
    """The trace as far as the model's context goes, and what came of it."""
    from moeray.bench.replay import replay
    from moeray.cli.session import apart, local_system, ray_system

    async with local_system(config) if local else ray_system(apart(config, "bench")) as backend:
        assert backend.model is not None
        trace = trace.clipped(backend.model.max_context)
        return trace, await replay(backend, trace, min(backend.model.vocab_size, 32000), report)


def _world(config: Config, trace: Trace, costs_file: Path) -> World:
    from moeray.control.cost import load_costs, load_model
    from moeray.control.popularity import PopularityModel
    from moeray.control.world import World

    costs = replace(load_costs(costs_file), cores=os.cpu_count() or 1)
    shape, expert_bytes = load_model(costs_file)
    return World(trace, config, costs, shape, PopularityModel("uniform", shape, 0), expert_bytes)


def _simulate(world: World) -> Outcome:
    from moeray.control.elastic import ElasticRun
    from moeray.control.outcome import Slo

    start = {name: group.actors for name, group in world.groups.items()}
    return ElasticRun(world, start).run(Slo(float("inf"), float("inf")), lambda now: None)


def _tree(trace: Trace, live: Replayed, simulated: Outcome, drift: float) -> dict[str, Any]:
    from moeray.bench.environment import surroundings

    figures: dict[str, tuple[float | None, float]] = {}
    for name, q, of in (("p50", 0.5, simulated.p50), ("p99", 0.99, simulated.p99)):
        seen = live.quantile(trace, q)
        figures[f"ttft_{name}_s"] = seen.ttft_s if seen else None, of.ttft_s
        figures[f"tpot_{name}_s"] = seen.tpot_s if seen else None, of.tpot_s
    hours = simulated.end_s / 3600
    figures["mean_actors"] = sum(live.actors) / max(1, len(live.actors)), simulated.actor_hours / hours
    figures["most_actors"] = max(live.actors, default=0), max(sample.actors for sample in simulated.curve)
    return {
        "requests": len(trace), "tokens": int(trace.prompt.sum() + trace.output.sum()), "duration_s": trace.duration_s,
        "calibration_drift_ratio": drift, "lost_requests": len(live.errors), "errors": sorted(set(live.errors))[:5],
        "figures": {
            key: {"live": seen, "simulated": said, "ratio": said / seen if seen else None}
            for key, (seen, said) in figures.items()
        },
    } | surroundings()  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    requests = f"{result['requests']} requests ({result['scale']:g} of the trace's)"
    title = f"{requests}, {result['tokens']} tokens in {result['duration_s']:.0f} s"
    table = Table("", title=title, title_justify="left")
    for column in ("live", "simulated", "ratio"):
        table.add_column(column, justify="right")
    for key, row in result["figures"].items():
        forms = (("live", ".4g"), ("simulated", ".4g"), ("ratio", ".2f"))
        table.add_row(key, *("-" if row[name] is None else format(row[name], form) for name, form in forms))
    console = Console()
    console.print(table)
    console.print(f"the trunk took {result['calibration_drift_ratio']:.2f} times as long after the replay as before it")
    for error in result["errors"]:
        console.print(f"lost: {error}", highlight=False)

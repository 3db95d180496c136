"""`moeray simulate`: what a trace would cost, with actors that follow the load."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import click

from moeray.cli.options import COUNT, NOT_NEGATIVE, POSITIVE, SEED, Finite
from moeray.cli.progress import progress
from moeray.config import Config, config_from, load_config
from moeray.control.comparison import Comparison, compare, routers_for
from moeray.control.cost import Costs, load_costs
from moeray.control.oracle import INTERVAL_S
from moeray.control.outcome import ATTAINED, Slo
from moeray.control.popularity import SKEWS, MoeShape, PopularityModel, Skew
from moeray.control.trace import Trace, read_trace
from moeray.control.world import World
from moeray.errors import SimulationError

DEFAULT_ACTORS = 256

CONTROL = {"policies": ("latency", "hot_experts"), "max_growth": 4.0, "interval_s": 1.0, "shrink_votes": 50}
"""Without --config: the other policies do not know the SLO that the run is judged by."""


@click.command("simulate")
@click.option("--trace", "trace_file", required=True, type=click.Path(), help="Azure 2023 CSV or Mooncake JSONL.")
@click.option("--config", "config_file", type=click.Path(), help="YAML as for `moeray serve`; the model is not read.")
@click.option("--costs", "costs_file", type=click.Path(), help="JSON of `moeray bench calibrate`.")
@click.option("--cores", type=COUNT, help="How many expert actors can compute at once [default: the costs', else all].")
@click.option("--layers", type=COUNT, default=24, show_default=True, help="MoE layers.")
@click.option("--experts", type=COUNT, default=32, show_default=True, help="Experts of a layer.")
@click.option("--top-k", type=COUNT, default=8, show_default=True, help="Experts of a token.")
@click.option("--expert-mib", type=Finite(0, 2**20), default=0, show_default=True, help="Memory of one expert.")
@click.option("--skew", type=click.Choice(SKEWS), default="uniform", show_default=True, help="Popularity of experts.")
@click.option("--max-actors", type=COUNT, help=f"Without --config: the most expert actors [default: {DEFAULT_ACTORS}].")
@click.option("--routers", type=COUNT, help="Constant number of routers [default: the config's, else what is needed].")
@click.option("--actors-per-node", type=COUNT, default=8, show_default=True)
@click.option("--slo", help="SECONDS,SECONDS: p99 of the first token and of the mean time between the others.")
@click.option("--slo-factor", type=Finite(0, 1e6, min_open=True), default=2, show_default=True,
              help="Without --slo: times the p99 that all actors would reach.")  # fmt: skip
@click.option("--scale", type=POSITIVE, default=1, show_default=True, help="Requests per second, times this.")
@click.option("--speed", type=Finite(1e-3, 1e6), default=1, show_default=True, help="The trace's clock, times this.")
@click.option("--from", "from_minute", type=NOT_NEGATIVE, default=0, show_default=True, help="Minute to begin.")
@click.option("--minutes", type=POSITIVE, help="How many minutes of the trace [default: all].")
@click.option("--oracle-interval", type=Finite(0.1), default=INTERVAL_S, show_default=True, help="Seconds.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--plot", "plot_dir", type=click.Path(), help="Folder for PNG and CSV files (with moeray[plot]).")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(trace_file: str, plot_dir: str | None, output: str, **flags: Any) -> None:
    """Replay a trace in a simulation of the live policies and placement, beside the best static placement.

    Without --config: one group of 1 to --max-actors actors that starts at the size of the best static placement, and as
    many routers as the busiest minute needs twice over. Costs without --costs are those of a small model on CPUs.

    Schedules of --config go by the trace's own dates (UTC); one without dates, such as Mooncake's, counts as begun on
    Monday, 2024-01-01 00:00.
    """
    if plot_dir is not None:
        from moeray.cli.plots import require_matplotlib

        require_matplotlib()
    trace = _trace(trace_file, flags)
    world = _world(trace, flags)
    with progress() as report:
        result = compare(
            world, _slo(flags["slo"]), slo_factor=flags["slo_factor"], warm_start=flags["config_file"] is None,
            interval_s=flags["oracle_interval"], seed=flags["seed"], report=report,
        )  # fmt: skip
    if plot_dir is not None:
        from moeray.cli.plots import write_plots

        write_plots(result, trace, plot_dir)
    if output == "json":
        click.echo(json.dumps(_tree(result, world)))
    else:
        _print(result, world)


def _trace(path: str, flags: dict[str, Any]) -> Trace:
    minutes = flags["minutes"]
    trace = read_trace(path)
    if flags["from_minute"] or minutes:
        trace = trace.window(60 * flags["from_minute"], None if minutes is None else 60 * minutes)
    if flags["scale"] != 1:
        trace = trace.scaled(flags["scale"])
    return trace.faster(flags["speed"])


def _world(trace: Trace, flags: dict[str, Any]) -> World:
    costs = load_costs(flags["costs_file"]) if flags["costs_file"] else Costs()
    if flags["cores"]:
        costs = replace(costs, cores=flags["cores"])
    if flags["top_k"] > flags["experts"]:
        raise click.BadParameter(f"a layer has only {flags['experts']} experts", param_hint="--top-k")
    shape = MoeShape(flags["layers"], flags["experts"], flags["top_k"])
    skew: Skew = flags["skew"]
    size = int(flags["expert_mib"] * 2**20)
    popularity = PopularityModel(skew, shape, flags["seed"])
    return World(trace, _config(trace, costs, shape, flags), costs, shape, popularity, size, flags["actors_per_node"])


def _config(trace: Trace, costs: Costs, shape: MoeShape, flags: dict[str, Any]) -> Config:
    if flags["config_file"]:
        if flags["max_actors"]:
            raise click.UsageError("--max-actors goes without --config; set experts.max_actors in the file")
        config = load_config(flags["config_file"])
        routers = flags["routers"]
    else:
        most = flags["max_actors"] or DEFAULT_ACTORS
        experts = {"actors": 1, "min_actors": 1, "max_actors": most}
        config = config_from({"experts": experts, "control": CONTROL})
        routers = flags["routers"] or routers_for(trace, config, costs, shape)
    if routers is None:
        return config
    return replace(config, router=replace(config.router, actors=routers, min_actors=routers, max_actors=routers))


def _slo(text: str | None) -> Slo | None:
    if text is None:
        return None
    try:
        ttft, tpot = (float(part) for part in text.split(","))
        if not (0 <= ttft < math.inf and 0 <= tpot < math.inf):
            raise ValueError
    except ValueError:
        raise SimulationError(f"--slo must be two numbers of seconds, 0 or more, such as 5,0.2; got {text!r}") from None
    return Slo(ttft, tpot)


def _tree(result: Comparison, world: World) -> dict[str, Any]:
    trace = world.trace
    return result.to_tree() | {
        "requests": len(trace),
        "duration_s": trace.duration_s,
        "tokens": int(trace.prompt.sum() + trace.output.sum()),
        "skew": world.popularity.skew,
        "routers": world.config.router.actors_span[1],
    }


_ROWS = (
    ("actor-hours", "actor_hours", "{:.2f}"), ("node-hours", "node_hours", "{:.2f}"),
    ("router-hours", "router_hours", "{:.2f}"), ("cost", "cost", "{:.2f}"),
    ("fewest actors", "actors_min", "{:.0f}"), ("most actors", "actors_max", "{:.0f}"),
    ("reversals", "reversals", "{:.0f}"), ("SLO attainment", "slo_attainment", "{:.2%}"),
    ("first token p50, s", "ttft_p50_s", "{:.3g}"), ("first token p99, s", "ttft_p99_s", "{:.3g}"),
    ("between tokens p50, s", "tpot_p50_s", "{:.3g}"), ("between tokens p99, s", "tpot_p99_s", "{:.3g}"),
)  # fmt: skip


def _print(result: Comparison, world: World) -> None:
    from rich.console import Console
    from rich.table import Table

    trace, shape = world.trace, world.shape
    title = (
        f"{trace.name}: {len(trace)} requests in {trace.duration_s / 60:.1f} min; {shape.layers} layers of "
        f"{shape.experts} experts, top-{shape.top_k}, {world.popularity.skew}; {world.config.router.actors_span[1]} "
        f"routers\nSLO, p99: first token within {result.slo.ttft_s:.3g} s, {result.slo.tpot_s:.3g} s between tokens"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("elastic", "best static", "oracle"):
        table.add_column(name, justify="right")
    summaries = [outcome.summary() for outcome in result.outcomes]
    for label, key, form in _ROWS:
        table.add_row(label, *(form.format(summary[key]) for summary in summaries))
    saved, oracle = result.saved(result.elastic), result.saved(result.oracle)
    table.add_row("actor-hours saved", f"{saved:.1%}", "", f"{oracle:.1%}")
    console = Console()
    console.print(table)
    if result.elastic.attainment < ATTAINED:
        console.print(
            f"the elastic system misses the SLO ({result.elastic.attainment:.1%} of the requests meet it, "
            f"{ATTAINED:.0%} should), so its savings are not at equal latency"
        )
    console.print(f"in proportion to tokens in and out, an oracle would save {result.token_bound:.1%}")

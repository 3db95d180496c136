"""`moeray bench grow [MODEL]`: add and remove an expert actor under load."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import COUNT, SECONDS, config_of, config_options
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.bench.grow import GrowPlan
    from moeray.cli.progress import Report
    from moeray.config import Config

_DEFAULTS = {
    "experts__actors": 1, "experts__max_actors": 2, "experts__num_cpus": 0.1, "router__num_cpus": 0.1,
    "router__threads": 1, "control__warm_pool": 1, "control__autoscale": False, "serve__name": "moeray-grow",
    "engine__kv_blocks": 1024,
}  # fmt: skip


@click.command("grow")
@click.argument("model", required=False)
@click.option("--streams", type=COUNT, default=16, show_default=True, help="Requests in flight.")
@click.option("--repeat", type=COUNT, default=5, show_default=True, help="Times up and down again.")
@click.option("--window", "window_s", type=SECONDS, default=5.0, show_default=True, help="Seconds before and after.")
@click.option("--max-tokens", type=COUNT, default=256, show_default=True, help="Tokens of a request.")
@click.option("--local", is_flag=True, help="All actors in this process, without Ray.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, local: bool, output: str, config_file: str | None, streams: int, repeat: int, window_s: float,
    max_tokens: int, **flags: Any,
) -> None:  # fmt: skip
    """Seconds until an added expert actor serves rows, and the throughput meanwhile.

    It starts a system of its own: MODEL, or a small random checkpoint, with a warm pool of one unless told otherwise.
    Each round adds an actor of the first group and removes it again. Exits 1 when a request was lost.

    A router and an expert actor of one thread each take turns, so that a machine of two cores has one for the actor
    that comes. Where there is none (--experts-actors 2 --experts-max-actors 3 --router-threads 2), growing takes the
    time of those that serve.
    """
    from moeray.bench.checkpoint import write_small_moe
    from moeray.bench.grow import GrowPlan

    with tempfile.TemporaryDirectory() as folder, progress() as report:
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        config = config_of(model or write_small_moe(Path(folder)), config_file, flags, **defaults)
        plan = GrowPlan(streams, repeat, window_s, max_tokens, group=config.experts.resolved()[0].name)
        result = asyncio.run(_run(config, plan, local, report))
    if output == "json":
        click.echo(json.dumps(result))
    else:
        _print(result)
    if result["lost_requests"]:
        raise SystemExit(1)


async def _run(config: Config, plan: GrowPlan, local: bool, report: Report) -> dict[str, Any]:
    from moeray.bench.grow import measure
    from moeray.cli.session import apart, local_system, ray_system

    async with local_system(config) if local else ray_system(apart(config, "bench")) as backend:
        assert backend.model is not None
        return await measure(backend, replace(plan, vocab=min(backend.model.vocab_size, 32000)), report)


_LINES = {
    "first_row_s": "from the call to the new actor's first row (s)",
    "grow_ratio": "tokens/s until then, over those before",
    "noise_ratio": "the same of a window as long before it, the lowest tenth",
    "lost_s": "decoding lost until then (s)",
    "settled_s": "until the warm pool is full again (s)",
    "settle_ratio": "tokens/s until then, over those before",
    "after_ratio": "tokens/s with one actor more, over those before",
    "shrink_s": "from the call until the actor has gone (s)",
    "shrink_ratio": "tokens/s until then, over those before",
    "before": "tokens/s before",
}


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = result["plan"]
    title = f"one more expert actor, and one less, under {plan['streams']} streams; {plan['repeat']} times"
    table = Table("", title=title, title_justify="left")
    for column in ("median", "worst"):
        table.add_column(column, justify="right")
    for key, text in _LINES.items():
        figure = result["figures"][key]
        digits = 3 if key in ("first_row_s", "lost_s") else 2
        table.add_row(text, f"{figure['median']:.{digits}f}", f"{figure['worst']:.{digits}f}")
    console = Console()
    console.print(table)
    console.print(f"{result['requests']} requests, {result['lost_requests']} lost", highlight=False)
    for error in result["errors"]:
        console.print(f"lost: {error}", highlight=False)
    console.print(
        f"on {result['environment']['cpu']}, {result['environment']['cores']} cores, load {result['load_average']:.1f}",
        highlight=False,
    )

"""`moeray bench skew`: a hot expert, and what the controller does about it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import COUNT, PART, POSITIVE, SECONDS, config_of, config_options
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.bench.skew import SkewPlan
    from moeray.config import Config

_DEFAULTS = {
    "experts__actors": 4, "experts__num_cpus": 0.1, "router__num_cpus": 0.1, "dtype": "float32",
    "serve__name": "moeray-skew", "engine__kv_blocks": 1024,
}  # fmt: skip


@click.command("skew")
@click.option("--local", is_flag=True, help="All actors in this process, without Ray.")
@click.option("--hot", type=PART, default=0.4, show_default=True, help="Part of the tokens that go to one expert.")
@click.option("--streams", type=COUNT, default=8, show_default=True, help="Requests in flight at any time.")
@click.option("--prompt-tokens", type=COUNT, default=192, show_default=True)
@click.option("--even-seconds", type=SECONDS, default=20.0, show_default=True, help="Even load first.")
@click.option("--quiet-minutes", type=POSITIVE, default=5.0, show_default=True, help="How long the load stays skewed.")
@click.option("--shrink-seconds", type=SECONDS, default=180.0, show_default=True, help="Longest wait for the shrink.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    local: bool, even_seconds: float, quiet_minutes: float, shrink_seconds: float, output: str,
    config_file: str | None, **flags: Any,
) -> None:  # fmt: skip
    """Seconds until a layer with a hot expert is even again, and whether replicas then come and go.

    A small random checkpoint is served whose gate sends some tokens of the prompts to one expert.
    """
    import torch

    from moeray.bench.checkpoint import write_random_moe
    from moeray.bench.skew import SHAPE, STEERING, SkewPlan

    chosen = {key: flags.pop(key) for key in ("hot", "streams", "prompt_tokens", "seed")}
    plan = SkewPlan(**chosen, even_s=even_seconds, quiet_s=60 * quiet_minutes, shrink_s=shrink_seconds)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        model = write_random_moe(SHAPE, Path(folder) / "steered-moe", torch.float32, steering=STEERING)
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        config = config_of(str(model), config_file, flags, **defaults)
        figures = asyncio.run(_run(config, plan, local, report))
    if output == "json":
        click.echo(json.dumps(figures))
    else:
        _print(figures)


async def _run(config: Config, plan: SkewPlan, local: bool, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    from moeray.bench.skew import SHAPE, measure
    from moeray.cli.session import apart, local_system, ray_system

    async with local_system(config) if local else ray_system(apart(config, "bench")) as system:
        return await measure(system, plan, SHAPE.vocab, report)


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    aim, minutes = figures["plan"]["aim"], figures["plan"]["quiet_s"] / 60
    lines = {
        "hot_part": "the hot expert's part of its layer's rows", "skew_before": "max/mean load per actor before",
        "skew_highest": "its highest under skewed load", "skew_last": "its last under skewed load",
        "even_again_seconds": f"below {aim:g} for good (s)", "replicas_given": "replicas of the hot expert",
        "reversals": f"reversals in {minutes:g} minutes of skewed load", "placements": "placements in that time",
        "shrunk_seconds": "replicas given back after (s)", "requests": "requests", "lost_requests": "lost requests",
        "load_average": "load average of the machine",
    }  # fmt: skip
    table = Table(title="a hot expert", title_justify="left", show_header=False)
    for key, text in lines.items():
        value = figures[key]
        table.add_row(text, "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)

"""`moeray bench grow`: scale up under load."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import config_of, config_options
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.bench.grow import GrowPlan
    from moeray.config import Config

_DEFAULTS = {
    "experts__actors": 2, "experts__max_actors": 3, "experts__num_cpus": 0.1, "router__num_cpus": 0.1,
    "control__warm_pool": 1, "control__autoscale": False, "dtype": "float32", "serve__name": "moeray-grow",
    "engine__kv_blocks": 1024,
}  # fmt: skip


@click.command("grow")
@click.argument("model", required=False)
@click.option("--local", is_flag=True, help="All actors in this process, without Ray.")
@click.option("--streams", type=int, default=16, show_default=True, help="Requests in flight at any time.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Tokens of a request.")
@click.option("--window-seconds", type=float, default=10.0, show_default=True, help="Over which a rate is measured.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, local: bool, window_seconds: float, output: str, config_file: str | None, **flags: Any
) -> None:
    """Seconds until an expert actor that is added under load serves its first row, and what decoding loses meanwhile.

    It starts a system of its own with a warm pool of one (a small random checkpoint where no MODEL is named), scales it
    up by one and back, and stops it. Exits 1 when a request was lost.
    """
    from moeray.bench.grow import GrowPlan

    chosen = {key: flags.pop(key) for key in ("streams", "max_tokens", "seed")}
    plan = GrowPlan(**chosen, window_s=window_seconds)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        config = config_of(model or _small_model(Path(folder)), config_file, flags, **defaults)
        figures = asyncio.run(_run(config, plan, local, report))
    if output == "json":
        click.echo(json.dumps(figures))
    else:
        _print(figures)
    if figures["lost_requests"]:
        raise SystemExit(1)


def _small_model(folder: Path) -> str:
    import torch

    from moeray.bench.checkpoint import Shape, write_random_moe

    shape = Shape(hidden=128, intermediate=192, experts=8, top_k=2, layers=4, vocab=512)
    return str(write_random_moe(shape, folder / "random-moe", torch.float32))


async def _run(config: Config, plan: GrowPlan, local: bool, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    from moeray.bench.grow import measure
    from moeray.cli.session import local_system, ray_system

    async with local_system(config) if local else ray_system(config) as system:
        assert system.model is not None
        return await measure(system, plan, min(system.model.vocab_size, 32000), report)


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rates = figures["tokens_per_second"]
    lines = {
        "from the command to the new actor's first row (s)": figures["first_row_seconds"],
        "tokens/s before": rates["before"], "tokens/s during": rates["during"], "tokens/s after": rates["after"],
        "during/before": figures["during_ratio"], "after/before": figures["after_ratio"],
        "from the command back to all as before (s)": figures["shrunk_seconds"],
        "requests": figures["requests"], "lost requests": figures["lost_requests"],
        "load average of the machine": figures["load_average"],
    }  # fmt: skip
    table = Table(title="one more expert actor under load", title_justify="left", show_header=False)
    for text, value in lines.items():
        table.add_row(text, "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)

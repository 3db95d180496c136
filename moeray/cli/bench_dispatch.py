"""`moeray bench dispatch`: what a layer's dispatch costs."""

from __future__ import annotations

import json
from typing import Any

import click

from moeray.cli.options import COUNT, listed


@click.command("dispatch")
@click.option(
    "--tokens", type=listed(COUNT), default="1,32,512", show_default=True, help="Tokens of a step, with commas between."
)
@click.option("--hidden", type=COUNT, default=1024, show_default=True)
@click.option("--intermediate", type=COUNT, default=512, show_default=True)
@click.option("--experts", type=COUNT, default=32, show_default=True)
@click.option("--top-k", type=COUNT, default=8, show_default=True)
@click.option("--layers", type=COUNT, default=2, show_default=True)
@click.option("--actors", type=COUNT, default=2, show_default=True)
@click.option("--repeat", type=COUNT, default=30, show_default=True, help="Layers per figure; the median is shown.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(tokens: tuple[int, ...], output: str, **shape: int) -> None:
    """Microseconds per layer: the same experts in process, over the unix channel, over TCP and over gRPC.

    The expert actors are processes of their own; the in-process figure uses the same number of threads in all.
    """
    from moeray.threads import wait_passively

    wait_passively()
    from moeray.bench.checkpoint import Shape
    from moeray.bench.dispatch import measure

    repeat, actors = shape.pop("repeat"), shape.pop("actors")
    result = measure(Shape(**shape), actors, tokens, repeat)
    if output == "json":
        click.echo(json.dumps(result))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moeray.dispatch.hops import KINDS

    shape = result["shape"]
    title = (
        f"one MoE layer, {shape['experts']} experts, top-{shape['top_k']}, {shape['hidden']}x{shape['intermediate']}, "
        f"bf16, {shape['actors']} expert actors; median µs of {result['repeat']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "in process", "unix", "of it experts", "TCP", "of it experts", "gRPC", "of it experts"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["tokens"]), f"{row['in_process_us']:.0f}",
            *(f"{row[f'{hop}_{part}']:.0f}" for hop in KINDS for part in ("us", "compute_us")),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"on {result['environment']['cpu']}, {result['environment']['cores']} cores")

"""`moeray bench metrics`: what counting costs of a decode step."""

from __future__ import annotations

import json

import click

from moeray.cli.options import COUNT, POSITIVE


@click.command("metrics")
@click.option("--layers", type=COUNT, default=24, show_default=True, help="MoE layers.")
@click.option("--actors", type=COUNT, default=2, show_default=True, help="Expert actors that each layer asks.")
@click.option("--streams", type=COUNT, default=1, show_default=True, help="Sequences that decode together.")
@click.option(
    "--active-gb", type=POSITIVE, default=0.8, show_default=True, help="10^9 bytes of weights that a step reads."
)
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(layers: int, actors: int, streams: int, active_gb: float, output: str) -> None:
    """All that a step records, against the least time that it can take: reading its weights once from memory."""
    from moeray.bench.metrics import Load, measure

    result = measure(Load(layers, actors, streams, round(active_gb * 1e9)))
    if output == "json":
        click.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"metrics of a decode step: {layers} layers, {actors} expert actors, {streams} streams")
    for column in ("a router's step", "a forward's", "a report, each second", "least step", "counting is"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{1e6 * result['router_step_s']:.0f} µs", f"{1e6 * result['expert_forward_s']:.1f} µs",
        f"{1e6 * result['report_s']:.0f} µs", f"{1e3 * result['least_step_s']:.1f} ms", f"{100 * result['part']:.2f} %",
    )  # fmt: skip
    Console().print(table)

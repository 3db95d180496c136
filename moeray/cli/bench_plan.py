"""`moeray bench plan`: how long the controller thinks."""

from __future__ import annotations

import json
from typing import Any

import click

from moeray.cli.options import COUNT, NOT_NEGATIVE, POSITIVE, SEED


@click.command("plan")
@click.option("--layers", type=COUNT, default=61, show_default=True)
@click.option("--experts", type=COUNT, default=256, show_default=True, help="Experts of a layer.")
@click.option("--actors", type=COUNT, default=1000, show_default=True)
@click.option(
    "--spares",
    type=NOT_NEGATIVE,
    default=0.05,
    show_default=True,
    help="Hot experts' replicas, part of all.",
)
@click.option("--fast", type=POSITIVE, default=1.0, show_default=True, help="How fast every second actor is.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--repeat", type=COUNT, default=5, show_default=True, help="Runs per figure; the median is shown.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(repeat: int, output: str, **sizes: Any) -> None:
    """Milliseconds to choose replicas, place all experts and plan the change, for several changes of the load."""
    from moeray.bench.plan import Problem, measure

    result = measure(Problem(**sizes), repeat)
    if output == "json":
        click.echo(json.dumps(result))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    problem = result["problem"]
    title = (
        f"{problem['layers']} layers of {problem['experts']} experts over {problem['actors']} actors; "
        f"median ms of {result['repeat']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("change", "ms", "of it CPU", "replicas moved"):
        table.add_column(column, justify="left" if column == "change" else "right")
    for row in result["rows"]:
        table.add_row(row["change"], f"{row['milliseconds']:.0f}", f"{row['cpu_milliseconds']:.0f}", str(row["moves"]))
    console = Console()
    console.print(table)
    console.print(f"on {result['environment']['cpu']}, load average {result['load_average']:.1f}")

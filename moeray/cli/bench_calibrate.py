"""`moeray bench calibrate`: the costs that `moeray simulate` reckons with, measured here."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("calibrate")
@click.argument("model", required=False)
@click.option("--out", type=click.Path(dir_okay=False), help="Write the cost file here, for `moeray simulate --costs`.")
@click.option("--actors", type=click.IntRange(1), default=2, show_default=True, help="Expert actors for the hops.")
@click.option("--repeat", type=click.IntRange(1), default=7, show_default=True, help="Times each point is measured.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(model: str | None, out: str | None, actors: int, repeat: int, output: str) -> None:
    """Measure what `moeray simulate` reckons with: trunk, experts, hops, and how long an actor takes to start.

    MODEL is a local folder or a hub id; without one, a small random model is measured. An actor's start is that of a
    forked process that opens the model; what Ray needs to schedule it comes on top, about a second.
    """
    from moeray.bench.calibrate import calibrate

    result = calibrate(model, actors=actors, repeat=repeat, report=lambda what: click.echo(f"{what} ...", err=True))
    text = json.dumps(result, indent=2)
    if out is not None:
        Path(out).write_text(text + "\n")
    if output == "json":
        click.echo(json.dumps(result))
        return
    for key, value in result["costs"].items():
        shown = ", ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.4g}"
        click.echo(f"{key:<13} {shown}")
    click.echo(f"on {result['environment']['cpu']}, {result['environment']['cores']} cores")

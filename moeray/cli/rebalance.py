"""`moeray rebalance`: balance the placement by the load of this moment."""

from __future__ import annotations

import json

import click

from moeray.cli.options import system_options


@click.command("rebalance")
@system_options
def command(name: str, address: str | None, output: str) -> None:
    """Move experts so that the actors' load is even, whatever the skew is."""
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    begun = ask(attach(name, address), "rebalance")
    if output == "json":
        click.echo(json.dumps({"begun": begun}))
    else:
        click.echo("rebalancing" if begun else "nothing to move")

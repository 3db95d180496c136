"""`moeray plan`: what the controller would do now, and why. Nothing is changed."""

from __future__ import annotations

import json
from typing import Any

import click

from moeray.cli.options import system_options


@click.command("plan")
@system_options
def command(name: str, address: str | None, output: str) -> None:
    """Show what would be scaled and moved at this moment, with the reasons (a dry run)."""
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    plan = ask(attach(name, address), "plan")
    if output == "json":
        click.echo(json.dumps(plan))
    else:
        _print(plan)


def _print(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    wish = plan["wish"]
    table = Table(title="actors", title_justify="left")
    for column in ("group", "wanted now", "policies want"):
        table.add_column(column)
    for group, count in plan["now"].items():
        wanted = wish["routers"] if group == "router" else wish["actors"].get(group)
        table.add_row(group, str(count), str(count if wanted is None else wanted))
    console.print(table)
    if not plan["autoscaling"]:
        console.print("autoscaling is paused: the policies' wish is not followed")
    console.print(f"a shrink needs {plan['shrink_votes']} decisions in a row that want less", highlight=False)
    for reason in wish["reasons"]:
        console.print(f"- {reason}", highlight=False)
    for layer, expert, count in wish["replicas"]:
        console.print(f"- expert {expert} of layer {layer}: {count} replicas", highlight=False)
    _print_moves(console, plan["placement"])


def _print_moves(console: Any, placement: dict[str, Any] | None) -> None:
    if placement is None:
        console.print("no expert would be moved")
        return
    console.print(f"{placement['kind']}: {placement['moves']} experts would be moved, since {placement['why']}")
    for verb, change in (("host", placement["host"]), ("drop", placement["drop"])):
        for actor, experts in change.items():
            names = ", ".join(f"({layer}, {expert})" for layer, expert in experts[:8])
            more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
            console.print(f"  {actor} would {verb} {names}{more}", highlight=False)

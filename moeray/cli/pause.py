"""`moeray pause-autoscaling` and `moeray resume-autoscaling`."""

from __future__ import annotations

import json

import click

from moeray.cli.options import system_options


@click.command("pause-autoscaling")
@system_options
def pause(name: str, address: str | None, output: str) -> None:
    """Keep the numbers of actors and replicas as they are. Repair and manual commands go on."""
    _set(True, name, address, output)


@click.command("resume-autoscaling")
@system_options
def resume(name: str, address: str | None, output: str) -> None:
    """Let the policies scale again."""
    _set(False, name, address, output)


def _set(paused: bool, name: str, address: str | None, output: str) -> None:
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    ask(attach(name, address), "pause", paused)
    if output == "json":
        click.echo(json.dumps({"autoscaling": not paused}))
    else:
        click.echo("autoscaling is paused" if paused else "autoscaling goes on")

"""`moeray scale GROUP=N ...`: set how many actors a group has."""

from __future__ import annotations

import json

import click

from moeray.cli.options import system_options
from moeray.errors import ConfigError


@click.command("scale")
@click.argument("sizes", nargs=-1, required=True, metavar="GROUP=N...")
@system_options
def command(sizes: tuple[str, ...], name: str, address: str | None, output: str) -> None:
    """Set the number of actors of expert groups, or of the routers (`router=2`), within their limits.

    All are set or, where one cannot be, none. Autoscaling goes on from there; `moeray pause-autoscaling` makes the
    number stay.
    """
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    asked = dict(map(_parse, sizes))
    wanted = ask(attach(name, address), "scale", asked)
    if output == "json":
        click.echo(json.dumps({"wanted": wanted}))
    else:
        click.echo("wanted: " + ", ".join(f"{group}={count}" for group, count in wanted.items()))


def _parse(size: str) -> tuple[str, int]:
    group, _, count = size.partition("=")
    if not group or not count.isdecimal():
        raise ConfigError(f"{size!r} is not of the form GROUP=N, such as experts=4")
    return group, int(count)

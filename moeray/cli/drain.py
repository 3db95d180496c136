"""`moeray drain ACTOR`: move an actor's work elsewhere and stop it."""

from __future__ import annotations

import json

import click

from moeray.cli.options import system_options
from moeray.errors import ConfigError


@click.command("drain")
@click.argument("actors", nargs=-1)
@click.option("--node", help="Every actor of this node (its Ray node id, or the beginning of it).")
@click.option("--within", type=float, help="Seconds until it must be gone, such as a spot notice gives.")
@system_options
def command(
    actors: tuple[str, ...], node: str | None, within: float | None, name: str, address: str | None, output: str
) -> None:
    """Empty ACTORS (names as `moeray status` shows them) and stop them; others are started in their place.

    What a node-termination handler calls when the cloud takes a machine back: `moeray drain --node ID --within 110`.
    """
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    if not actors and not node:
        raise ConfigError("name the actors to drain, or a node with --node; `moeray status` lists them")
    controller = attach(name, address)
    chosen = list(actors)
    if node:
        rows = ask(controller, "status")["actors"]
        chosen += [row["actor"] for row in rows if row["node"].startswith(node)]
        if not chosen:
            raise ConfigError(f"no actor runs on node {node!r}; `moeray status` shows the nodes")
    for actor in chosen:
        ask(controller, "drain", actor, within)
    click.echo(json.dumps({"draining": chosen}) if output == "json" else f"draining {', '.join(chosen)}")

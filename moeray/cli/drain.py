"""`moeray drain ACTOR`: move an actor's work elsewhere and stop it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from moeray.cli.options import SECONDS_LEFT, UnfinishedError, system_options
from moeray.errors import ConfigError, MoerayError


@click.command("drain")
@click.argument("actors", nargs=-1)
@click.option("--node", help="Every actor of this node (its Ray node id, or the beginning of it).")
@click.option("--here", is_flag=True, help="Every actor of the node that this command runs on.")
@click.option("--within", type=SECONDS_LEFT, help="Seconds until it must be gone, such as a spot notice gives.")
@click.option("--wait", is_flag=True, help="With --within: return when the node is empty, or the time is over.")
@system_options
def command(
    actors: tuple[str, ...], node: str | None, here: bool, within: float | None, wait: bool, name: str,
    address: str | None, output: str,
) -> None:  # fmt: skip
    """Empty ACTORS (names as `moeray status` shows them) and stop them; others are started in their place. All leave
    or, where a name is not there, none.

    A node with --within is one that will be gone by then: Ray starts nothing there any more, and Serve's replicas move
    too. What a node-termination handler calls is `moeray drain --node ID --within 110`, and the preStop hook of a pod
    `moeray drain --here --within 110 --wait`.
    """
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask
    from moeray.cluster.ray_drain import find_node, leave_node, this_node, wait_empty

    if not (actors or node or here):
        raise ConfigError("name the actors to drain, or a node with --node or --here; `moeray status` lists them")
    if wait and (within is None or actors):
        raise ConfigError("--wait goes with --within and a node")
    controller = attach(name, address)
    nodes = [find_node(node)] if node else [this_node()] if here else []
    if nodes:
        check_told(ask(controller, "status"), actors)
    if within is not None:
        for leaving in nodes:
            leave_node(leaving, within)
    chosen = ask(controller, "drain", actors, within, nodes)
    empty = wait and within is not None and all(wait_empty(leaving, within) for leaving in nodes)
    told = {"draining": chosen, **({"empty": empty} if wait else {})}
    if wait and not empty:
        late = f"the node is not empty after {within:g} s; what it had in flight goes on elsewhere"
        raise UnfinishedError(late, told)
    if output == "json":
        click.echo(json.dumps(told))
    else:
        click.echo(f"draining {', '.join(chosen) or 'nothing: no actor runs there'}")


def check_told(status: Mapping[str, Any], actors: Sequence[str]) -> None:
    """Raises MoerayError where the controller would, but before Ray is told that a node goes: for a name that is not
    there, and for a system of which it may not be known yet who runs there."""
    from moeray.actors.departures import check_known

    if status["status"] != "ready":
        raise MoerayError(f"the system is {status['status']} ({status['detail']}); try again when it is ready")
    check_known(actors, [row["actor"] for row in status["actors"]])

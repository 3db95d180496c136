"""`moeray status`: the running system as a table."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from moeray.cli.options import system_options

RATE_WINDOW_S = 1.0


@click.command("status")
@system_options
def command(name: str, address: str | None, output: str) -> None:
    """Show the running system: its actors, what they host and how busy they are."""
    from moeray.cli.session import attach
    from moeray.cluster.ray import ask

    controller = attach(name, address)
    ask(controller, "status")  # rates are the difference of two readings
    time.sleep(RATE_WINDOW_S)
    status = ask(controller, "status")
    if output == "json":
        click.echo(json.dumps(status))
    else:
        print_status(status)


def print_status(status: dict[str, Any]) -> None:
    """Print the system's status as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{status['model']}: {status['status']}, epoch {status['epoch']}", title_justify="left")
    for column in ("actor", "device", "node", "pid", "state"):
        table.add_column(column)
    for column in ("experts", "rows/s", "queue", "epoch"):
        table.add_column(column, justify="right")
    for row in status["actors"]:
        experts = str(row["experts"]) if row["kind"] == "expert" else ""
        rate = f"{row['rows_per_s']:.0f}" if row["kind"] == "expert" else ""
        table.add_row(
            row["actor"], row["device"], row["node"][:8], str(row["pid"]), row["state"], experts, rate,
            str(row["queue"]), str(row.get("epoch", status["epoch"])),
        )  # fmt: skip
    console = Console()
    console.print(table)
    for line in _standing(status):
        console.print(line, highlight=False)


def _standing(status: dict[str, Any]) -> list[str]:
    """What is wanted beside what is there, and the newest decisions."""
    if "wanted" not in status:
        return []
    reserve = status["reserve"]
    sizes = [
        "{} {}/{} ({} to {})".format(
            group, status["ready"][group], count + reserve.get(group, 0), *status["limits"][group]
        )
        for group, count in status["wanted"].items()
    ]
    skew = max(status["skew"].values(), default=1.0)
    lines = [
        f"ready/wanted (limits): {', '.join(sizes)}; {status['replicas']} replicas, "
        f"{status['without_replica']} experts without one; worst layer's max/mean {skew:.2f}; "
        f"autoscaling {'on' if status['autoscaling'] else 'paused'}"
    ]
    for entry in status["decisions"][-5:]:
        what = {key: value for key, value in entry.items() if key not in ("at", "event", "inputs")}
        when = time.strftime("%H:%M:%S", time.localtime(entry["at"]))
        lines.append(f"{when} {entry['event']}: " + ", ".join(f"{key}={value}" for key, value in what.items()))
    return lines
